"""Taking features out: attributions, deletion curves and steering against full forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Rewritten
from support import SECOND, VIT_DATA, forward_with, input_tensor
from torch import Tensor

from elude_runtime.analysis.targets import Target
from elude_runtime.network.tail import Recording
from elude_runtime.offline.evaluation import interventions as module
from elude_runtime.offline.evaluation import removal
from elude_runtime.offline.evaluation.bases import hidden_units
from elude_runtime.offline.evaluation.calibration import CalibrationTokens
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.own_sets import concept_set, own_split
from elude_runtime.offline.evaluation.tokens import TokenReader
from elude_runtime.offline.images import ImageSource


@pytest.fixture(scope="module")
def images() -> Tensor:
    return input_tensor(VIT_DATA, 8, 900)


@pytest.fixture(scope="module")
def made(vit: Rewritten, images: Tensor) -> tuple[TokenReader, list[FeatureSet], list[Tensor], Tensor]:
    """(reader, concepts and hidden units, means of their activations, what the tokens read [B, T_p, m])."""
    state = vit.model.state(SECOND)
    reader = TokenReader(state, 0)
    reads = torch.cat([r for _, r in reader.read(vit.model.record(images, [SECOND]).x[SECOND])])
    flat = reads.flatten(0, 1)
    weight = state.linear.weight().flatten(1)
    sets = [concept_set(own_split(state, 0, flat), "concepts"), hidden_units(CalibrationTokens.of(flat, weight))]
    return reader, sets, [one.activations(flat).mean(0) for one in sets], reads


def tops(recording: Recording) -> list[Target]:
    return [Target(int(logits.argmax())) for logits in recording.logits]


def measured(vit: Rewritten, made: tuple, images: Tensor) -> list[module.Effects]:
    reader, sets, means, _ = made
    return module.measure_effects(
        vit.model, reader, sets, means, ImageSource(images, VIT_DATA, batch_size=3), lambda *_: None
    )


def test_attributions_are_gradient_times_part(made: tuple) -> None:
    _, sets, means, reads = made
    gradient = torch.randn(reads.shape[1], 32, generator=torch.Generator().manual_seed(0))
    for one, mean in zip(sets, means, strict=True):
        found = removal.attributions(one, reads[0], gradient, mean)
        for f in (0, 3, len(found) - 1):
            expected = (removal.removed(one, reads[0], torch.tensor([f])) * gradient).sum()
            assert float(found[f]) == pytest.approx(float(expected), abs=1e-3)


def test_curves_are_those_of_full_passes(vit: Rewritten, made: tuple, images: Tensor) -> None:
    """Of every image: the target with the first features of the order taken out, by a forward pass with a hook."""
    reader, sets, means, _ = made
    state = vit.model.state(SECOND)
    effects = measured(vit, made, images)
    recording = vit.model.record(images, [SECOND])
    kept = removal.recorded_images(vit.model, reader, recording, tops(recording))
    assert 0 < len(kept) <= 8 and all(len(e.deletion) == len(kept) for e in effects)
    for number, image in enumerate(kept[:3]):
        one, mean = sets[0], means[0]
        order = removal.attributions(one, image.reads, image.gradient, mean).argsort(descending=True, stable=True)
        for place in (1, 6, len(module.FRACTIONS) - 1):
            count = round(module.FRACTIONS[place] * len(order))
            for curve, chosen in ((effects[0].deletion, order[:count]), (effects[0].insertion, order[count:])):
                change = torch.zeros(1, state.layout.total, 32)
                change[0, reader.span] = -removal.removed(one, image.reads, chosen)
                row = images[image.row : image.row + 1]
                logits = forward_with(vit.base, row, {SECOND: lambda _, y, c=change: y + c}).detach()  # type: ignore[misc]
                value = float(image.target.value(logits)[0])
                expected = (value - image.baseline) / (image.value - image.baseline)
                assert curve[number][place] == pytest.approx(expected, abs=2e-3)


def test_ends_of_the_curves(vit: Rewritten, made: tuple, images: Tensor) -> None:
    for effects in measured(vit, made, images):
        deletion, insertion = np.array(effects.deletion), np.array(effects.insertion)
        assert deletion[:, 0] == pytest.approx(1, abs=1e-4) and insertion[:, -1] == pytest.approx(1, abs=1e-4)
        assert deletion[:, -1] == pytest.approx(insertion[:, 0], abs=1e-4)
        areas = effects.areas()
        assert np.median(areas["insertion"]) > np.median(areas["deletion"])


def test_a_linear_model_of_known_selectivity() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [3.0, 1.0, 2.0]])
    drop, side = module._selectivity(logits, 0)
    assert drop.tolist() == [2.0] and side.tolist() == [1.0]
    assert removal.at_drop(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 8.0]), 2.0) == pytest.approx(5.0)
    assert removal.at_drop(torch.tensor([2.0]), torch.tensor([4.0]), 1.0) == pytest.approx(2.0)


def test_a_drop_that_is_never_reached_is_infinitely_dear() -> None:
    effects = module.Effects("s", side=[1.0, float("inf"), 2.0], per_norm=[1.0, 0.0, 2.0])
    document = effects.document(50, 0)
    assert document["drop_not_reached"] == 1 and document["side_effect"]["value"] == 2.0  # type: ignore[index]
    hopeless = module.Effects("s", side=[float("inf")] * 3, per_norm=[0.0] * 3)
    assert hopeless.document(50, 0)["side_effect"]["value"] is None  # type: ignore[index]


def test_only_the_types_own_tokens_are_changed(vit: Rewritten, made: tuple, images: Tensor) -> None:
    reader, *_ = made
    recording = vit.model.record(images[:1], [SECOND])
    huge = torch.full((16, 32), 7.0)
    logits = removal.outputs_with(vit.model, reader, recording, 0, [huge, 0 * huge])

    def change(_: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, :1], y[:, 1:] + 7.0], 1)

    torch.testing.assert_close(logits[1:2], forward_with(vit.base, images[:1], {SECOND: change}), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0], logits[2])
