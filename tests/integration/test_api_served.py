"""The whole interface on a real network through the real server: every operation, policies in force, KServe, budget."""

from __future__ import annotations

import base64
import io
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
import torch
from PIL import Image

pytest.importorskip("ts")
from elude_runtime.analysis.contrast import contrast
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.api.schema.reply import Reply
from elude_runtime.checkpoint.policies import save_policy
from elude_runtime.checkpoint.vectors import StoredVector, save_vector
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.model_options import ModelOptions
from elude_runtime.cli.torchserve import Server
from elude_runtime.client import Client, ProblemError
from elude_runtime.network.preprocessing import DataConfig, decode_image, to_input
from elude_runtime.offline.rewrite import rewrite_checkpoint
from elude_runtime.partition import SplitConfig

SHARED = Path(os.environ.get("ELUDE_SHARED", Path(__file__).parents[2].parent / "shared"))
LAYERS = ["blocks.8.mlp.fc2", "blocks.10.mlp.fc2"]
EARLY, LATE = LAYERS
BATCH = 4

pytestmark = [
    pytest.mark.server,
    pytest.mark.networks,
    pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason=f"no real networks at {SHARED}; set ELUDE_SHARED"),
]


@dataclass(frozen=True)
class Served:
    """`deit`: no policy in force; `guarded`: one by default and one in the shadow; `tight`: a small work budget."""

    server: Server
    engine: Engine
    folder: Path

    def client(self, model: str = "deit", **options: Any) -> Client:
        return Client(self.server.url, model, timeout=60, **options)

    def in_process(self, image: Path, document: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps({"image": {"b64": b64(image)}, **document}).encode()
        (answered,) = self.engine.answer([Row({"body": body}, "application/json", False, "", "r")])
        assert answered.status == 200, answered.body
        return content(json.loads(answered.body))


def b64(image: Path) -> str:
    return base64.b64encode(image.read_bytes()).decode()


def content(document: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one request to the next."""
    return {k: v for k, v in document.items() if k not in ("id", "timing_ms")}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return sorted((SHARED / "data" / "imagenet").glob("*.jpg"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> Path:
    """DeiT-Tiny, two layers split; a named vector and two policies beside it."""
    path = tmp_path_factory.mktemp("deit") / "ckpt"
    factory = f"{SHARED / 'weights' / 'reference_models.py'}:deit_tiny_3bit"
    options = ModelOptions(None, weights=SHARED / "weights" / "deit_tiny_3bit.safetensors", factory=factory)
    config = DataConfig.parse(json.loads((SHARED / "weights" / "data_configs.json").read_text())["deit_tiny_3bit"])
    rewrite_checkpoint(
        options.build(), files[::12], path, SplitConfig(tokens=100), layers=LAYERS, concepts=24, data_config=config
    )
    engine = Engine.open(path, ServingConfig(trust_factory=True), name="deit", version="1.0")
    partition = engine.model.manifest.partition_sha256
    sides = [
        torch.stack([to_input(decode_image(f.read_bytes()), engine.transform) for f in chosen]).split(8)
        for chosen in (files[:8], files[100:108])
    ]
    found = contrast(engine.model, LATE, *sides, top=3)
    save_vector(path, StoredVector("first", LATE, partition, "2026-01-01", found.direction, [], [], found.auc, 8, 8))
    ablate = [{"feature": f"{LATE}/P{k}", "mode": "ablate"} for k in range(24)]
    save_policy(path, "no-patches", {"partition_sha256": partition, "edits": ablate})
    save_policy(path, "louder", {"partition_sha256": partition, "vectors": [{"name": "first", "strength": 3.0}]})
    return path


def config_file(folder: Path, name: str, elude: str) -> Path:
    path = folder / f"{name}.yaml"
    workers = "minWorkers: 1\nmaxWorkers: 1\nresponseTimeout: 120\n"
    path.write_text(f"{workers}batchSize: {BATCH}\nmaxBatchDelay: 400\nelude:\n  trust_factory: true\n{elude}")
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("api")
    in_force = "  default_policies: [no-patches]\n  shadow_policies: [louder]\n"
    tight = "  max_work: 8\n  max_batch_work: 8\n  max_vector_images: 8\n"
    for name, elude in {"deit": "", "guarded": in_force, "tight": tight}.items():
        build_archive(checkpoint, folder / "store", name=name, config=config_file(folder, name, elude))
    engine = Engine.open(checkpoint, ServingConfig(trust_factory=True), name="deit", version="1.0")
    environment = {"ELUDE_THREADS": str(torch.get_num_threads())}
    with Server(folder / "store", token_auth=False, environment=environment, run_dir=folder / "run") as server:
        server.wait_ready(300)
        yield Served(server, engine, folder)


DOCUMENTS: dict[str, dict[str, Any]] = {
    "targets": {"explain": {"targets": ["top1", {"top": 2}, 281, {"index": 281, "versus": 282}], "layers": [LATE]}},
    "integrated gradients": {"explain": {"method": "integrated_gradients", "steps": 4, "level": "subunits"}},
    "ablation": {"explain": {"method": "ablation", "top_features": 4, "sign": "negative"}},
    "pictures": {"explain": {"top_features": 3, "heatmaps": "png", "pixels": True, "layers": [LATE]}},
    "edits": {
        "steer": {
            "edits": [
                {"feature": f"{EARLY}/P1", "mode": "scale", "value": -1.0, "apply": {"box": [0.0, 0.0, 0.5, 1.0]}},
                {"feature": f"{LATE}/C0", "mode": "set", "value": 2.0, "unit": "std"},
                {"feature": f"{LATE}/7/p1", "mode": "floor", "value": 0.5, "side": "positive"},
            ]
        }
    },
    "a condition that does not hold": {
        "steer": {
            "edits": [
                {
                    "feature": f"{LATE}/P1",
                    "mode": "zero",
                    "when": {"feature": f"{LATE}/P1", "op": ">", "value": 1e6},
                }
            ]
        }
    },
    "vectors and a policy": {
        "steer": {"vectors": [{"name": "first", "strength": 2.0}], "policies": ["no-patches"], "conflict": "sum"}
    },
    "a steered answer explained": {
        "explain": {"layers": [LATE]},
        "steer": {"edits": [{"feature": f"{EARLY}/P2", "mode": "ablate"}]},
    },
    "activations": {"activations": {"features": [f"{LATE}/P3", f"{EARLY}/5/p0", f"{LATE}/C1"], "reduce": "tokens"}},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_server_says_what_the_engine_says(served: Served, files: list[Path], name: str) -> None:
    """Explanations, steering, vectors, policies and activations, digit for digit the engine's in this process."""
    document = DOCUMENTS[name]
    with served.client() as client:
        found = client.request(files[31], document)
    assert content(json.loads(found.model_dump_json())) == served.in_process(files[31], document)
    assert found.answer.source == ("steered" if found.steered else "default")
    for changes in [found.steered.changes] if found.steered else []:
        assert any(c.change != 0 for c in changes) == ("condition" not in name)


def test_features_vectors_and_describe(served: Served, files: list[Path]) -> None:
    with served.client() as client:
        described = client.describe()
        assert [layer.name for layer in described.layers] == LAYERS
        assert [(p.name, p.mode) for p in described.policies] == [
            ("louder", "on request"),
            ("no-patches", "on request"),
        ]
        assert [v.name for v in described.vectors] == ["first"] and described.limits == ServingConfig().limits()
        listed = list(client.features(layer=LATE, page=200))
        assert len(listed) == len({f.feature for f in listed}) > 24
        found = client.vectors(LATE, files[:4], files[100:104], top_features=4)
        steered = client.steer(files[101], edits=found.edits).steered
        assert steered is not None and steered.edits_applied == len(found.edits) > 0
    metadata = httpx.get(f"{served.server.management_url}/models/deit", params={"customized": "true"}).json()
    shown = metadata[0]["customizedMetadata"]
    shown = json.loads(shown) if isinstance(shown, str) else shown
    assert shown["partition_sha256"] == described.partition_sha256


def test_sub_routes_stand_after_the_version(served: Served) -> None:
    found = httpx.post(f"{served.server.url}/predictions/deit/1.0/features", json={"limit": 2, "layer": EARLY}).json()
    assert len(found["features"]) == 2 and found["features"][0]["layer"] == EARLY
    missing = httpx.post(f"{served.server.url}/predictions/deit/1.0/nonsense", json={})
    assert (missing.status_code, missing.json()["type"]) == (404, "unknown-route")


class TestPolicies:
    def test_a_default_policy_is_in_every_reply(self, served: Served, files: list[Path]) -> None:
        raw = httpx.post(f"{served.server.url}/predictions/guarded", content=files[5].read_bytes(), timeout=60).json()
        reply = Reply.model_validate(raw)
        assert (reply.answer.source, reply.answer.policies) == ("steered", ["no-patches"])
        asked = served.in_process(files[5], {"steer": {"policies": ["no-patches"]}})
        assert raw["predictions"] == asked["predictions"] and raw["steered"] == asked["steered"]
        assert raw["answer"] == asked["answer"]
        louder = served.in_process(files[5], {"steer": {"policies": ["louder"]}})
        assert raw["shadow"]["policies"] == ["louder"]
        assert raw["shadow"]["predictions"] == louder["steered"]["predictions"]

    def test_the_log_names_policy_digest_and_since_when(self, served: Served, files: list[Path]) -> None:
        with served.client("guarded") as client:
            reply = client.request(files[6], {"id": "audit.me"})
            (policy,) = [p for p in client.describe().policies if p.mode == "default"]
        assert reply.answer.policies == [policy.name]
        lines = [
            line
            for log in served.server.run_dir.rglob("worker.jsonl")
            for line in log.read_text(errors="replace").splitlines()
            if "policy no-patches" in line
        ]
        assert any("in force (default)" in line and policy.sha256 in line and policy.since in line for line in lines)
        assert any("audit.me" in line and policy.sha256 in line and policy.since in line for line in lines)

    def test_an_environment_variable_turns_all_off(self, served: Served, files: list[Path]) -> None:
        """The same archive, started again with the switch: nothing is redeployed."""
        environment = {"ELUDE_POLICIES_OFF": "true", "ELUDE_THREADS": str(torch.get_num_threads())}
        models = ["guarded=guarded.mar"]
        with Server(served.folder / "store", models, token_auth=False, environment=environment) as server:
            server.wait_ready(240)
            with Client(server.url, "guarded", timeout=60) as client:
                plain = client.predict(files[5])
                named = client.steer(files[5], policies=["no-patches", "gone"])
        assert (plain.answer.source, plain.steered, plain.shadow) == ("default", None, None)
        assert [w.code for w in named.warnings] == ["policies-off"]
        assert named.predictions == plain.predictions and named.answer.policies == []


class TestKServe:
    def test_version_1(self, served: Served, files: list[Path]) -> None:
        steer = {"edits": [{"feature": f"{LATE}/P1", "mode": "ablate"}]}
        instances = [{"b64": b64(files[3])}, {"image": {"b64": b64(files[4])}, "steer": steer}, {"b64": "AAAA"}]
        url = f"{served.server.url}/v1/models/deit"
        found = httpx.post(f"{url}:predict", json={"instances": instances}, timeout=60)
        first, second, bad = found.json()["predictions"]
        assert found.status_code == 200 and (bad["type"], bad["status"]) == ("invalid-image", 422)
        assert first["predictions"] and first["explanations"] is None and second["steered"]["edits_applied"] == 1
        explained = httpx.post(f"{url}:explain", json={"instances": instances[:1]}, timeout=60).json()
        assert explained["predictions"][0]["explanations"][0]["layers"][0]["features"]

    def test_version_2(self, served: Served, files: list[Path]) -> None:
        """FP32 inputs: the base model's logits, digit for digit, in the batch of the request."""
        images = torch.stack([to_input(decode_image(f.read_bytes()), served.engine.transform) for f in files[3:5]])
        with torch.no_grad():
            expected = served.engine.model.base(images)
        tensor = {"name": "x", "datatype": "FP32", "shape": list(images.shape), "data": images.flatten().tolist()}
        encoded = {"name": "x", "datatype": "BYTES", "shape": [2], "data": [b64(f) for f in files[3:5]]}
        for given in (tensor, encoded):
            asked = {"id": "v2", "inputs": [given]}
            found = httpx.post(f"{served.server.url}/v2/models/deit/infer", json=asked, timeout=60).json()
            assert (found["id"], found["model_name"]) == ("v2", "deit")
            logits, documents = found["outputs"]
            assert logits["shape"] == [2, 1000]
            assert np.array_equal(np.float32(logits["data"]).reshape(2, 1000), expected.numpy())
            assert [json.loads(text)["predictions"][0]["index"] for text in documents["data"]] == [
                int(row.argmax()) for row in expected
            ]
        asked = {"inputs": [encoded], "parameters": {"elude": {"explain": {"layers": [EARLY], "top_features": 2}}}}
        for path in ("infer", "explain"):
            found = httpx.post(f"{served.server.url}/v2/models/deit/{path}", json=asked, timeout=60).json()
            documents = [json.loads(text) for text in found["outputs"][1]["data"]]
            assert [len(d["explanations"][0]["layers"][0]["features"]) for d in documents] == [2, 2]


class TestBudget:
    COSTLY: dict[str, Any] = {"explain": {"method": "ablation", "top_features": 6, "layers": [EARLY]}}  # noqa: RUF012

    def _ask(self, served: Served, files: list[Path], document: dict[str, Any]) -> httpx.Response:
        body = {"image": {"b64": b64(files[9])}, **document}
        return httpx.post(f"{served.server.url}/predictions/tight", json=body, timeout=60)

    def test_costly_rows_are_put_off_and_plain_ones_answered(self, served: Served, files: list[Path]) -> None:
        documents = [self.COSTLY, {}, self.COSTLY, self.COSTLY, {}, self.COSTLY, {}, self.COSTLY]
        with ThreadPoolExecutor(len(documents)) as pool:
            found = list(pool.map(lambda d: self._ask(served, files, d), documents))
        assert all(r.status_code == 200 for r, d in zip(found, documents, strict=True) if not d)
        costly = [r for r, d in zip(found, documents, strict=True) if d]
        assert {r.status_code for r in costly} == {200, 503}
        refused = [r for r in costly if r.status_code == 503]
        assert all(r.json()["type"] == "overloaded" and int(r.headers["retry-after"]) > 0 for r in refused)

    def test_the_client_comes_again(self, served: Served, files: list[Path]) -> None:
        def ask(_: int) -> Reply:
            with served.client("tight", retries=10) as client:
                return client.request(files[9], self.COSTLY)

        with ThreadPoolExecutor(BATCH) as pool:
            replies = list(pool.map(ask, range(BATCH)))
        assert all(r.explanations for r in replies)

    def test_a_request_that_never_fits_is_told_so(self, served: Served, files: list[Path]) -> None:
        with served.client("tight") as client, pytest.raises(ProblemError) as caught:
            client.explain(files[9], method="ablation", top_features=60, layers=[EARLY])
        assert (caught.value.status, caught.value.type) == (422, "limit-exceeded")


def test_exif_orientation_and_a_box(served: Served, files: list[Path]) -> None:
    """A box is one of the upright image, however its pixels are stored."""
    upright = Image.open(files[40]).convert("RGB")
    rotated = upright.transpose(Image.Transpose.ROTATE_90)  # stored so, orientation 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = [io.BytesIO(), io.BytesIO()]
    upright.save(stored[0], "PNG")
    rotated.save(stored[1], "PNG", exif=exif)
    edit = {"feature": f"{LATE}/P1", "mode": "scale", "value": 5.0, "apply": {"box": [0.1, 0.2, 0.4, 0.5]}}
    with served.client() as client:
        first, second = (client.steer(one.getvalue(), edits=[edit]) for one in stored)
    assert first.input == second.input and first.steered == second.steered
    assert first.steered is not None and first.steered.edits_applied == 1
