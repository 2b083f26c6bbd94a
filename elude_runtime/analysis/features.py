"""Names of features: `LAYER/P17` a concept, `LAYER/12/p3` a sub-unit, `rest` in place of the number for background."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from elude_runtime.errors import FeatureError, did_you_mean
from elude_runtime.network.tokens import LETTERS

CONCEPT, SUBUNIT = "concept", "subunit"
REST = "rest"
_PATTERN = re.compile(r"(?P<layer>.+?)(?:/(?P<neuron>\d{1,9})/(?P<lower>[pc])|/(?P<upper>[PC]))(?P<index>\d{1,9}|rest)")


@dataclass(frozen=True)
class Feature:
    """A concept or sub-unit of one layer and token type. index: its number, None for `rest`; neuron: of a sub-unit."""

    layer: str
    token_type: int
    index: int | None
    neuron: int | None = None

    @property
    def kind(self) -> str:
        return CONCEPT if self.neuron is None else SUBUNIT

    @property
    def name(self) -> str:
        letter = LETTERS[self.token_type]
        number = REST if self.index is None else str(self.index)
        if self.neuron is None:
            return f"{self.layer}/{letter.upper()}{number}"
        return f"{self.layer}/{self.neuron}/{letter}{number}"

    def __str__(self) -> str:
        return self.name


def parse_feature(name: str, layers: Iterable[str]) -> Feature:
    """A feature from its name, in one of `layers`. FeatureError with the closest names when it is not one."""
    layers = list(layers)
    match = _PATTERN.fullmatch(name)
    if not match:
        example = f"{layers[0]}/P0" if layers else "LAYER/P0"
        raise FeatureError(f"{name[:80]!r} is not a feature's name; names look like {example} or {example[:-2]}12/p3.")
    if match["layer"] not in layers:
        hint = did_you_mean(match["layer"], layers) or f" It has {', '.join(layers)}."
        raise FeatureError(f"The checkpoint has no split layer {match['layer'][:80]!r}.{hint}")
    index = None if match["index"] == REST else int(match["index"])
    if match["neuron"] is None:
        return Feature(match["layer"], LETTERS.index(match["upper"].lower()), index)
    return Feature(match["layer"], LETTERS.index(match["lower"]), index, int(match["neuron"]))
