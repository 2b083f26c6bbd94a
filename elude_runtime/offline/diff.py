"""`elude diff`: which features of two rewrites correspond, so that names can move from one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.errors import CheckpointError, LayerError, SettingsError
from elude_runtime.network.tokens import TYPE_NAMES, by_image
from elude_runtime.offline.collect import StopForward, layer_inputs
from elude_runtime.offline.correspondence import Catalogue, Diff, Matcher
from elude_runtime.offline.feature_matching import LayerMoments
from elude_runtime.offline.images import ImageSource, Progress

_FEW_TOKENS = 300
_PASS_BYTES = 2 * 2**30  # of streamed moments; layers that do not fit are taken in another pass over the images
_UNFOLDED_FLOATS = 16_000_000  # inputs unfolded at once: 64 MB of float32

Moments = dict[tuple[str, int], LayerMoments]  # by layer and token type


def diff(
    old: str | Path,
    new: str | Path,
    images: str | Path | Tensor,
    *,
    threshold: float = 0.7,
    subunits: bool = True,
    batch_size: int = 25,
    workers: int = 0,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    trust_factory: bool = False,
    progress: Progress | None = None,
) -> Diff:
    """Correlate the activations of all features of two checkpoints on the given images, and match them one to one.

    images: a folder, or preprocessed images [N, 3, H, W]. Concepts are compared within a layer and token type,
    sub-units (unless subunits=False) within a neuron; `rest` is no feature and takes no part. Correlations are over
    all tokens of the type. Two checkpoints of the same base share one forward pass; otherwise each runs on its own
    base. SettingsError for a threshold outside (0, 1], LayerError when no layer can be compared, CheckpointError for
    a checkpoint that cannot be used, ImagesError when there is no image.
    """
    if not 0 < threshold <= 1:
        raise SettingsError("The threshold is a correlation above 0 and at most 1.")
    report = progress or (lambda *_: None)
    paths = Path(old), Path(new)
    pair = _Pair(*(load(p, device, trust_factory=trust_factory) for p in paths))
    catalogues = Catalogue.read(paths[0]), Catalogue.read(paths[1])
    common, incomparable = pair.common()
    result = Diff(
        _facts(paths[0], pair.old), _facts(paths[1], pair.new), pair.same_base, 0, threshold, pair.warnings(),
        [n for n in pair.old.layers if n not in pair.new.layers],
        [n for n in pair.new.layers if n not in pair.old.layers],
        incomparable, [], [], [], [],
    )  # fmt: skip
    if not common:
        raise LayerError(_nothing_in_common(pair, incomparable))
    for names in _passes(pair, list(common), subunits):
        moments = {
            (name, t): LayerMoments(*pair.states(name), t, shared=pair.shared, subunits=subunits)
            for name in names
            for t in common[name]
        }
        result.images = _stream(pair, moments, images, report, batch_size=batch_size, workers=workers, limit=limit)
        for (name, t), one in moments.items():
            _check(one, name, t, result.warnings)
            matcher = Matcher(t, one.count, threshold, pair.states(name), catalogues)
            matcher.add_concepts(one.concept_correlations())
            neurons = pair.old.state(name).linear.neurons if subunits else 0
            for part in one.subunit_correlations() if subunits else ():
                matcher.add_subunits(part)
                report(f"matching {name}", len(part.values), neurons * len(common[name]))
            result.agreement.extend(matcher.agreement())
            result.splits.extend(matcher.splits)
            result.merges.extend(matcher.merges)
            result.mapping.extend(matcher.rows)
    return result


@dataclass(frozen=True)
class _Pair:
    """The two checkpoints, loaded."""

    old: EludeModel
    new: EludeModel

    @property
    def same_base(self) -> bool:
        """Whether both were made of the same tensors."""
        return self.old.manifest.base_sha256 == self.new.manifest.base_sha256

    @property
    def same_preprocessing(self) -> bool:
        return self.old.data_config == self.new.data_config

    @property
    def shared(self) -> bool:
        """Whether one forward pass serves both: the same tensors in the same network, on the same input."""
        return self.same_base and self.old.manifest.model == self.new.manifest.model and self.same_preprocessing

    def states(self, layer: str) -> tuple[SplitState, SplitState]:
        return self.old.state(layer), self.new.state(layer)

    def warnings(self) -> list[str]:
        found = []
        if not self.same_base:
            found.append(
                "The checkpoints have different base models: each ran on its own, and a layer's features are compared "
                "as if its neurons and tokens meant the same in both."
            )
        if not self.same_preprocessing:
            a, b = self.old.data_config.as_dict(), self.new.data_config.as_dict()
            changed = ", ".join(k for k in a if a[k] != b[k])
            found.append(
                f"The checkpoints preprocess images differently ({changed}): each saw them its own way, so that a "
                "token may show other pixels in each."
            )
        return found

    def common(self) -> tuple[dict[str, list[int]], dict[str, str]]:
        """({layer: token types that live in both}, {layer: why it cannot be compared}), in network order."""
        common: dict[str, list[int]] = {}
        refused: dict[str, str] = {}
        for name in self.old.layers:
            if name not in self.new.layers:
                continue
            old, new = self.states(name)
            differing = [
                f"{what} {a} against {b}"
                for what, a, b in (
                    ("neurons", old.linear.neurons, new.linear.neurons),
                    ("tokens", old.layout.total, new.layout.total),
                    ("prefix tokens", old.layout.prefix, new.layout.prefix),
                    ("groups", old.linear.groups, new.linear.groups),
                )
                if a != b
            ]
            live = [t for t in old.live_types if t in new.live_types]
            if differing or not live:
                refused[name] = ", ".join(differing) or "no token type matters to the output of both"
            else:
                common[name] = live
        return common, refused


def _nothing_in_common(pair: _Pair, incomparable: dict[str, str]) -> str:
    if incomparable:
        name, reason = next(iter(incomparable.items()))
        return f"No layer can be compared: {name} has {reason}; give two rewrites of one architecture."
    return (
        f"The checkpoints have no split layer in common: the old one splits {', '.join(pair.old.layers)}, the new one "
        f"{', '.join(pair.new.layers)}; rewrite with the same --layers."
    )


def _facts(path: Path, model: EludeModel) -> dict[str, Any]:
    m = model.manifest
    return {
        "checkpoint": str(path),
        "checkpoint_sha256": m.checkpoint_sha256,
        "base_sha256": m.base_sha256,
        "model": m.model.name,
        "method": m.method,
        "calibration_images": m.calibration.images,
        "calibration_sha256": m.calibration.sha256,
    }


def _passes(pair: _Pair, names: list[str], subunits: bool) -> Iterator[list[str]]:
    """The layers, as many at a time as have their moments fit in `_PASS_BYTES` (one at least)."""
    group: list[str] = []
    used = 0
    for name in names:
        widths = [s.linear.inputs * s.linear.positions for s in pair.states(name)]
        squares = widths[0] ** 2 if pair.shared else widths[0] ** 2 + widths[1] ** 2 + widths[0] * widths[1]
        state = pair.old.state(name)
        size = 8 * squares * state.linear.groups * state.layout.types if subunits else 0
        if group and used + size > _PASS_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


def _stream(
    pair: _Pair,
    moments: Moments,
    images: str | Path | Tensor,
    report: Progress,
    *,
    batch_size: int,
    workers: int,
    limit: int | None,
) -> int:
    """One pass over the images that feeds every entry of `moments`; returns the number of images."""
    models = [pair.old] if pair.shared else [pair.old, pair.new]
    names = list(dict.fromkeys(name for name, _ in moments))
    sources = [
        ImageSource(images, model.data_config, batch_size=batch_size, workers=workers, limit=limit) for model in models
    ]
    passes = [source.batches() for source in sources]
    seen: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in models]
    count = 0
    with ExitStack() as stack, torch.no_grad():
        for model, found in zip(models, seen, strict=True):
            stack.enter_context(layer_inputs(model.base, names, found))
        for batches in zip(*passes, strict=True):
            for model, found, batch in zip(models, seen, batches, strict=True):
                found.clear()
                parameter = next(model.base.parameters())
                with suppress(StopForward):
                    model.base(batch.to(parameter.device, parameter.dtype))
            for name in names:
                inputs = [by_image(found[name][0], len(batches[0])) for found in seen]
                for reads in _reads(pair.states(name), inputs):
                    for t in [t for n, t in moments if n == name]:
                        chosen = [r[:, pair.old.state(name).layout.slices[t]].flatten(0, 1) for r in reads]
                        moments[name, t].add(chosen[0], chosen[-1])
            count += len(batches[0])
            report("correlations", len(batches[0]), sources[0].count)
    return count


def _reads(states: tuple[SplitState, SplitState], inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """What the tokens of a few images at a time read [b, T, G, n, q], for each of the given inputs [B, ...]: unfolding
    multiplies the input of a large kernel."""
    widest = max(x[0].numel() * s.linear.positions for s, x in zip(states, inputs, strict=False))
    for parts in zip(*(x.split(max(1, _UNFOLDED_FLOATS // widest)) for x in inputs), strict=True):
        yield [s.linear.patches(x) for s, x in zip(states, parts, strict=False)]


def _check(one: LayerMoments, layer: str, token_type: int, warnings: list[str]) -> None:
    """CheckpointError when a layer's inputs are not numbers; a warning when there are few tokens."""
    if not one.finite():
        raise CheckpointError(
            f"The inputs of {layer} are not finite on these images, so nothing can be correlated; check the weights "
            "of the base model."
        )
    if one.count < _FEW_TOKENS:
        warnings.append(
            f"{layer} saw {one.count} tokens of type {TYPE_NAMES[token_type]}; correlations over so few say little, "
            "give more images."
        )
