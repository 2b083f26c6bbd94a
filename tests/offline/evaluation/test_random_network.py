"""The control with random weights: what is changed and what is not, and that it is scored as the trained one is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import Rewritten
from support import CONV_DATA, SECOND, VIT_DATA, input_tensor, tiny_mobilenet, write_pictures
from torch import Tensor, nn

from elude_runtime.errors import ModelError
from elude_runtime.offline.evaluation import random_network as module
from elude_runtime.offline.evaluation import run as run_module
from elude_runtime.offline.evaluation.encoders import PixelEncoder
from elude_runtime.offline.evaluation.evaluation import Evaluation
from elude_runtime.offline.evaluation.options import EvaluateOptions
from elude_runtime.offline.evaluation.own_sets import (
    CONCEPTS,
    CONCEPTS_RANDOM_WEIGHTS,
    SUBUNITS,
    SUBUNITS_RANDOM_WEIGHTS,
)
from elude_runtime.offline.evaluation.run import evaluate
from elude_runtime.offline.images import ImageSource

OPTIONS = EvaluateOptions(
    neurons=6, baselines=None, draws=20, effect_images=0, stability=False, fidelity_images=0
)  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("scored") / "set", 56, 2000)


def run(vit: Rewritten, scored: Path) -> Evaluation:
    return evaluate(vit.path, scored, [PixelEncoder()], OPTIONS, calibration=vit.folder, layers=[SECOND])


class TestWeights:
    def test_values_stay_and_places_do_not(self, vit: Rewritten) -> None:
        before = copy.deepcopy(vit.base.state_dict())
        made = module.with_random_weights(vit.base, [], 0)
        for name, value in vit.base.state_dict().items():
            assert torch.equal(value, before[name]), name
        own = dict(vit.base.named_parameters())
        for name, value in made.named_parameters():
            assert torch.equal(value.flatten().sort().values, own[name].flatten().sort().values), name
            if len(value.unique()) > 10:
                assert not torch.equal(value, own[name]), name
                pair = torch.stack([value.flatten(), own[name].flatten()]).detach()
                assert value.numel() < 100 or abs(float(pair.corrcoef()[0, 1])) < 0.2, name

    def test_the_seed_decides(self, vit: Rewritten) -> None:
        one, same, other = (module.with_random_weights(vit.base, [], seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[n], same[n]) for n in one)
        assert not torch.equal(one["blocks.1.mlp.fc2.weight"], other["blocks.1.mlp.fc2.weight"])

    def test_every_norm_finds_what_its_statistics_say(self) -> None:
        """On the one batch that they were measured on every norm puts out its own weight and bias as spread and
        mean."""
        base, images = tiny_mobilenet(), input_tensor(CONV_DATA, 32, 0)
        before = copy.deepcopy(base.state_dict())
        made = module.with_random_weights(base, [images[:1], images], 0)
        assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
        assert not any(m.training for m in made.modules())
        seen: dict[str, Tensor] = {}
        norms = {n: m for n, m in made.named_modules() if isinstance(m, nn.BatchNorm2d)}
        for name, norm in norms.items():
            assert norm.momentum == 0.1
            norm.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        with torch.no_grad():
            made(images)
        assert len(seen) > 20
        for name, x in seen.items():
            z = (x - norms[name].running_mean.view(1, -1, 1, 1)) / norms[name].running_var.view(1, -1, 1, 1).sqrt()  # type: ignore[union-attr]
            flat = z.transpose(0, 1).flatten(1)
            live = flat.var(1) > 1e-3
            assert float(flat.mean(1)[live].abs().max()) < 0.15 and live.float().mean() > 0.5, name
            assert float((flat.std(1)[live] - 1).abs().max()) < 0.15, name


class TestScores:
    def test_a_network_with_its_own_weights_scores_the_same(
        self, vit: Rewritten, scored: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All but the weights: rewriting by the checkpoint's method, images, tokens, neurons, judges."""
        monkeypatch.setattr(module, "with_random_weights", lambda base, *_: copy.deepcopy(base))
        result = run(vit, scored)
        assert len(result.layers) == 2
        for layer in result.layers:
            documents = {s["name"]: s for s in layer.document(20, 0)["sets"]}  # type: ignore[attr-defined]
            for own, control in ((CONCEPTS, CONCEPTS_RANDOM_WEIGHTS), (SUBUNITS, SUBUNITS_RANDOM_WEIGHTS)):
                a, b = documents[own], documents[control]
                assert {k: a[k] for k in ("features", "live", "near_duplicates", "share_of_variance")} == {
                    k: b[k] for k in ("features", "live", "near_duplicates", "share_of_variance")
                }
                for metric, entry in a["clarity"]["pixels"].items():
                    for how in ("weighted", "plain"):
                        assert entry[how]["value"] == b["clarity"]["pixels"][metric][how]["value"], (own, metric)

    def test_random_weights_against_a_direct_computation(self, vit: Rewritten, scored: Path, tmp_path: Path) -> None:
        """img9 of every concept at its positive end, from the other network's own activations."""
        result = run(vit, scored)
        source = ImageSource(str(vit.folder), VIT_DATA, batch_size=25)
        other = module.random_network(vit.model, [SECOND], source, tmp_path, 0, lambda *_: None)
        assert other.manifest.base_sha256 != vit.model.manifest.base_sha256
        assert other.manifest.method == vit.model.manifest.method and other.layers == [SECOND]
        images = torch.cat(list(ImageSource(scored, VIT_DATA).batches()))
        peaks = other.concepts(images, SECOND)[:, 1:, : other.state(SECOND).indices(0).concepts].amax(1)
        vectors, _ = PixelEncoder()(images * 0.5 + 0.5)
        vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
        layer = result.layers[0]
        control = layer.named(CONCEPTS_RANDOM_WEIGHTS)
        assert control is not None and layer.named(SUBUNITS_RANDOM_WEIGHTS) is not None
        found = control.clarity["pixels"].features["img9"][:, 0]
        assert len(found) == peaks.shape[1]
        for f in range(peaks.shape[1]):
            chosen = vectors[peaks[:, f].topk(9).indices]
            assert float(found[f]) == pytest.approx((float(chosen.sum(0).square().sum()) - 9) / 72, abs=2e-3)

    def test_it_is_compared_with_and_said(self, vit: Rewritten, scored: Path) -> None:
        result = run(vit, scored)
        named = {(c.own, c.other) for c in result.layers[0].comparisons()}
        assert {(CONCEPTS, CONCEPTS_RANDOM_WEIGHTS), (SUBUNITS, SUBUNITS_RANDOM_WEIGHTS)} <= named
        assert CONCEPTS_RANDOM_WEIGHTS in result.statement and SUBUNITS_RANDOM_WEIGHTS in result.statement

    def test_a_network_that_cannot_be_is_left_out_and_said(
        self, vit: Rewritten, scored: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise ModelError("The model's output is not finite.")

        monkeypatch.setattr(run_module, "random_network", refuse)
        result = run(vit, scored)
        assert result.layers[0].named(CONCEPTS_RANDOM_WEIGHTS) is None
        assert any("random weights is left out: The model's output is not finite." in w for w in result.warnings)
