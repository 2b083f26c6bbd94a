"""What a request costs before it is run: its limits, and its work in predictions, so that one batch stays bounded.

A tail is counted by its share of a prediction's floating-point operations, which is the same in every run; a backward
pass as two forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from elude_runtime.analysis.model import EludeModel
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.problems import Problem
from elude_runtime.api.schema.request import Change, Explain, Request

_BACKWARD = 2
# torch's counter knows the attention kernels of GPUs only
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def tail_shares(model: EludeModel) -> dict[str, float]:
    """For every split layer, floating-point operations of a tail over those of a prediction."""
    parameter = next(model.base.parameters())
    images = torch.zeros(1, *model.data_config.input_size, device=parameter.device, dtype=parameter.dtype)
    tails = model.tails  # planned before anything is counted
    with _counter() as whole:
        recording = model.record(images)  # the operations of a prediction
    rows, shares = torch.zeros(1, dtype=torch.long, device=parameter.device), {}
    for layer in model.layers:
        with _counter() as tail, torch.no_grad():
            tails.run(recording, layer, recording.y[layer], rows)
        shares[layer] = round(min(1.0, tail.get_total_flops() / max(1, whole.get_total_flops())), 4)
    return shares


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def explain_work(explain: Explain, layers: Sequence[str], shares: Mapping[str, float]) -> float:
    """Predictions' worth of the tails, and of the passes to the image, of one explanation."""
    targets = count_targets(explain)
    nodes = explain.steps if explain.method in ("auto", "integrated_gradients") else 1
    rows = 1 + nodes * (1 + _BACKWARD * targets)
    if _ablates(explain):
        rows += targets * (explain.top_features + 1)
    work = rows * sum(shares[layer] for layer in layers)
    if explain.pixels:
        work += len(layers) * (1 + _BACKWARD * targets * explain.top_features)
    return work


def _ablates(explain: Explain) -> bool:
    return explain.method == "ablation" or explain.effects


def steer_work(edited: Sequence[str], shares: Mapping[str, float]) -> float:
    """Predictions' worth of a steered tail and the null edit beside it; the tail begins at the first edited layer."""
    return 2 * shares[edited[0]] if edited else 0.0


def count_targets(explain: Explain) -> int:
    return sum(getattr(target, "top", 1) for target in explain.targets)


def admitted(work: Sequence[float], budget: float) -> list[bool]:
    """Which requests of a batch are run, the cheapest first, and of equals the earlier ones: what costs nothing always
    is."""
    left, found = budget, [False] * len(work)
    for number in sorted(range(len(work)), key=lambda n: work[n]):
        if work[number] == 0 or work[number] <= left:
            found[number] = True
            left -= work[number]
    return found


def check_limits(request: Request, config: ServingConfig, layers: int) -> None:
    """Problem where a request to a checkpoint with that many split layers asks for more than the operator allows."""
    explain, found = request.explain, []
    if explain is not None:
        explained = layers if explain.layers is None else len(explain.layers)
        targets = count_targets(explain)
        found += [
            ("explain.targets", targets, config.max_targets),
            ("explain.layers", explained, config.max_layers),
            ("explain.top_features", explain.top_features, config.max_top_features),
            ("explain.steps", explain.steps, config.max_steps),
        ]
        listed = targets * explain.top_features * explained
        maps = (explain.heatmaps != "none") + explain.pixels
        per_feature = "explain.top_features times targets and layers"
        found.append((f"{per_feature}, with heatmaps or pixels", maps * listed, config.max_heatmaps))
        if _ablates(explain):
            found.append((f"{per_feature}, each for an ablation", listed, config.max_ablations))
    if request.steer is not None:
        found.append(("steer.edits and vectors", count_changes(request.steer), config.max_edits))
    if request.activations is not None:
        found.append(("activations.features", len(request.activations.features), config.max_activations))
    for name, value, limit in found:
        if value > limit:
            raise Problem("limit-exceeded", f"{name} is {value}, the limit is {limit}; ask for less.")


def check_work(work: float, config: ServingConfig) -> None:
    if work > config.max_work:
        raise Problem(
            "limit-exceeded",
            f"The request needs the work of {work:.0f} predictions, the limit is {config.max_work}; ask for fewer "
            "targets, steps, layers or features.",
        )


def count_changes(change: Change) -> int:
    return len(change.edits) + len(change.vectors)
