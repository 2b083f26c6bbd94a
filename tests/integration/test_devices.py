"""What is promised holds on every device that is there: on a GPU with the real networks, on the CPU with the demo's
(`test_networks.py` has the others there)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elude_runtime as elude
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import Row
from elude_runtime.checkpoint.storage import read_tensors
from elude_runtime.demo.model import load_demo_model
from elude_runtime.demo.rewrite import demo_data_config, rewrite_demo, write_calibration
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.images import ImageSource
from elude_runtime.offline.verify import verify

NETWORKS = ("demo", "deit_tiny_3bit", "mobilenetv2_100")
BATCHES = (1, 3, 8, 32)
TOP = 5


@dataclass(frozen=True)
class Network:
    """A network and its checkpoint, made on the CPU. images: the folder that it was calibrated on; source: what tells
    a rewrite how the network is built."""

    base: nn.Module
    data: DataConfig
    images: Path
    checkpoint: Path
    source: dict[str, Any]

    def inputs(self, count: int, device: str) -> Tensor:
        source = ImageSource(self.images, self.data, batch_size=count, limit=count)
        return next(source.batches()).to(device)

    def load(self, device: str) -> elude.EludeModel:
        return elude.load(self.checkpoint, device, trust_factory=True)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return request.param


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Network:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    if name == "demo":
        model, config = load_demo_model()
        write_calibration(folder / "images")
        rewrite_demo(model, config, folder / "images", folder / "ckpt")
        return Network(
            model, demo_data_config(config), folder / "images", folder / "ckpt", {"model_args": config["timm_args"]}
        )
    if device == "cpu":
        pytest.skip("test_networks.py has the real networks on the CPU")
    shared: Path = request.getfixturevalue("shared")
    sys.path.insert(0, str(shared / "weights"))
    try:
        import reference_models  # type: ignore[import-not-found]

        base = reference_models.load(name)
    finally:
        sys.path.remove(str(shared / "weights"))
    data = DataConfig.parse(json.loads((shared / "weights" / "data_configs.json").read_text())[name])
    factory = f"{shared / 'weights' / 'reference_models.py'}:{name}" if name == "deit_tiny_3bit" else None
    images = shared / "data" / "imagenet"
    elude.rewrite(base, images, out=folder / "ckpt", data_config=data, factory=factory, max_images=200)
    return Network(base, data, images, folder / "ckpt", {"factory": factory})


@contextmanager
def tf32() -> Iterator[None]:
    """Matrix products in TF32, where the device has it; convolutions have it by torch's own default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


PRECISIONS: dict[str, Callable[[str], AbstractContextManager]] = {
    "torch's default": lambda _: nullcontext(),
    "tf32 everywhere": lambda _: tf32(),
    "tf32 nowhere": lambda _: exact_convolutions(),
    "bfloat16 autocast": lambda device: torch.autocast(device, torch.bfloat16),
    "float16 autocast": lambda device: torch.autocast(device, torch.float16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_are_the_base_models_bit_for_bit(network: Network, device: str, precision: str) -> None:
    """By the path of a plain prediction and by the recorded one that explanations start from."""
    model, base = network.load(device), network.base.to(device)
    with PRECISIONS[precision](device), torch.no_grad():
        for size in BATCHES:
            x = network.inputs(size, device)
            expected = base(x)
            assert torch.equal(model(x), expected)
            assert torch.equal(model.record(x).logits, expected)
    base.to("cpu")


def test_the_certificate_holds(network: Network, device: str) -> None:
    result = verify(
        network.checkpoint, network.base, network.data, network.images,
        batch_sizes=(1, 8), limit=64, device=device, trust_factory=True, write=False,
    )  # fmt: skip
    assert result.holds, [c for c in result.checks if c.holds is False]
    assert torch.device(result.environment["device"]).type == device
    assert next(network.base.parameters()).device.type == "cpu", "the base model was given back where it was"
    assert {c.name: c for c in result.checks}["logits"].figures["images"] == 64


def test_the_engine_answers_with_the_base_models_values(network: Network, device: str) -> None:
    """A batch of plain, explained and steered rows: one forward pass, whose outputs are the base model's."""
    config = ServingConfig(device=device, trust_factory=True)
    engine = Engine.open(network.checkpoint, config, name="m", version="1")
    names = engine.model.concept_names(engine.model.layers[0])
    steer = {"edits": [{"feature": names[0], "mode": "ablate"}]}
    wishes: list[dict] = [{}, {"explain": {"heatmaps": "values"}}, {"steer": steer}, {"explain": {}, "steer": steer}]
    encoded = list(ImageSource(network.images, network.data).encoded(len(wishes)))
    rows = [
        Row({"image": image, "request": json.dumps(wish).encode()}, "multipart/form-data", False, "", "r")
        for image, wish in zip(encoded, wishes, strict=True)
    ]
    replies = [json.loads(a.body) for a in engine.answer(rows)]
    with torch.no_grad():
        expected = network.base.to(device)(network.inputs(len(wishes), device)).cpu()
    network.base.to("cpu")
    for reply, logits in zip(replies, expected, strict=True):
        top = logits.topk(min(TOP, len(logits)))
        assert [p["index"] for p in reply["predictions"]] == top.indices.tolist()
        assert torch.equal(torch.tensor([p["logit"] for p in reply["predictions"]]), top.values)
    assert "explanations" in replies[1] and "steered" in replies[2] and "explanations" in replies[3]["steered"]


def test_an_edit_that_changes_nothing_gives_the_unedited_row(network: Network, device: str) -> None:
    model = network.load(device)
    x = network.inputs(4, device)
    name = model.concept_names(model.layers[0])[0]
    out = model.steer(x, [elude.Edit(name, mode="scale", value=1.0)])
    assert torch.equal(out.steered, out.default)
    assert not torch.equal(model.steer(x, [elude.Edit(name)]).steered, out.default)


def test_explanations_and_effects_are_the_cpus(network: Network, device: str) -> None:
    """To what another device's float32 leaves; TF32 convolutions would leave three digits."""
    with exact_convolutions():
        found = {}
        for place in ("cpu", device):
            model = network.load(place)
            x = network.inputs(4, "cpu").to(place)
            target = model(x).argmax(-1).tolist()[:1]
            rows = model.explain(x, targets=target, method="integrated_gradients", top_features=1000)
            attributions = [{f.feature.name: f.attribution for f in r[0].layers[0].features} for r in rows]
            strongest = max(attributions[0], key=lambda name: abs(attributions[0][name]))
            change = model.steer(x, [elude.Edit(found["cpu"][2] if found else strongest)])
            found[place] = attributions, (change.steered - change.default).cpu(), strongest
    for here, there in zip(found[device][0], found["cpu"][0], strict=True):
        scale = max(map(abs, there.values()))
        assert set(here) == set(there)
        assert max(abs(here[name] - there[name]) for name in here) < 1e-3 * scale
    difference = (found[device][1] - found["cpu"][1]).abs().max()
    assert difference < 1e-3 * found["cpu"][1].abs().max()


def test_a_rewrite_there_is_the_same_twice(network: Network, device: str, tmp_path: Path) -> None:
    """The same seed gives the same tensors; those of another device differ where its last bits decide."""
    if device == "cpu":
        pytest.skip("tests/offline/test_rewrite.py has it for the CPU")
    made = []
    for number in range(2):
        out = tmp_path / str(number)
        elude.rewrite(
            network.base, network.images, out=out, data_config=network.data, max_images=200, device=device,
            **network.source,
        )  # fmt: skip
        made.append(read_tensors(out))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    # how much is left to the device: printed for the record, and bounded by what chance would give
    before = read_tensors(network.checkpoint)
    for name in (n for n in before if n.endswith(".partition")):
        same = (made[0][name] == before[name]).float().mean()
        print(f"{name}: {same:.3f} of the edges in the sub-unit that the CPU puts them in")
        assert same > 0.3
