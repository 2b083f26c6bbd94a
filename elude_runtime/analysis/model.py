"""A rewritten checkpoint as a model: the base model's output bit for bit, and its features on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, wraps
from pathlib import Path
from threading import RLock
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from elude_runtime.analysis.attribution import ExplainOptions, ExplainRequest, Explanation
from elude_runtime.analysis.edits import DenseVector, Edit, Steering
from elude_runtime.analysis.explain_batch import explain_batch
from elude_runtime.analysis.features import Feature, parse_feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.steering import Steered, plan_steering, steer_batch
from elude_runtime.analysis.targets import Target, chosen_targets
from elude_runtime.checkpoint.catalogue import FeatureCatalogue, read_catalogue
from elude_runtime.checkpoint.manifest import Manifest, ModelSource
from elude_runtime.checkpoint.storage import read_checkpoint
from elude_runtime.errors import CheckpointError, LayerError, did_you_mean
from elude_runtime.network.build import Factory, build_timm, load_weights
from elude_runtime.network.conditions import checkpointed, usable_device
from elude_runtime.network.explicit import explicit_model
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.tail import Recording, TailRunner, record_layers
from elude_runtime.partition import Partition

P = ParamSpec("P")
R = TypeVar("R")


class _Lock:
    """A lock that one thread may take again; copied or pickled it is a new one."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


def _one_at_a_time(method: Callable[Concatenate[EludeModel, P], R]) -> Callable[Concatenate[EludeModel, P], R]:
    """Recordings and tails patch the modules that predictions run: threads take turns."""

    @wraps(method)
    def call(self: EludeModel, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return call


class EludeModel(nn.Module):
    """`model(x)` is the base model's output, bit for bit; everything else is computed beside that path.

    x: preprocessed images [B, 3, H, W] (see `data_config.transform()`), on the model's device. Threads may share a
    model: they take turns.
    """

    def __init__(self, base: nn.Module, manifest: Manifest, partitions: dict[str, Partition]) -> None:
        super().__init__()
        self.base = base
        self.manifest = manifest
        self.data_config = DataConfig.parse(manifest.data_config)
        modules = dict(base.named_modules())
        self._states = nn.ModuleList(
            SplitState(entry, modules[entry.name], partitions[entry.name]) for entry in manifest.layers
        )
        self.lock = _Lock()  # held while modules are patched or watched; tasks outside this class take it too
        self.directory: Path | None = None  # of the checkpoint, where it was loaded from one
        self._catalogue: FeatureCatalogue | None = None
        self.eval()
        for module in checkpointed(base):
            module.grad_checkpointing = False

    @_one_at_a_time
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)

    @cached_property
    def states(self) -> dict[str, SplitState]:
        """The split layers by name, in network order."""
        return {s.name: s for s in self._states}  # type: ignore[misc]

    @property
    def layers(self) -> list[str]:
        return list(self.states)

    @cached_property
    def tails(self) -> TailRunner:
        """The tails of all split layers, planned on first use; sub-units and concepts do without."""
        with self.lock:
            return TailRunner(self.base, self.layers, self.data_config.input_size)

    def state(self, layer: str) -> SplitState:
        """One split layer. LayerError with the closest names when the checkpoint does not have it."""
        if layer not in self.states:
            hint = did_you_mean(layer, self.layers) or f" It has {', '.join(self.layers)}."
            raise LayerError(f"The checkpoint has no split layer {layer[:80]!r}.{hint}")
        return self.states[layer]

    def feature(self, name: str) -> Feature:
        """A feature by name, checked to exist. FeatureError otherwise."""
        feature = parse_feature(name, self.layers)
        return self.states[feature.layer].check(feature)

    @_one_at_a_time
    def record(self, x: Tensor, layers: Iterable[str] | None = None) -> Recording:
        """A forward pass that keeps what `explain` and `steer` need of the given layers (default: all)."""
        return self.tails.record(x, self.layers if layers is None else list(layers))

    @_one_at_a_time
    def subunits(self, x: Tensor, layer: str) -> Tensor:
        """Uncentred sub-unit sums float32 [B, T, d, M + 1], `rest` last; plus the bias they add up to the layer's
        output. Convolutions: T = H * W positions, row by row."""
        state = self.state(layer)
        with torch.no_grad():
            return state.sums(self._input(x, state))

    @_one_at_a_time
    def concepts(self, x: Tensor, layer: str) -> Tensor:
        """Concept activations float32 [B, T, K], columns as `concept_names(layer)`; 0 where a concept is of the other
        token type."""
        state = self.state(layer)
        inputs = self._input(x, state)
        columns = []
        with torch.no_grad():
            for token_type in state.live_types:
                part = state.concept_activations(inputs, token_type)
                full = part.new_zeros(len(x), state.layout.total, part.shape[-1])
                full[:, state.layout.slices[token_type]] = part
                columns.append(full)
        return torch.cat(columns, -1)

    def _input(self, x: Tensor, state: SplitState) -> Tensor:
        return record_layers(self.base, x, {state.name: state.linear.module}).x[state.name].float()

    def concept_names(self, layer: str) -> list[str]:
        return self.state(layer).concept_names()

    @_one_at_a_time
    def explain(
        self,
        x: Tensor,
        targets: Sequence[int | Target] | None = None,
        *,
        layers: Sequence[str] | None = None,
        top_features: int = 10,
        method: str = "auto",
        level: str = "concepts",
        steps: int = 4,
        sign: str = "both",
        effects: bool = False,
        heatmaps: bool = False,
        pixels: bool = False,
    ) -> list[list[Explanation]]:
        """For every image, one explanation a target (default: each image's top class), layers in network order."""
        options = ExplainOptions(method, steps, level, top_features, sign, effects, heatmaps, pixels)
        names = self.layers if layers is None else [self.state(name).name for name in layers]
        recording = self.record(x, names)
        embedding = self.manifest.output == "embedding"
        chosen = [chosen_targets(targets, output, embedding=embedding) for output in recording.logits]
        requests = [ExplainRequest(row, own, names, options) for row, own in enumerate(chosen)]
        return explain_batch(self, recording, requests)

    @_one_at_a_time
    def explain_row(
        self, recording: Recording, row: int, targets: list[Target], layers: list[str], options: ExplainOptions
    ) -> list[Explanation]:
        """Explanations of one image of a recorded pass, one a target."""
        return explain_batch(self, recording, [ExplainRequest(row, targets, layers, options)])[0]

    @_one_at_a_time
    def steer(
        self,
        x: Tensor,
        edits: Sequence[Edit] = (),
        *,
        vectors: Sequence[DenseVector] = (),
        strength_multiplier: float = 1.0,
        conflict: str = "error",
    ) -> Steered:
        """The same edits and vectors on every image: default and steered outputs side by side. See `Steering` for the
        rest. FeatureError, LayerError or EditError for what cannot be done."""
        plan = plan_steering(self, Steering(tuple(edits), tuple(vectors), strength_multiplier, conflict))
        recording = self.record(x, plan.layers)
        rows = steer_batch(self, recording, range(len(x)), [plan] * len(x))
        return Steered.of(rows, recording.logits)

    def concept_std(self, feature: Feature) -> float | None:
        """The calibration standard deviation of a concept's activation, from the checkpoint's feature catalogue; None
        where that is not there."""
        if self._catalogue is None and self.directory is not None:
            with suppress(CheckpointError):  # a missing or unreadable catalogue stops nobody who does not need it
                self._catalogue = read_catalogue(self.directory)
        facts = self._catalogue.facts(feature.name) if self._catalogue is not None else None
        return None if facts is None else facts.std

    @_one_at_a_time
    def explicit(self) -> nn.Module:
        """The explicit form: a copy of the base model with every split layer as sub-units and their sum."""
        return explicit_model(self.base, {n: (s.partition, s.layout) for n, s in self.states.items()})


def build_base(source: ModelSource, directory: Path, *, trust_factory: bool = False) -> nn.Module:
    """The architecture a checkpoint names. CheckpointError for code that is not trusted or was changed."""
    if source.kind == "timm":
        if ":" in source.name:
            raise CheckpointError(
                f"{directory} names a model on a hub ({source.name}); a checkpoint is loaded from disk only."
            )
        return build_timm(source.name, source.args)
    folder = directory / "factory"
    if not trust_factory:
        raise CheckpointError(
            f"{directory} carries code ({source.file}) that builds its model; read it, then load it with "
            "trust_factory=True (--trust-factory, or `trust_factory: true` in the server's configuration)."
        )
    for name, expected in source.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{directory} names a file outside itself ({name}); it is not to be trusted.")
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise CheckpointError(f"{path} is missing or was changed since the checkpoint was made; make it again.")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    if found - set(source.files):
        raise CheckpointError(
            f"{folder} holds {sorted(found - set(source.files))[0]}, which the checkpoint does not list; make it again."
        )
    if source.file not in source.files or source.function is None:
        raise CheckpointError(f"{directory} does not say which of its files builds the model; make it again.")
    return Factory((folder / source.file).resolve(), source.function).build(source.args)[0]


@torch.inference_mode(False)  # weights made in that mode would never have gradients run through them
def load(checkpoint: str | Path, device: str | torch.device = "cpu", *, trust_factory: bool = False) -> EludeModel:
    """Load a checkpoint directory, digests checked. CheckpointError says what does not fit and why, SettingsError
    that the device is not there."""
    device = usable_device(device)
    directory = Path(checkpoint)
    manifest, tensors, partitions = read_checkpoint(directory)
    for name, partition in partitions.items():
        problems = partition.problems()
        if problems:
            raise CheckpointError(f"The partition of {name} in {directory} is damaged: {problems[0]}.")
    base = build_base(manifest.model, directory, trust_factory=trust_factory)
    load_weights(base, tensors, str(directory))
    base.requires_grad_(False)
    modules = dict(base.named_modules())
    for entry in manifest.layers:
        module = modules.get(entry.name)
        if module is None or tuple(module.weight.shape[:2]) != (entry.neurons, entry.inputs):
            raise CheckpointError(f"{directory} splits {entry.name}, which its model does not have in that shape.")
    model = EludeModel(base, manifest, partitions).to(device)
    model.directory = directory
    return model
