"""What an evaluation shows and what it does not, in a few short sentences for each layer, from its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elude_runtime.offline.evaluation.encoders import PIXELS
from elude_runtime.offline.evaluation.own_sets import (
    CONCEPTS,
    CONCEPTS_RANDOM_WEIGHTS,
    OTHER_NEURON,
    OWN,
    RANDOM_CONCEPTS,
    RANDOM_SUBUNITS,
    SUBUNITS,
    SUBUNITS_RANDOM_WEIGHTS,
)
from elude_runtime.offline.evaluation.result import CLEARER, EVEN, LESS, LayerResult
from elude_runtime.offline.evaluation.scores import INTRUDER

_PLAIN = ("hidden units", "k-means directions of x")
_CONTROLS = {
    CONCEPTS: (RANDOM_CONCEPTS, CONCEPTS_RANDOM_WEIGHTS, *_PLAIN),
    SUBUNITS: (RANDOM_SUBUNITS, OTHER_NEURON, SUBUNITS_RANDOM_WEIGHTS, *_PLAIN),
}
_SAID = {CLEARER: "clearer than", EVEN: "not told apart from", LESS: "less clear than"}


def statement(facts: Mapping[str, Any], layers: Sequence[LayerResult]) -> str:
    """A frame, a line of sentences for each layer, and what none of them says."""
    encoders = [e["name"] for e in facts["encoders"] if e["name"] != PIXELS]
    seen = f"to {' and '.join(encoders)}" if encoders else "to colours and edges alone"
    return "\n".join(
        [
            f"On {facts['images']['scored']} images that calibrated nothing, {seen}, by 95 % intervals of paired "
            "differences, weighted by share of variance over both ends:",
            *(" ".join(layer_sentences(layer)) for layer in layers),
            "This says nothing about other images, layers or encoders, and clear to an encoder is not yet meaningful "
            "to people.",
        ]
    )


def layer_sentences(result: LayerResult) -> list[str]:
    """At most four: the numbers of sets, the controls of concepts and of sub-units, what colours and `rest` leave."""
    found = []
    own = [name for name in OWN if result.named(name)]
    verdicts = {name: result.verdicts(name) for name in own}
    others = len(result.sets) - 1
    if not own or not others:
        found.append("There is nothing to compare.")
    else:
        counts = (f"{_SAID[v]} {len(verdicts[own[0]][v])}" for v in (CLEARER, EVEN, LESS))
        found.append(f"of {others} other sets {own[0]} are {', '.join(counts)}.")
    for name in own:
        of = {other: verdict for verdict, names in verdicts[name].items() for other in names}
        groups = {v: [n for n in _CONTROLS[name] if of.get(n) == v] for v in (CLEARER, EVEN, LESS)}
        said = [f"{_SAID[v]} {_listed(names)}" for v, names in groups.items() if names]
        if said:
            found.append(f"{name.capitalize()} are {'; '.join(said)}.")
    last = []
    pixel = [c for c in result.comparisons() if (c.own, c.encoder) == (CONCEPTS, PIXELS) and c.metric != INTRUDER]
    if pixel:
        clearer = sum(c.verdict == CLEARER for c in pixel)
        last.append(f"to colours and edges alone concepts are clearer in {clearer} of {len(pixel)} comparisons")
    if CONCEPTS in own and CONCEPTS in result.rest:
        last.append(f"{result.rest[CONCEPTS]:.0%} of the layer's variance is outside all concepts")
    if last:
        text = "; ".join(last)
        found.append(f"{text[0].upper()}{text[1:]}.")
    return [f"{result.layer}, {result.tokens}: {found[0]}", *found[1:]]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
