"""The neuron that the overview takes apart: the one in which it can be seen best."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from elude_runtime.network.tokens import LETTERS, TYPE_NAMES
from elude_runtime.offline.report.material import Material

_TOP = "top"


def hero(material: Material) -> dict[str, Any] | None:
    """The neuron whose own exemplars are told apart best: of the images at its two ends, those that are exemplars of
    one of its sub-units too, at the same end, by as many different sub-units as possible; then as many images as
    possible. Patches before the class token. None without exemplars, or where no neuron falls into parts."""
    exemplars = material.exemplars
    if exemplars is None:
        return None
    place = {entry.name: i for i, entry in enumerate(material.manifest.layers)}
    best: tuple[tuple[int, ...], dict[str, Any]] | None = None
    for (layer, tokens, neuron), subunits in _live_subunits(material).items():
        letter = LETTERS[TYPE_NAMES.index(tokens)]
        own = exemplars.of(f"{layer}/y{neuron}" + ("" if letter == LETTERS[0] else letter))
        wanted = {(e.end, e.image) for e in own if e.role == _TOP}
        told = [{(e.end, e.image) for e in exemplars.of(name) if e.role == _TOP} & wanted for name in subunits]
        seen = len(set().union(*told))
        merit = (letter == LETTERS[0], sum(map(bool, told)), seen, len(subunits), -neuron)
        if len(subunits) > 1 and (best is None or merit > best[0]):
            best = merit, {"layer": place[layer], "tokens": tokens, "neuron": neuron}
    return best and best[1]


def _live_subunits(material: Material) -> dict[tuple[str, str, int], list[str]]:
    """{(layer, tokens, neuron): sub-units that vary}, of token types that can change the output."""
    live = {(e.name, t.name) for e in material.manifest.layers for t in e.token_types if t.live}
    columns = ("layer", "token_type", "neuron", "subunit", "std", "feature")
    found: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    rows = zip(*(material.table[c].to_pylist() for c in columns), strict=True)
    for layer, tokens, neuron, subunit, std, name in rows:
        if subunit is not None and std > 0 and (layer, tokens) in live:
            found[layer, tokens, neuron].append(name)
    return found
