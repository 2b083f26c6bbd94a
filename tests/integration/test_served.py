"""The real networks through the real server: what a client receives against the base model, digit for digit."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.model_options import ModelOptions
from elude_runtime.cli.torchserve import Server
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.rewrite import rewrite_checkpoint
from elude_runtime.partition import SplitConfig

SHARED = Path(os.environ.get("ELUDE_SHARED", Path(__file__).parents[2].parent / "shared"))
NETWORKS = ("deit_tiny_3bit", "mobilenetv2_100")
IMAGES = 40
BATCH = 4

pytestmark = [
    pytest.mark.server,
    pytest.mark.networks,
    pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason=f"no real networks at {SHARED}; set ELUDE_SHARED"),
]


@dataclass(frozen=True)
class Served:
    """A network behind the server, its base model built without our loader, and the same engine in this process."""

    url: str
    base: nn.Module
    transform: Any
    engine: Engine
    layer: str

    def post(self, document: dict[str, Any], file: Path, verb: str = "predictions") -> httpx.Response:
        image = {"b64": base64.b64encode(file.read_bytes()).decode()}
        return httpx.post(f"{self.url}/{verb}/{self.engine.info.name}", json={"image": image, **document}, timeout=60)

    def expected(self, files: list[Path]) -> np.ndarray:
        """The base model's logits [B, K] for a batch of these files, by timm's own transform."""
        inputs = torch.stack([self.transform(Image.open(f).convert("RGB")) for f in files])
        with torch.no_grad():
            return self.base(inputs).numpy()


def _base(name: str) -> nn.Module:
    if name == "mobilenetv2_100":
        model = timm.create_model(name)
        model.load_state_dict(load_file(SHARED / "weights" / f"{name}.safetensors"))
        return model.eval()
    return ModelOptions(None, weights=SHARED / "weights" / f"{name}.safetensors", factory=_factory()).build().model


def _factory() -> str:
    return f"{SHARED / 'weights' / 'reference_models.py'}:deit_tiny_3bit"


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return sorted((SHARED / "data" / "imagenet").glob("*.jpg"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> Iterator[dict[str, Served]]:
    """Both networks rewritten, archived and behind one TorchServe, with as many threads as this process."""
    folder = tmp_path_factory.mktemp("served")
    settings = folder / "model-config.yaml"
    settings.write_text(
        f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {BATCH}\nmaxBatchDelay: 1500\nresponseTimeout: 120\n"
    )
    configs = json.loads((SHARED / "weights" / "data_configs.json").read_text())
    for name in NETWORKS:
        weights = SHARED / "weights" / f"{name}.safetensors"
        deit = name.startswith("deit")
        options = ModelOptions(None if deit else name, weights=weights, factory=_factory() if deit else None)
        rewrite_checkpoint(
            options.build(), files[:: len(files) // IMAGES][:IMAGES], folder / name, SplitConfig(tokens=100),
            concepts=24, data_config=DataConfig.parse(configs[name]),
        )  # fmt: skip
        build_archive(folder / name, folder / "store", name=name, config=settings)
    threads = torch.get_num_threads()
    environment = {"ELUDE_THREADS": str(threads), "ELUDE_TRUST_FACTORY": "true"}
    with Server(folder / "store", token_auth=False, environment=environment) as server:
        server.wait_ready(240)
        made = {}
        for name in NETWORKS:
            engine = Engine.open(folder / name, ServingConfig(trust_factory=True), name=name, version="1.0")
            transform = timm.data.create_transform(**configs[name] | {"input_size": tuple(configs[name]["input_size"])})
            made[name] = Served(server.url, _base(name), transform, engine, engine.model.layers[0])
        yield made


@pytest.mark.parametrize("name", NETWORKS)
class TestServed:
    def test_every_logit_alone(self, served: dict[str, Served], files: list[Path], name: str) -> None:
        one = served[name]
        for file in files[3:400:130]:
            reply = one.post({"top_k": 1000}, file).json()
            assert reply["batch_size"] == 1
            _assert_logits(reply, one.expected([file])[0])

    def test_every_logit_in_a_batch(self, served: dict[str, Served], files: list[Path], name: str) -> None:
        """One batch mixes a plain, an explained and a steered row; every row's default logits are the base model's."""
        one = served[name]
        four = files[7:400:100][:BATCH]
        edit = {"feature": f"{one.layer}/P0", "mode": "ablate"}
        documents = [{}, {"explain": {}}, {"steer": {"edits": [edit]}}, {}]
        with ThreadPoolExecutor(BATCH) as pool:
            ask = lambda pair: one.post({"top_k": 1000, **pair[0]}, pair[1]).json()  # noqa: E731
            replies = list(pool.map(ask, zip(documents, four, strict=True)))
        assert [r["batch_size"] for r in replies] == [BATCH] * BATCH
        # the order of arrival is the server's; some order of the four gives every digit of every row
        for order in itertools.permutations(range(BATCH)):
            expected = one.expected([four[i] for i in order])
            if all(_equal(replies[i], expected[place]) for place, i in enumerate(order)):
                return
        pytest.fail("no order of the batch gives the base model's logits")

    @pytest.mark.parametrize("document", [{"explain": {"method": m}} for m in ("gradient", "ablation", "auto")])
    def test_explanations(self, served: dict[str, Served], files: list[Path], name: str, document: dict) -> None:
        _assert_same_as_in_process(served[name], document, files[11])

    def test_sub_units_and_heatmaps(self, served: dict[str, Served], files: list[Path], name: str) -> None:
        document = {"explain": {"level": "subunits", "top_features": 5, "heatmaps": "values", "targets": [{"top": 2}]}}
        _assert_same_as_in_process(served[name], document, files[12])

    def test_steering(self, served: dict[str, Served], files: list[Path], name: str) -> None:
        one = served[name]
        edits = [{"feature": f"{one.layer}/P1", "mode": "scale", "value": -2.0}]
        reply = _assert_same_as_in_process(one, {"steer": {"edits": edits}}, files[13])
        assert reply["answer"]["source"] == "steered"
        assert any(c["change"] != 0 for c in reply["steered"]["changes"])

    def test_raw_bytes_and_the_explanations_verb(self, served: dict[str, Served], files: list[Path], name: str) -> None:
        one = served[name]
        raw = httpx.post(f"{one.url}/predictions/{name}", content=files[0].read_bytes(), timeout=60).json()
        assert raw["predictions"] and raw["explanations"] is None
        explained = httpx.post(f"{one.url}/explanations/{name}", content=files[0].read_bytes(), timeout=60).json()
        assert explained["explanations"][0]["layers"][0]["features"]
        assert explained["predictions"] == raw["predictions"]

    def test_a_bad_row_fails_alone(self, served: dict[str, Served], files: list[Path], name: str) -> None:
        one = served[name]
        documents: list[dict[str, Any]] = [{}, {"top_k": "5"}, {"explain": {"layers": ["nope"]}}, {}]
        with ThreadPoolExecutor(BATCH) as pool:
            replies = list(pool.map(lambda d: one.post(d, files[20]), documents))
        assert [r.status_code for r in replies] == [200, 422, 422, 200]
        assert {r.headers["content-type"] for r in replies[1:3]} == {"application/problem+json"}


def _equal(reply: dict[str, Any], expected: np.ndarray) -> bool:
    found = {p["index"]: np.float32(p["logit"]) for p in reply["predictions"]}
    return len(found) == len(expected) and all(found[i] == expected[i] for i in range(len(expected)))


def _assert_logits(reply: dict[str, Any], expected: np.ndarray) -> None:
    assert _equal(reply, expected), "a logit in the reply is not the base model's float32"


def _assert_same_as_in_process(one: Served, document: dict[str, Any], file: Path) -> dict[str, Any]:
    """The server's document is the engine's, but for its id and timing."""
    image = {"b64": base64.b64encode(file.read_bytes()).decode()}
    body = json.dumps({"image": image, **document}).encode()
    expected = json.loads(one.engine.answer([Row({"body": body}, "application/json", False, "", "r")])[0].body)
    found = one.post(document, file).json()
    for each in (expected, found):
        for key in ("id", "timing_ms"):
            each.pop(key)
    assert found == expected
    return found
