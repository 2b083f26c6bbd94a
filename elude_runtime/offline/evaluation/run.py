"""`elude evaluate`: every measure for a checkpoint's features and for what others would find in the same layer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.errors import ImagesError
from elude_runtime.network.tail import record_layers
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.evaluation.baselines import baseline_sets
from elude_runtime.offline.evaluation.embeddings import Embeddings
from elude_runtime.offline.evaluation.encoders import PIXELS, Encoder, PixelEncoder, TimmEncoder, refuse_evaluated
from elude_runtime.offline.evaluation.estimates import image_halves
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.images import (
    ImageSplit,
    calibration_hashes,
    known_truth,
    layer_batches,
    split_images,
)
from elude_runtime.offline.evaluation.interventions import Effects, measure_effects
from elude_runtime.offline.evaluation.options import EvaluateOptions, run_facts
from elude_runtime.offline.evaluation.own_sets import CONCEPTS, RANDOM_CONCEPTS, SUBUNITS, own_sets, own_split
from elude_runtime.offline.evaluation.result import Evaluation, LayerResult
from elude_runtime.offline.evaluation.scores import Judge, score_set
from elude_runtime.offline.evaluation.stability import compare_halves, rewritten_halves
from elude_runtime.offline.evaluation.tokens import PeakStream, TokenReader, TokenSample
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.partition.sums import full_width, neuron_groups

_HELD_OUT = 6000  # tokens of the scoring images that correlations are taken over
_LEVELS = 8_000  # calibration tokens that levels of activations are taken from
_LOGITS = 100_000_000  # numbers: of a larger table the control that reads the logits is left out
_INTERVENED = ("hidden", "pca", "groups", "kmeans", "sae")


def evaluate(
    checkpoint: str | Path,
    images: str | Path | list[str] | list[Path] | Tensor,
    encoders: Sequence[Encoder],
    options: EvaluateOptions | None = None,
    *,
    calibration: str | Path | Tensor | None = None,
    layers: Sequence[str] | None = None,
    batch_size: int = 25,
    workers: int = 0,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    trust_factory: bool = False,
    truth: Mapping[str, Collection[str]] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the features of a checkpoint, and all baselines and controls, on the same layers, tokens and images.

    images: a folder (or what `ImageSource` takes) of which half is scored, or all where `calibration` brings images to
    train baselines on. Images that the checkpoint or a baseline was calibrated on are never scored. The pixel encoder
    is always among the encoders. truth: known properties, {property: names of the files that have it}; the feature that
    tells each best is chosen on half of the scoring images and reported on the others.

    EncoderError for an encoder that is the evaluated model, ImagesError when fewer than 50 images can be scored,
    CheckpointError, LayerError or SettingsError for what was asked.
    """
    start, report = time.perf_counter(), progress or (lambda *_: None)
    options = options or EvaluateOptions()
    directory = Path(checkpoint)
    model = load(directory, device, trust_factory=trust_factory)
    for encoder in encoders:
        refuse_evaluated(encoder, model.base)
        if isinstance(encoder, TimmEncoder):
            encoder.model.to(device)
    judges = [*encoders, *([] if any(e.name == PIXELS for e in encoders) else [PixelEncoder()])]
    names = [model.state(n).name for n in layers] if layers else model.layers
    given, own = (
        None if i is None else ImageSource(i, model.data_config, batch_size=batch_size, workers=workers, limit=n)
        for i, n in ((images, limit), (calibration, None))
    )
    assert given is not None
    split = split_images(given, own, calibration_hashes(directory), options.seed, report)
    with tempfile.TemporaryDirectory() as folder:
        split, places, embeddings = _embed(model, split, judges, Path(folder), report)
        halves = image_halves(len(places), options.draws, options.seed)
        run = _Run(model, split, places, embeddings, options, halves, report)
        run.truth = known_truth(split.scoring, places, truth or {})
        if options.stability:
            run.rewrite_halves(names, Path(folder))
        found = [result for name in names for result in run.layer(name)]
    return Evaluation(
        run_facts(directory, model, split, judges, options, time.perf_counter() - start), found, options.draws,
        options.seed, run.warnings,
    )  # fmt: skip


def _embed(
    model: EludeModel, split: ImageSplit, encoders: Sequence[Encoder], folder: Path, report: Progress
) -> tuple[ImageSplit, Tensor, list[Embeddings]]:
    """What every encoder says of the scoring images; of these, those that can be read, and their places."""
    found = [Embeddings(e.name, split.scoring.count or 0, folder) for e in encoders]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.data_config.mean, model.data_config.std))
    places = []
    for batch in split.scoring.numbered():
        if len(batch.places):
            pixels = (batch.images.cpu() * std + mean).clamp(0, 1)
            for encoder, one in zip(encoders, found, strict=True):
                one.add(*encoder(pixels))
            places.append(batch.places)
        report("encoders", len(batch.places), split.scoring.count)
    if not places:
        raise ImagesError("None of the images to score could be read; give others.")
    read = torch.cat(places)
    return replace(split, scoring=split.scoring.at(read)), read, found


class _Run:
    """What all layers share."""

    def __init__(
        self, model: EludeModel, split: ImageSplit, places: Tensor, embeddings: list[Embeddings],
        options: EvaluateOptions, halves: Tensor, report: Progress,
    ) -> None:  # fmt: skip
        self.model, self.split, self.places, self.embeddings = model, split, places, embeddings
        self.options, self.halves, self.report = options, halves, report
        self.warnings: list[str] = []
        self.truth: dict[str, Tensor] = {}
        self.rewritten: tuple[EludeModel, EludeModel] | None = None

    def rewrite_halves(self, layers: Sequence[str], folder: Path) -> None:
        """The base model rewritten from two halves of the calibration images."""
        places = torch.cat([batch.places for batch in self.split.calibration.numbered()])
        source = self.split.calibration
        self.rewritten = rewritten_halves(self.model, layers, source, places, folder, self.report)

    def layer(self, name: str) -> list[LayerResult]:
        """Every live token type of one layer: one pass over the calibration images, one over the scoring ones."""
        state = self.model.state(name)
        samples, logits = self._calibrate(state)
        sets = {t: self._sets(state, t, samples[t], logits) for t in state.live_types}
        count = len(self.places)
        streams = {t: PeakStream(TokenReader(state, t), made, count) for t, (made, _) in sets.items()}
        held = {t: TokenSample(TokenReader(state, t), count, self.options.seed + 1, _HELD_OUT) for t in sets}
        for _, x in layer_batches(self.model, name, self.split.scoring, self.report, f"scoring {name}"):
            for t, stream in streams.items():
                stream.add(x)
                held[t].add(x)
        found = []
        for t, (made, rest) in sets.items():
            grid = state.layout.grid if t == 0 else None
            judges = [Judge.of(one, grid, self.options.seed) for one in self.embeddings]
            inputs, tokens = samples[t].inputs(), held[t].inputs()
            levels = inputs[:: max(1, len(inputs) // _LEVELS)]
            scores, means = [], []
            for one, peaks in zip(made, streams[t].peaks, strict=True):
                activations = one.activations(levels)
                means.append(activations.mean(0))
                scores.append(
                    score_set(
                        one, peaks, activations, one.activations(tokens), judges, self.halves, self.options.seed,
                        self.truth,
                    )
                )  # fmt: skip
                self.report(f"scores {name} {TYPE_NAMES[t]}", 1, len(made))
            effects = self._effects(state, t, made, means)
            stability = {}
            if self.rewritten:
                neurons = self._neurons(state)
                stability = compare_halves(self.rewritten, name, t, inputs, tokens, neurons, self.options.seed)
            found.append(LayerResult(name, t, len(inputs), rest, judges, scores, effects, stability))
        return found

    def _calibrate(self, state: SplitState) -> tuple[dict[int, TokenSample], Tensor | None]:
        """Token samples of every live type, and the logits of every calibration image [N, C]."""
        source = self.split.calibration
        count = source.count or 0
        samples = {
            t: TokenSample(TokenReader(state, t), count, self.options.seed, self.options.tokens)
            for t in state.live_types
        }
        logits = []
        parameter = next(self.model.base.parameters())
        for batch in source.numbered():
            if len(batch.places):
                with self.model.lock:
                    recording = record_layers(
                        self.model.base, batch.images.to(parameter.device, parameter.dtype),
                        {state.name: state.linear.module},
                    )  # fmt: skip
                for sample in samples.values():
                    sample.add(recording.x[state.name].float())
                logits.append(recording.logits.float().cpu())
            self.report(f"calibration {state.name}", len(batch.places), source.count)
        if not logits:
            raise ImagesError("None of the images to calibrate on could be read; give others.")
        return samples, torch.cat(logits)

    def _neurons(self, state: SplitState) -> Tensor:
        """int64, ascending: those whose sub-units are scored."""
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.randperm(state.linear.neurons, generator=generator)[: self.options.neurons].sort().values

    def _sets(
        self, state: SplitState, token_type: int, sample: TokenSample, logits: Tensor | None
    ) -> tuple[list[FeatureSet], dict[str, float]]:
        """All feature sets of one token type, and what of the output's variance is in `rest`."""
        inputs, options = sample.inputs(), self.options
        neurons = self._neurons(state)
        split = own_split(state, token_type, inputs)
        made = own_sets(split, neurons, inputs, options.seed)
        if options.baselines is not None:
            weight = full_width(split.weight, neuron_groups(len(split.weight), split.groups), split.groups)
            concepts = split.partition.concepts(0) or max(2, len(split.weight) // 2)
            per_token = None
            if logits is not None and len(inputs) * logits.shape[1] <= _LOGITS:
                per_token = (
                    logits.repeat_interleave(sample.each, 0) if len(logits) * sample.each == len(inputs) else None
                )
            made += baseline_sets(
                inputs, weight.flatten(1), concepts=concepts, subunits=split.partition.subunits,
                neurons=neurons.tolist(), logits=per_token, heads=_heads(self.model, state.name), seed=options.seed,
                options=options.baselines, progress=self.report,
            )  # fmt: skip
        few = f"{state.name} has {len(inputs)} calibration tokens of type {TYPE_NAMES[token_type]} here"
        if len(inputs) < 1000:
            self.warnings.append(f"{few}; baselines trained on so few say little, give more images.")
        made = [one for one in made if len(one.share)]
        return made, {CONCEPTS: split.rest_share, SUBUNITS: split.rest_edges_share}

    def _effects(
        self, state: SplitState, token_type: int, sets: Sequence[FeatureSet], means: Sequence[Tensor]
    ) -> list[Effects]:
        """Faithfulness and steering, on some scoring images spread over all of them."""
        count = min(self.options.effect_images, len(self.places))
        if not count or self.model.manifest.output != "logits":
            return []
        wanted = [i for i, one in enumerate(sets) if _intervened(one)]
        chosen = self.places[torch.linspace(0, len(self.places) - 1, count).round().long()]
        return measure_effects(
            self.model, TokenReader(state, token_type), [sets[i] for i in wanted], [means[i] for i in wanted],
            self.split.scoring.at(chosen), self.report,
        )  # fmt: skip


def _intervened(one: FeatureSet) -> bool:
    """Sets that are taken out of the layer and steered by: those that divide the whole layer, one SAE of each size."""
    if one.ablation is None:
        return False
    facts = one.facts
    if facts.get("baseline") == "sae":
        return (facts.get("kind"), facts.get("reads")) == ("TopK", "y")
    return one.name in (CONCEPTS, RANDOM_CONCEPTS) or facts.get("baseline") in _INTERVENED


def _heads(model: EludeModel, layer: str) -> int | None:
    """The attention heads whose outputs a layer merges, where it is an attention's last projection."""
    parent, _, own = layer.rpartition(".")
    heads = getattr(dict(model.base.named_modules()).get(parent), "num_heads", None)
    return heads if own == "proj" and isinstance(heads, int) and heads > 1 else None
