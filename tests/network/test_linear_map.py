"""Tokens and edges of a linear layer against the layer itself."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

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
    (Conv2dSame(6, 4, 3, stride=2), (3, 6, 5, 7)),
]
IDS = [str(m) for m, _ in LAYERS]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=IDS)
def test_patches_times_weight_is_the_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(shape), LinearMap(module)
    with torch.no_grad():
        expected = linear.tokens(module(x))
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
        y = module(torch.randn(shape))
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
    y = module(x)
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


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.LayerNorm(4), "only nn.Linear and nn.Conv2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "zero padding"),
    ],
)
def test_what_cannot_be_split_is_refused(module: nn.Module, said: str) -> None:
    with pytest.raises(LayerError, match=said):
        LinearMap(module, "blocks.3")
