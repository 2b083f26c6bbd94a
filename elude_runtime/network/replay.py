"""Replayed modules: forwards that return what a module put out in a recorded pass, for chosen images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from elude_runtime.network.tail_plan import CallOutput, OutputRows


def replay(
    name: str,
    calls: tuple[CallOutput, ...],
    leaves: Iterator[list[Any]],
    look: Callable[[str, Tensor], None],
) -> Callable[..., Any]:
    """A forward that returns what the module did, call by call. leaves: of each call's output."""
    remaining = zip(calls, leaves, strict=True)

    def forward(*_: Any, **__: Any) -> Any:
        call, found = next(remaining)
        for leaf in found:
            if isinstance(leaf, Tensor):
                look(name, leaf)
        return found[0] if call.structure.is_leaf() else tree_unflatten(found, call.structure)

    return forward


def chosen(calls: tuple[CallOutput, ...], kept: list[list[Tensor]], rows: Tensor, shared: bool) -> Iterator[list[Any]]:
    """The leaves of each call's output for the chosen rows of a recorded pass. kept: the tensors of each of the
    module's calls. shared: hand out the recorded tensors themselves, which are these rows and which nobody changes."""
    for call in calls:
        remaining = iter(kept[call.number])
        yield [
            _choose(leaf, next(remaining), rows, shared) if isinstance(leaf, OutputRows) else leaf
            for leaf in call.leaves
        ]


def _choose(leaf: OutputRows, tensor: Tensor, rows: Tensor, shared: bool) -> Tensor:
    if shared and not (tensor.is_inference() and torch.is_grad_enabled()):  # those cannot enter a graph
        return tensor
    return leaf.choose(tensor, rows)


def blank(leaf: Any, images: int, device: torch.device) -> Any:
    """A leaf that nobody reads, for a number of images."""
    return leaf.blank(images, device) if isinstance(leaf, OutputRows) else leaf
