"""What follows a layer, read off the recorded operations: one small network for every way to go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elude_runtime.errors import ModelError
from elude_runtime.network.graph import ADDED, OUTPUT, PASSED_ON, Graph, Verdict, record_graph

After = Callable[["Network", Tensor, Tensor], Tensor]


class Network(nn.Module):
    """`layer` reads what a nonlinear stem makes of the image; `after(self, stream, y)` says what becomes of its output
    y [B, 4, 8], with the stream [B, 4, 8] beside it."""

    def __init__(self, after: After) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layer, self.other, self.head = (nn.Linear(n, m) for n, m in ((3, 8), (8, 8), (8, 8), (8, 2)))
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.rand(8))
        self.batch_norm = nn.BatchNorm1d(8)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x.flatten(2).transpose(1, 2)).tanh()
        out = self.after(self, stream, self.layer(stream))
        return self.head(out.mean(1).tanh())


def graph_of(model: nn.Module) -> Graph:
    return record_graph(model.eval(), {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}, images())


def images() -> Tensor:
    return torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def verdict_of(after: After) -> Verdict:
    return graph_of(Network(after)).verdict("layer")


def attention(n: Network, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.transpose(1, 2)).softmax(-1) @ values


def into_a_buffer(n: Network, s: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros(len(y), 4, 16)
    buffer[..., :8] = s
    buffer[:, :, 8:] = y
    return buffer.view(-1, 4, 2, 8).sum(2)


def in_place_through_a_view(n: Network, s: Tensor, y: Tensor) -> Tensor:
    y[:, 1:].relu_()
    return s + y


def through_data(n: Network, s: Tensor, y: Tensor) -> Tensor:
    y.data.relu_()
    return s + y


def through_storage(n: Network, s: Tensor, y: Tensor) -> Tensor:
    torch.empty(0).set_(y.untyped_storage(), 0, y.shape, y.stride()).relu_()
    return s + y


LINEAR: dict[str, tuple[After, str]] = {
    "residual": (lambda n, s, y: s + y, ADDED),
    "residual in place": (lambda n, s, y: y.add_(s), ADDED),
    "scaled residual": (lambda n, s, y: torch.add(s, n.scale * y, alpha=0.5), ADDED),
    "subtracted": (lambda n, s, y: s - y, ADDED),
    "batch norm, then residual": (lambda n, s, y: s + n.batch_norm(y.transpose(1, 2)).transpose(1, 2), ADDED),
    "bias, then residual": (lambda n, s, y: s + (y + n.scale), ADDED),
    "affine by addcmul": (lambda n, s, y: s + torch.addcmul(n.scale, y, n.scale), ADDED),
    "added by addcmul": (lambda n, s, y: torch.addcmul(s, y, n.scale), ADDED),
    "pooled": (lambda n, s, y: s + F.avg_pool1d(y, 2).repeat_interleave(2, -1), ADDED),
    "next layer": (lambda n, s, y: n.other(y).tanh(), PASSED_ON),
    "next layer and residual": (lambda n, s, y: s + n.other(y).tanh() + y, f"{ADDED} and {PASSED_ON}"),
    "concatenated": (lambda n, s, y: n.other(torch.cat([s[..., :4], y[..., 4:]], -1)), PASSED_ON),
    "written into a buffer": (lambda n, s, y: n.other(into_a_buffer(n, s, y)), PASSED_ON),
    "shuffled by constants": (lambda n, s, y: s + y[:, torch.tensor([2, 0, 1, 3])].flip(1).roll(1, 2), ADDED),
    "masked by constants": (lambda n, s, y: s + y.masked_fill(torch.eye(4, 8).bool(), 0.0), ADDED),
    "interpolated by constants": (lambda n, s, y: torch.lerp(s, y, n.scale), ADDED),
    "weight of constants": (lambda n, s, y: s + torch.lerp(n.scale, 2 * n.scale, y), ADDED),
    "added by addcdiv": (lambda n, s, y: torch.addcdiv(s, y, 1 + n.scale), ADDED),
    "copied to places": (lambda n, s, y: s + torch.zeros_like(s).index_copy(1, torch.tensor([3, 1, 0, 2]), y), ADDED),
    "copied by a mask": (lambda n, s, y: s + torch.zeros_like(s).masked_scatter(torch.ones(4, 8).bool(), y), ADDED),
    "triangle": (lambda n, s, y: s + y.tril() + y.triu(1), ADDED),
    "another float": (lambda n, s, y: s + y.double().float(), ADDED),
    "the stream it starts": (lambda n, s, y: y + n.other(y).tanh(), f"{ADDED} and {PASSED_ON}"),
}

WEIGHTED: dict[str, tuple[After, str]] = {
    "gate beside it": (lambda n, s, y: s + y * s.sigmoid(), ADDED),
    "divided by the stream": (lambda n, s, y: s + y * (1 / (1 + s.exp())), ADDED),
    "weight between others": (lambda n, s, y: torch.lerp(s, 2 * s, y), ADDED),
    "interpolated by the stream": (lambda n, s, y: s + torch.lerp(n.scale, y, s.sigmoid()), ADDED),
    "values of attention": (lambda n, s, y: n.other(attention(n, s, s, y)), PASSED_ON),
    "values of fused attention": (lambda n, s, y: s + F.scaled_dot_product_attention(s, s, y), ADDED),
}

REFUSED: dict[str, tuple[After, str]] = {
    "nonlinearity": (lambda n, s, y: F.gelu(y), "nonlinearity (gelu)"),
    "nonlinearity in place": (lambda n, s, y: y.relu_(), "nonlinearity (relu)"),
    "nonlinearity in place through a view": (in_place_through_a_view, "nonlinearity (relu)"),
    "nonlinearity in place through .data": (through_data, "nonlinearity (relu)"),
    "nonlinearity in place through its storage": (through_storage, "nonlinearity (relu)"),
    "nonlinearity beside a residual": (lambda n, s, y: s + y + y.sigmoid(), "nonlinearity (sigmoid)"),
    "post-norm": (lambda n, s, y: s + n.norm(y), "followed by a norm"),
    "root mean square": (lambda n, s, y: s + y * (y.pow(2).mean(-1, True) + 1e-6).rsqrt(), "followed by a norm"),
    "length": (lambda n, s, y: s + F.normalize(y, dim=-1), "followed by a norm"),
    "instance norm": (lambda n, s, y: s + F.instance_norm(y), "followed by a norm"),
    "max pooling": (lambda n, s, y: s + F.max_pool2d(y, 2).repeat(1, 2, 2), "max pooling"),
    "gate of itself": (lambda n, s, y: s + y * n.other(y).sigmoid(), "gate that depends on it"),
    "squeeze and excite": (lambda n, s, y: s + y * n.other(y.mean(1, True)).sigmoid(), "gate that depends on it"),
    "gate of its mean": (lambda n, s, y: s + y * y.mean(1, True).sigmoid(), "nonlinearity (sigmoid)"),
    "square": (lambda n, s, y: s + y * y, "gate that depends on it"),
    "gate of the stream it was added to": (lambda n, s, y: y * (s + y).sigmoid(), "gate that depends on it"),
    "weight of itself": (lambda n, s, y: s + torch.lerp(y, 2 * y, y), "gate that depends on it"),
    "queries": (lambda n, s, y: s + attention(n, y, s, s), "followed by attention"),
    "keys of fused attention": (lambda n, s, y: s + F.scaled_dot_product_attention(s, y, s), "followed by attention"),
    "queries, keys and values": (lambda n, s, y: s + attention(n, y, y, y), "followed by attention"),
    "denominator": (lambda n, s, y: s / (3 + y), "divided by what depends on it"),
    "denominator of addcdiv": (lambda n, s, y: torch.addcdiv(s, n.scale, 3 + y), "divided by what depends on it"),
    "rounded": (lambda n, s, y: s + (10 * y).to(torch.int8).to(s.dtype), "rounding to whole numbers"),
    "a mask": (lambda n, s, y: s.masked_fill(y.to(torch.bool), 0.0), "rounding to whole numbers"),
    "index": (lambda n, s, y: s.gather(1, y.argmax(1, True)), "nonlinearity (argmax)"),
    "choice": (lambda n, s, y: torch.where(y > 0, y, s), "nonlinearity (gt)"),
    "unused": (lambda n, s, y: s, "never used"),
    "only its shape": (lambda n, s, y: s + torch.ones_like(y), "never used"),
    "twice": (lambda n, s, y: s + n.layer(y.tanh()), "more than once"),
}


@pytest.mark.parametrize("case", LINEAR)
def test_what_stays_separable_is_offered(case: str) -> None:
    after, reason = LINEAR[case]
    assert verdict_of(after) == Verdict(True, reason)


@pytest.mark.parametrize("case", WEIGHTED)
def test_weights_that_do_not_depend_on_it_are_noted(case: str) -> None:
    after, reason = WEIGHTED[case]
    assert verdict_of(after) == Verdict(True, reason, weighted=True)


@pytest.mark.parametrize("case", REFUSED)
def test_what_mixes_its_parts_is_refused(case: str) -> None:
    after, reason = REFUSED[case]
    found = verdict_of(after)
    assert not found.offered and reason in found.reason, found.reason


class Heads(nn.Module):
    """Two classifiers whose outputs are averaged, and a third behind a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.third = (nn.Linear(12, 6), *(nn.Linear(6, 3) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1)).tanh()
        return (self.first(h) + self.second(h)) / 2 + 0.5 * self.third(h).relu()


def test_classifiers_are_what_reaches_the_output_and_nothing_else() -> None:
    graph = graph_of(Heads())
    assert graph.verdict("first").classifier and graph.verdict("second").classifier
    assert graph.verdict("first").reason == ADDED
    assert not graph.verdict("third").offered and not graph.verdict("stem").offered
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert graph_of(model).verdict("1") == Verdict(True, OUTPUT, classifier=True)


class Clamped(nn.Linear):
    """A nonlinearity of its own, which random images may never reach."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1e4, 1e4)


class Computed(nn.Linear):
    """A matrix product that makes its weight comes before the one of the images."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight @ torch.eye(self.in_features), self.bias)


def test_the_walk_starts_at_the_linear_operation() -> None:
    model = Network(LINEAR["residual"][0])
    model.layer = Clamped(8, 8)
    assert graph_of(model).verdict("layer") == Verdict(False, "followed by a nonlinearity (clamp)")
    model.layer = Computed(8, 8)
    assert graph_of(model).verdict("layer") == Verdict(True, ADDED)


def test_what_does_not_run_or_does_not_see_the_image() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.unused, self.head = nn.Linear(4, 12), nn.Linear(2, 2), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1) + self.table(torch.eye(4)).sum(0))

    graph = graph_of(Model())
    assert "does not run as a module" in graph.verdict("unused").reason
    assert "does not depend on the image" in graph.verdict("table").reason


def test_tensors_are_not_kept_alive() -> None:
    """A pass of a large network must not hold every intermediate result: seen by their weak references."""
    import weakref

    seen: list[weakref.ref] = []

    def after(n: Network, s: Tensor, y: Tensor) -> Tensor:
        middle = y + s
        seen.append(weakref.ref(middle))
        return middle.tanh()

    graph = graph_of(Network(after))
    assert graph.verdict("layer").offered and seen[0]() is None


def test_a_model_that_returns_several_tensors() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, x]

    with pytest.raises(ModelError, match="returns a list"):
        graph_of(Two())


def test_hooks_are_gone_afterwards() -> None:
    model = Network(LINEAR["residual"][0])
    graph_of(model)
    assert not any(m._forward_hooks for m in model.modules())
