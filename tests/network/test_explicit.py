"""The explicit form of whole networks."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Rewritten
from support import random_partition
from timm.layers import ScaledStdConv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from elude_runtime.network.explicit import ExplicitLayer, explicit_model
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


@pytest.mark.parametrize(
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
