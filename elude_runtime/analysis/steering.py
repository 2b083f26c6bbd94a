"""Steering: images of a recorded pass answered again with edits in place, beside the unchanged answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elude_runtime.analysis.layer_change import LayerChange, layer_change
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.steering_plan import PlannedCondition, SteeringPlan, plan_steering
from elude_runtime.network.tail import Change, Recording

if TYPE_CHECKING:
    from elude_runtime.analysis.model import EludeModel

__all__ = ["Steered", "SteeredRow", "SteeringPlan", "plan_steering", "record_steered", "steer_batch"]

_TAIL_ROWS = 16  # of a tail pass, unless it is the recorded pass with all its rows


@dataclass(frozen=True, eq=False)
class SteeredRow:
    """default [K]: the unchanged model's output; steered [K]: with the edits; change [K]: their difference, measured
    against a null edit in the same tail batch. relative_norm: of each edited layer, norm of the realised change of its
    output over the norm of that output, over the edited tokens. applied: of every edit, then every vector (steering by
    steering, where there are several), whether it acted: its condition held, at some token in scope on its side."""

    default: Tensor
    steered: Tensor
    change: Tensor
    relative_norm: dict[str, float]
    applied: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Steered:
    """The same of several images: default, steered, change [R, K]; relative_norm: of each edited layer, a number for
    every image; applied: of every image, for every edit and then every vector."""

    default: Tensor
    steered: Tensor
    change: Tensor
    relative_norm: dict[str, list[float]]
    applied: list[tuple[bool, ...]]

    @classmethod
    def of(cls, rows: Sequence[SteeredRow], default: Tensor) -> Steered:
        layers = rows[0].relative_norm if rows else ()
        return cls(
            default,
            torch.stack([row.steered for row in rows]) if rows else default.clone(),
            torch.stack([row.change for row in rows]) if rows else torch.zeros_like(default),
            {layer: [row.relative_norm[layer] for row in rows] for layer in layers},
            [row.applied for row in rows],
        )


@dataclass(eq=False)
class _Job:
    """One image and its plan. wanted: numbers of the edits and vectors whose conditions hold; found: what became of the
    edited layers so far; start: the first of them that changes."""

    row: int
    plan: SteeringPlan
    wanted: frozenset[int]
    found: dict[str, LayerChange] = field(default_factory=dict)
    start: str | None = None
    steered: Tensor | None = None
    null: Tensor | None = None

    def change(self, state: SplitState, x: Tensor, y: Tensor) -> LayerChange:
        self.found[state.name] = layer_change(state, x, y, self.plan, self.wanted)
        return self.found[state.name]

    def result(self, default: Tensor) -> SteeredRow:
        steered, change = default, torch.zeros_like(default)
        if self.steered is not None and self.null is not None:
            steered, change = self.steered, self.steered - self.null
        acted = frozenset().union(*(change.acted for change in self.found.values()))
        return SteeredRow(
            default,
            steered,
            change,
            {layer: self.found[layer].relative_norm for layer in self.plan.edited},
            tuple(part.number in acted for part in self.plan.parts),
        )


@torch.no_grad()
def steer_batch(
    model: EludeModel, recording: Recording, rows: Sequence[int], plans: Sequence[SteeringPlan]
) -> list[SteeredRow]:
    """Images `rows` of a recorded pass, each with its own plan; an image may come several times.

    recording: of at least the plans' `layers`. Conditions look at the recorded pass; a layer further on edits the
    already steered activations. An image that no edit changes gets the unedited row itself, bit for bit, and no tail;
    those of which the first layer to change is the same share tail passes.
    """
    with model.lock:
        jobs = [_begun(model.states, recording, row, plan) for row, plan in zip(rows, plans, strict=True)]
        for layer in model.layers:
            for batch in _batches([job for job in jobs if job.start == layer], len(recording.images)):
                _run(model, recording, layer, batch)
    return [job.result(recording.logits[job.row]) for job in jobs]


@torch.no_grad()
def record_steered(
    model: EludeModel,
    recording: Recording,
    rows: Sequence[int],
    plans: Sequence[SteeringPlan],
    layers: Sequence[str],
) -> tuple[Recording, dict[str, Tensor]]:
    """A full pass over images of a recorded pass with the edits in place, recorded for tails of `layers`; and of every
    layer that a plan edits what was added to its output, float32 [R, T, d].

    x of a layer is what it saw, y what it passed on, with the edits. Tails run later layers unedited, unless told to
    add what was added here.
    """
    states = model.states
    jobs = [_conditioned(states, recording, row, plan) for row, plan in zip(rows, plans, strict=True)]
    edited = [layer for layer in model.layers if any(layer in job.plan.edited for job in jobs)]
    added: dict[str, Tensor] = {}

    def adding(state: SplitState) -> Change:
        def change(x: Tensor, y: Tensor) -> Tensor:
            added[state.name] = torch.zeros(len(jobs), state.layout.total, state.linear.neurons, device=y.device)
            for position, made in _changes(state, x, y, jobs):
                added[state.name][position] = made.change
            return state.changed(y, added[state.name])

        return change

    with model.lock:
        images = recording.images[list(rows)]
        found = model.tails.record(images, list(layers), {layer: adding(states[layer]) for layer in edited})
    return found, added


def _conditioned(states: Mapping[str, SplitState], recording: Recording, row: int, plan: SteeringPlan) -> _Job:
    """A job with the conditions looked at."""
    wanted = frozenset(p.number for p in plan.parts if all(_holds(when, states, recording, row) for when in p.when))
    return _Job(row, plan, wanted)


def _holds(when: PlannedCondition, states: Mapping[str, SplitState], recording: Recording, row: int) -> bool:
    x = recording.x[when.feature.layer][row : row + 1]
    activation = states[when.feature.layer].activations(x, when.feature)[0]
    return when.condition.holds(float(activation[activation.abs().argmax()]))


def _begun(states: Mapping[str, SplitState], recording: Recording, row: int, plan: SteeringPlan) -> _Job:
    """A job up to the first layer that changes."""
    job = _conditioned(states, recording, row, plan)
    for layer in plan.edited:
        x, y = recording.x[layer][row : row + 1], recording.y[layer][row : row + 1]
        if job.change(states[layer], x, y).relative_norm != 0:
            job.start = layer
            break
    return job


@dataclass(frozen=True, eq=False)
class _Batch:
    """The rows of one tail pass: for each the image, and the job that changes it or None for a null edit. recorded:
    these are all images of the recorded pass in order, which therefore has the same shape and is the null edit."""

    rows: list[tuple[int, _Job | None]]
    recorded: bool = False


def _batches(jobs: list[_Job], images: int) -> Iterator[_Batch]:
    """Tail passes for some jobs that start at one layer."""
    by_image = {job.row: job for job in jobs}
    if len(by_image) == len(jobs) and 2 * len(jobs) >= images:
        # the others as they are cost no more than null edits would
        yield _Batch([(row, by_image.get(row)) for row in range(images)], recorded=True)
        return
    rows: list[tuple[int, _Job | None]] = []
    for image, own in groupby(sorted(jobs, key=lambda job: job.row), key=lambda job: job.row):
        for job in own:
            if rows and len(rows) + (1 if rows[-1][0] == image else 2) > _TAIL_ROWS:
                yield _Batch(rows)
                rows = []
            if not rows or rows[-1][0] != image:
                rows.append((image, None))
            rows.append((image, job))
    if rows:
        yield _Batch(rows)


def _run(model: EludeModel, recording: Recording, layer: str, batch: _Batch) -> None:
    """One tail pass: puts the outputs on its jobs."""
    y = recording.y[layer]
    outputs = [y[row : row + 1] if job is None else job.found[layer].output for row, job in batch.rows]
    jobs = [job for _, job in batch.rows]
    rows = torch.tensor([row for row, _ in batch.rows], device=y.device)
    later = {
        name: _changing(model.states[name], jobs)
        for name in model.layers[model.layers.index(layer) + 1 :]
        if any(job is not None and name in job.plan.edited for job in jobs)
    }
    given = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    out = model.tails.run(recording, layer, given, rows, later)
    null = recording.logits[0]
    for position, (row, job) in enumerate(batch.rows):
        if batch.recorded:
            null = recording.logits[row]
        elif job is None:
            null = out[position]
        if job is not None:
            job.steered, job.null = out[position], null


def _changing(state: SplitState, jobs: Sequence[_Job | None]) -> Callable[[Tensor, Tensor], Tensor]:
    """What the jobs, a row each, do to the output of a layer that runs in a tail; None leaves its row as it is."""

    def change(x: Tensor, y: Tensor) -> Tensor:
        changed = y.clone()
        for position, made in _changes(state, x, y, jobs):
            changed[position] = made.output[0]
        return changed

    return change


def _changes(state: SplitState, x: Tensor, y: Tensor, jobs: Sequence[_Job | None]) -> Iterator[tuple[int, LayerChange]]:
    """(row, its change) of each row that a job edits at this layer."""
    for position, job in enumerate(jobs):
        if job is not None and state.name in job.plan.edited:
            one = slice(position, position + 1)
            yield position, job.change(state, x[one], y[one])
