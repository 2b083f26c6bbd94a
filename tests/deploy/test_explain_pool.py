"""One archive registered twice, with the container's settings: explanations never queue before predictions."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_archive import demo_archive
from deploy_files import DEPLOY, check_call, load

pytest.importorskip("ts")
from elude_runtime.cli.server_settings import free_ports
from elude_runtime.cli.torchserve import Server

pytestmark = pytest.mark.server
LONG = 5.0
"""Seconds of work of an explanation, where a prediction takes milliseconds; far below every limit of time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration network's archive in `store`, and its pictures."""
    folder = tmp_path_factory.mktemp("pool")
    demo_archive(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """The models of the component's command; ports of its own, so that it can run anywhere."""
    component = load(DEPLOY / "kubernetes" / "explain-pool" / "deployment.yaml")
    models = check_call(component["spec"]["template"]["spec"]["containers"][0]["args"])["models"]
    for file in ("container/config.properties", "metrics.yaml"):  # in the image the two lie side by side
        shutil.copy(DEPLOY / file, folder)
    inference, management, metrics = free_ports(3)
    environment = {"ELUDE_THREADS": "1", "OMP_NUM_THREADS": "1", "ELUDE_METRICS_DIR": str(folder / "metrics")}
    limits = ("ELUDE_MAX_STEPS", "ELUDE_MAX_WORK", "ELUDE_MAX_BATCH_WORK")
    environment |= dict.fromkeys(limits, "1000000")  # a small network needs many steps to take long
    with Server(
        folder / "store", models, config=folder / "config.properties", inference_port=inference,
        management_port=management, metrics_port=metrics, token_auth=False, environment=environment,
    ) as running:  # fmt: skip
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def picture(folder: Path) -> str:
    return base64.b64encode(next((folder / "images").rglob("*.png")).read_bytes()).decode()


def post(server: Server, path: str, document: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/{path}", json=document, timeout=60)


def test_both_registrations_answer_alike(server: Server, picture: str) -> None:
    """Whole documents, but for what names the request and the registration."""
    assert server.names == ["demo", "demo-explain"]
    for verb in ("predictions", "explanations"):
        documents = []
        for name in server.names:
            reply = post(server, f"{verb}/{name}", {"image": {"b64": picture}})
            assert reply.status_code == 200, reply.text
            document = {key: value for key, value in reply.json().items() if key not in ("id", "timing_ms")}
            assert document["model"].pop("name") == name
            documents.append(document)
        assert documents[0] == documents[1] and documents[0]["predictions"]
        assert bool(documents[0]["explanations"]) == (verb == "explanations")


def test_a_prediction_does_not_wait_for_an_explanation_that_came_before_it(server: Server, picture: str) -> None:
    """By the order of the answers: a prediction overtakes an explanation in the pool, and none in its own queue."""

    def explanation_of(steps: int) -> dict[str, Any]:
        return {"image": {"b64": picture}, "explain": {"method": "integrated_gradients", "steps": steps}}

    begin = time.monotonic()
    assert post(server, "explanations/demo-explain", explanation_of(100)).status_code == 200
    long = explanation_of(int(100 * LONG / (time.monotonic() - begin)))

    def overtakes(name: str) -> bool:
        with ThreadPoolExecutor(1) as pool:
            explanation = pool.submit(post, server, f"explanations/{name}", long)
            time.sleep(0.5)  # the worker is at it
            assert not explanation.done(), explanation.result().text
            assert post(server, "predictions/demo", {"image": {"b64": picture}}).status_code == 200
            first = bool(wait([explanation], timeout=0.5).not_done)  # this process's own threads need a moment
            assert explanation.result().status_code == 200
            return first

    assert overtakes("demo-explain") and not overtakes("demo")
