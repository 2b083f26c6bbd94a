"""What an evaluation is asked for, and what its result says of how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

import elude_runtime
from elude_runtime.analysis.model import EludeModel
from elude_runtime.errors import SettingsError
from elude_runtime.offline.bench import environment
from elude_runtime.offline.evaluation.baselines import BaselineOptions
from elude_runtime.offline.evaluation.encoders import Encoder
from elude_runtime.offline.evaluation.images import ImageSplit


@dataclass(frozen=True)
class EvaluateOptions:
    """neurons: drawn at random, whose sub-units are scored; baselines: None for none; draws: of the bootstrap;
    effect_images: on which features are taken out and steered, 0 for none; stability: rewrite the model from halves of
    the calibration images; random_network: score the same architecture with random weights beside it; fidelity_images:
    on which reconstructions are put in place, 0 for none; tokens: of the calibration, at most."""

    neurons: int = 100
    baselines: BaselineOptions | None = field(default_factory=BaselineOptions)
    draws: int = 200
    effect_images: int = 24
    stability: bool = True
    random_network: bool = True
    fidelity_images: int = 100
    tokens: int = 60_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.neurons < 1 or self.draws < 2 or min(self.effect_images, self.fidelity_images) < 0 or self.tokens < 2:
            raise SettingsError("Neurons must be at least 1, draws and tokens at least 2, images not below 0.")
        if not 0 <= self.seed < 2**31:
            raise SettingsError("The seed must be a whole number from 0 to 2^31 - 1.")


def run_facts(
    directory: Path, model: EludeModel, split: ImageSplit, encoders: Sequence[Encoder], options: EvaluateOptions,
    seconds: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Version, seconds of each phase, environment, checkpoint, images, encoders and settings."""
    manifest, baselines = model.manifest, options.baselines
    return {
        "elude_version": elude_runtime.__version__,
        "seconds": dict(seconds),
        "environment": {**environment(), "timm": timm.__version__},
        "checkpoint": {
            "path": str(directory),
            "checkpoint_sha256": manifest.checkpoint_sha256,
            "base_sha256": manifest.base_sha256,
            "model": manifest.model.name,
            "method": manifest.method,
        },
        "images": {
            "given": split.given,
            "scored": split.scoring.count,
            "calibration": split.calibration.count,
            "excluded_checkpoint_calibration": split.known,
            "excluded_baseline_calibration": split.shared,
            "excluded_twice": split.twice,
        },
        "encoders": [{"name": e.name, "sha256": e.sha256} for e in encoders],
        "settings": {
            "seed": options.seed, "neurons": options.neurons, "draws": options.draws, "tokens": options.tokens,
            "effect_images": options.effect_images, "stability": options.stability,
            "random_network": options.random_network, "fidelity_images": options.fidelity_images,
            "baselines": None if baselines is None else {k: _listable(v) for k, v in vars(baselines).items()},
        },
    }  # fmt: skip


def _listable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
