"""What the model still answers with a feature set's reconstruction in place of the layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.offline.evaluation.estimates import number
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.images import layer_recordings
from elude_runtime.offline.evaluation.tokens import TokenReader
from elude_runtime.offline.images import ImageSource, Progress

_Z = 1.96  # of a 95 % interval
_FLOATS = 16_000_000  # activations held at once: 64 MB


@dataclass
class TopKept:
    """On how many of the images the top class is the unedited model's."""

    kept: int = 0
    images: int = 0

    @property
    def value(self) -> float:
        return self.kept / self.images if self.images else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 1927: of a share close to 1, or at it, a bootstrap of the images knows nothing."""
        if not self.images:
            return float("nan"), float("nan")
        spread = _Z**2 / self.images
        middle = (self.value + spread / 2) / (1 + spread)
        half = (self.value * (1 - self.value) * spread + spread**2 / 4) ** 0.5 / (1 + spread)
        return max(0.0, middle - half), min(1.0, middle + half)

    def document(self) -> dict[str, float | None]:
        low, high = self.interval
        return {"value": number(self.value), "low": number(low), "high": number(high), "images": self.images}


def measure_fidelity(
    model: EludeModel, reader: TokenReader, sets: Sequence[FeatureSet], source: ImageSource, report: Progress
) -> list[TopKept | None]:
    """Of every set with a reconstruction, the images whose top class stays with it in place at all tokens of the
    reader's type, through the tail of the layer; the lossless sets by the same way as the lossy ones."""
    found = [None if one.reconstruct is None else TopKept() for one in sets]
    state = reader.state
    with torch.inference_mode(False), torch.no_grad():
        for recording in layer_recordings(model, state.name, source, report, f"fidelity: {state.name}"):
            reads = torch.cat([part for _, part in reader.read(recording.x[state.name])])
            y = recording.y[state.name]
            given = (state.linear.tokens(y.float())[:, reader.span] - state.linear.bias()).cpu()
            top, rows = recording.logits.argmax(1), torch.arange(len(y), device=y.device)
            for one, kept in zip(sets, found, strict=True):
                if kept is None:
                    continue
                change = torch.zeros(len(y), state.layout.total, state.linear.neurons)
                change[:, reader.span] = reconstructed(one, reads) - given
                with model.lock:
                    logits = model.tails.run(recording, state.name, state.changed(y, change.to(y.device)), rows)
                kept.kept += int((logits.argmax(1) == top).sum())
                kept.images += len(y)
    return found


def reconstructed(one: FeatureSet, reads: Tensor) -> Tensor:
    """[B, T_p, d]: the layer's output less its bias, as the set gives it back, at tokens [B, T_p, m]."""
    assert one.reconstruct is not None
    flat = reads.flatten(0, 1)
    step = max(1, _FLOATS // max(1, len(one.share), flat.shape[1]))
    return torch.cat([one.reconstruct(part) for part in flat.split(step)]).unflatten(0, reads.shape[:2])
