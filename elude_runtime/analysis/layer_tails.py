"""Tails of one split layer for several requests at once: baselines, gradients and effects, images sharing passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from elude_runtime.analysis.attribution import path_nodes
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.targets import Target
from elude_runtime.network.tail import Change, Recording, TailRunner

TAIL_ROWS = 16  # rows of a tail pass
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """Targets of image `row` at one layer. steps: integration nodes, None for the gradient at the output itself;
    change: what edits added to the outputs of layers, [T, d] each."""

    row: int
    targets: Sequence[Target]
    steps: int | None = None
    change: Mapping[str, Tensor] = field(default_factory=dict)


class LayerTails:
    """The tails of one layer of a recorded pass that some questions need, at most `TAIL_ROWS` rows a pass.

    Rows do not mix: a question's numbers depend on the others only through the shape of the batch.
    """

    def __init__(
        self,
        runner: TailRunner,
        recording: Recording,
        states: Mapping[str, SplitState],
        layer: str,
        questions: Sequence[Question],
    ) -> None:
        self._runner, self._recording, self._states = runner, recording, states
        self.state = states[layer]
        self.questions = questions
        self.y = recording.y[layer]
        self.c = self.state.linear.untokens(self.state.baseline()[None].to(self.y.dtype), self.y)
        order = list(states)
        self._later = order[order.index(layer) + 1 :]

    def x(self, question: int) -> Tensor:
        """The layer's input for one question's image, [1, ...]."""
        row = self.questions[question].row
        return self._recording.x[self.state.name][row : row + 1].detach()

    @torch.no_grad()
    def baselines(self) -> list[Tensor]:
        """Of each question, the model's output [1, K] with y := c on all tokens."""
        found: list[Tensor] = []
        for part in _parts(range(len(self.questions))):
            found += self._run(self.c.expand(len(part), *self.c.shape[1:]), part).split(1)
        return found

    def gradients(self) -> list[Tensor]:
        """Of each question d target / d y for every target, float32 [targets, T, d]: at y itself, or averaged over the
        nodes of the path from c to y. One forward tail serves all targets."""
        tokens = self.state.layout.total, self.state.linear.neurons
        found = [torch.zeros(len(q.targets), *tokens, device=self.y.device) for q in self.questions]
        # a backward pass goes through all rows of a tail: those with equally many targets share one
        asked = sorted((i for i, q in enumerate(self.questions) if q.targets), key=lambda i: len(found[i]))
        nodes = [(i, a, weight) for i in asked for a, weight in path_nodes(self.questions[i].steps)]
        for part in _parts(nodes):
            owners = [i for i, _, _ in part]
            for number, gradient in enumerate(self._path_gradients(owners, [a for _, a, _ in part])):
                gradient *= torch.tensor([w for *_, w in part], device=gradient.device)[:, None, None]
                for i, start, end in _spans(owners):
                    if number < len(found[i]):
                        found[i][number] += gradient[start:end].sum(0)
        return found

    def _path_gradients(self, owners: list[int], places: list[float]) -> Iterable[Tensor]:
        """Of each row the gradient of its question's first target, then of its second, ...: float32 [R, T, d]."""
        a = torch.tensor(places, device=self.y.device, dtype=self.y.dtype).view(-1, *[1] * (self.y.dim() - 1))
        with torch.no_grad():
            path = torch.lerp(self.c, self.y.index_select(0, self._rows(owners)), a)  # y itself, bit for bit, at a = 1
        most = max(len(self.questions[i].targets) for i in owners)
        with torch.enable_grad():
            leaf = path.requires_grad_()
            out = self._run(leaf.clone(), owners)  # glue code may change what it is given in place, but not a leaf
            for number in range(most):
                totals = [
                    self.questions[i].targets[number].value(out[start:end]).sum()
                    for i, start, end in _spans(owners)
                    if number < len(self.questions[i].targets)
                ]
                total = torch.stack(totals).sum() if len(totals) > 1 else totals[0]
                (gradient,) = torch.autograd.grad(total, leaf, retain_graph=number + 1 < most)
                yield self.state.linear.tokens(gradient).float()

    @torch.no_grad()
    def effects(self, changes: Sequence[Sequence[Callable[[], Tensor]]]) -> list[Tensor]:
        """Of each question what each of its changes of the layer's output does to its targets, float32 [targets, C]:
        minus the targets under a null edit in the same pass.

        changes: of each question, functions that make a change [1, T, d] when its pass comes.
        """
        found = [
            torch.zeros(len(q.targets), len(own), device=self.y.device)
            for q, own in zip(self.questions, changes, strict=True)
        ]
        for part in _with_null_edits([len(own) for own in changes]):
            owners = [i for i, _ in part]
            null = torch.zeros(1, self.state.layout.total, self.state.linear.neurons, device=self.y.device)
            change = torch.cat([null if number is None else changes[i][number]() for i, number in part])
            out = self._run(self.state.changed(self.y.index_select(0, self._rows(owners)), change), owners)
            for i, start, end in _spans(owners):
                first = part[start + 1][1]
                for target, effect in zip(self.questions[i].targets, found[i], strict=True):
                    values = target.value(out[start:end])
                    effect[first : first + end - start - 1] = values[1:] - values[0]  # type: ignore[operator]
        return found

    def _rows(self, owners: Sequence[int]) -> Tensor:
        return torch.tensor([self.questions[i].row for i in owners], device=self.y.device)

    def _run(self, y: Tensor, owners: Sequence[int]) -> Tensor:
        """The model's output [R, K] with the layer returning y [R, ...] for the images of these questions."""
        later = {}
        for layer in self._later:
            changes = [self.questions[i].change.get(layer) for i in owners]
            if any(c is not None for c in changes):
                later[layer] = held_change(self._states[layer], changes)
        return self._runner.run(self._recording, self.state.name, y, self._rows(owners), later)


def held_change(state: SplitState, changes: Sequence[Tensor | None]) -> Change:
    """What adds a fixed change [T, d] to a layer's output, a row each; None leaves its row as it is."""
    nothing = next(torch.zeros_like(c) for c in changes if c is not None)
    stacked = torch.stack([nothing if c is None else c for c in changes])
    return lambda _, y: state.changed(y, stacked)


def _with_null_edits(counts: list[int]) -> list[list[tuple[int, int | None]]]:
    """Passes of (question, its change), every question's changes in a pass after a null edit (None) of its own."""
    passes: list[list[tuple[int, int | None]]] = []
    for i, count in enumerate(counts):
        for number in range(count):
            if not passes or len(passes[-1]) + (1 if passes[-1][-1][0] == i else 2) > TAIL_ROWS:
                passes.append([])
            if not passes[-1] or passes[-1][-1][0] != i:
                passes[-1].append((i, None))
            passes[-1].append((i, number))
    return passes


def _spans(owners: Sequence[int]) -> list[tuple[int, int, int]]:
    """(question, start, end) of the rows of each question in a pass."""
    found, start = [], 0
    for owner, rows in groupby(owners):
        end = start + len(list(rows))
        found.append((owner, start, end))
        start = end
    return found


def _parts(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + TAIL_ROWS] for start in range(0, len(items), TAIL_ROWS)]
