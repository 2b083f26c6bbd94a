"""Groups of classes that are steered against all others: how they are named, their targets, their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.analysis.targets import Target
from elude_runtime.errors import SettingsError, did_you_mean

LEAST_IMAGES = 4


@dataclass(frozen=True)
class ClassGroup:
    """Some of the model's `size` classes, not all, ascending."""

    name: str
    members: tuple[int, ...]
    size: int

    @property
    def target(self) -> Target:
        """The mean of the group's logits minus the mean of the others'."""
        inside, outside = 1 / len(self.members), -1 / (self.size - len(self.members))
        own = set(self.members)
        return Target(direction=tuple(inside if i in own else outside for i in range(self.size)))

    def selectivity(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(drop of the target, mean |change| of the others) of each row [R - 1] of logits [R, C] against the first.

        The others' logits are centred on their own mean: what moves all of them alike is part of the target's drop, and
        no harm among them.
        """
        change = (logits[1:] - logits[0]).float().cpu()
        inside = torch.zeros(self.size, dtype=torch.bool)
        inside[list(self.members)] = True
        others = change[:, ~inside]
        mean = others.mean(1)
        return mean - change[:, inside].mean(1), (others - mean[:, None]).abs().mean(1)


@dataclass(frozen=True, eq=False)
class GroupImages:
    """Places of images whose top class is in a group: features are chosen on some and reported on the others."""

    group: ClassGroup
    choosing: Tensor
    reporting: Tensor


def class_groups(asked: Mapping[str, Sequence[int | str]], labels: Sequence[str], size: int) -> list[ClassGroup]:
    """Groups from {name: indices or labels} for a model of `size` classes. SettingsError for a class that it does not
    have, a label of several classes, and a group that is empty, names a class twice or is all classes."""
    found = []
    for name, classes in asked.items():
        members = [_index(name, c, labels, size) for c in classes]
        twice = [i for i, count in Counter(members).items() if count > 1]
        if twice:
            raise SettingsError(f"The class group {name!r} names class {twice[0]} twice; name each class once.")
        if not 0 < len(members) < size:
            number = "all" if members else "none"
            raise SettingsError(f"The class group {name!r} has {number} of the model's classes; name some of them.")
        found.append(ClassGroup(name, tuple(sorted(members)), size))
    return found


def _index(group: str, asked: int | str, labels: Sequence[str], size: int) -> int:
    if isinstance(asked, str):
        having = [i for i, label in enumerate(labels) if label == asked]
        if not having:
            hint = did_you_mean(asked, labels) or (" Name classes by index." if not labels else "")
            raise SettingsError(f"The class group {group!r} names {asked[:80]!r}, a label the model lacks.{hint}")
        if len(having) > 1:
            raise SettingsError(
                f"The class group {group!r} names {asked!r}, which {len(having)} classes are called; use their indices "
                f"{', '.join(map(str, having))}."
            )
        return having[0]
    if not 0 <= asked < size:
        raise SettingsError(f"The class group {group!r} names class {asked}; the model has classes 0 to {size - 1}.")
    return asked


def group_images(
    groups: Sequence[ClassGroup], tops: Tensor, places: Tensor, count: int, seed: int
) -> tuple[list[GroupImages], list[str]]:
    """Of every group `count` images at most to choose features on and as many to report on, drawn at random from those
    whose top class, tops [N], is in it; and a sentence for each group that has too few. places [N]."""
    found, short = [], []
    for group in groups:
        own = places[torch.isin(tops, torch.tensor(group.members))]
        if len(own) < LEAST_IMAGES:
            short.append(
                f"The model puts {len(own)} of the scored images into the class group {group.name!r}; with fewer than "
                f"{LEAST_IMAGES} it is left out."
            )
            continue
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[: 2 * count]
        half = len(order) // 2
        found.append(GroupImages(group, own[order[:half]].sort().values, own[order[half:]].sort().values))
    return found, short
