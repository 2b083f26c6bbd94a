"""A label for each feature from what the model itself says of its exemplars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.best_images import NOWHERE

NAMED = 3  # classes of an end at most
LONGEST = 60  # characters
_LEAST_SHARE = 0.02  # mean probability, over the top images but the one that is surest of the class
_LEAST_ODDS = 5.0  # over the odds of the base rate
_BETWEEN = " ↔ "  # what is between the ends


def shown_classes(places: Tensor, answers: Answers, classes: Sequence[str]) -> Tensor:
    """int64 [F, 3]: the classes that stand out among the top images of an end, the most first, -1 where there is none.

    places int64 [n, F]; classes: their names, and without any none stands out. A class stands out by its mean
    probability over the top images, its surest image left out (one image speaks for nothing): at least .02, at odds of
    at least 5 times those of its base rate over all images. Probabilities beyond an image's first ten classes count
    as 0.
    """
    features = places.shape[1]
    shown = torch.full((features, NAMED), -1)
    feature, rank = (places.T != NOWHERE).nonzero(as_tuple=True)
    if not len(feature) or not classes:
        return shown
    rows = answers.rows(places[rank, feature])
    numbers, probabilities = answers.classes[rows].long().numpy(), answers.probabilities[rows].double().numpy()
    count = len(answers.total)
    key = feature.numpy()[:, None] * count + numbers
    pairs, which = np.unique(key.ravel(), return_inverse=True)
    total, most = np.zeros(len(pairs)), np.zeros(len(pairs))
    np.add.at(total, which, probabilities.ravel())
    np.maximum.at(most, which, probabilities.ravel())
    images = torch.bincount(feature, minlength=features).numpy()
    of, named = pairs // count, pairs % count
    share = (total - most) / np.maximum(1, images[of] - 1)
    base = answers.base_rate.numpy()[named]
    out = (share >= _LEAST_SHARE) & (share * (1 - base) >= _LEAST_ODDS * base * (1 - share))
    of, named, share = of[out], named[out], share[out]
    order = np.lexsort((-share, of))
    of, named = of[order], named[order]
    number = np.arange(len(of)) - np.searchsorted(of, of)
    first = number < NAMED
    shown[torch.from_numpy(of[first]), torch.from_numpy(number[first])] = torch.from_numpy(named[first])
    return shown


def label_texts(positive: Tensor, negative: Tensor, classes: Sequence[str]) -> list[str]:
    """The labels of F features from what `shown_classes` says of both ends, [F, 3] each: `zebra, sorrel ↔ minivan`, or
    nothing."""
    return [_label(p, n, classes) for p, n in zip(positive.tolist(), negative.tolist(), strict=True)]


def _label(positive: Sequence[int], negative: Sequence[int], classes: Sequence[str]) -> str:
    ends = [[_short(classes[number]) for number in end if number >= 0] for end in (positive, negative)]
    while len(text := _joined(ends)) > LONGEST and max(map(len, ends)) > 1:
        max(ends, key=len).pop()
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _joined(ends: list[list[str]]) -> str:
    positive, negative = (", ".join(end) for end in ends)
    return f"{positive}{_BETWEEN}{negative}".strip() if negative else positive


def _short(name: str) -> str:
    """The first of a class's names, in characters that are text."""
    return "".join(c for c in " ".join(name.split(",")[0].split()) if c.isprintable())
