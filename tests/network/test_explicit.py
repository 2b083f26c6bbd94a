"""The explicit form of whole networks."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Rewritten
from support import TorchEncoder, forward_with, random_partition
from timm.layers import ScaledStdConv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from elude_runtime.network.explicit import ExplicitLayer, explicit_model
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.tokens import TokenLayout


def test_it_gives_the_base_models_output(rewritten: Rewritten) -> None:
    wide = rewritten.model.explicit()
    for name in rewritten.model.layers:
        assert isinstance(wide.get_submodule(name), ExplicitLayer)
    x, base = rewritten.images.double(), copy.deepcopy(rewritten.base).double()
    with torch.no_grad():
        expected, found = base(x), copy.deepcopy(wide).double()(x)
        single = wide(rewritten.images)
    assert float((expected - found).abs().max() / expected.abs().max()) < 1e-12
    torch.testing.assert_close(single, rewritten.base(rewritten.images), rtol=1e-3, atol=1e-4)


def test_its_neurons_are_the_subunits(rewritten: Rewritten) -> None:
    wide = rewritten.model.explicit()
    seen: list[torch.Tensor] = []
    wide.get_submodule(f"{rewritten.layer}.subunits").register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        wide(rewritten.images)
    expected = rewritten.model.subunits(rewritten.images, rewritten.layer)
    torch.testing.assert_close(seen[0], expected.flatten(2), rtol=1e-3, atol=1e-4)


def test_the_original_stays_as_it_is(rewritten: Rewritten) -> None:
    before = rewritten.model(rewritten.images)
    wide = rewritten.model.explicit()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
    assert torch.equal(rewritten.model(rewritten.images), before)


class Small(nn.Module):
    """A split convolution under two names, whose glue asks for its sizes."""

    def __init__(self, layer: nn.Module, windows: bool = False) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)
        self.again = nn.ModuleList([layer])
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        pad = self.layer.kernel_size[0] // 2 - 1 if isinstance(self.layer.kernel_size, tuple) else 0
        x = nn.functional.pad(x, (pad, pad, pad, pad))
        if self.windows:
            x = x.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1)
        y = self.again[0](x).tanh().mean((2, 3))
        return self.head(y.unflatten(0, (-1, 2)).sum(1) if self.windows else y)


OF_EVERY_KIND = pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, 3, stride=2, padding="valid", groups=2, bias=False),
        StdConv2d(6, 4, 3, padding=1, bias=True),
        ScaledStdConv2dSame(6, 4, 3, stride=2),
        weight_norm(nn.Conv2d(6, 4, (3, 2), padding=(1, 0))),
    ],
    ids=["plain", "grouped", "standardised", "scaled, padded", "weight norm"],
)


@OF_EVERY_KIND
def test_the_weight_is_what_the_subunits_add_up_to(layer: nn.Module) -> None:
    model = Small(layer).eval().requires_grad_(False)
    wide = explicit_model(model, {"layer": (random_partition(1, 4, layer.weight.shape[1]), TokenLayout(1))})
    expected = LinearMap(layer).weight(torch.float32).reshape(layer.weight.shape)
    assert torch.equal(wide.layer.weight, expected)
    half = wide.to(torch.bfloat16).layer.weight
    assert half.dtype == torch.bfloat16 and half.device == expected.device
    assert "layer.weight" not in wide.state_dict()


@OF_EVERY_KIND
@pytest.mark.parametrize("windows", [False, True])
def test_computed_weights_and_windows_in_float64(layer: nn.Module, windows: bool) -> None:
    torch.manual_seed(0)
    model = Small(layer, windows).eval().requires_grad_(False)
    partition = random_partition(1, 4, layer.weight.shape[1])
    wide = explicit_model(model, {"layer": (partition, TokenLayout(1))}, torch.float64)
    assert wide.layer is wide.again[0] and isinstance(wide.layer, ExplicitLayer)
    x = torch.randn(3, 6, 8, 10, dtype=torch.float64)
    expected = copy.deepcopy(model).double()(x)
    torch.testing.assert_close(wide(x), expected, rtol=1e-13, atol=1e-14)
    single = explicit_model(model, {"layer": (partition, TokenLayout(1))})
    torch.testing.assert_close(single(x.float()), model(x.float()), rtol=1e-4, atol=1e-5)


def test_glue_code_that_asks_for_the_weights_type_and_device() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x.to(self.layer.weight.device, self.layer.weight.dtype)))

    model = Casting().requires_grad_(False)
    layers = {"layer": (random_partition(1, 4, 6), TokenLayout(1))}
    x = torch.randn(3, 6)
    torch.testing.assert_close(explicit_model(model, layers)(x), model(x), rtol=1e-5, atol=1e-6)
    wide = explicit_model(model, layers, torch.float64)
    torch.testing.assert_close(wide(x), copy.deepcopy(model).double()(x), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("norm_first", [False, True])
def test_pytorchs_encoder_calls_it(norm_first: bool) -> None:
    """Its fused path would take the weight only, and none of the sub-units would be computed."""
    model, name = TorchEncoder(norm_first), "encoder.layers.1.linear2"
    wide = explicit_model(model, {name: (random_partition(1, 16, 32), TokenLayout(4))})
    with torch.no_grad():
        for parameter in wide.get_submodule(f"{name}.subunits").parameters():
            parameter.mul_(3)
        wide.get_submodule(name).bias.mul_(3)
        x = torch.randn(2, 3, 4, 4)
        expected = forward_with(model, x, {name: lambda _, y: 3 * y})
        torch.testing.assert_close(copy.deepcopy(wide)(x), expected, rtol=1e-4, atol=1e-5)
