"""`elude catalogue`: one pass over the images, tails for the classes, then the pictures of what became exemplars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import elude_runtime
from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.checkpoint.exemplars import EXEMPLARS, FORMAT_VERSION
from elude_runtime.checkpoint.labels import AUTOMATIC, USER, stored_labels
from elude_runtime.checkpoint.storage import new_directory
from elude_runtime.errors import CheckpointError, ImagesError, SettingsError
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.catalogue.effects import measure_effects
from elude_runtime.offline.catalogue.features import type_features
from elude_runtime.offline.catalogue.findings import Findings, described
from elude_runtime.offline.catalogue.image_pass import SKIPPED_NAMED, ImagePass
from elude_runtime.offline.catalogue.layer_pass import LayerPass
from elude_runtime.offline.catalogue.pictures import Pictures, take_pictures
from elude_runtime.offline.catalogue.writing import ExemplarImages, write_catalogue
from elude_runtime.offline.feature_table import labelled, read_table, replace_table
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.offline.ranks import Ranks
from elude_runtime.offline.resume import SAVE_SECONDS, Resume

_MB = 1_000_000


@dataclass(frozen=True)
class CatalogueOptions:
    """thumbnail_budget: bytes of all thumbnails together; effect_images: images on which classes raised and lowered are
    measured, 0 for none; seed: of the images and tokens drawn at random."""

    thumbnail_budget: int = 64 * _MB
    effect_images: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.thumbnail_budget < 0 or self.effect_images < 0 or self.seed < 0:
            raise SettingsError("The thumbnail budget, the number of effect images and the seed are at least 0.")


@dataclass(frozen=True)
class CatalogueResult:
    """What a catalogue holds. features: that vary, of each layer; dead: that never did; labels: by source; skipped:
    images that could not be read, the first of `skipped_count`; missing: exemplars that were not found again for their
    pictures; size: bytes of the folder; warnings: a sentence each."""

    path: Path
    checkpoint_sha256: str
    images: int
    exemplar_images: int
    features: dict[str, int]
    dead: dict[str, int]
    labels: dict[str, int]
    skipped: list[tuple[str, str]]
    skipped_count: int
    missing: list[tuple[str, str]]
    thumbnails: int
    thumbnail_bytes: int
    size: int
    warnings: list[str]


def make_catalogue(
    checkpoint: str | Path,
    images: str | Path | list[str] | list[Path],
    options: CatalogueOptions | None = None,
    *,
    layers: Sequence[str] | None = None,
    batch_size: int = 25,
    workers: int = 0,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    trust_factory: bool = False,
    save_every: float = SAVE_SECONDS,
    progress: Progress | None = None,
) -> CatalogueResult:
    """Make the catalogue of a checkpoint from images (files of any kind that ImageSource takes, not tensors), in the
    place of an earlier one: `exemplars/`, and labels and classes in `features.parquet`.

    layers: default all that the checkpoint splits; what an earlier catalogue says of others goes. Memory is bounded by
    the number of features, not of images. A run that was killed goes on where it was. EludeError (a subclass says which
    part) with one sentence.
    """
    checkpoint, options = Path(checkpoint), options or CatalogueOptions()
    report = progress or (lambda *_: None)
    model = load(checkpoint, device, trust_factory=trust_factory)
    table = read_table(checkpoint)
    names = set(table["feature"].to_pylist())
    stored_labels(checkpoint, names)  # a file that cannot be used is told before the work
    wanted = {model.state(name).name for name in (layers or model.layers)}
    states = {name: state for name, state in model.states.items() if name in wanted}
    source = ImageSource(
        images, model.data_config, batch_size=batch_size, workers=workers, limit=limit, progress=report
    )
    if not source.has_files:
        raise ImagesError("A catalogue shows pictures, and these images are tensors; give image files.")
    settings = {
        "version": elude_runtime.__version__,
        "torch": torch.__version__,
        "checkpoint": model.manifest.checkpoint_sha256,
        "layers": list(states),
        "options": asdict(options),
        "images": source.digest,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    types = {name: type_features(state, table) for name, state in states.items()}
    if not any(t.features for own in types.values() for t in own):
        raise CheckpointError(
            f"No feature of {', '.join(states)} ever varied on the calibration images, so no image can stand for one; "
            "choose other layers, or rewrite with other images."
        )
    with Resume(checkpoint / EXEMPLARS, settings, Ranks(), save_every) as resume:
        passed = ImagePass(model, {name: LayerPass(states[name], own) for name, own in types.items()}, options.seed)
        passed.run(source, resume, report)
        effects = measure_effects(model, passed.layers, source, options.effect_images, resume, report)
        report("putting together", 0, 1)
        findings = Findings.of(passed, effects, model.manifest.labels)
        report("putting together", 1, 1)
        shown = ExemplarImages.of(findings, passed.answers, source)
        pictures = take_pictures(source, shown.places, shown.hashes, options.thumbnail_budget, resume, report)
        # read now: somebody may have named a feature meanwhile
        found = labelled(described(table, findings.types), stored_labels(checkpoint, names))
        with new_directory(checkpoint / EXEMPLARS, force=True, within=resume.folder, known_by=None) as work:
            facts = _facts(model, passed, pictures, {"max_images": limit, **asdict(options)})
            write_catalogue(work, findings, shown, pictures, facts)
            size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        replace_table(checkpoint, found)
    sources = found["label_source"].to_pylist()
    return CatalogueResult(
        path=checkpoint / EXEMPLARS,
        checkpoint_sha256=model.manifest.checkpoint_sha256,
        images=passed.answers.count,
        exemplar_images=len(shown.places),
        features={name: sum(len(t.features) for t in own) for name, own in types.items()},
        dead={name: sum(t.dead for t in own) for name, own in types.items()},
        labels={kind: sources.count(kind) for kind in (AUTOMATIC, USER)},
        skipped=passed.skipped.named,
        skipped_count=passed.skipped.count,
        missing=pictures.missing,
        thumbnails=sum(length > 0 for length in pictures.lengths),
        thumbnail_bytes=sum(pictures.lengths),
        size=size,
        warnings=_warnings(model, passed, effects, options),
    )


def _facts(model: EludeModel, passed: ImagePass, pictures: Pictures, settings: dict[str, Any]) -> dict[str, Any]:
    """`catalogue.json`."""
    told = [*passed.skipped.named, *pictures.missing][:SKIPPED_NAMED]
    return {
        "format_version": FORMAT_VERSION,
        "checkpoint_sha256": model.manifest.checkpoint_sha256,
        "partition_sha256": model.manifest.partition_sha256,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "images": {
            "read": passed.answers.count,
            "skipped": [{"file": file, "reason": reason} for file, reason in told],
            "skipped_count": passed.skipped.count,
            "missing_count": len(pictures.missing),
        },
        "layers": [_layer_facts(one) for one in passed.layers.values()],
    }


def _layer_facts(one: LayerPass) -> dict[str, Any]:
    layout = one.split.layout
    return {
        "name": one.split.name,
        "grid": list(layout.grid) if layout.grid else None,
        "prefix": layout.prefix,
        "token_types": [TYPE_NAMES[t] for t in one.split.live_types],
        "units": {"concept": "standard deviations", "subunit": "the layer's output", "input": "the layer's input"},
    }


def _warnings(
    model: EludeModel, passed: ImagePass, effects: Mapping[str, Sequence[object | None]], options: CatalogueOptions
) -> list[str]:
    found = []
    if model.manifest.output == "logits" and not model.manifest.labels:
        found.append(
            "The checkpoint has no class names, so features get no automatic labels; rewrite it with --labels."
        )
    if model.manifest.output == "logits" and options.effect_images:
        found += [
            f"None of the images for the classes of {name} could be read; they are left out."
            for name, own in effects.items() if own and all(one is None for one in own)
        ]  # fmt: skip
    found += [
        f"A token of {name} reads {t.moments.columns} values, too many to compare; no inputs and duplicates are listed."
        for name, one in passed.layers.items() for t in one.types[:1] if not t.moments.kept
    ]  # fmt: skip
    return found
