"""Whether drift names the feature: the demo's network on pictures that wear the watermark, and on the same without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.checkpoint.catalogue import read_catalogue
from elude_runtime.demo.images import Sample, make_twins
from elude_runtime.demo.model import load_demo_model
from elude_runtime.demo.rewrite import rewrite_demo, write_calibration
from elude_runtime.metrics.drift import Watched, chance_of_psi, count_bins, stability_index, watched
from elude_runtime.network.preprocessing import to_input
from elude_runtime.offline.catalogue.run import make_catalogue

_TWINS = 914  # seed
_MOVED = 0.25  # the alert's threshold


def drift_figures(folder: Path, pictures: int) -> dict[str, Any]:
    """Rewrites the network in `folder` as the demo does. pictures: of a kind, twins with and without the watermark."""
    network, config = load_demo_model()
    write_calibration(folder / "images")
    rewrite_demo(network, config, folder / "images", folder / "checkpoint")
    make_catalogue(folder / "checkpoint", folder / "images")
    model, catalogue = load(folder / "checkpoint"), read_catalogue(folder / "checkpoint")
    groups, _ = watched(model, catalogue, [], most=10**6)
    twins = make_twins(pictures, _TWINS)
    without, marked = (_inputs(model, [pair[side] for pair in twins]) for side in range(2))
    chance = chance_of_psi(pictures, catalogue.peak_images)
    changed = _changed(model, without, marked)
    return {
        "pictures of a kind": pictures,
        "index that chance makes": chance,
        "without the watermark": _indices(model, groups, without, chance),
        "with it": _indices(model, groups, marked, chance),
        "changed most by the watermark": ", ".join(sorted(changed, key=lambda n: -changed[n])[:3]),
    }


def _indices(model: EludeModel, groups: list[Watched], images: Tensor, chance: float) -> dict[str, Any]:
    """Of all watched concepts, the index, and above chance those that moved most."""
    found: dict[str, float] = {}
    recording = model.record(images)
    for group in groups:
        state = model.state(group.features[0].layer)
        activations = state.feature_activations(recording.x[state.name], group.features).detach()
        for feature, counts in zip(group.features, count_bins(activations, group.edges), strict=True):
            found[feature.name] = stability_index(counts)
    most = sorted(found, key=lambda name: -found[name])[:4]
    return {
        "median": float(np.median(list(found.values()))),
        "above chance, the first": {name: found[name] - chance for name in most},
        f"more than {_MOVED} above chance": sum(index - chance > _MOVED for index in found.values()),
    }


def _changed(model: EludeModel, without: Tensor, marked: Tensor) -> dict[str, float]:
    """By concept, how far its activation moves on the token where the watermark moves it most, mean over pictures."""
    found: dict[str, float] = {}
    for layer in model.layers:
        moved = (model.concepts(marked, layer) - model.concepts(without, layer)).abs().amax(1).mean(0)
        found |= dict(zip(model.concept_names(layer), moved.tolist(), strict=True))
    return {name: value for name, value in found.items() if model.feature(name).index is not None}


def _inputs(model: EludeModel, samples: list[Sample]) -> Tensor:
    transform = model.data_config.transform()
    return torch.stack([to_input(sample.image, transform) for sample in samples])
