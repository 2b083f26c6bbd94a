"""TorchServe's configuration: every key exists, every line has its reason, the container's differs as it says."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from deploy_files import DEPLOY, load

pytest.importorskip("ts")
from elude_runtime.cli.server_settings import read_properties

HOST, CONTAINER = DEPLOY / "config.properties", DEPLOY / "container" / "config.properties"
TORCHSERVE = Path(str(importlib.util.find_spec("ts").origin)).parent  # type: ignore[union-attr]


def java_words(class_name: str) -> bytes:
    """The constants of one of TorchServe's classes, among them every key that it reads."""
    (jar,) = (TORCHSERVE / "frontend").glob("*.jar")
    with zipfile.ZipFile(jar) as content:
        return content.read(f"org/pytorch/serve/{class_name}.class")


@pytest.mark.parametrize("file", [HOST, CONTAINER])
def test_torchserve_knows_every_key(file: Path) -> None:
    """It says nothing about one that it does not know."""
    words = java_words("util/ConfigManager") + (TORCHSERVE / "model_server.py").read_bytes()
    assert [key for key in read_properties(file) if key.encode() not in words] == []
    assert b"job_queue_sise" not in words  # the check can fail


def test_torchserve_knows_every_key_of_a_model() -> None:
    words = java_words("archive/model/ModelConfig")
    assert [key for key in load(DEPLOY / "model-config.yaml") if key != "elude" and key.encode() not in words] == []


@pytest.mark.parametrize("file", [HOST, CONTAINER, DEPLOY / "model-config.yaml"])
def test_every_setting_has_a_reason_before_it(file: Path) -> None:
    """A comment, or another setting of which the comment speaks too."""
    before = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert before, f"{line} in {file.name} has no comment before it"
        before = line.strip()


def test_every_metric_that_torchserve_does_not_have_by_itself_has_a_reason() -> None:
    """What our file adds to TorchServe's own stands in a paragraph with a comment above it."""
    text = (DEPLOY / "metrics.yaml").read_text(encoding="utf-8")
    ours, own = yaml.safe_load(text), load(TORCHSERVE / "configs" / "metrics.yaml")
    for side in ("ts_metrics", "model_metrics"):
        for kind, metrics in (ours.get(side) or {}).items():
            known = [metric["name"] for metric in own[side].get(kind) or []]
            for name in {metric["name"] for metric in metrics} - set(known):
                paragraph = re.split(rf"^ +- name: {name}$", text, flags=re.MULTILINE)[0].split("\n\n")[-1]
                assert "#" in paragraph, f"{name} has no comment before it"


def test_a_container_differs_from_a_host_only_where_it_says_so() -> None:
    host, container = read_properties(HOST), read_properties(CONTAINER)
    changed = {key for key in host.keys() | container.keys() if host.get(key) != container.get(key)}
    assert changed == {
        "inference_address", "metrics_address", "job_queue_size", "vmargs",
        # `elude serve` chooses free ones where a file names none; keys are off in a container
        "grpc_inference_port", "grpc_management_port", "token_expiration_min",
    }  # fmt: skip
    assert container["inference_address"] == "http://0.0.0.0:8080"
    assert container["management_address"] == host["management_address"] == "http://127.0.0.1:8081"
    assert container["metrics_address"] == "http://0.0.0.0:8082"
    assert {container["grpc_inference_address"], container["grpc_management_address"]} == {"127.0.0.1"}


def test_a_full_queue_fits_into_javas_heap() -> None:
    """And the batch on its way to the worker, in the container that the manifests ask for; and all of Java leaves the
    worker the gigabyte that it takes."""
    main = load(DEPLOY / "kubernetes" / "base" / "deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    limit = int(main["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
    settings = read_properties(CONTAINER)
    heap = limit * int(re.findall(r"MaxRAMPercentage=(\d+)", settings["vmargs"])[0]) / 100
    waiting = int(settings["job_queue_size"]) + load(DEPLOY / "model-config.yaml")["batchSize"]
    assert waiting * int(settings["max_request_size"]) < heap
    assert limit - 2 * heap - 0.25e9 > 1.1e9  # twice: outside of the heap it may take as much again
