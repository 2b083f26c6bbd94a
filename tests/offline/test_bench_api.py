"""The cost benchmark's own arithmetic: what is compared with what, bounds, shares; never how long anything takes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Rewritten
from support import FIRST, SECOND, VIT, VIT_ARGS, Run, refused, write_pictures

from elude_runtime.errors import EludeError, LayerError
from elude_runtime.offline import bench_api
from elude_runtime.offline.bench_api import (
    KINDS,
    Kind,
    Workbench,
    captum_cost,
    kind_cost,
    measure_api,
    paired,
    tail_share,
)

STEERED = KINDS[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("asked") / "set", 3)


@pytest.fixture(scope="module")
def bench(vit: Rewritten, folder: Path) -> Workbench:
    return Workbench(vit.path, folder, 2)


class Clock:
    """Time that passes only when something says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def taking(self, seconds: float, seen: list[Any] | None = None, name: str = "") -> Any:
        def call(number: int) -> None:
            self.now += seconds
            if seen is not None:
                seen.append((name, number))

        return call


class TestPaired:
    def test_the_ratio_is_other_over_plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock(monkeypatch)
        found = paired(clock.taking(2.0), clock.taking(3.0), 5)
        assert (found.median, found.low, found.high, found.pairs) == (1.5, 1.5, 1.5, 5)

    def test_pairs_are_about_one_image_and_neither_goes_always_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, seen = Clock(monkeypatch), list[Any]()
        paired(clock.taking(1, seen, "plain"), clock.taking(1, seen, "other"), 3)
        assert seen[:2] == [("plain", 0), ("other", 0)]  # not timed
        assert seen[2:] == [("plain", 0), ("other", 0), ("other", 1), ("plain", 1), ("plain", 2), ("other", 2)]


class TestKinds:
    @pytest.mark.parametrize(("kind", "bound"), list(zip(KINDS, (1.9, 1.9, 3.9, 3.9, 1.29), strict=True)))
    def test_bounds(self, kind: Kind, bound: float) -> None:
        """1 + 4t + 0.1 for a gradient, 1 + 14t + 0.1 for four nodes, 1 + 1.2t + 0.05 for steering, at t = 0.2."""
        assert kind.bound(0.2) == pytest.approx(bound)

    @pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
    def test_the_engine_does_what_is_measured(self, bench: Workbench, kind: Kind) -> None:
        tops = bench.top_concepts(SECOND)
        body = json.loads(bench.request([kind.document(SECOND, top) for top in tops])(0))
        if kind is STEERED:
            assert (
                body["answer"]["source"] == "steered" and body["predictions"] and body["steered"]["edits_applied"] == 1
            )
            assert SECOND in body["steered"]["relative_norm"]
        else:
            assert kind.explain is not None
            (layer,) = body["explanations"][0]["layers"]
            assert layer["layer"] == SECOND and layer["method"] == kind.explain["method"]
            assert len(layer["features"]) == 10 and body["answer"]["source"] == "default"
            of_subunits = "/" in layer["features"][0]["feature"].removeprefix(f"{SECOND}/")
            assert of_subunits == (kind.explain["level"] == "subunits")

    @pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
    def test_the_model_does_the_same(self, bench: Workbench, kind: Kind) -> None:
        top = bench.top_concepts(SECOND)[1]
        body = json.loads(bench.request([kind.document(SECOND, top)] * 2)(1))
        found = kind.of_model(bench.model, bench.sample(1).x, SECOND, top)
        if kind is STEERED:
            changes = {c["index"]: c["change"] for c in body["steered"]["changes"]}
            for index, change in changes.items():
                assert float(found.change[0, index]) == pytest.approx(change, abs=1e-5)
        else:
            (layer,) = found[0][0].layers
            listed = {f["feature"]: f["attribution"] for f in body["explanations"][0]["layers"][0]["features"]}
            assert {f.feature.name: pytest.approx(f.attribution, rel=1e-4, abs=1e-6) for f in layer.features} == listed

    def test_the_concept_that_is_ablated_carries_most(self, bench: Workbench) -> None:
        for sample, top in zip(bench.samples, bench.top_concepts(SECOND), strict=True):
            ((explanation,),) = bench.model.explain(sample.x, layers=[SECOND], method="gradient", top_features=50)
            listed = explanation.layers[0].features
            assert top == max(listed, key=lambda f: abs(f.attribution)).feature.name

    def test_met_is_the_median_against_the_bound(self, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
        ratios = iter([1.29, 1.3])
        monkeypatch.setattr(
            bench_api, "paired", lambda *_: bench_api.Ratio(next(ratios), 1.0, 2.0, 7)
        )  # requests first, then the model
        found = kind_cost(bench, STEERED, SECOND, bench.top_concepts(SECOND), 0.2, 7)
        assert found["bound"] == 1.29 and found["request"]["met"] and not found["model"]["met"]


class TestTailShare:
    def test_is_read_off_between_the_layer_and_the_end(self, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pass whose every module takes a second: what comes after the layer, over all."""
        clock = Clock(monkeypatch)
        order: list[str] = []
        hooks = []
        for name, module in bench.model.base.named_modules():
            if not list(module.children()):

                def tick(*_: Any, name: str = name) -> None:
                    clock.now += 1
                    order.append(name)

                hooks.append(module.register_forward_pre_hook(tick))
        try:
            share = tail_share(bench, SECOND, 2)
        finally:
            for hook in hooks:
                hook.remove()
        one = order[: len(order) // 3]  # one pass that is not timed, two that are
        expected = (len(one) - 1 - one.index(SECOND)) / len(one)
        assert share.median == pytest.approx(expected, abs=1e-4) and 0 < expected < 0.5 and share.pairs == 2

    def test_an_earlier_layer_has_the_longer_tail_and_no_hook_stays(self, bench: Workbench) -> None:
        shares = [tail_share(bench, layer, 9).median for layer in (FIRST, SECOND)]
        assert 1 > shares[0] > shares[1] > 0
        assert not any(m._forward_hooks for m in bench.model.base.modules())


class TestCaptum:
    def test_both_methods_run(self, bench: Workbench) -> None:
        pytest.importorskip("captum")
        for layer in (SECOND, None):
            found = captum_cost(bench, layer, 2)
            assert found.pairs == 2 and found.median > 1

    def test_missing(self, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "captum.attr", None)
        with pytest.raises(EludeError, match=r"pip install captum\), or .*--captum-pairs 0\.$"):
            captum_cost(bench, None, 1)


class TestMeasure:
    def test_the_whole(self, bench: Workbench, vit: Rewritten) -> None:
        found = measure_api(bench, pairs=2, captum_pairs=0)
        assert [e["layer"] for e in found["layers"]] == vit.model.layers
        assert found["images"] == 2 and found["checkpoint_sha256"] == vit.model.manifest.checkpoint_sha256
        for entry in found["layers"]:
            assert [c["kind"] for c in entry["kinds"]] == [k.name for k in KINDS]
            for cost, kind in zip(entry["kinds"], KINDS, strict=True):
                assert cost["bound"] == pytest.approx(kind.bound(entry["tail_share"]["median"]), abs=1e-3)
                assert cost["request"]["pairs"] == cost["model"]["pairs"] == 2
            assert "captum_layer_ig" not in entry
        assert "captum_pixel_ig" not in found

    def test_what_cannot_be_measured(
        self, bench: Workbench, vit: Rewritten, headless: Rewritten, folder: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(LayerError, match=r"blocks\.9"):
            measure_api(bench, ["blocks.9"], pairs=1)
        with pytest.raises(EludeError, match="no classes"):
            Workbench(headless.path, folder, 1)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken/a.png").write_bytes(b"")
        with pytest.raises(EludeError):
            Workbench(vit.path, tmp_path / "broken", 1)

    def test_a_refusal_is_no_figure(self, bench: Workbench) -> None:
        with pytest.raises(EludeError, match="404|422"):
            bench.request([{"explain": {"layers": ["blocks.9"]}}] * 2)(0)


class TestCommand:
    def test_of_a_checkpoint(self, vit: Rewritten, folder: Path, run: Run) -> None:
        asked = ("bench", "api", vit.path, "--images", folder, "--layers", SECOND, "--pairs", 1, "--captum-pairs", 1)
        found = run(*asked, "--max-images", 2, "--json").document
        (entry,) = found["layers"]
        assert entry["layer"] == SECOND and found["captum_pixel_ig"]["pairs"] == entry["captum_layer_ig"]["pairs"] == 1
        shown = run(*asked)
        assert shown.code == 0 and shown.out.count("met") == 2 * len(KINDS) and shown.out.count("Captum") == 2

    def test_of_a_model_that_is_rewritten_for_it(self, folder: Path, run: Run) -> None:
        args = [part for name, value in VIT_ARGS.items() for part in ("--model-arg", f"{name}={value}")]
        given = ("--input-size", "3,32,32", "--layers", FIRST, "--pairs", 1, "--captum-pairs", 0)
        found = run("bench", "api", VIT, *args, "--images", folder, *given, "--json").document
        assert [e["layer"] for e in found["layers"]] == [FIRST]

    def test_of_nothing(self, folder: Path, run: Run) -> None:
        refused(run("bench", "api", "--images", folder), "--model-factory")
