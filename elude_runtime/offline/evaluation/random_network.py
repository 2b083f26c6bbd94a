"""Control: the same architecture with random weights. What is as clear there, the trained weights did not make.

Every parameter's own values are dealt anew within it (a permutation), rather than drawn by an initialiser: that keeps
the scale, sign and spread that training gave each tensor, works for every architecture and every factory (one that
loads weights too), and leaves nothing of what was learnt but these. Heap et al. 2025 (arXiv 2501.17727) keep mean and
variance of each tensor for the same reason; Adebayo et al. 2018 (arXiv 1810.03292) shuffle layers.
Running statistics of batch norms belong to the old weights, so they are measured anew on the calibration images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from elude_runtime.analysis.model import EludeModel
from elude_runtime.offline.evaluation.images import ImageSplit, layer_batches
from elude_runtime.offline.evaluation.known_properties import property_auc
from elude_runtime.offline.evaluation.options import EvaluateOptions
from elude_runtime.offline.evaluation.own_sets import (
    CONCEPTS_RANDOM_WEIGHTS,
    SUBUNITS_RANDOM_WEIGHTS,
    concept_set,
    own_split,
    subunit_set,
)
from elude_runtime.offline.evaluation.scores import Judge, SetScores
from elude_runtime.offline.evaluation.scoring import Scoring
from elude_runtime.offline.evaluation.stability import CalibrationImages, rewritten
from elude_runtime.offline.evaluation.tokens import TokenReader, TokenSample
from elude_runtime.offline.images import ImageSource, Progress

_NORM_IMAGES = 256  # that running statistics are measured on, at most


def with_random_weights(model: nn.Module, batches: Iterable[Tensor], seed: int) -> nn.Module:
    """A copy of the model with the values of every parameter permuted at random; the model itself stays as it is.
    batches [B, 3, H, W]: preprocessed images for the batch norms' statistics, read only where there are any."""
    made = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    _measure_norms(made, batches)
    return made


def _measure_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Running means and variances as plain averages over the batches. One pass is enough: meanwhile every norm works
    with its batch's statistics, so that what it hands on is as it will be."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    momentum = [norm.momentum for norm in norms]
    parameter = next(model.parameters())
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    seen = 0
    with torch.no_grad():
        for images in batches:
            if len(images) > 1:  # of one image, one position each, there is no variance
                model(images.to(parameter.device, parameter.dtype))
                seen += len(images)
            if seen >= _NORM_IMAGES:
                break
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before
        norm.eval()


def random_network(
    model: EludeModel, layers: Sequence[str], source: ImageSource, folder: Path, seed: int, report: Progress
) -> EludeModel:
    """The evaluated model's architecture with random weights, rewritten by the checkpoint's own method from the
    calibration images. EludeError where such a network cannot be rewritten (its output overflows)."""
    images = CalibrationImages(source)
    base = with_random_weights(model.base, images, seed)
    return rewritten(model, base, layers, images, folder / "random", "random weights", report)


def random_scores(
    model: EludeModel, layer: str, split: ImageSplit, judges: Mapping[int, Sequence[Judge]], neurons: Tensor,
    halves: Tensor, options: EvaluateOptions, truth: Mapping[str, Tensor], choosing: Tensor, report: Progress,
) -> dict[int, list[SetScores]]:  # fmt: skip
    """{token type: scores} of the concepts and the sub-units of the same neurons in a network with random weights, on
    the images, tokens and judges that score the trained one: two passes over its own activations. judges: of every
    token type that is scored; none for a type that the random weights leave without an effect."""
    state, count = model.state(layer), split.calibration.count or 0
    readers = {t: TokenReader(state, t) for t in judges if t in state.live_types}
    samples = {t: TokenSample(reader, count, options.seed, options.tokens) for t, reader in readers.items()}
    for _, x in layer_batches(model, layer, split.calibration, report, f"random weights: calibration {layer}"):
        for sample in samples.values():
            sample.add(x)
    inputs = {t: sample.inputs() for t, sample in samples.items()}
    scorings = {}
    for t, reader in readers.items():
        own = own_split(state, t, inputs[t])
        sets = [concept_set(own, CONCEPTS_RANDOM_WEIGHTS)] if own.partition.concepts(0) else []
        sets.append(subunit_set(own, SUBUNITS_RANDOM_WEIGHTS, neurons))
        scorings[t] = Scoring(reader, [one for one in sets if len(one.share)], len(halves), options.seed)
    for _, x in layer_batches(model, layer, split.scoring, report, f"random weights: scoring {layer}"):
        for scoring in scorings.values():
            scoring.add(x)
    found = {}
    for t, scoring in scorings.items():
        aucs = [property_auc(peaks, truth, choosing) for peaks in scoring.peaks]
        found[t], _ = scoring.scores(inputs[t], judges[t], halves, aucs, lambda: None)
    return found
