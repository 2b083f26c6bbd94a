"""Tokens and edges of a linear layer against the layer itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from elude_runtime.errors import LayerError
from elude_runtime.network.linear_map import LinearMap

LAYERS = [
    (nn.Linear(6, 4), (3, 6)),
    (nn.Linear(6, 4, bias=False), (3, 5, 6)),
    (nn.Linear(6, 4), (3, 2, 5, 6)),
    (nn.Conv2d(6, 4, 1), (3, 6, 2, 5)),
    (nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), (3, 6, 5, 7)),
    (nn.Conv2d(6, 4, 3, padding=1, groups=2), (3, 6, 5, 7)),
    (nn.Conv2d(6, 4, (1, 3), padding=(0, 2), dilation=(1, 2)), (3, 6, 5, 7)),
    (nn.Conv2d(6, 4, (3, 2), padding="same", dilation=(1, 2)), (3, 6, 5, 7)),
    (nn.Conv2d(6, 4, 3, padding="valid"), (3, 6, 5, 7)),
    (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 5, 7)),
    (nn.Conv2d(6, 4, 3, padding=(1, 0), padding_mode="circular", stride=2), (3, 6, 5, 7)),
    (Conv2dSame(6, 4, 3, stride=2), (3, 6, 5, 7)),
    (Conv2dSame(6, 4, 2, stride=3), (3, 6, 8, 7)),  # pads some input sizes, and not its own kernel's
    (nn.Conv2d(6, 4, 3, padding=1, groups=2), (3, 2, 6, 5, 7)),  # windows
]
IDS = [str(m) for m, _ in LAYERS]


def run(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output; windows [B, W, C, h, w] as it sees them, folded into the batch."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.dim() == 5 else module(x)


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=IDS)
def test_patches_times_weight_is_the_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(shape), LinearMap(module)
    with torch.no_grad():
        expected = linear.tokens(run(module, x))
    reads = linear.patches(x)
    assert reads.shape == (3, expected.shape[1], linear.groups, linear.inputs, linear.positions)
    weight = linear.weight().unflatten(0, (linear.groups, -1))
    found = torch.einsum("btgnq,gdnq->btgd", reads, weight).flatten(2) + linear.bias()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear.apply(x, linear.weight()) + linear.bias(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=IDS)
def test_untokens_undoes_tokens(module: nn.Module, shape: tuple[int, ...]) -> None:
    linear = LinearMap(module)
    with torch.no_grad():
        y = run(module, torch.randn(shape))
    tokens = linear.tokens(y)
    assert tokens.dim() == 3
    assert torch.equal(linear.untokens(tokens, y), y)
    more = torch.cat([tokens, tokens])  # another number of rows than `like` has
    assert torch.equal(linear.untokens(more, y), torch.cat([y, y]))


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=IDS)
def test_edge_gradient_is_that_of_the_weight(module: nn.Module, shape: tuple[int, ...]) -> None:
    """d (g . y) / d w_kj, which autograd knows, is sum over tokens of g_k x_j."""
    torch.manual_seed(1)
    x, linear = torch.randn(1, *shape[1:]), LinearMap(module)
    y = run(module, x)
    gradient = torch.randn_like(linear.tokens(y))
    (expected,) = torch.autograd.grad((linear.tokens(y) * gradient).sum(), module.weight)
    (found,) = linear.edge_gradient(x, gradient, [slice(None)])
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-5)


def test_edge_gradient_of_some_tokens_only() -> None:
    torch.manual_seed(2)
    linear, x, gradient = LinearMap(nn.Linear(6, 4)), torch.randn(1, 5, 6), torch.randn(1, 5, 4)
    late, early = linear.edge_gradient(x, gradient, [slice(2, 5), slice(0, 2)])
    torch.testing.assert_close(late[..., 0], gradient[0, 2:].T @ x[0, 2:])
    torch.testing.assert_close(early[..., 0], gradient[0, :2].T @ x[0, :2])


class Doubled(nn.Linear):
    """An effective weight that is not the parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight.tanh(), self.bias)


class OwnBias(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input=input, weight=self.weight, bias=self.bias.sigmoid())


def parametrised(kind: str) -> nn.Module:
    torch.manual_seed(4)
    made: dict[str, Any] = {
        "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        "weight norm, conv": lambda: parametrizations.weight_norm(nn.Conv2d(6, 4, 3, padding=1)),
        "weight norm by hook": lambda: nn.utils.weight_norm(nn.Linear(6, 4)),
        "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
        "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 4)),
        "StdConv2d": lambda: StdConv2d(6, 4, 3, padding=1, bias=True),
        "StdConv2dSame": lambda: StdConv2dSame(6, 4, 3, stride=2),
        "ScaledStdConv2d": lambda: ScaledStdConv2d(6, 4, 3, padding=1, groups=2),
        "ScaledStdConv2dSame": lambda: ScaledStdConv2dSame(6, 4, 3, stride=2),
        "own forward": lambda: Doubled(6, 4),
        "own bias": lambda: OwnBias(6, 4),
    }
    return made[kind]().eval().requires_grad_(False)


COMPUTED = [
    "weight norm", "weight norm, conv", "weight norm by hook", "spectral norm", "orthogonal", "StdConv2d",
    "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "own forward", "own bias",
]  # fmt: skip


@pytest.mark.parametrize("kind", COMPUTED)
class TestComputedWeights:
    def test_the_effective_weight_gives_the_layers_output(self, kind: str) -> None:
        module = parametrised(kind)
        x = torch.randn(3, 6, 5, 7) if isinstance(module, nn.Conv2d) else torch.randn(3, 5, 6)
        linear, expected = LinearMap(module), module(x)
        found = linear.apply(x, linear.weight()) + linear.bias()
        torch.testing.assert_close(found, linear.tokens(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.einsum("btgnq,gdnq->btgd", linear.patches(x), linear.weight().unflatten(0, (linear.groups, -1)))
            .flatten(2) + linear.bias(),
            linear.tokens(expected), rtol=1e-4, atol=1e-5,
        )  # fmt: skip

    def test_in_float64_it_is_computed_in_float64(self, kind: str) -> None:
        module = parametrised(kind)
        x = torch.randn(3, 6, 5, 7) if isinstance(module, nn.Conv2d) else torch.randn(3, 5, 6)
        linear = LinearMap(module)
        expected = copy.deepcopy(module).double()(x.double())
        found = linear.apply(x.double(), linear.weight(torch.float64)) + linear.bias(torch.float64)
        torch.testing.assert_close(found, linear.tokens(expected), rtol=1e-13, atol=1e-13)

    def test_it_follows_the_parameters(self, kind: str) -> None:
        """It is kept, but not longer than it is right."""
        module = parametrised(kind)
        linear = LinearMap(module)
        x = torch.randn(3, 6, 5, 7) if isinstance(module, nn.Conv2d) else torch.randn(3, 5, 6)
        before = linear.weight().clone()
        assert linear.weight().data_ptr() == linear.weight().data_ptr()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape))
            expected = module(x)
        found = linear.apply(x, linear.weight()) + linear.bias()
        torch.testing.assert_close(found, linear.tokens(expected), rtol=1e-3, atol=1e-4)
        assert kind in ("own bias", "orthogonal") or not torch.equal(before, linear.weight())


def test_a_plain_weight_is_not_copied() -> None:
    module = nn.Linear(6, 4)
    assert LinearMap(module).weight().data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_in_float32(dtype: torch.dtype) -> None:
    module = nn.Linear(6, 4).to(dtype)
    linear = LinearMap(module)
    assert linear.weight().dtype == linear.bias().dtype == torch.float32
    assert torch.equal(linear.weight()[..., 0], module.weight.detach().float())


def test_gradients_go_through_the_padding_that_a_forward_does() -> None:
    linear = LinearMap(Conv2dSame(6, 4, 3, stride=2))
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    (found,) = torch.autograd.grad(linear.apply(x, linear.weight()).sum(), x)
    (expected,) = torch.autograd.grad((linear.module(x)).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Elsewhere(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input[..., :4] * self.weight[:, 0]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.LayerNorm(4), "only nn.Linear and nn.Conv2d"),
        (Elsewhere(4, 4), "does not come to one linear operation"),
    ],
)
def test_what_cannot_be_split_is_refused(module: nn.Module, said: str) -> None:
    with pytest.raises(LayerError, match=said):
        LinearMap(module, "blocks.3")
