"""Linear probes become classifiers: logits are the probe on the embedding, or one sentence says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support import VIT, VIT_ARGS, tiny_vit
from torch import Tensor, nn

from elude_runtime.errors import ModelError
from elude_runtime.network.build import build_timm
from elude_runtime.network.head import Probe, read_probe, with_probe

SIZE = (3, 32, 32)
BARE_ARGS = {k: v for k, v in VIT_ARGS.items() if k != "num_classes"}


def build(classes: int | None) -> nn.Module:
    return build_timm(VIT, {**BARE_ARGS, "num_classes": classes})


def probe(classes: int = 5, features: int = 32, seed: int = 0) -> Probe:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return Probe(draw(classes, features), draw(classes), "probe.pt")


class TestReading:
    @pytest.mark.parametrize("prefix", ["", "fc.", "head.linear."])
    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_weight_and_bias(self, tmp_path: Path, prefix: str, suffix: str) -> None:
        tensors = {f"{prefix}weight": torch.randn(5, 8), f"{prefix}bias": torch.randn(5)}
        file = tmp_path / f"probe.{suffix}"
        save_file(tensors, file) if suffix == "safetensors" else torch.save({"state_dict": tensors}, file)
        found = read_probe(file)
        assert found.classes == 5 and found.source == str(file)
        assert torch.equal(found.weight, tensors[f"{prefix}weight"]) and torch.equal(
            found.bias, tensors[f"{prefix}bias"]
        )

    def test_no_bias(self, tmp_path: Path) -> None:
        torch.save({"weight": torch.randn(5, 8)}, tmp_path / "probe.pt")
        assert read_probe(tmp_path / "probe.pt").bias.tolist() == [0.0] * 5

    @pytest.mark.parametrize(
        "tensors",
        [
            {"bias": torch.zeros(5)},
            {"weight": torch.zeros(5)},
            {"weight": torch.zeros(5, 8), "bias": torch.zeros(4)},
            {"weight": torch.zeros(5, 8), "bias": torch.zeros(5, 1)},
            {"0.weight": torch.zeros(5, 8), "2.weight": torch.zeros(3, 5)},
            {"weight": torch.zeros(5, 8), "running_mean": torch.zeros(8)},
            {"weight": torch.zeros(0, 8)},
            {"weight": torch.zeros(5, 8, dtype=torch.int64)},
            {"matrix": torch.zeros(5, 8)},
        ],
        ids=lambda t: " ".join(t),
    )
    def test_what_is_no_probe(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        torch.save(tensors, tmp_path / "probe.pt")
        with pytest.raises(ModelError, match="is not a linear probe") as caught:
            read_probe(tmp_path / "probe.pt")
        assert "\n" not in str(caught.value)


def test_logits_are_the_probe_on_the_embedding() -> None:
    bare, head = tiny_vit(num_classes=0), probe()
    notes: list[str] = []
    model = with_probe(build, bare, head, SIZE, notes)
    x = torch.randn(4, *SIZE)
    with torch.no_grad():
        embedding = bare(x)
        torch.testing.assert_close(model(x), F.linear(embedding, head.weight, head.bias), rtol=1e-6, atol=1e-6)
    assert model.num_classes == 5 and not notes and not model.training
    assert torch.equal(model.head.weight, head.weight) and torch.equal(model.head.bias, head.bias)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in bare.state_dict().items())


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_mambaout", "vgg11", "test_vit3"])
def test_other_families(name: str) -> None:
    """Convolutional ones, one whose classifier ends a head of several modules, and one with a wide hidden layer."""
    torch.manual_seed(0)
    bare = timm.create_model(name, num_classes=0).eval()
    size = bare.pretrained_cfg["input_size"]
    x = torch.randn(1, *size)
    with torch.no_grad():
        embedding = bare(x)
        head = probe(features=embedding.shape[1])
        model = with_probe(lambda k: build_timm(name, {"num_classes": k}), bare, head, size, [])
        torch.testing.assert_close(model(x), F.linear(embedding, head.weight, head.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "caformer_s18"])
def test_classifiers_that_are_not_one_linear_map(name: str) -> None:
    """Two heads whose answers are averaged; a perceptron that is gone with the classes."""
    torch.manual_seed(0)
    bare = timm.create_model(name, num_classes=0).eval()
    head = probe(features=bare.head_hidden_size)
    with pytest.raises(ModelError, match="not one linear map of its embedding"):
        with_probe(lambda k: build_timm(name, {"num_classes": k}), bare, head, (3, 224, 224), [])


def test_a_nonlinear_head_is_found_out() -> None:
    """Whatever the parts are called: the logits are compared."""

    class Squashed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight).tanh() + self.bias

    def build_squashed(classes: int | None) -> nn.Module:
        model = build(classes)
        model.head = Squashed(32, int(classes or 0))
        return model

    bare = tiny_vit(num_classes=0)
    with pytest.raises(ModelError, match="not one linear map"):
        with_probe(build_squashed, bare, probe(), SIZE, [])
    hidden = Probe(probe().weight, probe().bias * 1e5, "probe.pt")  # the bias is most of the logits
    with pytest.raises(ModelError, match="not one linear map"):
        with_probe(build_squashed, bare, hidden, SIZE, [])


def test_a_probe_of_another_width() -> None:
    with pytest.raises(ModelError, match="reads 64 features and the embedding has 32"):
        with_probe(build, tiny_vit(num_classes=0), probe(features=64), SIZE, [])


def test_a_body_without_pooling() -> None:
    with pytest.raises(ModelError, match="not one embedding an image"):
        with_probe(build, tiny_vit(num_classes=0, global_pool=""), probe(), SIZE, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_probe_takes_the_bodys_type(dtype: torch.dtype) -> None:
    bare, notes = tiny_vit(num_classes=0).to(dtype), list[str]()
    model = with_probe(build, bare, probe(), SIZE, notes)
    assert {t.dtype for t in model.state_dict().values()} == {dtype}
    assert torch.equal(model.head.weight, probe().weight.to(dtype))
    assert bool(notes) == (dtype != torch.float64)
    assert all("rounded to" in n for n in notes)
