"""Targets as requests name them (`top1`, a label, a class against another), as targets of the analysis."""

from __future__ import annotations

from torch import Tensor

from elude_runtime.analysis.targets import Target
from elude_runtime.api.problems import Problem, at
from elude_runtime.api.schema.request import DirectionTarget, Explain, IndexTarget, LabelTarget, TopTarget
from elude_runtime.errors import closest


class TargetReader:
    """Resolves targets for one checkpoint. size: numbers in the model's output; classes: whether these are logits."""

    def __init__(self, labels: list[str], size: int, *, classes: bool) -> None:
        self._labels, self._size, self._classes = labels, size, classes

    def check(self, explain: Explain) -> None:
        """Problem for a target that the model does not have, whatever it will answer."""
        for number in range(len(explain.targets)):
            self._fixed(explain, number)

    def resolve(self, explain: Explain, output: Tensor) -> list[Target]:
        """The targets of one answer, output [K], in the request's order; `top` as many targets."""
        found: list[Target] = []
        for number, target in enumerate(explain.targets):
            fixed = self._fixed(explain, number)
            if fixed is not None:
                found.append(fixed)
            else:
                count = target.top if isinstance(target, TopTarget) else 1
                found += [Target(int(i)) for i in output.topk(min(count, len(output))).indices]
        return found

    def _fixed(self, explain: Explain, number: int) -> Target | None:
        """A target that does not depend on the answer; None for those that do."""
        asked, loc = explain.targets[number], _at(number)
        if isinstance(asked, DirectionTarget):
            if len(asked.direction) != self._size:
                raise Problem(
                    "invalid-target",
                    f"A direction of this model has {self._size} numbers, this one has {len(asked.direction)}.",
                    at([*loc, "direction"], "wrong length"),
                )
            return Target(direction=tuple(asked.direction))
        if not self._classes:
            detail = 'The model has no classes; give targets as {"direction": [...]}.'
            raise Problem("invalid-target", detail, at(loc, "needs a direction"))
        if asked == "top1" or isinstance(asked, TopTarget):
            return None
        if isinstance(asked, LabelTarget):
            made = Target(self._class_of(asked.label, loc))
        elif isinstance(asked, IndexTarget):
            made = Target(asked.index, asked.versus)
        else:
            assert isinstance(asked, int)
            made = Target(asked)
        for index in (made.index, made.versus):
            if index is not None and index >= self._size:
                detail = f"There is no class {index}: the model has classes 0 to {self._size - 1}."
                raise Problem("invalid-target", detail, at(loc, "no such class"))
        return made

    def _class_of(self, label: str, loc: list[str | int]) -> int:
        if label not in self._labels:
            near = closest(label, self._labels)
            raise Problem("unknown-label", f"The model has no label {label[:80]!r}.", at(loc, "unknown", near))
        same = [i for i, name in enumerate(self._labels) if name == label]
        if len(same) > 1:
            raise Problem(
                "unknown-label",
                f"{len(same)} classes are called {label!r}; name one by its index.",
                at(loc, "ambiguous", [str(i) for i in same]),
            )
        return same[0]


def _at(number: int) -> list[str | int]:
    return ["explain", "targets", number]
