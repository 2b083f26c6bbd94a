"""Stability: whether a rewrite from other images of the same kind finds the same features.

The base model is rewritten twice, by the checkpoint's own method, from disjoint halves of the calibration images; what
the two find is compared at tokens of the scoring images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.offline.base_model import BaseModel
from elude_runtime.offline.evaluation.agreement import Match, adjusted_rand_index, matched_to_random
from elude_runtime.offline.evaluation.estimates import number
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.own_sets import (
    CONCEPTS,
    SUBUNITS,
    concept_set,
    own_split,
    random_split,
    siblings,
    subunit_set,
)
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.offline.rewrite import rewrite_checkpoint
from elude_runtime.partition import SplitConfig


class CalibrationImages:
    """Images of a source, as batches that can be read again and again."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.images for batch in self._source.numbered() if len(batch.places))


def rewritten_halves(
    model: EludeModel, layers: Sequence[str], source: ImageSource, folder: Path, report: Progress
) -> tuple[EludeModel, EludeModel]:
    """Two checkpoints of the same base model, each from every second one of the images."""
    first, second = (
        rewritten(
            model, model.base, layers, CalibrationImages(source.at(source.places[half::2])), folder / f"half{half}",
            f"half {half + 1}", report,
        )
        for half in range(2)
    )  # fmt: skip
    return first, second


def rewritten(
    model: EludeModel, base: nn.Module, layers: Sequence[str], images: CalibrationImages, out: Path, stage: str,
    report: Progress,
) -> EludeModel:  # fmt: skip
    """A network of the checkpoint's architecture, `base`, rewritten by the checkpoint's own method."""
    manifest = model.manifest
    known = {f.name for f in fields(SplitConfig)}
    config = SplitConfig(**{k: v for k, v in manifest.method.items() if k in known})
    files: tuple[Path, ...] = ()
    root = None
    if manifest.model.kind == "factory" and model.directory is not None:
        root = model.directory / "factory"
        files = tuple(root / name for name in manifest.model.files)
    device = next(model.base.parameters()).device
    rewrite_checkpoint(
        BaseModel(base, manifest.model, files, root), images, out, config, layers=list(layers),
        concepts=manifest.method.get("concepts", 96), device=device, data_config=model.data_config,
        progress=lambda part, done, total: report(f"{stage}: {part}", done, total),
    )  # fmt: skip
    return load(out, device, trust_factory=True)


def compare_halves(
    halves: tuple[EludeModel, EludeModel], layer: str, token_type: int, calibration: Tensor, held_out: Tensor,
    neurons: Tensor, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Matched activation correlation of concepts, and of sub-units within their neurons, each beside a size-matched
    random partition of the second half; ARI of the edges (those of weight zero are in `rest` and left out), likewise
    beside the random partition, which keeps the signs. calibration, held_out [S, m]: what tokens read."""
    splits = [own_split(half.state(layer), token_type, calibration) for half in halves]
    random = random_split(splits[1], calibration, seed)
    written = (splits[0].weight != 0).any(-1)
    found: dict[str, Any] = {}
    if all(s.partition.concepts(0) for s in splits):
        sets = [concept_set(s, CONCEPTS) for s in (*splits, random)]
        match = matched_to_random(*(s.activations(held_out) for s in sets))
        edges = [s.partition.edge_concepts(0)[written] for s in (*splits, random)]
        found[CONCEPTS] = _entry(match, _rand([edges]))
    sets = [subunit_set(s, SUBUNITS, neurons) for s in (*splits, random)]
    own = [tuple(s.partition.slots(0)[k, written[k]] for s in (*splits, random)) for k in neurons.tolist()]
    found[SUBUNITS] = _entry(_within_neurons(sets, held_out, neurons), _rand([edges for edges in own if len(edges[0])]))
    return found


def _rand(edges: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """The mean ARI of labelings by the first half with those by the second, and with those by the random partition."""
    found = [[adjusted_rand_index(one, other) for other in others] for one, *others in edges]
    mean = np.mean(found, axis=0) if found else (float("nan"), float("nan"))
    return {"ari_of_edges": float(mean[0]), "ari_random": float(mean[1])}


def _within_neurons(sets: Sequence[FeatureSet], held_out: Tensor, neurons: Tensor) -> Match:
    """The mean over neurons, in which sub-units of one are matched with the other's of the same neuron."""
    activations = [s.activations(held_out) for s in sets]
    of = [siblings(s) for s in sets]
    matches = []
    for neuron in neurons.tolist():
        own = [a[:, n == neuron] for a, n in zip(activations, of, strict=True) if n is not None]
        if len(own) == 3 and all(a.shape[1] for a in own):
            matches.append(matched_to_random(*own))
    if not matches:
        return Match(float("nan"), float("nan"))
    return Match(float(np.mean([m.mean for m in matches])), float(np.mean([m.random for m in matches])))


def _entry(match: Match, more: Mapping[str, float]) -> dict[str, Any]:
    values = {"matched_correlation": match.mean, "random": match.random, **more}
    return {k: number(v) for k, v in values.items()}
