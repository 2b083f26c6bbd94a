"""What an ELUDe partition is compared with: other features of the same layer, made from the same calibration tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elude_runtime.errors import SettingsError, did_you_mean
from elude_runtime.offline.evaluation import bases, directions, gating, sae
from elude_runtime.offline.evaluation.calibration import CalibrationTokens, written_set
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.images import Progress

BASELINES = (
    *("hidden", "channels", "pca", "rotation", "heads"),  # bases
    *("groups", "ica", "kmeans", "logits", "gating"),
    *("sae", "transcoder"),
)


@dataclass(frozen=True)
class BaselineOptions:
    """Which baselines are made, and how much is spent on them.

    baselines: of `BASELINES`; tokens: that k-means, groups and the read-out of the logits look at, at most;
    end_tokens: at each end of a neuron (gating); active: numbers k of active latents; max_latents: of an SAE, at most
    (and no more than there are tokens); steps, batch, rates: training of an SAE (`SparseConfig`); of several learning
    rates the one with the lowest FVU on held-out tokens is kept.
    """

    baselines: tuple[str, ...] = BASELINES
    tokens: int = 25_000
    end_tokens: int = 400
    active: tuple[int, ...] = (8, 32)
    max_latents: int = 1536
    steps: int = 1000
    batch: int = 512
    rates: tuple[float, ...] = (0.14,)

    def __post_init__(self) -> None:
        for name in self.baselines:
            if name not in BASELINES:
                raise SettingsError(f"There is no baseline {name!r}.{did_you_mean(name, BASELINES)}")
        least = min(self.tokens, self.end_tokens, self.max_latents, self.steps, self.batch, *self.active)
        if least < 1 or not self.rates or min(self.rates) <= 0:
            raise SettingsError("Numbers of tokens, latents and steps, and learning rates must be above 0.")


@dataclass(frozen=True)
class _Task:
    """All that a baseline is made from: the arguments of `baseline_sets`, sample [R] of token numbers."""

    tokens: CalibrationTokens
    sample: Tensor
    concepts: int
    subunits: int
    neurons: Tensor
    logits: Tensor | None
    heads: int | None
    seed: int
    options: BaselineOptions
    progress: Progress


def baseline_sets(
    inputs: Tensor,
    weight: Tensor,
    *,
    concepts: int,
    subunits: int,
    neurons: Sequence[int],
    logits: Tensor | None = None,
    heads: int | None = None,
    seed: int,
    options: BaselineOptions,
    progress: Progress,
) -> Iterator[FeatureSet]:
    """The baselines of one layer and token type, the cheap ones first; each is made when it is asked for.

    inputs float32 [S, m]: what calibration tokens read; weight [d, m]; concepts: number of ICA components, k-means
    directions, groups, and latents of the smaller SAEs (the larger ones have subunits * d); neurons: those for which
    gating and the per-head partition are made; logits [S, C] of each token's image, for the control that reads them;
    heads: of an attention output layer, else None. The same seed, tokens and threads give the same features.
    facts of every set: `baseline` (its name in the options) and `seconds`.
    """
    if len(inputs) < 2:
        raise SettingsError("Baselines need at least 2 calibration tokens.")
    tokens = CalibrationTokens.of(inputs, weight)
    chosen = torch.tensor(list(neurons), dtype=torch.int64)
    sample = tokens.sample(options.tokens, seed)
    task = _Task(tokens, sample, concepts, subunits, chosen, logits, heads, seed, options, progress)
    for name in options.baselines:
        start = time.perf_counter()
        for found in _make(name, task):
            seconds = time.perf_counter() - start
            progress(f"baseline: {found.name}", 1, 1)
            yield replace(found, facts={"baseline": name, "seconds": round(seconds, 2), **found.facts})
            start = time.perf_counter()  # what the caller did with it is not the baseline's time


def _make(name: str, task: _Task) -> Iterator[FeatureSet]:
    """The sets of one entry of the options; none where the layer has nothing for it."""
    tokens, sample, seed = task.tokens, task.sample, task.seed
    if name == "hidden":
        yield bases.hidden_units(tokens)
    elif name == "channels":
        yield bases.output_channels(tokens)
    elif name == "pca":
        yield bases.principal_directions(tokens)
    elif name == "rotation":
        yield bases.rotated_channels(tokens, seed)
    elif name == "heads" and task.heads and len(task.neurons):
        yield bases.head_parts(tokens, task.heads, task.neurons)
    elif name == "groups":
        yield bases.unit_groups(tokens, task.concepts, sample, seed)
    elif name == "ica":
        yield directions.independent_components(tokens, task.concepts, sample, seed, "y")
        yield directions.independent_components(tokens, task.concepts, sample, seed, "x")
    elif name == "kmeans":
        yield directions.kmeans_directions(tokens, task.concepts, sample, seed)
    elif name == "logits" and task.logits is not None:
        yield directions.logit_directions(tokens, task.concepts, sample, task.logits)
    elif name == "gating" and len(task.neurons):
        yield gating.gated_neurons(tokens, task.neurons, task.subunits, task.options.end_tokens, seed)
    elif name == "sae":
        for source in ("y", "x"):
            for config in _configs(task, ("TopK", "BatchTopK")):
                yield _sparse_set(task, f"{config.kind} SAE on {source}", source, source, config)
    elif name == "transcoder":
        for config in _configs(task, ("TopK",)):
            yield _sparse_set(task, f"{config.kind} transcoder", "x", "y", config)


def _configs(task: _Task, kinds: tuple[sae.Kind, ...]) -> Iterator[sae.SparseConfig]:
    """As many latents as concepts, then as sub-units; every active count that leaves latents inactive."""
    options, count = task.options, len(task.tokens.inputs)
    large = task.subunits * len(task.tokens.weight)
    for latents in sorted({min(n, options.max_latents, count) for n in (task.concepts, large)}):
        for kind in kinds:
            for active in options.active:
                if active < latents:
                    yield sae.SparseConfig(
                        kind, latents, active, options.steps, options.batch, options.rates[0], seed=task.seed
                    )


def _sparse_set(task: _Task, name: str, reads: str, writes: str, config: sae.SparseConfig) -> FeatureSet:
    """Train a coder that reads x or y and gives back x or y. A latent writes its decoder row to y, from x through W."""
    tokens, weight = task.tokens, task.tokens.weight
    label = f"{name}, k = {config.active}, {config.latents} latents"
    values = {"x": tokens.inputs, "y": tokens.outputs}
    encoder = weight if reads != writes else None

    def report(steps: int) -> None:
        task.progress(label, steps, config.steps * len(task.options.rates))

    tried = [
        sae.train(values[reads], values[writes], replace(config, rate=rate), encoder, report)
        for rate in task.options.rates
    ]
    best = min(tried, key=lambda t: t.fvu)
    coder = best.coder
    mean = tokens.mean

    def raw(inputs: Tensor) -> Tensor:
        return coder.encode(inputs if reads == "x" else (inputs - mean) @ weight.T)

    mean_output = weight @ mean  # outputs are given to coders without it

    def reconstruct(inputs: Tensor) -> Tensor:
        decoded = coder.decode(raw(inputs))
        return decoded + mean_output if writes == "y" else decoded @ weight.T

    decoded = coder.directions() if writes == "y" else coder.directions() @ weight.T
    return written_set(
        tokens,
        label,
        raw,
        decoded,
        reconstruct=reconstruct,
        kind=config.kind,
        reads=reads,
        writes=writes,
        k=config.active,
        latents=config.latents,
        fvu=best.fvu,
        fvu_output=best.fvu if writes == "y" else _output_fvu(tokens, best),
        active=best.active,
        threshold=coder.threshold,
        steps=config.steps,
        batch=config.batch,
        rate=best.config.rate,
        rates={t.config.rate: t.fvu for t in tried},
        curve=best.curve,
        training_seconds=round(sum(t.seconds for t in tried), 2),
    )


def _output_fvu(tokens: CalibrationTokens, trained: sae.TrainedCoder) -> float:
    """FVU of the layer's output, where a coder gives back its input."""
    inputs, outputs = tokens.inputs[trained.held], tokens.outputs[trained.held]
    missed = inputs - trained.coder.decode(trained.coder.encode(inputs))
    return sae.unexplained(outputs, outputs - missed @ tokens.weight.T)
