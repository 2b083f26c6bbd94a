"""How far each attribution method is from adding up, measured once when a checkpoint is made."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from torch import Tensor

from elude_runtime.analysis.attribution import GRADIENT, INTEGRATED, ExplainOptions
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.targets import Target
from elude_runtime.checkpoint.manifest import AttributionEntry

ACCEPTABLE = 0.1  # median relative completeness error under which the cheaper method is good enough


def measure_completeness(
    model: EludeModel, images: Tensor, progress: Callable[[int], None] | None = None
) -> dict[str, AttributionEntry]:
    """For every split layer the median over images [B, 3, H, W] of |completeness_error| / |value - baseline|, target
    the top class (an embedding: its own direction); `auto` is the cheapest method under 0.1, else the most accurate."""
    errors: dict[str, dict[str, list[float]]] = {n: {GRADIENT: [], INTEGRATED: []} for n in model.layers}
    recording = model.record(images)
    for row in range(len(images)):
        out = recording.logits[row].float()
        if model.manifest.output == "logits":
            target = Target(int(out.argmax()))
        else:
            target = Target(direction=tuple((out / out.norm()).tolist()))
        for method in (GRADIENT, INTEGRATED):
            explanation = model.explain_row(
                recording, row, [target], model.layers, ExplainOptions(method, top_features=1)
            )
            for layer in explanation[0].layers:
                if layer.completeness_error is not None:
                    difference = abs(explanation[0].value - layer.baseline)
                    errors[layer.layer][method].append(abs(layer.completeness_error) / max(difference, 1e-12))
        if progress:
            progress(len(model.layers))
    found = {}
    for name, by_method in errors.items():
        medians = {m: round(statistics.median(v), 4) for m, v in by_method.items()}
        auto = GRADIENT if medians[GRADIENT] < ACCEPTABLE or medians[GRADIENT] <= medians[INTEGRATED] else INTEGRATED
        found[name] = AttributionEntry(auto=auto, completeness=medians, images=len(images))  # type: ignore[arg-type]
    return found
