"""How far each attribution method is from adding up, measured once when a checkpoint is made."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from elude_runtime.analysis.attribution import GRADIENT, INTEGRATED, ExplainOptions, path_nodes
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.checkpoint.manifest import AttributionEntry
from elude_runtime.network.tail import Recording, TailRunner

ACCEPTABLE = 0.1  # median relative completeness error under which the cheaper method is good enough
_ROWS = 4  # images at once: the gradients of a whole network's tail take much memory


@torch.inference_mode(False)
def measure_completeness(
    model: EludeModel, images: Tensor, progress: Callable[[int], None] | None = None
) -> dict[str, AttributionEntry]:
    """For every split layer the median over images [B, 3, H, W] of |completeness_error| / |value - baseline|, target
    the top class (an embedding: its own direction); `auto` is the cheapest method under 0.1, else the most accurate."""
    steps = {GRADIENT: None, INTEGRATED: ExplainOptions().steps}
    errors: dict[str, dict[str, list[float]]] = {n: {m: [] for m in steps} for n in model.layers}
    for part in images.split(_ROWS):
        recording = model.record(part)
        out = recording.logits.float()
        # the target as a direction of the output: a logit minus the mean logit, or the embedding's own direction
        if model.manifest.output == "logits":
            directions = torch.nn.functional.one_hot(out.argmax(-1), out.shape[-1]) - 1 / out.shape[-1]
        else:
            directions = out / out.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny)
        for name, state in model.states.items():
            for method in steps:
                errors[name][method] += _relative_errors(model.tails, recording, state, directions, steps[method])
        if progress:
            progress(len(part) * len(errors))
    found = {}
    for name, by_method in errors.items():
        medians = {m: round(statistics.median(v), 4) for m, v in by_method.items()}
        auto = GRADIENT if medians[GRADIENT] < ACCEPTABLE or medians[GRADIENT] <= medians[INTEGRATED] else INTEGRATED
        found[name] = AttributionEntry(auto=auto, completeness=medians, images=len(images))  # type: ignore[arg-type]
    return found


def _relative_errors(
    runner: TailRunner, recording: Recording, state: SplitState, directions: Tensor, steps: int | None
) -> list[float]:
    """|sum of all attributions - (value - baseline)| / |value - baseline| of every image. The attributions of all
    features of a layer add up to gradient * (y - c), so that none of them is computed by itself."""
    y = recording.y[state.name]
    c = state.linear.untokens(state.baseline()[None].to(y.dtype), y[:1]).expand_as(y)
    rows = torch.arange(len(y), device=y.device)
    with torch.no_grad():
        baseline = (runner.run(recording, state.name, c.contiguous(), rows).float() * directions).sum(-1)
    value = (recording.logits.float() * directions).sum(-1)
    total = torch.zeros_like(value)
    for a, weight in path_nodes(steps):
        with torch.enable_grad():
            leaf = (c + a * (y - c)).detach().requires_grad_()
            target = (runner.run(recording, state.name, leaf, rows).float() * directions).sum()
            (gradient,) = torch.autograd.grad(target, leaf)
        total += weight * (gradient.float() * (y - c).float()).flatten(1).sum(1)
    difference = value - baseline
    # where the layer does not matter to the target there is rounding to share out, and nothing to be wrong about
    still = difference.abs() < 1e-5 * value.abs()
    return torch.where(still, 0, (total - difference).abs() / difference.abs().clamp(min=1e-12)).tolist()
