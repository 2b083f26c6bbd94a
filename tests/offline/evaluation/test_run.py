"""The whole evaluation on tiny networks: images kept apart, every figure there, the same for the same seed."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Rewritten
from support import (
    CONV_DATA,
    FIRST,
    SECOND,
    VIT_ARGS,
    VIT_DATA,
    hook_count,
    input_tensor,
    tiny_mobilenet,
    write_pictures,
)

import elude_runtime as elude
from elude_runtime.errors import ImagesError, LayerError, SettingsError
from elude_runtime.offline.evaluation.baselines import BaselineOptions
from elude_runtime.offline.evaluation.encoders import EncoderError, TimmEncoder
from elude_runtime.offline.evaluation.estimates import Estimate
from elude_runtime.offline.evaluation.evaluation import Evaluation
from elude_runtime.offline.evaluation.images import calibration_hashes, split_images
from elude_runtime.offline.evaluation.options import EvaluateOptions
from elude_runtime.offline.evaluation.own_sets import CONCEPTS, SUBUNITS
from elude_runtime.offline.evaluation.result import CLEARER, EVEN, LESS
from elude_runtime.offline.evaluation.run import evaluate
from elude_runtime.offline.evaluation.statement import layer_sentences
from elude_runtime.offline.images import ImageSource

QUICK = EvaluateOptions(
    neurons=6, baselines=BaselineOptions(("hidden", "pca", "kmeans", "sae"), active=(2,), steps=20), draws=40,
    effect_images=3, stability=False, random_network=False, fidelity_images=20,
)  # fmt: skip


def silent(*_: object) -> None:
    pass


def encoder(name: str = "conv") -> TimmEncoder:
    return TimmEncoder(name, tiny_mobilenet(), CONV_DATA)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures that no checkpoint saw."""
    return write_pictures(tmp_path_factory.mktemp("scored") / "set", 60, 2000)


@pytest.fixture(scope="module")
def evaluated(vit: Rewritten, scored: Path) -> Evaluation:
    before = hook_count(vit.model)
    options = EvaluateOptions(**{**vars(QUICK), "stability": True})
    result = evaluate(vit.path, scored, [encoder()], options, calibration=vit.folder, layers=[SECOND], batch_size=16)
    assert hook_count(vit.model) == before
    return result


class TestImagesApart:
    def source(self, folder: Path) -> ImageSource:
        return ImageSource(folder, VIT_DATA, batch_size=16)

    def hashes(self, source: ImageSource) -> set[bytes]:
        return {h for b in source.numbered() for h in (b.hashes[i : i + 16] for i in range(0, len(b.hashes), 16))}

    def test_half_scores_and_the_rest_calibrates(self, tmp_path: Path) -> None:
        given = self.source(write_pictures(tmp_path / "a", 120))
        split = split_images(given, None, set(), 0, silent)
        scoring, rest = self.hashes(split.scoring), self.hashes(split.calibration)
        assert len(scoring) == len(rest) == 60 and not scoring & rest and split.excluded == 0
        again, other = (split_images(given, None, set(), seed, silent) for seed in (0, 1))
        assert self.hashes(again.scoring) == scoring != self.hashes(other.scoring)

    def test_what_the_checkpoint_saw_is_never_scored(self, vit: Rewritten, tmp_path: Path) -> None:
        assert vit.folder is not None
        folder = write_pictures(tmp_path / "a", 100, 3000)
        for i, file in enumerate(sorted(vit.folder.iterdir())[:10]):
            shutil.copy(file, folder / f"renamed{i}.png")
        known = calibration_hashes(vit.path)
        assert len(known) == 24
        split = split_images(self.source(folder), None, known, 0, silent)
        assert split.known == 10 and not self.hashes(split.scoring) & known
        assert len(self.hashes(split.scoring)) == len(self.hashes(split.calibration)) == 55

    def test_nor_what_the_baselines_saw_nor_a_copy(self, tmp_path: Path) -> None:
        folder, other = write_pictures(tmp_path / "a", 70), write_pictures(tmp_path / "b", 30, 60)
        shutil.copy(folder / "000.png", folder / "copy.png")
        split = split_images(self.source(folder), self.source(other), set(), 0, silent)
        assert (split.given, split.shared, split.twice) == (71, 10, 1)
        assert len(self.hashes(split.scoring)) == 60 and not self.hashes(split.scoring) & self.hashes(split.calibration)

    def test_too_few_are_refused(self, vit: Rewritten, tmp_path: Path) -> None:
        with pytest.raises(ImagesError, match="Of 98 images only 49 can score"):
            split_images(self.source(write_pictures(tmp_path / "a", 98)), None, set(), 0, silent)
        with pytest.raises(ImagesError, match="24 are among those that the checkpoint was calibrated on"):
            evaluate(vit.path, str(vit.folder), [encoder()], QUICK)

    def test_tensors(self, tmp_path: Path) -> None:
        images = input_tensor(VIT_DATA, 52, 0)
        known = {next(iter(self.hashes(ImageSource(images[:1], VIT_DATA))))}
        split = split_images(ImageSource(images, VIT_DATA), ImageSource(images[50:], VIT_DATA), set(), 0, silent)
        assert split.shared == 2 and split.scoring.count == 50
        with pytest.raises(ImagesError, match="only 49"):
            split_images(ImageSource(images, VIT_DATA), ImageSource(images[50:], VIT_DATA), known, 0, silent)


class TestRefusals:
    def test_the_evaluated_model_as_encoder(self, vit: Rewritten, scored: Path) -> None:
        with pytest.raises(EncoderError, match="the evaluated model itself"):
            evaluate(vit.path, scored, [encoder(), TimmEncoder("other", vit.base, VIT_DATA)], QUICK)

    def test_an_unknown_layer(self, vit: Rewritten, scored: Path) -> None:
        with pytest.raises(LayerError):
            evaluate(vit.path, scored, [encoder()], QUICK, layers=["blocks.9"])

    @pytest.mark.parametrize(
        "wrong", [{"neurons": 0}, {"draws": 1}, {"effect_images": -1}, {"fidelity_images": -1}, {"seed": -1}]
    )
    def test_settings(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(SettingsError):
            EvaluateOptions(**wrong)


class TestResult:
    def test_every_set_and_figure_is_there(self, evaluated: Evaluation) -> None:
        assert [(r.layer, r.tokens) for r in evaluated.layers] == [(SECOND, "patches"), (SECOND, "cls")]
        for result in evaluated.layers:
            names = [s.name for s in result.sets]
            assert len(names) == len(set(names)) and names[:2] == [CONCEPTS, "random concepts"]
            expected = {
                SUBUNITS,
                "random sub-units",
                "another neuron's sub-units",
                "hidden units",
                "PCA directions of y",
            }
            assert expected < set(names) and sum("SAE" in n for n in names) >= 4
            assert [j.name for j in result.judges] == ["conv", "pixels"]
            for one in result.sets:
                assert one.clarity.keys() == {"conv", "pixels"}
                for clarity in one.clarity.values():
                    wanted = {"img9", "ms", "ms_top", "intruder"} | ({"tok9"} if result.tokens == "patches" else set())
                    assert clarity.averages.keys() == wanted
                    assert 0 <= clarity.averages["intruder"]["plain"].value <= 1
                    assert clarity.document()["intruder"]["chance"] == 0.2  # type: ignore[index]
                    figure = clarity.averages["img9"]["weighted"]
                    low, high = figure.interval
                    assert -1 <= figure.value <= 1 and low < high
            assert {e.name for e in result.effects} >= {CONCEPTS, "random concepts", "hidden units"}
            assert result.stability.keys() == {CONCEPTS, SUBUNITS}
            for entry in result.stability.values():
                assert entry["matched_correlation"] > entry["random"] - 0.2

    def test_figures_against_a_direct_computation(self, vit: Rewritten, scored: Path, evaluated: Evaluation) -> None:
        """img9 of every concept at its positive end, from the model's own activations."""
        images = torch.cat(list(ImageSource(scored, VIT_DATA).batches()))
        acts = vit.model.concepts(images, SECOND)[:, 1:, : vit.model.state(SECOND).indices(0).concepts]
        peaks = acts.amax(1)
        with torch.no_grad():
            vectors, _ = encoder()(images * 0.5 + 0.5)
        vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
        found = evaluated.layers[0].sets[0].clarity["conv"].features["img9"][:, 0]
        for f in range(peaks.shape[1]):
            chosen = vectors[peaks[:, f].topk(9).indices]
            expected = (float((chosen.sum(0)).square().sum()) - 9) / 72
            assert float(found[f]) == pytest.approx(expected, abs=2e-3)

    def test_clarity_by_attribution(self, evaluated: Evaluation) -> None:
        result = evaluated.layers[0]
        (effects,) = [e for e in result.effects if e.name == CONCEPTS]
        scores = result.sets[0].clarity["conv"].features["img9"].nanmean(1)
        expected = float((effects.attribution * scores).sum() / effects.attribution.sum())
        found = result.by_attribution(effects)["conv"]["img9"]
        assert found["weighted_by_attribution"] == pytest.approx(expected, abs=1e-4)
        assert 0 <= (found["attribution_above_random"] or 0) <= 1

    def test_the_top_class_with_reconstructions_in_place(self, evaluated: Evaluation) -> None:
        for result in evaluated.layers:
            kept = {s["name"]: s["top1_kept"] for s in result.document(40, 0)["sets"]}  # type: ignore[attr-defined]
            for own in (CONCEPTS, SUBUNITS):
                assert kept[own]["value"] == 1 and kept[own]["images"] == 20 and 0.8 < kept[own]["low"] < 0.9
            coders = [value for name, value in kept.items() if "SAE" in name]
            assert len(coders) >= 4 and all(0 <= value["value"] <= 1 for value in coders)
            assert kept["hidden units"] is None and kept["k-means directions of x"] is None
        first = evaluated.layers[0]
        assert min(s.top1_kept.value for s in first.sets if s.top1_kept) < 1

    def test_comparisons(self, evaluated: Evaluation) -> None:
        result = evaluated.layers[0]
        comparisons = list(result.comparisons())
        assert len(comparisons) == 2 * (len(result.sets) - 1) * 2 * 3
        first = comparisons[0]
        a, b = (result.named(n) for n in (first.own, first.other))
        assert a is not None and b is not None
        figures = [s.clarity[first.encoder].averages[first.metric]["weighted"].value for s in (a, b)]
        assert first.difference.value == pytest.approx(figures[0] - figures[1])

    def test_verdicts_follow_the_intervals(self, evaluated: Evaluation) -> None:
        result = evaluated.layers[0]
        for own in (CONCEPTS, SUBUNITS):
            said = result.verdicts(own)
            assert sorted(n for names in said.values() for n in names) == sorted(
                s.name for s in result.sets if s.name != own
            )
        clarity = copy.deepcopy(result.sets[0].clarity["conv"].averages)
        others = len(result.sets) - 1
        sure = np.random.default_rng(0).normal(size=40) * 0.001
        for value, verdict in ((1.0, CLEARER), (-1.0, LESS)):
            for metric in ("img9", "tok9"):
                clarity[metric]["weighted"] = Estimate(value, sure)
            changed = copy.copy(result.sets[0])
            changed.clarity = {
                **changed.clarity, "conv": replace(changed.clarity["conv"], averages=clarity),
            }  # fmt: skip
            said = replace(result, sets=[changed, *result.sets[1:]]).verdicts(CONCEPTS)
            assert len(said[verdict]) == others
        clarity["img9"]["weighted"] = Estimate(1.0, sure)  # the two metrics disagree
        assert len(replace(result, sets=[changed, *result.sets[1:]]).verdicts(CONCEPTS)[EVEN]) == others

    def test_the_statement_says_what_and_what_not(self, evaluated: Evaluation) -> None:
        text = evaluated.statement
        for part in ("On 60 images", "to conv", SECOND, "outside all concepts", "says nothing about other images"):
            assert part in text

    def test_the_statement_is_short_and_true(self, evaluated: Evaluation) -> None:
        for layer in evaluated.layers:
            said = layer_sentences(layer)
            assert len(said) <= 4 and max(map(len, said)) < 260 and " ".join(said) in evaluated.statement
            verdicts = layer.verdicts(CONCEPTS)
            counts = [len(verdicts[v]) for v in (CLEARER, EVEN, LESS)]
            assert f"clearer than {counts[0]}, not told apart from {counts[1]}, less clear than {counts[2]}" in said[0]
            assert sum(counts) == len(layer.sets) - 1
            for name, verdict in ((n, v) for v, names in verdicts.items() for n in names):
                if name in ("random concepts", "hidden units"):
                    clause = next(c for c in said[1].removesuffix(".").split("; ") if name in c)
                    assert verdict in clause

    def test_the_files(self, vit: Rewritten, evaluated: Evaluation, tmp_path: Path) -> None:
        folder = tmp_path / "ckpt"
        shutil.copytree(vit.path, folder)
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "of an earlier run.png").touch()
        one = replace(evaluated, layers=evaluated.layers[:1])
        files = one.write(folder)
        document = json.loads((folder / "evaluation.json").read_text())
        assert document["statement"] == one.statement and document["images"]["scored"] == 60
        assert document["layers"][0]["sets"][0]["name"] == CONCEPTS
        assert all(f.is_file() and f.stat().st_size > 500 for f in files) and {f.suffix for f in files[1:]} == {
            ".png",
            ".svg",
        }
        assert sorted((folder / "evaluation").iterdir()) == sorted(files[1:]) and len(files) == 11
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        assert elude.load(folder).manifest.checkpoint_sha256 == vit.model.manifest.checkpoint_sha256


class TestTruth:
    def test_a_known_property_is_found(self, vit: Rewritten, scored: Path) -> None:
        """The property: the images at which one concept is most active."""
        images = torch.cat(list(ImageSource(scored, VIT_DATA).batches()))
        peaks = vit.model.concepts(images, SECOND)[:, 1:, 2].amax(1)
        files = sorted(scored.iterdir())
        having = [files[i].name for i in peaks.topk(20).indices.tolist()]
        options = EvaluateOptions(
            neurons=4, baselines=None, draws=5, effect_images=0, stability=False, random_network=False
        )
        result = evaluate(
            vit.path, scored, [], options, calibration=vit.folder, layers=[SECOND],
            truth={"it": having, "other": having[:7]},
        )  # fmt: skip
        own = result.layers[0].sets[0].auc["it"]
        assert (own.feature, own.sign, own.chosen, own.reported) == (2, 1, 1.0, 1.0)
        assert result.document()["layers"][0]["sets"][0]["auc"].keys() == {"it", "other"}

    def test_a_property_that_cannot_be_told(self, vit: Rewritten, scored: Path) -> None:
        with pytest.raises(SettingsError, match="'it' cannot be told"):
            evaluate(vit.path, scored, [], QUICK, calibration=vit.folder, truth={"it": ["nowhere.png"]})


class TestRuns:
    def test_the_same_seed_gives_the_same_figures(self, vit: Rewritten, scored: Path) -> None:
        def run(seed: int) -> list[Any]:
            options = EvaluateOptions(
                neurons=4, baselines=None, draws=10, effect_images=2, stability=False, fidelity_images=5, seed=seed
            )
            document = evaluate(
                vit.path, scored, [encoder()], options, calibration=vit.folder, layers=[FIRST]
            ).document()
            return document["layers"]

        assert run(3) == run(3) != run(4)

    def test_a_convolutional_network_on_tensors(self, mobilenet: Rewritten) -> None:
        torch.manual_seed(1)
        judge = TimmEncoder("vit", timm.create_model("vit_tiny_patch16_224", **VIT_ARGS), VIT_DATA)
        result = evaluate(
            mobilenet.path, input_tensor(CONV_DATA, 52, 4000), [judge], QUICK,
            calibration=input_tensor(CONV_DATA, 20, 5000),
        )  # fmt: skip
        (layer,) = result.layers
        assert layer.tokens == "patches" and layer.named(CONCEPTS) is not None
        assert not math.isnan(layer.sets[0].clarity["vit"].averages["tok9"]["weighted"].value)
        json.dumps(result.document(), allow_nan=False)

    def test_an_embedding_has_no_effects(self, headless: Rewritten) -> None:
        result = evaluate(
            headless.path, input_tensor(VIT_DATA, 50, 4000), [encoder()],
            EvaluateOptions(neurons=2, baselines=None, draws=5), calibration=input_tensor(VIT_DATA, 20, 5000),
        )  # fmt: skip
        assert all(not layer.effects for layer in result.layers)
