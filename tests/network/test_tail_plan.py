"""Which modules can be replayed, and whose the rows of their outputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support import hook_count
from torch import Tensor, nn

from elude_runtime.network.tail import TailRunner
from elude_runtime.network.tail_plan import FIXED, FULL, REPLAY, OutputRows, TailPlan, draft_plans, in_order_of

IMAGES = torch.randn(3, 6, 1, 1, generator=torch.Generator().manual_seed(1))


@dataclass
class Features:
    """A custom output: no tree of tensors to PyTorch."""

    x: Tensor


class Part(nn.Module):
    """Whatever `make` makes of its input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


class Model(nn.Module):
    """A part, then a split layer, then another part; `tidy` makes one [B, 6] of the first part's output."""

    def __init__(self, make: Any, tidy: Any = lambda out: out) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.layer, self.head = Part(make), nn.Linear(6, 6), nn.Linear(6, 2)
        self.tidy = tidy

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.tidy(self.part(x.flatten(1)))).tanh())


def plan_of(model: nn.Module, layer: str = "layer") -> TailPlan:
    with torch.no_grad():
        plan = draft_plans(model.eval(), [layer], IMAGES[:2], IMAGES[2])[layer]
    assert hook_count(model) == 0
    return plan


@pytest.mark.parametrize(
    ("make", "tidy", "rows"),
    [
        (lambda x: x + 1, lambda out: out, [1]),
        (lambda x: x.unflatten(1, (3, 2)).flatten(0, 1), lambda out: out.reshape(-1, 6), [3]),
        (lambda x: (x, torch.arange(6.0)), lambda out: out[0] + out[1], [1, FIXED]),
        (lambda x: {"a": x, "b": [x * 2]}, lambda out: out["a"] + out["b"][0], [1, 1]),
        (lambda x: torch.ones(len(x), 6), lambda out: out, [1]),
    ],
    ids=["an image", "three an image", "a constant", "a tree", "as many constants as images"],
)
def test_rows_that_belong_to_images(make: Any, tidy: Any, rows: list[int]) -> None:
    plan = plan_of(Model(make, tidy))
    assert plan.mode == REPLAY and plan.modules == ("part",)
    (call,) = plan.calls["part"]
    assert [leaf.rows for leaf in call.leaves] == rows


@pytest.mark.parametrize(
    ("make", "tidy"),
    [
        (lambda x: x.unflatten(1, (3, 2)).transpose(0, 1).flatten(0, 1), lambda out: out.unflatten(0, (3, -1))
         .transpose(0, 1).reshape(-1, 6)),
        (lambda x: x.T, lambda out: out.T),
        (lambda x: x + x.mean(0), lambda out: out),
        (lambda x: (x, x.mean(0)), lambda out: out[0] + out[1]),
        (lambda x: (x, x.mean()), lambda out: out[0] * out[1]),
        (lambda x: (x, len(x)), lambda out: out[0] / out[1]),
        (lambda x: (x, torch.equal(x[-1], IMAGES[2].flatten())), lambda out: out[0] * out[1]),
        (lambda x: Features(x), lambda out: out.x),
        (lambda x: (x, np.array([1.0, 2.0])), lambda out: out[0] * float(out[1][1])),
        (lambda x: (x, np.float64(2)), lambda out: out[0] * float(out[1])),
    ],
    ids=["images innermost", "images last", "images mixed", "a mean of all", "a number of all", "how many there are",
         "which they are", "an object", "an array", "a number of numpy's"],
)  # fmt: skip
def test_rows_that_do_not(make: Any, tidy: Any) -> None:
    assert plan_of(Model(make, tidy)) == TailPlan("layer", FULL)


def test_constants_are_kept_where_they_stand() -> None:
    plan = plan_of(Model(lambda x: (x, (4, 5), None, "nchw"), lambda out: out[0]))
    assert list(plan.calls["part"][0].leaves[1:]) == [4, 5, None, "nchw"]


def test_the_outermost_modules_that_have_finished() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
            self.block = nn.ModuleDict({"before": nn.Linear(6, 6), "layer": nn.Linear(6, 6), "after": nn.Linear(6, 2)})
            self.shared = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            h = self.shared(self.block["before"](self.stem(x.flatten(1))))
            return self.block["after"](self.shared(self.block["layer"](h)))

    plan = plan_of(Nested(), "block.layer")
    assert set(plan.modules) == {"stem", "block.before"}  # `shared` runs again later


def test_calls_that_a_replayed_module_would_have_made_are_left_out() -> None:
    """A module shared by a block that is replayed and by code that runs (CoaT): the tail makes its second call only."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(6, 6)
            self.block = nn.Sequential(nn.Linear(6, 6), self.shared)
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.shared(self.block(x.flatten(1)).tanh())
            return self.head(self.layer(h).tanh())

    model = Shared()
    plan = plan_of(model)
    made = {name: [call.number for call in calls] for name, calls in plan.calls.items()}
    assert made == {"block": [0], "shared": [1]}
    model.requires_grad_(False)
    runner = TailRunner(model, ["layer"], (6, 1, 1))
    assert runner.plans["layer"].mode == REPLAY


def test_what_is_changed_in_place_later_is_found() -> None:
    class InPlace(Model):
        def forward(self, x: Tensor) -> Tensor:
            h = self.part(x.flatten(1))
            return self.head(h.add_(self.layer(h)))

    assert plan_of(InPlace(lambda x: x + 1)).copied == {"part"}
    assert plan_of(Model(lambda x: x + 1)).copied == frozenset()


def test_chosen_rows_are_those_of_the_images() -> None:
    tensor = torch.arange(24).view(6, 4)
    rows = OutputRows(2, tensor.shape, tensor.dtype)
    assert rows.choose(tensor, torch.tensor([2, 0]))[:, 0].tolist() == [16, 20, 0, 4]
    assert rows.blank(5, tensor.device).shape == (10, 4) and rows.blank(5, tensor.device).dtype == torch.int64
    fixed = OutputRows(FIXED, tensor.shape, tensor.dtype)
    assert torch.equal(fixed.choose(tensor, torch.tensor([1])), tensor)
    assert fixed.blank(5, tensor.device).shape == tensor.shape
    assert OutputRows(FIXED, torch.Size(()), torch.float32).blank(3, tensor.device).shape == ()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2)])
def test_elements_in_the_order_of_another_tensor(order: tuple[int, ...]) -> None:
    back = [order.index(axis) for axis in range(4)]
    like = torch.empty([(2, 3, 4, 5)[axis] for axis in order]).permute(back)
    tensor = torch.randn(7, 3, 4, 5)
    found = in_order_of(like, tensor)
    assert torch.equal(found, tensor) and sorted(range(4), key=lambda a: -found.stride(a)) == list(order)
    assert in_order_of(torch.zeros(1).expand(2, 3, 4, 5), tensor).is_contiguous()
