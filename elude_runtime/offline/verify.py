"""`elude verify`: the certificate that a checkpoint changes nothing, against the base model from its own source."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from elude_runtime.analysis.model import EludeModel, build_base
from elude_runtime.checkpoint.certificate import VERIFICATION
from elude_runtime.checkpoint.manifest import Manifest, read_manifest
from elude_runtime.checkpoint.storage import (
    CALIBRATION_TENSOR,
    read_partition,
    read_tensors,
    split_tensors,
    tensors_sha256,
    write_json,
)
from elude_runtime.errors import EludeError
from elude_runtime.network.build import load_weights
from elude_runtime.network.conditions import borrowed, usable_device
from elude_runtime.network.explicit import explicit_model
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.preprocessing import DataConfig, decode_image, to_input, upright_image
from elude_runtime.network.tokens import by_image
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.offline.verify_outputs import Check, check_compiled, check_logits, same_bits
from elude_runtime.partition import Partition
from elude_runtime.partition.sums import concept_weight, wide_weight

FLOAT64_BOUND = 1e-12
# of the neuron's own scale: the float32 inputs of a layer deep in a network move by 1e-5 with batch size and machine
_MEAN_BOUND = 1e-4


@dataclass(frozen=True)
class Verification:
    """The certificate: it holds when no check fails; `checks` says what was not checked."""

    checkpoint_sha256: str
    checks: list[Check]
    images: int
    environment: dict[str, Any]

    @property
    def holds(self) -> bool:
        return all(c.holds is not False for c in self.checks)

    def document(self) -> dict[str, Any]:
        made = datetime.now(UTC).isoformat(timespec="seconds")
        return _json_numbers({"holds": self.holds, "made": made, **asdict(self)})


def verify(
    checkpoint: Path,
    base: nn.Module,
    data_config: DataConfig,
    images: str | Path | Tensor,
    *,
    batch_sizes: tuple[int, ...] = (1, 8),
    limit: int | None = None,
    few: int = 4,
    device: str | torch.device | None = None,
    trust_factory: bool = False,
    compiled: bool = False,
    write: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """Check a checkpoint against `base`, the model built from its own source with its own weights (eval mode).

    data_config: the base model's preprocessing; images: files as `ImageSource` takes them, or preprocessed images
    [N, 3, H, W]; few: images for the float64 checks; device: where both models run, by default where the base model
    is; compiled: the outputs of both under torch.compile are compared too. Writes `verification.json` unless told not
    to. CheckpointError for a checkpoint that cannot be read at all, SettingsError for a device that is not there;
    what can be read and does not hold is a failed check.
    """
    report = progress or (lambda *_: None)
    with borrowed(base, None if device is None else usable_device(device)):
        manifest = read_manifest(checkpoint)
        tensors, own = split_tensors(read_tensors(checkpoint))
        own.pop(CALIBRATION_TENSOR, None)
        partitions = {entry.name: read_partition(own, entry) for entry in manifest.layers}
        checks = [check_tensors(manifest, tensors, own, base), check_partition(manifest, own, partitions)]
        place = next(base.parameters()).device
        source = ImageSource(images, data_config, batch_size=max(batch_sizes), limit=limit)
        count = 0
        # a tampered name or another base: the two first checks say so, and the others have nothing to compare
        if checks[-1].holds and _same_names(tensors, base) and set(partitions) <= set(dict(base.named_modules())):
            rebuilt = build_base(manifest.model, checkpoint, trust_factory=trust_factory)
            load_weights(rebuilt, tensors, str(checkpoint))
            model = EludeModel(rebuilt.requires_grad_(False), manifest, partitions)
            model.to(place)
            logits, count = check_logits(model, base, source, batch_sizes, report)
            same = sha256(source.report.hashes.in_order()).hexdigest() == manifest.calibration.sha256
            sample = next(source.batches())[:few]
            report("float64", 0, None)
            checks += [
                logits[0],
                check_additivity(model, base, sample),
                check_means(model, base, source if same else None),
                check_explicit(base, partial(_explicit, model), sample),
            ]
            checks += (
                [] if isinstance(images, Tensor) else [check_preprocessing(manifest, data_config, source.encoded(32))]
            )
            checks += logits[1:]
            if compiled and logits[0].holds:
                checks.append(check_compiled(rebuilt, base, source, batch_sizes, report))
            elif compiled:
                checks.append(Check("compiled", None, "Not compared: the plain outputs differ already."))
    environment = {"torch": torch.__version__, "timm": timm.__version__, "threads": torch.get_num_threads()}
    environment["device"] = str(place)
    result = Verification(manifest.checkpoint_sha256, checks, count, environment)
    if write:
        write_json(checkpoint / VERIFICATION, result.document())
    return result


def check_tensors(manifest: Manifest, tensors: dict[str, Tensor], own: dict[str, Tensor], base: nn.Module) -> Check:
    """Every base tensor under its own name, with its own dtype and bytes; both digests as the manifest has them."""
    expected = base.state_dict()
    names = sorted(set(tensors) ^ set(expected))
    changed = [n for n in expected if n in tensors and not same_bits(tensors[n], expected[n])]
    digests = {
        "base_sha256": tensors_sha256(tensors) == manifest.base_sha256,
        "partition_sha256": tensors_sha256(own) == manifest.partition_sha256,
    }
    figures = {"tensors": len(expected), "changed": len(changed), "names_that_differ": len(names), **digests}
    if names or changed:
        first = (changed or names)[0]
        return Check(
            "tensors",
            False,
            f"{len(changed) + len(names)} tensors differ from the base model's, first {first}.",
            figures,
        )
    wrong = [n for n, ok in digests.items() if not ok]
    if wrong:
        return Check("tensors", False, f"The tensors do not hash to the manifest's {' and '.join(wrong)}.", figures)
    return Check("tensors", True, f"All {len(expected)} base tensors are byte-identical.", figures)


def check_partition(manifest: Manifest, own: dict[str, Tensor], partitions: dict[str, Partition]) -> Check:
    """Every edge in one existing sub-unit or `rest`, every sub-unit in one existing concept or `rest`."""
    problems = [f"{name}: {p}" for name, partition in partitions.items() for p in partition.problems()]
    figures = {name: {"subunits": int(p.counts.long().sum()), "rest_edges": float((p.edges == 255).float().mean())}
               for name, p in partitions.items()}  # fmt: skip
    if problems:
        return Check("partition", False, f"{problems[0]}.", figures)
    return Check(
        "partition", True, "Every edge is in one sub-unit or rest, every sub-unit in one concept or rest.", figures
    )


def check_additivity(model: EludeModel, base: nn.Module, images: Tensor) -> Check:
    """In float64: bias + sub-units = the layer's output; baseline + concepts = the layer's output."""
    figures: dict[str, Any] = {}
    worst, holds = 0.0, True
    modules = dict(base.named_modules())
    images = images.to(next(base.parameters()).device, next(base.parameters()).dtype)
    recording = model.record(images)
    with torch.no_grad():
        for name, state in model.states.items():
            x = recording.x[name].double()
            rows = x.flatten(0, 1) if state.linear.is_conv and x.dim() == 5 else x  # a convolution of windows
            y = copy.deepcopy(modules[name]).double()(rows)  # the base model's own layer
            expected = state.linear.tokens(by_image(y, len(x)))
            subunits = state.sums(x, torch.float64).sum(-1) + state.linear.bias(torch.float64)
            concepts = _by_concepts(model, name, x)
            errors = {"subunits": _relative(subunits, expected), "concepts": _relative(concepts, expected)}
            figures[name] = errors
            holds = holds and all(e <= FLOAT64_BOUND for e in errors.values())
            worst = max(worst, *errors.values())
    detail = f"Sub-units and concepts add up to the layer's output; largest relative error {worst:.1e} in float64."
    return Check("additivity", holds, detail, figures)


def _by_concepts(model: EludeModel, layer: str, x: Tensor) -> Tensor:
    """c + the sum of all concepts' writes, each by its own masked weight: float64 [B, T, d]."""
    state = model.states[layer]
    linear, partition, slices = state.linear, state.partition, state.layout.slices
    mean, weight = partition.mean.double(), linear.weight(torch.float64)
    parts = []
    for token_type in range(partition.types):
        inputs = x[:, slices[token_type]] if len(slices) > 1 else x
        total: Tensor | float = linear.bias(torch.float64) + mean[token_type].sum(-1)
        for concept in range(partition.concepts(token_type) + 1):
            slots = partition.concept_slots(token_type) == concept
            written = linear.apply(inputs, concept_weight(weight, partition, token_type, concept))
            total = total + written - (mean[token_type] * slots).sum(-1)
        parts.append(total)
    return torch.cat(parts[::-1], 1)  # type: ignore[arg-type]


def check_means(model: EludeModel, base: nn.Module, source: ImageSource | None) -> Check:
    """The stored means are those of the calibration images, recomputed from the base model where these are given."""
    if source is None:
        text = "Not recomputed: these are not the calibration images; the means are covered by partition_sha256."
        return Check("means", None, text, {"recomputed": False})
    modules = dict(base.named_modules())
    parameter = next(base.parameters())
    sums: dict[str, list[Tensor]] = {}
    counts = 0
    with torch.no_grad():
        for images in source.batches():
            recording = model.record(images.to(parameter.device, parameter.dtype))
            counts += len(images)
            for name, state in model.states.items():
                reads = LinearMap(modules[name], name).patches(recording.x[name])
                fresh = [reads[:, s].mean(1, dtype=torch.float64).sum(0) for s in state.layout.slices]
                sums[name] = [a + b for a, b in zip(sums[name], fresh, strict=True)] if name in sums else fresh
    worst, figures = 0.0, {}
    for name, state in model.states.items():
        linear, partition = state.linear, state.partition
        weight = linear.weight(torch.float64)
        groups = torch.arange(linear.neurons) // (linear.neurons // linear.groups)
        largest = 0.0
        for token_type, total in enumerate(sums[name]):
            wide = wide_weight(weight, partition.slots(token_type), partition.subunits + 1)
            mean = torch.einsum("kmjq,kjq->km", wide, (total / counts)[groups])
            # of what is added up, not of the sum: where that cancels, the last bits of a batch size are much of it
            read = torch.einsum("kmjq,kjq->k", wide.abs(), (total / counts).abs()[groups])
            scale = read[:, None] + partition.std[token_type].double().amax(-1, keepdim=True)
            error = (mean - partition.mean[token_type].double()).abs() / scale.clamp(min=1e-12)
            largest = max(largest, float(error.max()))
        figures[name] = largest
        worst = max(worst, largest)
    detail = f"The stored means are those of the {counts} calibration images, to {worst:.1e} of the neuron's scale."
    if worst > _MEAN_BOUND:
        detail = f"A stored mean is not that of the calibration images: off by {worst:.1e} of the neuron's scale."
    return Check("means", worst <= _MEAN_BOUND, detail, {"recomputed": True, **figures})


def check_explicit(base: nn.Module, explicit: Callable[[torch.dtype], nn.Module], images: Tensor) -> Check:
    """The explicit form gives the base model's outputs: float64 within 1e-12; float32 and bfloat16 as measured.

    explicit: builds the explicit form in a dtype.
    """
    figures: dict[str, Any] = {}
    device = next(base.parameters()).device
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = images.to(device, dtype)
        key = str(dtype).removeprefix("torch.")
        with torch.no_grad():
            try:
                z = copy.deepcopy(base).to(dtype)(x).double()
            except Exception as error:  # not every model runs in every type
                if dtype == torch.float64:
                    text = f"Not checked: the base model does not run in float64 ({_one_line(error)})."
                    return Check("explicit", None, text)
                continue
            try:
                other = explicit(dtype)(x).double()
            except Exception as error:  # glue code may ask of a layer what the explicit form does not have
                return Check(
                    "explicit", False, f"The explicit form does not run in {key} ({_one_line(error)}).", figures
                )
        figures[key] = _relative(other, z)
    listed = ", ".join(f"{key} {error:.1e}" for key, error in figures.items())
    detail = f"Outputs of the explicit form, relative to the largest: {listed}."
    return Check("explicit", figures["float64"] <= FLOAT64_BOUND, detail, figures)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _explicit(model: EludeModel, dtype: torch.dtype) -> nn.Module:
    return explicit_model(model.base, {n: (s.partition, s.layout) for n, s in model.states.items()}, dtype)


def check_preprocessing(manifest: Manifest, data_config: DataConfig, encoded: Iterable[bytes]) -> Check:
    """From the same image files' bytes, our decoding and the checkpoint's transform give the tensors of timm's own
    transform with the base model's configuration."""
    ours = DataConfig.parse(manifest.data_config).transform()
    timms = create_transform(**data_config.as_dict() | {"input_size": data_config.input_size, "is_training": False})
    compared = unequal = 0
    for data in _readable(encoded):
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith(("I", "F")):
            continue  # more than 8 bits: Pillow's own conversion clips, ours scales
        expected = timms(upright_image(image).convert("RGB"))
        found = to_input(decode_image(data), ours)
        compared += 1
        unequal += not (expected.shape == found.shape and torch.equal(expected, found))
    same = DataConfig.parse(manifest.data_config) == data_config
    figures = {"images": compared, "unequal": unequal, "data_config_equal": same}
    if unequal or not same:
        differing = [k for k, v in data_config.as_dict().items() if manifest.data_config.get(k) != v]
        named = f" ({', '.join(differing)})" if differing else ""
        text = f"The checkpoint's preprocessing is not the base model's{named}: {unequal} of {compared} images differ."
        return Check("preprocessing", False, text, figures)
    return Check("preprocessing", True, f"{compared} images give timm's own input tensors.", figures)


def _readable(encoded: Iterable[bytes]) -> Iterator[bytes]:
    for data in encoded:
        with suppress(EludeError):
            decode_image(data)
            yield data


def _same_names(tensors: dict[str, Tensor], base: nn.Module) -> bool:
    """Whether names and shapes are the base model's, whatever the values."""
    return {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in base.state_dict().items()}


def _relative(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; the numerator alone where all that is expected is zero."""
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def _json_numbers(value: Any) -> Any:
    """The same document with NaN and infinities as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {k: _json_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_numbers(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
