"""Stability: the same features from the same images, and fewer agreements than that with a random partition."""

from __future__ import annotations

import torch
from conftest import Rewritten
from support import SECOND, VIT_DATA, input_tensor

from elude_runtime.offline.evaluation.own_sets import CONCEPTS, SUBUNITS
from elude_runtime.offline.evaluation.stability import compare_halves, rewritten_halves
from elude_runtime.offline.evaluation.tokens import TokenReader
from elude_runtime.offline.images import ImageSource


def reads(vit: Rewritten, first: int, count: int) -> torch.Tensor:
    state = vit.model.state(SECOND)
    x = vit.model.record(input_tensor(VIT_DATA, count, first), [SECOND]).x[SECOND]
    return torch.cat([part for _, part in TokenReader(state, 0).read(x)]).flatten(0, 1)


def test_a_rewrite_agrees_with_itself(vit: Rewritten) -> None:
    calibration, held_out = reads(vit, 0, 12), reads(vit, 600, 12)
    found = compare_halves((vit.model, vit.model), SECOND, 0, calibration, held_out, torch.arange(8), 0)
    for kind in (CONCEPTS, SUBUNITS):
        assert found[kind]["matched_correlation"] == 1 and found[kind]["ari_of_edges"] == 1
        assert found[kind]["random"] < 0.9 and found[kind]["ari_random"] < 0.8


def test_halves_are_disjoint_and_by_the_checkpoints_method(vit: Rewritten, tmp_path_factory: object) -> None:
    images = input_tensor(VIT_DATA, 24, 0)
    folder = tmp_path_factory.mktemp("halves")  # type: ignore[attr-defined]
    halves = rewritten_halves(vit.model, [SECOND], ImageSource(images, VIT_DATA, batch_size=8), folder, lambda *_: None)
    for half in halves:
        assert half.layers == [SECOND] and half.manifest.calibration.images == 12
        assert half.manifest.method == vit.model.manifest.method
        assert half.manifest.base_sha256 == vit.model.manifest.base_sha256
    assert halves[0].manifest.calibration.sha256 != halves[1].manifest.calibration.sha256
