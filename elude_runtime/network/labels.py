"""Class names that published weights bring along: a fine-tuned model's own, or ImageNet's where the weights say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn


def labels_of(model: nn.Module, name: str) -> list[str]:
    """One text a class, or nothing where it is not certain what the classes are.

    name: what the weights were named by. Certain are the names in their own configuration (`label_names`, described
    by `label_descriptions`), and ImageNet's for weights that timm publishes, whose tag ends in an ImageNet of the same
    number of classes (`…_in1k`, `…_in12k`, `…_in22k`).
    """
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    classes = int(getattr(model, "num_classes", 0) or 0)
    if classes and config.get("num_classes") == classes:
        own = _own_labels(config, classes)
        if own:
            return own
        subset = _imagenet(config, name)
        if subset:
            info = ImageNetInfo(subset)
            texts = [info.index_to_description(i) for i in range(classes)]
            return _distinct(texts, list(info.label_names()))
    return []


def _own_labels(config: Mapping[str, Any], classes: int) -> list[str]:
    names: Any = config.get("label_names")
    if isinstance(names, Mapping):  # {class: name}, which may have gaps
        by_class = {int(k): v for k, v in names.items() if str(k).isdecimal()}
        names = [by_class.get(i) for i in range(classes)]
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != classes:
        return []
    if not all(isinstance(n, str) and n for n in names):
        return []
    descriptions = config.get("label_descriptions") or {}
    texts = [str(descriptions.get(n) or n) if isinstance(descriptions, Mapping) else n for n in names]
    return _distinct(texts, list(names), shorten=False)


def _imagenet(config: Mapping[str, Any], name: str) -> str | None:
    """The ImageNet subset that timm's own weights were trained on last, where tag and number of classes agree."""
    source, _, where = name.rpartition(":")
    if source == "local-dir" or ("/" in where and not where.startswith("timm/")):
        return None  # somebody's fine-tuned model may keep the tag of what it was made from
    tag = where.partition("@")[0].removeprefix("timm/").partition(".")[2] or str(config.get("tag") or "")
    last = re.findall(r"(?:^|_)(in\d+k)(?=_|$)", tag)
    subset = infer_imagenet_subset(dict(config))
    if not last or not subset:
        return None
    return subset if f"-{last[-1].removeprefix('in')}" in subset else None


def _distinct(texts: list[str], names: list[str], *, shorten: bool = True) -> list[str]:
    """A text for every class that no other class has: the first synonym, else all of them, else with the name."""
    found = [t.split(",")[0].strip() for t in texts] if shorten else texts
    for longer in (texts, [f"{t} ({n})" for t, n in zip(texts, names, strict=True)]):
        counts = Counter(found)
        found = [new if counts[old] > 1 else old for old, new in zip(found, longer, strict=True)]
    return found
