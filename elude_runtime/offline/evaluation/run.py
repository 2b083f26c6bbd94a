"""`elude evaluate`: every measure for a checkpoint's features and for what others would find in the same layer."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.errors import EludeError, ImagesError, SettingsError
from elude_runtime.network.tail import record_layers
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.evaluation.class_groups import ClassGroup, GroupImages, class_groups, group_images
from elude_runtime.offline.evaluation.embeddings import Embeddings
from elude_runtime.offline.evaluation.encoders import PIXELS, Encoder, PixelEncoder, TimmEncoder, refuse_evaluated
from elude_runtime.offline.evaluation.estimates import image_halves
from elude_runtime.offline.evaluation.evaluation import Evaluation
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.fidelity import TopKept, measure_fidelity
from elude_runtime.offline.evaluation.images import (
    ImageSplit,
    calibration_hashes,
    known_truth,
    layer_batches,
    split_images,
    spread_places,
    top_classes,
)
from elude_runtime.offline.evaluation.known_properties import choosing_half, known_properties, property_auc
from elude_runtime.offline.evaluation.layer_effects import layer_effects
from elude_runtime.offline.evaluation.layer_sets import layer_sets, scored_neurons
from elude_runtime.offline.evaluation.options import EvaluateOptions, run_facts
from elude_runtime.offline.evaluation.phases import Phases
from elude_runtime.offline.evaluation.random_network import random_network, random_scores
from elude_runtime.offline.evaluation.result import LayerResult
from elude_runtime.offline.evaluation.scores import Judge, SetScores
from elude_runtime.offline.evaluation.scoring import Scoring
from elude_runtime.offline.evaluation.stability import compare_halves, rewritten_halves
from elude_runtime.offline.evaluation.tokens import TokenReader, TokenSample
from elude_runtime.offline.images import ImageSource, Progress


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
    groups: Mapping[str, Sequence[int | str]] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the features of a checkpoint, and all baselines and controls, on the same layers, tokens and images.

    images: a folder (or what `ImageSource` takes) of which half is scored, or all where `calibration` brings images to
    train baselines on. Images that the checkpoint or a baseline was calibrated on are never scored. The pixel encoder
    is always among the encoders. truth: known properties, {property: names of the files that have it}; the feature that
    tells each best is chosen on half of the scoring images and reported on the others. groups: of classes, by index or
    label, that are steered against all others, on at most 2 * `effect_images` images of each.

    EncoderError for an encoder that is the evaluated model, ImagesError when fewer than 50 images can be scored,
    CheckpointError, LayerError or SettingsError for what was asked.
    """
    phases, report = Phases(), progress or (lambda *_: None)
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
    asked = _asked_groups(model, groups, options) if groups else []
    with phases("content of the images"):
        split = split_images(given, own, calibration_hashes(directory), options.seed, report)
    with tempfile.TemporaryDirectory() as folder:
        with phases("encoders"):
            split, places, embeddings = _embed(model, split, judges, Path(folder), report)
        halves = image_halves(len(places), options.draws, options.seed)
        run = _Run(model, split, places, embeddings, options, halves, phases, report)
        run.truth = known_truth(split.scoring, places, truth or {}, run.choosing)
        run.choose_images(asked)
        if options.stability:
            run.rewrite_halves(names, Path(folder))
        if options.random_network:
            run.rewrite_random(names, Path(folder))
        found = [result for name in names for result in run.layer(name)]
    return Evaluation(
        run_facts(directory, model, split, judges, options, phases.document()), found, options.draws,
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


def _asked_groups(
    model: EludeModel, groups: Mapping[str, Sequence[int | str]], options: EvaluateOptions
) -> list[ClassGroup]:
    """Refused before the work, not after it."""
    if model.manifest.output != "logits" or not options.effect_images:
        raise SettingsError("Class groups need a model with classes, and at least one effect image.")
    parameter = next(model.base.parameters())
    with model.lock, torch.no_grad():
        size = model.base(parameter.new_zeros(1, *model.data_config.input_size)).shape[-1]
    return class_groups(groups, model.manifest.labels, size)


class _Run:
    """What all layers share."""

    def __init__(
        self, model: EludeModel, split: ImageSplit, places: Tensor, embeddings: list[Embeddings],
        options: EvaluateOptions, halves: Tensor, phases: Phases, report: Progress,
    ) -> None:  # fmt: skip
        self.model, self.split, self.places, self.embeddings = model, split, places, embeddings
        self.options, self.halves, self.phases, self.report = options, halves, phases, report
        self.warnings: list[str] = []
        self.choosing = choosing_half(len(places), options.seed)
        self.truth: dict[str, Tensor] = {}
        self.groups: list[GroupImages] = []
        self.rewritten: tuple[EludeModel, EludeModel] | None = None
        self.random: EludeModel | None = None

    def choose_images(self, asked: Sequence[ClassGroup]) -> None:
        """Of every class group, those images that the model puts there."""
        if asked:
            with self.phases("class groups"):
                places, tops = top_classes(self.model, self.split.scoring, self.report)
            count, seed = self.options.effect_images, self.options.seed
            self.groups, short = group_images(asked, tops, places, count, seed)
            self.warnings += short

    def rewrite_halves(self, layers: Sequence[str], folder: Path) -> None:
        """The base model rewritten from two halves of the calibration images."""
        with self.phases("stability"):
            self.rewritten = rewritten_halves(self.model, layers, self.split.calibration, folder, self.report)

    def rewrite_random(self, layers: Sequence[str], folder: Path) -> None:
        """The same architecture with random weights rewritten, where that is possible."""
        source, seed = self.split.calibration, self.options.seed
        try:
            with self.phases("random network"):
                self.random = random_network(self.model, layers, source, folder, seed, self.report)
        except EludeError as error:
            self.warnings.append(f"The control with random weights is left out: {error}")

    def layer(self, name: str) -> list[LayerResult]:
        """Every live token type of one layer: one pass over the calibration images, one over the scoring ones."""
        state = self.model.state(name)
        with self.phases("activations"):
            samples, logits = self._calibrate(state)
        sets = {
            t: layer_sets(self.model, state, t, sample, logits, self.options, self.phases, self.report)
            for t, sample in samples.items()
        }
        count = len(self.places)
        scorings = {t: Scoring(TokenReader(state, t), made, count, self.options.seed) for t, (made, _) in sets.items()}
        with self.phases("activations"):
            for _, x in layer_batches(self.model, name, self.split.scoring, self.report, f"scoring {name}"):
                for scoring in scorings.values():
                    scoring.add(x)
        grids = {t: state.layout.grid if t == 0 else None for t in sets}
        with self.phases("scores"):
            judging = {
                t: [Judge.of(one, grid, self.options.seed) for one in self.embeddings] for t, grid in grids.items()
            }
        beside = self._beside(name, judging)
        found = []
        for t, (made, rest) in sets.items():
            judges, scoring, inputs = judging[t], scorings[t], samples[t].inputs()
            if len(inputs) < 1000:
                few = f"{name} has {len(inputs)} calibration tokens of type {TYPE_NAMES[t]} here"
                self.warnings.append(f"{few}; baselines trained on so few say little, give more images.")
            with self.phases("scores"):
                aucs = [property_auc(peaks, self.truth, self.choosing) for peaks in scoring.peaks]
                done = partial(self.report, f"scores {name} {TYPE_NAMES[t]}", 1, len(made))
                scores, means = scoring.scores(inputs, judges, self.halves, aucs, done)
            with self.phases("fidelity"):
                for one, kept in zip(scores, self._fidelity(state, t, made), strict=True):
                    one.top1_kept = kept
            scores += beside.get(t, [])
            effects = layer_effects(
                self.model, TokenReader(state, t), made, means, inputs, self.split.scoring, self.places, self.groups,
                self.options, self.phases, self.report,
            )  # fmt: skip
            properties = None
            if self.truth:
                with self.phases("known properties"):
                    properties = known_properties(
                        made, scoring.peaks, aucs, self.truth, self.choosing, self.options.draws, self.options.seed
                    )
            stability = {}
            if self.rewritten:
                neurons = scored_neurons(state, self.options)
                tokens = scoring.held_out()
                with self.phases("stability"):
                    stability = compare_halves(self.rewritten, name, t, inputs, tokens, neurons, self.options.seed)
            found.append(
                LayerResult(
                    name, t, len(inputs), rest, judges, scores, effects.taken_out, stability, effects.agreement,
                    self.groups, effects.steering, properties,
                )
            )  # fmt: skip
        return found

    def _calibrate(self, state: SplitState) -> tuple[dict[int, TokenSample], Tensor]:
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

    def _beside(self, layer: str, judges: Mapping[int, Sequence[Judge]]) -> dict[int, list[SetScores]]:
        """{token type: scores in the network with random weights}, where there is one."""
        if self.random is None:
            return {}
        neurons = scored_neurons(self.model.state(layer), self.options)
        with self.phases("random network"):
            return random_scores(
                self.random, layer, self.split, judges, neurons, self.halves, self.options,
                self.truth, self.choosing, self.report,
            )  # fmt: skip

    def _fidelity(self, state: SplitState, token_type: int, sets: Sequence[FeatureSet]) -> list[TopKept | None]:
        """What is left of the top class with reconstructions in place, on scoring images spread over all of them."""
        count = self.options.fidelity_images
        if not count or self.model.manifest.output != "logits":
            return [None] * len(sets)
        source = self.split.scoring.at(spread_places(self.places, count))
        return measure_fidelity(self.model, TokenReader(state, token_type), sets, source, self.report)
