"""`elude rewrite`: from a model and images to a checkpoint with sub-units and concepts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import timm
import torch
from torch import Tensor, nn

import elude_runtime
from elude_runtime.analysis.completeness import measure_completeness
from elude_runtime.analysis.model import EludeModel
from elude_runtime.checkpoint.manifest import (
    AttributionEntry,
    Calibration,
    LayerEntry,
    Manifest,
    TokenTypeEntry,
    read_manifest,
)
from elude_runtime.checkpoint.storage import (
    CALIBRATION_TENSOR,
    new_directory,
    partition_tensors,
    tensors_sha256,
    write_manifest,
    write_tensors,
)
from elude_runtime.errors import ModelError, SettingsError
from elude_runtime.network.conditions import borrowed, output_size, usable_device
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.split_layers import choose_layers, find_split_layers
from elude_runtime.network.tail import TailRunner
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.base_model import BaseModel, carry_factory, describe_model
from elude_runtime.offline.collect import LayerStatistics
from elude_runtime.offline.feature_table import write_table
from elude_runtime.offline.image_files import spread
from elude_runtime.offline.image_loading import HASH_BYTES
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.offline.layer_partition import make_concepts, split_edges
from elude_runtime.offline.passes import Passes
from elude_runtime.offline.ranks import joined, launched
from elude_runtime.offline.resume import SAVE_SECONDS, Resume
from elude_runtime.offline.seen_images import SeenImages
from elude_runtime.partition import REST_CONCEPT, Partition, SplitConfig

__all__ = ["BaseModel", "RewriteResult", "rewrite", "rewrite_checkpoint"]

COMPLETENESS_IMAGES = 16


@dataclass(frozen=True)
class RewriteResult:
    """Where the checkpoint lies, its manifest, and the images that were skipped: (file, reason)."""

    path: Path
    manifest: Manifest
    skipped: list[tuple[str, str]]


def rewrite(
    model: nn.Module | BaseModel,
    images: str | Path | list[str] | list[Path] | Tensor | Iterable[Tensor],
    *,
    out: str | Path,
    layers: list[str] | None = None,
    subunits: int = 8,
    concepts: int = 96,
    tokens: int = 400,
    seed: int = 0,
    batch_size: int = 25,
    workers: int = 0,
    max_images: int | None = None,
    device: str | torch.device = "cpu",
    data_config: DataConfig | None = None,
    labels: list[str] | None = None,
    factory: str | None = None,
    model_args: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> EludeModel:
    """Rewrite a model and write the checkpoint; returns it loaded (its directory is `out`).

    model: a timm model with its weights; one that timm.create_model(name, **model_args) does not rebuild needs
    `factory="FILE.py:FUNCTION"`. images: a folder, files, a tensor [N, 3, H, W] of preprocessed images, or an
    iterable of such batches that can be read twice. A linear probe: put it on the model (`model.reset_classifier(K)`,
    then load it into `model.get_classifier()`). layers: default the deepest one that all tokens matter to.
    subunits: M a neuron; concepts: K a layer and token type; tokens: N at each end of a neuron.
    Raises EludeError (a subclass says which part) with one sentence; nothing is left behind.
    """
    base = model if isinstance(model, BaseModel) else describe_model(model, factory, model_args)
    result = rewrite_checkpoint(
        base, images, Path(out), SplitConfig(subunits, tokens, seed=seed), layers=layers, concepts=concepts,
        batch_size=batch_size, workers=workers, max_images=max_images, device=device, data_config=data_config,
        labels=labels, force=force, progress=progress,
    )  # fmt: skip
    own = launched().device(device)
    return elude_runtime.load(result.path, own, trust_factory=base.source.kind == "factory")


def rewrite_checkpoint(
    base: BaseModel,
    images: str | Path | list[str] | list[Path] | Tensor | Iterable[Tensor],
    out: Path,
    config: SplitConfig,
    *,
    layers: list[str] | None = None,
    concepts: int = 96,
    batch_size: int = 25,
    workers: int = 0,
    max_images: int | None = None,
    device: str | torch.device = "cpu",
    data_config: DataConfig | None = None,
    labels: list[str] | None = None,
    force: bool = False,
    save_every: float = SAVE_SECONDS,
    progress: Progress | None = None,
) -> RewriteResult:
    """The whole offline step; see `rewrite`."""
    if not 1 <= concepts < REST_CONCEPT:
        raise SettingsError(f"The number of concepts must be between 1 and {REST_CONCEPT - 1}.")
    versions = {"torch": torch.__version__, "timm": timm.__version__, "numpy": numpy.__version__}
    with joined() as ranks, borrowed(base.model, usable_device(ranks.device(device))) as model:
        report = progress if progress and ranks.first else _silent
        size = tuple(images.shape[1:]) if isinstance(images, Tensor) and images.dim() == 4 else None
        data = data_config or DataConfig.of_model(model, input_size=size)
        outputs = output_size(model, data.input_size) if getattr(model, "num_classes", 1) else 0
        if labels and len(labels) != outputs:
            has = f"{outputs} classes" if outputs else "none, its output is an embedding"
            raise SettingsError(f"{len(labels)} labels were given and the model has {has}; give one label a class.")
        source = ImageSource(images, data, batch_size=batch_size, workers=workers, limit=max_images, progress=report)
        chosen = choose_layers(find_split_layers(model, data.input_size), layers)
        tensors = model.state_dict()
        # buffers may be infinite by design (a clamp that is off); the outputs are looked at below
        broken = [n for n, t in model.named_parameters() if not bool(torch.isfinite(t).all())]
        if broken:
            raise ModelError(
                f"The weight {broken[0]} holds values that are not finite (NaN or infinity); take weights that were "
                "saved before training went wrong."
            )
        # planned before the work, since it refuses a layer whose output cannot be replaced
        tails = TailRunner(model, [layer.name for layer in chosen], data.input_size)
        base_sha256 = tensors_sha256(tensors)
        settings = {
            "versions": {"elude": elude_runtime.__version__, **versions},
            "weights": base_sha256,
            "model": base.source.model_dump(),
            "factory files": base.file_hashes,
            "layers": [layer.name for layer in chosen],
            "options": asdict(config),
            "images": source.digest,
            "device": str(device),
            "processes": ranks.world,
            "threads": torch.get_num_threads(),
        }
        ranks.agree(settings)
        with (
            Resume(out, settings if source.digest else None, ranks, save_every) as resume,
            new_directory(out, force=force, within=resume.folder) if ranks.first else nullcontext() as work,
        ):
            carried = carry_factory(base, work, data) if work else {}
            passes = Passes(model, chosen, source, config, ranks, resume, report)
            statistics, seen = passes.token_statistics()
            stores = passes.chosen_tokens(statistics, seen)
            edges = [split_edges(s, stores[s.layer.name], config, ranks, resume, report) for s in statistics]
            if work:
                made = []
                for s, e in zip(statistics, edges, strict=True):
                    report(f"concepts of {s.layer.name}", 0, 1)
                    made.append(make_concepts(s, stores[s.layer.name], *e, config, concepts))
                    report(f"concepts of {s.layer.name}", 1, 1)
                partitions = {s.layer.name: p for s, (p, _) in zip(statistics, made, strict=True)}
                write_table(work, [part for _, parts in made for part in parts])
                own = {n: t for name, p in partitions.items() for n, t in partition_tensors(name, p).items()}
                hashes = torch.frombuffer(bytearray(seen.hashes.in_order()), dtype=torch.uint8).view(-1, HASH_BYTES)
                manifest = Manifest(
                    format_version=1,
                    elude_version=elude_runtime.__version__,
                    model=base.source.model_copy(update={"files": carried}),
                    output="logits" if getattr(model, "num_classes", 1) else "embedding",
                    data_config=data.as_dict(),
                    labels=labels or [],
                    layers=[_entry(s, partitions[s.layer.name], config) for s in statistics],
                    method={"partition": "sign-split", **asdict(config), "concepts": concepts},
                    seed=config.seed,
                    threads=torch.get_num_threads(),
                    versions=versions,
                    calibration=Calibration(
                        images=len(hashes),
                        sha256=hashlib.sha256(hashes.numpy().tobytes()).hexdigest(),
                        skipped=len(seen.skipped),
                    ),
                    base_sha256=base_sha256,
                    partition_sha256=tensors_sha256(own),
                )
                manifest = _measure_attribution(tails, manifest, partitions, source, seen, report)
                report("writing", 0, 1)
                write_tensors(work, {**tensors, **own, CALIBRATION_TENSOR: hashes})
                write_manifest(work, manifest)
                report("writing", 1, 1)
            for of_layer in stores.values():
                for store in of_layer.values():
                    store.close()
        ranks.wait()  # the checkpoint is complete for every process
        return RewriteResult(out, read_manifest(out), seen.skipped)


def _entry(one: LayerStatistics, partition: Partition, config: SplitConfig) -> LayerEntry:
    layer, layout = one.layer, one.layer.layout
    return LayerEntry(
        name=layer.name,
        kind="conv" if layer.kind == "conv" else "linear",
        neurons=layer.neurons,
        inputs=layer.inputs,
        kernel=list(layer.kernel),
        groups=layer.groups,
        subunits=config.subunits,
        total=layout.total,
        prefix=layout.prefix,
        grid=list(layout.grid) if layout.grid else None,
        token_types=[
            TokenTypeEntry(name=TYPE_NAMES[t], live=layer.live[t], concepts=partition.concepts(t), tokens=one.counts[t])  # type: ignore[arg-type]
            for t in range(layout.types)
        ],
        follows=layer.reason,
        attribution=AttributionEntry(auto="gradient", completeness={}, images=0),
    )


def _measure_attribution(
    tails: TailRunner,
    manifest: Manifest,
    partitions: dict[str, Partition],
    source: ImageSource,
    seen: SeenImages,
    report: Progress,
) -> Manifest:
    """The manifest with every layer's measured completeness errors, and the method that `auto` stands for: on images
    spread over those seen, since neighbours are often alike (an iterable of batches: on the first)."""
    model = tails.model
    loaded = EludeModel(model, manifest, partitions).to(next(model.parameters()).device)
    loaded.tails = tails
    few = source.at(seen.places[torch.from_numpy(spread(len(seen.places), COMPLETENESS_IMAGES))])
    taken: list[Tensor] = []
    for batch in few.numbered():
        seen.check(batch, few)
        taken.append(batch.images)
        if sum(len(b) for b in taken) >= COMPLETENESS_IMAGES:
            break
    images = torch.cat(taken)[:COMPLETENESS_IMAGES]
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        if not bool(torch.isfinite(model(images)).all()):
            raise ModelError(
                "The model's output is not finite (NaN or infinity) on these images; check the data configuration, and "
                "prefer bfloat16 or float32 to float16."
            )
    report("attribution accuracy", 0, len(images) * len(manifest.layers))
    measured = measure_completeness(loaded, images, lambda n: report("attribution accuracy", n, None))
    entries = [e.model_copy(update={"attribution": measured[e.name]}) for e in manifest.layers]
    return manifest.model_copy(update={"layers": entries})


def _silent(stage: str, done: int, total: int | None) -> None:
    pass
