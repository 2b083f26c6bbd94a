"""`elude rewrite`: from a model and images to a checkpoint with sub-units and concepts."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import timm
import torch
from torch import Tensor, nn

import elude_runtime
from elude_runtime.analysis.completeness import measure_completeness
from elude_runtime.analysis.features import Feature
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
from elude_runtime.errors import ModelError
from elude_runtime.network.build import Factory, build_timm, carry_files
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.split_layers import SplitLayer, choose_layers, find_split_layers
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.collect import LayerStatistics, TokenStore, run_layers
from elude_runtime.offline.feature_table import table_rows, write_table
from elude_runtime.offline.images import ImageSource
from elude_runtime.partition import REST_CONCEPT, REST_EDGE, Partition, SplitConfig
from elude_runtime.partition.concepts import (
    concept_activation,
    concept_share,
    describe,
    group_concepts,
    subunit_share,
)
from elude_runtime.partition.sign_split import sign_split
from elude_runtime.partition.sums import wide_weight

COMPLETENESS_IMAGES = 24
Progress = Callable[[str, int, int | None], None]  # (stage, done now, total if known)


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
    mine, other = model.state_dict(), again.state_dict()
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in other.items()} or repr(model) != repr(again):
        raise ModelError(
            f"{described.source.name} built again is another network than the one given; name its arguments with "
            "model_args={...}, or give factory='FILE.py:FUNCTION' that builds it."
        )
    return described


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
    model = base.model.eval().requires_grad_(False).to(device)
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
        statistics = _first_pass(model, chosen, modules, source, config, report)
        skipped, hashes = source.report.skipped, sorted(source.report.hashes)
        with tempfile.TemporaryDirectory(prefix="tokens.", dir=work) as folder:
            stores = _second_pass(model, chosen, statistics, source, Path(folder), report)
            made = [_split(s, stores[s.layer.name], config, concepts, report) for s in statistics]
            del stores
        partitions = {s.layer.name: p for s, (p, _) in zip(statistics, made, strict=True)}
        write_table(work, [part for _, parts in made for part in parts])
        own = {n: t for name, p in partitions.items() for n, t in partition_tensors(name, p).items()}
        tensors = {n: t.detach().cpu() for n, t in model.state_dict().items()}
        calibration = torch.tensor([list(h) for h in hashes], dtype=torch.uint8)
        carried = _carry(base, work)
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
        if carried:  # the carried copy must build the same network, or the checkpoint could never be loaded
            Factory(work / "factory" / str(base.source.file), str(base.source.function)).build(base.source.args)
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


def _split(
    one: LayerStatistics,
    stores: dict[int, tuple[TokenStore, list[Tensor]]],
    config: SplitConfig,
    concepts: int,
    report: Progress,
) -> tuple[Partition, list[pa.Table]]:
    """Partition and feature table of one layer, all token types."""
    linear, layer = one.linear, one.layer
    weight = linear.weight().cpu()
    d, n, _ = weight.shape
    width = config.subunits + 1
    types = layer.layout.types
    edges = torch.full((types, d, n), REST_EDGE, dtype=torch.uint8)
    counts = torch.zeros(types, d, dtype=torch.uint8)
    mean, std = torch.zeros(types, d, width), torch.zeros(types, d, width)
    concept = torch.full((types, d, width), REST_CONCEPT, dtype=torch.int32)
    per_group = d // linear.groups
    tables: list[pa.Table] = []
    for t in range(types):
        if t in stores:
            store, (positive, negative) = stores[t]

            def read(neurons: Tensor, ids: Tensor, store: TokenStore = store) -> Tensor:
                tokens = store.read(ids)  # [B, N, G, n, q]
                group = (neurons // per_group).view(-1, 1, 1, 1, 1).expand(-1, tokens.shape[1], 1, *tokens.shape[3:])
                return tokens.gather(2, group)[:, :, 0]

            total = d * len(one.types)
            edges[t], counts[t] = sign_split(
                weight, read, positive, negative, config, lambda k: report(f"partition of {layer.name}", k, total)
            )
        slots = torch.where(edges[t] == REST_EDGE, config.subunits, edges[t].long())
        wide = wide_weight(weight, slots, width)  # [d, M + 1, n, q]
        groups = torch.arange(d) // per_group
        mean[t] = torch.einsum("kmjq,kjq->km", wide.double(), one.mean(t).cpu()[groups]).float()
        if t not in stores:
            continue
        centred = _sample_sums(one.samples[t].take(), wide, groups) - mean[t]
        std[t] = centred.std(0, correction=0)
        concept[t] = group_concepts(centred, std[t], counts[t], concepts, config.seed)
        partition = Partition(edges, counts, mean, std, concept)
        tables += _tables(layer.name, t, centred, partition)
    return Partition(edges, counts, mean, std, concept), tables


def _sample_sums(reads: Tensor, wide: Tensor, groups: Tensor) -> Tensor:
    """Sub-unit sums of sampled tokens: reads [S, G, n, q], wide [d, M + 1, n, q] -> [S, d, M + 1]."""
    parts = []
    for group in range(reads.shape[1]):
        rows = wide[groups == group].flatten(2)  # [d/G, M + 1, n q]
        parts.append((reads[:, group].flatten(1) @ rows.flatten(0, 1).T).unflatten(1, rows.shape[:2]))
    return torch.cat(parts, 1)


def _tables(layer: str, token_type: int, centred: Tensor, partition: Partition) -> list[pa.Table]:
    """Feature rows of one token type: its concepts, then its sub-units (those without an edge left out)."""
    concepts = partition.concepts(token_type)
    concept, std = partition.concept[token_type], partition.std[token_type]
    numbers = [*range(concepts), None]
    features = [Feature(layer, token_type, i) for i in numbers]
    names = [f.name for f in features]
    slots = partition.concept_slots(token_type)
    # slots without an edge stay out of the count: unused numbers of a neuron, and a background that nothing fell to
    edges = torch.zeros(std.shape, dtype=torch.int32)
    edges.scatter_add_(1, partition.slots(token_type), torch.ones_like(partition.slots(token_type), dtype=torch.int32))
    used = edges > 0
    sizes = torch.bincount(slots[used], minlength=concepts + 1).tolist()
    activations = concept_activation(centred, std, concept, concepts)
    share = concept_share(centred, concept, concepts)
    tables = [table_rows(features, names, sizes, describe(activations, share))]
    neurons, places = used.nonzero(as_tuple=True)
    width = std.shape[1]
    subunits = [
        Feature(layer, token_type, None if m == width - 1 else m, k)
        for k, m in zip(neurons.tolist(), places.tolist(), strict=True)
    ]
    chosen = centred[:, used]
    of = [names[c] for c in slots[used].tolist()]
    own = subunit_share(centred)[used]
    tables.append(table_rows(subunits, of, edges[used].tolist(), describe(chosen, own)))
    return tables


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
