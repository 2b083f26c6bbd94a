"""Targets: the scalar read off the model that an explanation is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.errors import EludeError


class TargetError(EludeError):
    """A class index, label or direction that the model does not have."""


@dataclass(frozen=True)
class Target:
    """A logit minus the mean logit (softmax ignores the common part), or minus another class's (`versus`), or the dot
    product of the embedding with `direction` [K] for a model without a head."""

    index: int | None = None
    versus: int | None = None
    direction: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.direction is not None:
            if (self.index, self.versus) != (None, None):
                raise TargetError("A target is a class (with versus, if need be) or a direction, not both.")
            if not all(math.isfinite(v) for v in self.direction):
                raise TargetError("The numbers of a direction must be finite.")

    def value(self, logits: Tensor) -> Tensor:
        """The target of every row: logits [R, K] -> [R]. TargetError where the model has no such output."""
        size = logits.shape[-1]
        if self.direction is not None:
            if len(self.direction) != size:
                raise TargetError(f"A direction needs {size} numbers, this one has {len(self.direction)}.")
            return logits.float() @ torch.tensor(self.direction, device=logits.device)
        for index in (self.index, self.versus):
            if index is not None and not 0 <= index < size:
                raise TargetError(f"There is no class {index}: the model has classes 0 to {size - 1}.")
        if self.index is None:
            raise TargetError("A target needs a class index or a direction.")
        logits = logits.float()
        other = logits.mean(-1) if self.versus is None else logits[:, self.versus]
        return logits[:, self.index] - other


def chosen_targets(targets: Sequence[int | Target] | None, output: Tensor, *, embedding: bool) -> list[Target]:
    """The targets of one image with output [K]: default its top class, or what was asked for.

    TargetError where the output is an embedding and a target is not a direction in it.
    """
    found = [Target(t) if isinstance(t, int) else t for t in targets or ()]
    if embedding and (targets is None or any(t.direction is None for t in found)):
        raise TargetError(
            f"The model has no classes, its output is an embedding: give targets=[Target(direction=…)] of "
            f"{len(output)} numbers."
        )
    return [Target(int(output.argmax()))] if targets is None else found
