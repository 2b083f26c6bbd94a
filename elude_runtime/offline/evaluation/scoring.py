"""Feature sets of one layer and token type while the scoring images stream by, and then their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from elude_runtime.offline.evaluation.agreement import ConceptAuc
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.scores import Judge, SetScores, score_set
from elude_runtime.offline.evaluation.tokens import Peaks, PeakStream, TokenReader, TokenSample

_HELD_OUT = 6000  # tokens of the scoring images that correlations are taken over
_LEVELS = 8_000  # calibration tokens that levels of activations are taken from


class Scoring:
    """images: how many there will be."""

    def __init__(self, reader: TokenReader, sets: Sequence[FeatureSet], images: int, seed: int) -> None:
        self.sets, self._seed = sets, seed
        self._stream = PeakStream(reader, sets, images)
        self._held = TokenSample(reader, images, seed + 1, _HELD_OUT)

    def add(self, x: Tensor) -> None:
        """The layer's input [B, ...] at the images that follow."""
        self._stream.add(x)
        self._held.add(x)

    @property
    def peaks(self) -> list[Peaks]:
        return self._stream.peaks

    def held_out(self) -> Tensor:
        """float32 [S, m]: what a sample of the tokens read."""
        return self._held.inputs()

    def scores(
        self, inputs: Tensor, judges: Sequence[Judge], halves: Tensor, aucs: Sequence[Mapping[str, ConceptAuc]],
        done: Callable[[], None],
    ) -> tuple[list[SetScores], list[Tensor]]:  # fmt: skip
        """The scores of every set, and the means [F] of its activations on calibration tokens, inputs [S, m]. aucs: of
        every set, from its `peaks`; done: called after each."""
        tokens, levels = self.held_out(), inputs[:: max(1, len(inputs) // _LEVELS)]
        scores, means = [], []
        for one, peaks, auc in zip(self.sets, self.peaks, aucs, strict=True):
            activations = one.activations(levels)
            means.append(activations.mean(0))
            scores.append(score_set(one, peaks, activations, one.activations(tokens), judges, halves, self._seed, auc))
            done()
        return scores, means
