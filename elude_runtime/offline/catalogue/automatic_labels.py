"""A label for each feature from what the model itself says of its exemplars."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.best_images import NOWHERE
from elude_runtime.offline.catalogue.layer_pass import TOP

NAMED = 3  # classes of an end at most
LONGEST = 60  # characters
_FEWEST = 3  # top images that speak for an end
_FEWEST_READ = 20  # images of which a class's spread is known
_BY_CHANCE = 0.01  # ends of images drawn at random that would be named
_DRAWS = 1000  # such ends
_AT_ONCE = 16_000_000  # logits gathered at once
_BETWEEN = " ↔ "  # what is between the ends


class StandingOut:
    """Which classes stand out among the top images of an end.

    What counts is what the model says of all top images together, not only its first answers: the mean of a class's
    centred logit over them, above its mean over all images, in standard errors. A class stands out where this is more
    than the largest of any class for all but one in a hundred ends of as many images drawn at random. An end needs
    three images, and a catalogue twenty. classes: their names, and without any none stands out.
    """

    def __init__(self, answers: Answers, classes: Sequence[str]) -> None:
        """answers: of a pass that has ended."""
        self.answers, self.classes = answers, classes

    @cached_property
    def _least(self) -> Tensor:
        """float32 [TOP + 1], by the number of an end's images: what a class has to reach."""
        return torch.cat([torch.full((_FEWEST,), torch.inf), _by_chance(self.answers, TOP)])

    def shown(self, places: Tensor) -> Tensor:
        """int64 [F, 3]: the classes of F ends that stand out, the most first, -1 where there is none. places int64
        [n, F], n at most `TOP`."""
        answers, features = self.answers, places.shape[1]
        shown = torch.full((features, NAMED), -1)
        if not self.classes or answers.count < _FEWEST_READ:
            return shown
        step = max(1, _AT_ONCE // (len(places) * len(self.classes)))
        for start in range(0, features, step):
            part = places[:, start : start + step]
            there = part != NOWHERE
            rows = answers.rows(torch.where(there, part, answers.places[0]))
            errors = _standard_errors(answers, answers.logits[rows], there)
            found = errors.topk(min(NAMED, len(self.classes)), dim=1)
            named = torch.where(found.values > self._least[there.sum(0)][:, None], found.indices, -1)
            shown[start : start + step, : named.shape[1]] = named
        return shown


def _standard_errors(answers: Answers, logits: Tensor, there: Tensor) -> Tensor:
    """float32 [F, K]: how far each class's mean over an end's images is above that over all. logits [n, F, K];
    there bool [n, F]: which of them are images."""
    images = there.sum(0)
    mean = (logits.float() * there[..., None]).sum(0) / images.clamp(min=1)[:, None]
    std = answers.std.float()
    return torch.where(std > 0, (mean - answers.mean.float()) / std, 0) * images.sqrt()[:, None]


def _by_chance(answers: Answers, most: int) -> Tensor:
    """float32 [most - 2]: what the largest class of an end of 3, 4, … random images reaches once in a hundred."""
    g = torch.Generator().manual_seed(0)
    images = len(answers.sample)
    sets = torch.rand(_DRAWS, images, generator=g).argsort(1)[:, :most].T  # [most, draws], without one twice
    reached = []
    for count in range(_FEWEST, most + 1):
        own = sets[: min(count, images)]
        part = _AT_ONCE // max(1, own.shape[0] * answers.sample.shape[1])
        largest = [
            _standard_errors(answers, answers.sample[some], torch.ones_like(some, dtype=torch.bool)).amax(1)
            for some in own.split(max(1, part), dim=1)
        ]
        reached.append(torch.cat(largest).quantile(1 - _BY_CHANCE))
    return torch.stack(reached)


def label_texts(positive: Tensor, negative: Tensor, classes: Sequence[str]) -> list[str]:
    """The labels of F features from what `StandingOut` says of both ends, [F, 3] each: `zebra, sorrel ↔ minivan`, or
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
