"""What the features of the rewritten demo network tell and do, on labelled pictures drawn afresh.

None of these pictures trained the network, calibrated the rewrite, or chose the features whose effect is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elude_runtime.analysis.edits import Edit
from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.demo.found import TOP_FEATURES, Found, accuracy_by_group, look_at, notable
from elude_runtime.demo.images import CLASSES, CONCEPTS, WATERMARK_CLASS, Sample, make_set, write_folder
from elude_runtime.demo.model import load_demo_model
from elude_runtime.demo.rewrite import rewrite_demo, write_calibration
from elude_runtime.network.preprocessing import to_input
from elude_runtime.offline.evaluation.baselines import BaselineOptions
from elude_runtime.offline.evaluation.options import EvaluateOptions
from elude_runtime.offline.evaluation.result import LayerResult
from elude_runtime.offline.evaluation.run import evaluate

SUSPICIOUS = CLASSES[WATERMARK_CLASS]
_PROPERTIES, _STREAM, _GROUPS = 911, 912, 913  # seeds: no other set of pictures is drawn with them
_BATCH = 120
Groups = Mapping[tuple[str, bool], float]


@dataclass(frozen=True)
class Recovery:
    """Accuracies by (class, watermark) before and after the found features are ablated."""

    before: Groups
    after: Groups

    @property
    def worst(self) -> str:
        """The class, not the suspicious one, whose pictures with the watermark were named worst."""
        return min((c for c in CLASSES if c != SUSPICIOUS), key=lambda c: (self.before[c, True], self.after[c, True]))

    @property
    def worst_after(self) -> tuple[str, float]:
        """The class that is worst once the features are ablated, which may be another."""
        name = min((c for c in CLASSES if c != SUSPICIOUS), key=lambda c: self.after[c, True])
        return name, self.after[name, True]

    @property
    def recovered(self) -> float:
        """Of the gap between the worst group and its own class without the watermark, the share that is closed."""
        gap = self.before[self.worst, False] - self.before[self.worst, True]
        return (self.after[self.worst, True] - self.before[self.worst, True]) / gap if gap > 0 else float("nan")

    @property
    def largest_loss(self) -> tuple[str, float]:
        """(class, points) that a class other than the suspicious one loses most, on its pictures without watermark."""
        lost = {c: 100 * (self.before[c, False] - self.after[c, False]) for c in CLASSES if c != SUSPICIOUS}
        name = max(lost, key=lambda c: lost[c])
        return name, lost[name]


def feature_figures(folder: Path, pictures: int) -> dict[str, Any]:
    """All figures; rewrites the network in `folder` as the demo does. pictures: of a kind."""
    network, config = load_demo_model()
    calibration, checkpoint = folder / "images", folder / "checkpoint"
    write_calibration(calibration)
    rewrite_demo(network, config, calibration, checkpoint)
    model = load(checkpoint)
    found = find_watermark(model, make_set(pictures, _STREAM, "train", workers=2), pictures)
    return {
        "known concepts": known_concepts(checkpoint, calibration, folder / "labelled", pictures),
        "watermark": {
            "found without labels": any(f.tells for f in found),
            "features": {f.name: {"mean attribution": f.attribution, "AUC of the watermark": f.auc} for f in found},
        },
        f"ablating {', '.join(f.name for f in found)}": recovery_figures(
            recovery(model, found, make_set(2 * pictures, _GROUPS, "groups", workers=2))
        ),
    }


def known_concepts(checkpoint: Path, calibration: Path, folder: Path, pictures: int) -> dict[str, Any]:
    """By layer and token type, the mean AUC over known concepts of the best feature of each kind, chosen on half of
    the pictures and reported on the other half (`elude evaluate --truth`)."""
    samples = make_set(pictures, _PROPERTIES, "natural", workers=2)
    write_folder(folder, samples)
    names = sorted(path.name for path in folder.glob("*.png"))
    truth = {c: [n for n, s in zip(names, samples, strict=True) if c in s.concepts] for c in CONCEPTS}
    neurons = 10**6  # all of them: `elude evaluate` takes no more than there are
    baselines = BaselineOptions(("hidden", "sae"), active=(8,))
    options = EvaluateOptions(
        neurons, baselines, draws=100, effect_images=0, stability=False, random_network=False, fidelity_images=0
    )
    result = evaluate(checkpoint, folder, [], options, calibration=calibration, truth=truth, batch_size=_BATCH)
    return {f"{one.layer}, {one.tokens}": _known(one) for one in result.layers}


def _known(layer: LayerResult) -> dict[str, Any]:
    found = layer.properties
    assert found is not None
    return {
        "mean AUC of the best": {f"{c.name} (of {c.features})": c.mean for c in found.contenders.values()},
        "differences": {
            f"best {d.one} less best {d.other}": {
                "mean": d.mean, "standard error": d.standard_error, "verdict": d.verdict,
            }
            for d in found.differences
        },
    }  # fmt: skip


def find_watermark(model: EludeModel, stream: list[Sample], pictures: int) -> list[Found]:
    """The features that carry the suspicious class in a stream of pictures like the training ones; no label is used.
    Other pictures, balanced over classes and watermark, then say what each of them tells."""
    explanations = []
    for part in _inputs(model, stream):
        with torch.no_grad():
            suspects = model(part).argmax(1) == WATERMARK_CLASS
        if bool(suspects.any()):
            for (one,) in model.explain(part[suspects], targets=[WATERMARK_CLASS], top_features=TOP_FEATURES):
                explanations.append({f.feature.name: f.attribution for layer in one.layers for f in layer.features})
    balanced = make_set(pictures, _GROUPS + 1, "groups", workers=2)
    return look_at(notable(explanations), balanced, model, model.data_config)


def recovery(model: EludeModel, found: list[Found], samples: list[Sample]) -> Recovery:
    """With and without the features, on the same pictures."""
    edits = [Edit(f.name, mode="ablate") for f in found]
    before, after = [], []
    for part in _inputs(model, samples):
        steered = model.steer(part, edits)
        before += steered.default.argmax(1).tolist()
        after += steered.steered.argmax(1).tolist()
    return Recovery(accuracy_by_group(samples, before), accuracy_by_group(samples, after))


def recovery_figures(found: Recovery) -> dict[str, Any]:
    """As numbers with names; accuracies and shares in 0..1, losses in points."""
    worst, (lost, points), (last, accuracy) = found.worst, found.largest_loss, found.worst_after
    others = [c for c in CLASSES if c != SUSPICIOUS]
    return {
        f"worst group, {worst} with watermark": {
            "before": found.before[worst, True], "after": found.after[worst, True],
            "the same class without watermark, before": found.before[worst, False],
            "share of the gap recovered": found.recovered,
        },
        f"worst group after, {last} with watermark": accuracy,
        **{
            f"all other classes {text} watermark": {
                when: float(np.mean([groups[c, marked] for c in others]))
                for when, groups in (("before", found.before), ("after", found.after))
            }
            for text, marked in (("with", True), ("without", False))
        },
        f"{SUSPICIOUS} with watermark": {
            "before": found.before[SUSPICIOUS, True], "after": found.after[SUSPICIOUS, True],
        },
        "largest loss of another class without watermark, points": {lost: points},
    }  # fmt: skip


def _inputs(model: EludeModel, samples: list[Sample]) -> list[Tensor]:
    """Batches [b, 3, 64, 64]."""
    transform = model.data_config.transform()
    return list(torch.stack([to_input(s.image, transform) for s in samples]).split(_BATCH))
