"""`elude rewrite`: from a model and images to a checkpoint with sub-units and concepts."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
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
    ModelSource,
    TokenTypeEntry,
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
from elude_runtime.network.build import Factory, borrowed, build_timm, carry_files, load_weights
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.split_layers import SplitLayer, choose_layers, find_split_layers
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.collect import LayerStatistics, TokenStore, run_layers
from elude_runtime.offline.feature_table import write_table
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.offline.layer_partition import partition_layer
from elude_runtime.partition import REST_CONCEPT, Partition, SplitConfig

COMPLETENESS_IMAGES = 24


@dataclass(frozen=True)
class RewriteResult:
    """Where the checkpoint lies, its manifest, and the images that were skipped: (file, reason)."""

    path: Path
    manifest: Manifest
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class BaseModel:
    """A base model with its weights, and how it is built again without them."""

    model: nn.Module
    source: ModelSource
    factory_files: tuple[Path, ...] = ()
    factory_root: Path | None = None


def rewrite(
    model: nn.Module | BaseModel,
    images: str | Path | list[Path] | Tensor | Iterable[Tensor],
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
    iterable of such batches that can be read twice. layers: default the deepest one that all tokens matter to.
    subunits: M a neuron; concepts: K a layer and token type; tokens: N at each end of a neuron.
    Raises EludeError (a subclass says which part) with one sentence; nothing is left behind.
    """
    base = model if isinstance(model, BaseModel) else describe_model(model, factory, model_args)
    result = rewrite_checkpoint(
        base, images, Path(out), SplitConfig(subunits, tokens, seed=seed), layers=layers, concepts=concepts,
        batch_size=batch_size, workers=workers, max_images=max_images, device=device, data_config=data_config,
        labels=labels, force=force, progress=progress,
    )  # fmt: skip
    return elude_runtime.load(result.path, device, trust_factory=base.source.kind == "factory")


def describe_model(model: nn.Module, factory: str | None, args: dict[str, Any] | None) -> BaseModel:
    """How a model in memory is built again, checked: ModelError when it cannot be."""
    if factory:
        made = Factory.parse(factory)
        again, files = made.build(args)
        source = ModelSource(
            kind="factory", name=made.function, args=args or {}, file=made.file.name, function=made.function
        )
        described = BaseModel(model, source, tuple(files), made.file.parent)
    else:
        config = getattr(model, "pretrained_cfg", None) or {}
        name = config.get("architecture")
        if not name:
            raise ModelError(
                "This model was not made by timm.create_model; give factory='FILE.py:FUNCTION' that builds it."
            )
        arguments = {"num_classes": model.num_classes} if args is None and hasattr(model, "num_classes") else args or {}
        again = build_timm(name, arguments)
        described = BaseModel(model, ModelSource(kind="timm", name=name, args=arguments))
    if repr(model) == repr(again) and _same_network(model, again, DataConfig.of_model(model).input_size):
        return described
    raise ModelError(
        f"{described.source.name} built again is another network than the one given; name its arguments with "
        "model_args={...}, or give factory='FILE.py:FUNCTION' that builds it."
    )


def _same_network(model: nn.Module, again: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether `again`, with the same tensors, answers two random images of that size bit for bit as `model` does."""
    try:
        load_weights(again, {n: t.cpu() for n, t in model.state_dict().items()}, "the model")
        first = next(model.parameters())
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)
        with borrowed(model), borrowed(again, first.device), torch.no_grad():
            return torch.equal(model(images), again(images))
    except ModelError:
        return False


def rewrite_checkpoint(
    base: BaseModel,
    images: str | Path | list[Path] | Tensor | Iterable[Tensor],
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
    progress: Progress | None = None,
) -> RewriteResult:
    """The whole offline step; see `rewrite`."""
    report = progress or (lambda *_: None)
    if not 1 <= concepts < REST_CONCEPT:
        raise SettingsError(f"The number of concepts must be between 1 and {REST_CONCEPT - 1}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"There is no device {str(device)!r} here; use cpu, or cuda where there is a GPU."
        ) from error
    with borrowed(base.model, device) as model:
        size = tuple(images.shape[1:]) if isinstance(images, Tensor) and images.dim() == 4 else None
        data = data_config or DataConfig.of_model(model, input_size=size)
        source = ImageSource(
            Path(images) if isinstance(images, str) else images,
            data,
            batch_size=batch_size,
            workers=workers,
            limit=max_images,
        )
        chosen = choose_layers(find_split_layers(model, data.input_size), layers)
        modules = dict(model.named_modules())
        with new_directory(out, force=force) as work:
            carried = _carry(base, work)
            if carried:  # the carried copy must build the same network, or the checkpoint could not be loaded
                copy = Factory(work / "factory" / str(base.source.file), str(base.source.function))
                if not _same_network(model, copy.build(base.source.args)[0], data.input_size):
                    raise ModelError(
                        "The factory's files, copied into the checkpoint, build another network; let the factory open "
                        "what it needs with Python, from its own folder."
                    )
            statistics = _first_pass(model, chosen, modules, source, config, report)
            skipped, hashes = source.report.skipped, sorted(source.report.hashes)
            with tempfile.TemporaryDirectory(prefix="tokens.", dir=work) as folder:
                stores = _second_pass(model, chosen, statistics, source, Path(folder), report)
                made = [partition_layer(s, stores[s.layer.name], config, concepts, report) for s in statistics]
                del stores
            partitions = {s.layer.name: p for s, (p, _) in zip(statistics, made, strict=True)}
            write_table(work, [part for _, parts in made for part in parts])
            own = {n: t for name, p in partitions.items() for n, t in partition_tensors(name, p).items()}
            tensors = {n: t.detach().cpu() for n, t in model.state_dict().items()}
            calibration = torch.tensor([list(h) for h in hashes], dtype=torch.uint8)
            entries = [_entry(s, partitions[s.layer.name], config) for s in statistics]
            manifest = Manifest(
                format_version=1,
                elude_version=elude_runtime.__version__,
                model=base.source.model_copy(update={"files": carried}),
                output="logits" if getattr(model, "num_classes", 1) else "embedding",
                data_config=data.as_dict(),
                labels=labels or [],
                layers=entries,
                method={"partition": "sign-split", **asdict(config), "concepts": concepts},
                seed=config.seed,
                threads=torch.get_num_threads(),
                versions={"torch": torch.__version__, "timm": timm.__version__, "numpy": numpy.__version__},
                calibration=Calibration(
                    images=len(hashes), sha256=hashlib.sha256(b"".join(hashes)).hexdigest(), skipped=len(skipped)
                ),
                base_sha256=tensors_sha256(tensors),
                partition_sha256=tensors_sha256(own),
            )
            manifest = _measure_attribution(model, manifest, partitions, source, report)
            write_tensors(work, {**tensors, **own, CALIBRATION_TENSOR: calibration})
            write_manifest(work, manifest)
        return RewriteResult(out, manifest, skipped)


def _first_pass(
    model: nn.Module,
    chosen: list[SplitLayer],
    modules: dict[str, nn.Module],
    source: ImageSource,
    config: SplitConfig,
    report: Progress,
) -> list[LayerStatistics]:
    statistics = [LayerStatistics(layer, LinearMap(modules[layer.name], layer.name), config) for layer in chosen]
    for first, seen in run_layers(model, chosen, source, lambda n: report("token statistics", n, source.count)):
        for one in statistics:
            one.add(first, *seen[one.layer.name])
    return statistics


def _second_pass(
    model: nn.Module,
    chosen: list[SplitLayer],
    statistics: list[LayerStatistics],
    source: ImageSource,
    folder: Path,
    report: Progress,
) -> dict[str, dict[int, tuple[TokenStore, list[Tensor]]]]:
    """{layer: {token type: (store of the end tokens' inputs, ids of the positive and the negative end)}}"""
    stores: dict[str, dict[int, tuple[TokenStore, list[Tensor]]]] = {}
    for number, one in enumerate(statistics):
        linear, stores[one.layer.name] = one.linear, {}
        for t in one.types:
            ends = [e.cpu() for e in one.ends[t].ends()]
            shape = (linear.groups, linear.inputs, linear.positions)
            store = TokenStore(folder / f"{number}.{t}.npy", torch.cat([e.flatten() for e in ends]), shape)
            stores[one.layer.name][t] = (store, ends)
    for first, seen in run_layers(model, chosen, source, lambda n: report("end tokens", n, source.count)):
        for one in statistics:
            reads = one.linear.patches(seen[one.layer.name][0])
            for t, (store, _) in stores[one.layer.name].items():
                store.add(first, reads[:, one.layer.layout.slices[t]])
    return stores


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
    model: nn.Module, manifest: Manifest, partitions: dict[str, Partition], source: ImageSource, report: Progress
) -> Manifest:
    """The manifest with every layer's measured completeness errors, and the method that `auto` stands for."""
    loaded = EludeModel(model, manifest, partitions).to(next(model.parameters()).device)
    taken: list[Tensor] = []
    for batch in source.batches():
        taken.append(batch)
        if sum(len(b) for b in taken) >= COMPLETENESS_IMAGES:
            break
    images = torch.cat(taken)[:COMPLETENESS_IMAGES]
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    report("attribution accuracy", 0, len(images) * len(manifest.layers))
    measured = measure_completeness(loaded, images, lambda n: report("attribution accuracy", n, None))
    entries = [e.model_copy(update={"attribution": measured[e.name]}) for e in manifest.layers]
    return manifest.model_copy(update={"layers": entries})


def _carry(base: BaseModel, work: Path) -> dict[str, str]:
    """Copy a factory's files into the checkpoint; their SHA-256 by name."""
    if base.source.kind != "factory" or base.factory_root is None:
        return {}
    names = carry_files(list(base.factory_files), base.factory_root, work / "factory")
    return {n: hashlib.sha256((work / "factory" / n).read_bytes()).hexdigest() for n in names}
