"""Finding what carries a suspicious class without labels, and what then is known of it from the generator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from elude_runtime.analysis.model import EludeModel
from elude_runtime.demo.images import CLASSES, Sample
from elude_runtime.network.preprocessing import DataConfig, to_input
from elude_runtime.offline.evaluation.agreement import auc

TOP_FEATURES = 12  # that are asked of each explanation
# A feature belongs to the story when its mean attribution is at least this share of the largest one's.
_NOTABLE = 1 / 10
_TELLS = 0.9


@dataclass(frozen=True)
class Found:
    """A feature that carries the suspicious class. auc: how well its activation tells pictures with the watermark from
    those without (known from the generator, not used to find it); lowest, highest: pictures at its two ends."""

    name: str
    attribution: float
    auc: float
    lowest: list[Image.Image]
    highest: list[Image.Image]

    @property
    def tells(self) -> bool:
        """Whether either end of it is the watermark."""
        return max(self.auc, 1 - self.auc) > _TELLS


def notable(explanations: Sequence[Mapping[str, float]]) -> list[tuple[str, float]]:
    """Features with their mean attributions, the notable ones, largest first. explanations: {feature: attribution} of
    every picture."""
    totals: dict[str, float] = defaultdict(float)
    for one in explanations:
        for name, attribution in one.items():
            totals[name] += attribution / len(explanations)
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return [item for item in ranked if item[1] >= ranked[0][1] * _NOTABLE]


def look_at(
    names: Sequence[tuple[str, float]], samples: Sequence[Sample], model: EludeModel, data: DataConfig
) -> list[Found]:
    """What a person would do with a feature's name: look at the pictures at its two ends."""
    transform = data.transform()
    images = torch.stack([to_input(s.image, transform) for s in samples])
    marked = torch.tensor(["watermark" in s.concepts for s in samples])
    found = []
    for name, attribution in names:
        feature = model.feature(name)
        with torch.no_grad():
            activation = model.state(feature.layer).activations(
                model.record(images, [feature.layer]).x[feature.layer], feature
            )
        peak = activation.gather(1, activation.abs().argmax(1, keepdim=True))
        order = np.argsort(peak[:, 0].numpy(), kind="stable")
        ends = [[samples[i].image for i in part] for part in (order[:6], order[::-1][:6])]
        found.append(Found(name, attribution, float(auc(peak, marked)[0]), *ends))
    return found


def accuracy_by_group(samples: Sequence[Sample], predicted: Sequence[int]) -> dict[tuple[str, bool], float]:
    """Accuracy of every group (class, watermark)."""
    hits: dict[tuple[str, bool], list[bool]] = defaultdict(list)
    for sample, index in zip(samples, predicted, strict=True):
        hits[(CLASSES[sample.label], "watermark" in sample.concepts)].append(index == sample.label)
    return {group: float(np.mean(values)) for group, values in hits.items()}
