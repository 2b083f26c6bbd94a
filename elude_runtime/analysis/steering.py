"""Steering: edits of features, as the difference they make to the layer's output, computed in float32 and cast once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.errors import EludeError
from elude_runtime.network.tail import Recording, TailRunner

MODES = ("scale", "ablate")


class EditError(EludeError):
    """An edit that cannot be carried out, or two that contradict each other."""


@dataclass(frozen=True)
class Edit:
    """A change of one feature on all tokens of its type: `scale` t -> value * t, `ablate` t -> 0 (calibration mean).

    On a concept it acts on every member. feature: its name, `LAYER/P17` or `LAYER/NEURON/p3`.
    """

    feature: str
    mode: str = "ablate"
    value: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise EditError(f"There is no edit mode {self.mode!r}; use one of {', '.join(MODES)}.")
        if self.mode == "scale" and self.value is None:
            raise EditError("An edit with mode 'scale' needs a value: 0 removes the feature, 1 leaves it.")
        if self.value is not None and not math.isfinite(self.value):
            raise EditError(f"The value of an edit must be a finite number, not {self.value}.")
        if self.mode == "ablate" and self.value is not None:
            raise EditError("An edit with mode 'ablate' takes no value; use mode 'scale' for one.")

    @property
    def factor(self) -> float:
        """v of t -> v * t."""
        return 0.0 if self.value is None else float(self.value)


@dataclass(frozen=True)
class Steered:
    """default [R, K]: the unchanged model's output; steered [R, K]: with the edits; change [R, K]: their difference,
    measured against a null edit in a tail of the same shape; relative_norm: per layer, norm of the change of its
    output over the norm of that output, over the edited tokens, for each row."""

    default: Tensor
    steered: Tensor
    change: Tensor
    relative_norm: dict[str, list[float]] = field(default_factory=dict)


def steer_rows(
    runner: TailRunner,
    recording: Recording,
    rows: list[int],
    states: dict[str, SplitState],
    edits: list[tuple[Feature, Edit]],
) -> Steered:
    """Apply edits to the chosen images of a recorded pass. states: by layer, in network order.

    A row that no edit changes is the unedited row itself, bit for bit. EditError when two edits overlap.
    """
    check_overlaps(edits, states)
    by_layer = {name: [e for e in edits if e[0].layer == name] for name in states}
    order = [name for name in states if by_layer[name]]
    default = recording.logits[rows]
    if not order:
        return Steered(default, default.clone(), torch.zeros_like(default))
    norms: dict[str, list[float]] = {}
    first = states[order[0]]
    index = torch.tensor(rows, device=default.device)
    # A null edit shares the tail batch, so that both sides have the same floating-point shape. Where the tail has the
    # recorded pass's own shape, that pass already is the null edit.
    whole = rows == list(range(len(recording.images)))
    with torch.no_grad():
        x = recording.x[first.name].index_select(0, index)
        y = recording.y[first.name].index_select(0, index)
        edited = _edited(first, x, y, by_layer[first.name], norms)
        tail_rows = index if whole else torch.cat([index, index])
        later = {n: _later(states[n], by_layer[n], norms, 0 if whole else len(rows)) for n in order[1:]}
        out = runner.run(recording, first.name, edited if whole else torch.cat([y, edited]), tail_rows, later)
    null = default if whole else out[: len(rows)]
    steered = out if whole else out[len(rows) :]
    still = torch.tensor([all(n[i] == 0 for n in norms.values()) for i in range(len(rows))], device=out.device)
    change = torch.where(still[:, None], torch.zeros_like(steered), steered - null)
    return Steered(default, torch.where(still[:, None], default, steered), change, norms)


def check_overlaps(edits: list[tuple[Feature, Edit]], states: dict[str, SplitState]) -> None:
    """EditError when two edits act on one sub-unit: the same feature twice, or a concept and one of its members."""
    concepts: dict[tuple[str, int, int], str] = {}
    subunits: dict[tuple[str, int, int, int], str] = {}
    for feature, _ in edits:
        state = states[feature.layer]
        slot, key = state.slot(feature), (feature.layer, feature.token_type)
        if feature.neuron is None:
            clash = concepts.get((*key, slot))
            concepts[(*key, slot)] = feature.name
        else:
            clash = subunits.get((*key, feature.neuron, slot))
            subunits[(*key, feature.neuron, slot)] = feature.name
        if clash:
            raise EditError(f"Two edits change {feature.name}; keep one of them.")
    for (layer, token_type, neuron, slot), name in subunits.items():
        concept = int(states[layer].partition.concept_slots(token_type)[neuron, slot])
        if (layer, token_type, concept) in concepts:
            raise EditError(
                f"{name} belongs to {concepts[(layer, token_type, concept)]}, and both are edited; keep one of them."
            )


def _edited(
    state: SplitState, x: Tensor, y: Tensor, edits: list[tuple[Feature, Edit]], norms: dict[str, list[float]]
) -> Tensor:
    """The layer's output with the edits' difference added."""
    change = torch.zeros(x.shape[0], state.layout.total, state.linear.neurons, device=x.device)
    touched = torch.zeros(state.layout.total, dtype=torch.bool, device=x.device)
    for feature, edit in edits:
        if edit.factor != 1.0:
            change += (edit.factor - 1.0) * state.write(x, feature)
            touched[state.layout.slices[feature.token_type]] = True
    before = state.linear.tokens(y).float()
    scale = before[:, touched].flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    norms[state.name] = (change.flatten(1).norm(dim=1) / scale).tolist() if bool(touched.any()) else [0.0] * len(x)
    return state.changed(y, change)


def _later(
    state: SplitState, edits: list[tuple[Feature, Edit]], norms: dict[str, list[float]], null_rows: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The edits of a layer further on, applied to the already steered activations; the null rows stay as they are."""

    def change(x: Tensor, y: Tensor) -> Tensor:
        edited = _edited(state, x[null_rows:], y[null_rows:], edits, norms)
        return edited if not null_rows else torch.cat([y[:null_rows], edited])

    return change
