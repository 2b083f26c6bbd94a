"""Which features of two rewrites correspond: identity, known permutations, merges and bases, and what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Rewritten
from support import FIRST, SECOND, VIT_ARGS, VIT_DATA, hook_count, input_tensor, tamper, tiny_vit, write_pictures
from torch import Tensor

import elude_runtime as elude
from elude_runtime.analysis.features import parse_feature
from elude_runtime.checkpoint.labels import write_labels
from elude_runtime.errors import CheckpointError, EludeError, LayerError, SettingsError
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline import diff as module
from elude_runtime.offline.correspondence import Agreement, Correspondence, Diff, write_mapping
from elude_runtime.offline.diff import diff
from elude_runtime.offline.images import ImageSource

OPTIONS: dict[str, Any] = {
    "layers": [SECOND], "subunits": 4, "concepts": 6, "tokens": 24, "batch_size": 8, "data_config": VIT_DATA,
    "model_args": VIT_ARGS,
}  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Pictures that no checkpoint here was calibrated on."""
    return input_tensor(VIT_DATA, 30, 300)


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The tiny ViT's second layer again: another seed, fewer sub-units and concepts."""
    out = tmp_path_factory.mktemp("other") / "ckpt"
    elude.rewrite(tiny_vit(), pictures, out=out, seed=7, **{**OPTIONS, "subunits": 6, "concepts": 4})
    return out


def rows_of(result: Diff, kind: str, layer: str = SECOND, token_type: str = "patches") -> list[Correspondence]:
    return [r for r in result.mapping if (r.kind, r.layer, r.token_type) == (kind, layer, token_type)]


def entry(result: Diff, kind: str, token_type: str = "patches", layer: str = SECOND) -> Agreement:
    (found,) = [a for a in result.agreement if (a.kind, a.token_type, a.layer) == (kind, token_type, layer)]
    return found


class TestIdentity:
    def test_a_checkpoint_corresponds_to_itself(self, rewritten: Rewritten) -> None:
        result = diff(rewritten.path, rewritten.path, rewritten.images, threshold=1.0)
        assert result.same_base and result.images == 3 and not result.only_old and not result.only_new
        seen = set()
        for row in result.mapping:
            if row.status == "dead":
                assert (row.old is None) != (row.new is None) and row.correlation is None
                continue
            assert (row.status, row.new, row.correlation) == ("matched", row.old, 1.0)
            assert row.old_share == row.new_share and row.old is not None
            seen.add(row.old)
        for a in result.agreement:
            assert (a.mean, a.median, a.weighted_mean) == (1.0, 1.0, 1.0)
            assert a.pairs == a.matched == a.old - a.old_dead and a.old == a.new and a.old_dead == a.new_dead
            assert a.mutual == a.matched and a.random_mean is not None and a.random_mean < 1
        table = pq.read_table(rewritten.path / "features.parquet").to_pylist()
        named = {r["feature"] for r in table if not r["feature"].endswith("rest")}
        assert named == {r.old for r in result.mapping if r.old} | {r.new for r in result.mapping if r.new}
        assert len(seen) > 20 and not any(r.endswith("rest") for r in seen)

    def test_every_layer_and_living_token_type_is_there(self, vit: Rewritten, images: Tensor) -> None:
        result = diff(vit.path, vit.path, images)
        assert [(a.layer, a.token_type, a.kind, a.tokens) for a in result.agreement] == [
            (layer, token_type, kind, tokens)
            for layer in (FIRST, SECOND)
            for token_type, tokens in (("patches", 30 * 16), ("cls", 30))
            for kind in ("concept", "subunit")
        ]
        assert all("cls" in w for w in result.warnings) and len(result.warnings) == 2  # 30 class tokens are few


class TestAgainstNumpy:
    """The whole way from images to the table, against numpy.corrcoef of what `concepts` and `subunits` give."""

    @pytest.mark.parametrize("batch_size", [7, 30])
    def test_concepts_and_subunits(self, vit: Rewritten, other_seed: Path, images: Tensor, batch_size: int) -> None:
        result = diff(vit.path, other_seed, images, batch_size=batch_size)
        models = vit.model, elude.load(other_seed)
        for t, token_type in enumerate(("patches", "cls")):
            spans = [m.state(SECOND).layout.slices[t] for m in models]
            names = [[f.name for f in m.state(SECOND).concept_features(t)][:-1] for m in models]
            acts = []
            for m, span, chosen in zip(models, spans, names, strict=True):
                columns = [m.concept_names(SECOND).index(n) for n in chosen]
                acts.append(m.concepts(images, SECOND)[:, span][..., columns].flatten(0, 1).double().numpy())
            expected = np.corrcoef(acts[0].T, acts[1].T)[: len(names[0]), len(names[0]) :]
            at = {(a, b): expected[i, j] for i, a in enumerate(names[0]) for j, b in enumerate(names[1])}
            rows = rows_of(result, "concept", token_type=token_type)
            assert {r.old for r in rows if r.old} == set(names[0]) and {r.new for r in rows if r.new} == set(names[1])
            for r in rows:
                if r.old and r.new:
                    assert r.correlation == pytest.approx(at[r.old, r.new], abs=1e-4)
                if r.old:
                    best = max((n for n in names[1] if n != r.new), key=lambda n, o=r.old: at[o, n])
                    assert r.runner_up == best and r.runner_up_correlation == pytest.approx(at[r.old, best], abs=1e-4)
                if r.new:
                    best = max((n for n in names[0] if n != r.old), key=lambda n, o=r.new: at[n, o])
                    assert r.rival == best and r.rival_correlation == pytest.approx(at[best, r.new], abs=1e-4)
            sums = [
                m.subunits(images, SECOND)[:, span].flatten(0, 1).double().numpy()
                for m, span in zip(models, spans, strict=True)
            ]
            compared = 0
            for r in rows_of(result, "subunit", token_type=token_type):
                if r.old and r.new:
                    a, b = parse_feature(r.old, [SECOND]), parse_feature(r.new, [SECOND])
                    assert a.neuron == b.neuron
                    pair = sums[0][:, a.neuron, a.index], sums[1][:, b.neuron, b.index]
                    assert r.correlation == pytest.approx(np.corrcoef(*pair)[0, 1], abs=1e-4)
                    compared += 1
            assert compared > 60

    def test_the_figures_are_those_of_the_rows(self, vit: Rewritten, other_seed: Path, images: Tensor) -> None:
        result = diff(vit.path, other_seed, images, threshold=0.6)
        for a in result.agreement:
            rows = [r for r in result.mapping if (r.layer, r.token_type, r.kind) == (a.layer, a.token_type, a.kind)]
            paired = [r.correlation for r in rows if r.correlation is not None]
            assert a.pairs == len(paired) and a.matched == sum(r >= 0.6 for r in paired)
            assert a.old == sum(r.old is not None for r in rows) and a.new == sum(r.new is not None for r in rows)
            assert a.matched_fraction == pytest.approx(a.matched / a.old)
            assert a.matched_share == pytest.approx(
                sum(r.old_share or 0 for r in rows if r.status == "matched"), abs=1e-9
            )
            if a.kind == "concept":
                assert a.mean == pytest.approx(sum(paired) / 4) and a.median == pytest.approx(
                    np.median(paired + [0.0] * (4 - len(paired)))
                )
            weights = {r.old: max(r.old_share or 0, 0) for r in rows if r.old and r.status != "dead"}
            weighted = sum(weights[r.old] * r.correlation for r in rows if r.correlation is not None and r.old)
            assert a.weighted_mean == pytest.approx(weighted / sum(weights.values()))
            assert a.mutual == sum(r.status == "matched" and bool(r.mutual) for r in rows)
            for r in rows:
                if r.correlation is None:
                    assert r.mutual is None
                else:
                    others = r.runner_up_correlation or 0, r.rival_correlation or 0
                    assert r.mutual == (r.correlation >= max(others))
                expected = "weak" if (r.correlation or 0) < 0.6 else "matched"
                assert r.status == expected if r.correlation is not None else r.status in ("only_old", "only_new")

    def test_two_seeds_agree_better_than_chance(self, vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
        elude.rewrite(tiny_vit(), pictures, out=tmp_path / "c", seed=3, **OPTIONS)
        result = diff(vit.path, tmp_path / "c", pictures)
        assert result.images == 24 and result.only_old == [FIRST]
        for a in result.agreement:
            assert a.mean is not None and a.random_mean is not None
            assert a.random_mean < a.mean < 1 and a.mean > 0.6


def permuted(layer: str, order: list[int], token_type: int = 0) -> Callable[[dict[str, Tensor]], None]:
    """Concept i becomes concept order[i]."""

    def change(stored: dict[str, Tensor]) -> None:
        concept = stored[f"elude.{layer}.concept"].to(torch.int32)
        new = concept.clone()
        for i, j in enumerate(order):
            new[token_type][concept[token_type] == i] = j
        stored[f"elude.{layer}.concept"] = new.to(torch.uint16)

    return change


class TestKnownChanges:
    def test_renumbered_concepts_are_found_again(self, vit: Rewritten, images: Tensor, tmp_path: Path) -> None:
        order = [3, 5, 0, 1, 2, 4]
        changed = tamper(vit.path, tmp_path / "c", permuted(SECOND, order))
        result = diff(vit.path, changed, images)
        found = {r.old: (r.new, r.correlation) for r in rows_of(result, "concept")}
        assert found == {f"{SECOND}/P{i}": (f"{SECOND}/P{j}", 1.0) for i, j in enumerate(order)}
        assert all(r.new == r.old for r in rows_of(result, "concept", token_type="cls"))

    def test_renumbered_subunits_are_found_again(self, vit: Rewritten, images: Tensor, tmp_path: Path) -> None:
        neuron = next(k for k in range(32) if int(vit.model.state(SECOND).partition.counts[0, k]) == 4)

        def change(stored: dict[str, Tensor]) -> None:
            edges = stored[f"elude.{SECOND}.partition"][0, neuron]
            edges[edges != 255] = 3 - edges[edges != 255]
            for part in ("mean", "std", "sign"):
                tensor = stored[f"elude.{SECOND}.{part}"][0, neuron]
                tensor[:4] = tensor[:4].flip(0)
            concept = stored[f"elude.{SECOND}.concept"].to(torch.int32)
            concept[0, neuron, :4] = concept[0, neuron, :4].flip(0)
            stored[f"elude.{SECOND}.concept"] = concept.to(torch.uint16)

        result = diff(vit.path, tamper(vit.path, tmp_path / "c", change), images)
        found = {r.old: (r.new, r.correlation) for r in rows_of(result, "subunit")}
        for i in range(4):
            assert found[f"{SECOND}/{neuron}/p{i}"] == (f"{SECOND}/{neuron}/p{3 - i}", 1.0)
        assert sum(old != new for old, (new, _) in found.items()) == 4
        assert all(r.correlation == 1.0 for r in rows_of(result, "concept"))

    def test_a_merge_and_the_split_that_undoes_it(self, vit: Rewritten, images: Tensor, tmp_path: Path) -> None:
        """Two concepts with about equally many members become one: each half is found in the whole."""
        acts = vit.model.concepts(images, SECOND)[:, 1:, :6].flatten(0, 1).double().numpy()
        sizes = vit.model.state(SECOND).indices(0).concept_slots.flatten().bincount()[:6].numpy()

        def distinctness(pair: tuple[int, int]) -> float:
            """By how much the less alike of the two is more like their whole than any other concept."""
            whole = acts[:, pair] @ sizes[list(pair)]
            alike = np.corrcoef(acts.T, whole)[-1, :-1]
            one, other = alike[list(pair)]
            if 1 - max(one, other) ** 2 < 0.25:  # what is left without the other; made of two only if it is a part
                return -np.inf
            return min(one, other) - max(np.delete(alike, pair))

        a, b = max(itertools.combinations(range(6), 2), key=distinctness)
        order = [i if i < b else a if i == b else i - 1 for i in range(6)]
        changed = tamper(vit.path, tmp_path / "c", permuted(SECOND, order))
        merged, halves = f"{SECOND}/P{a}", {f"{SECOND}/P{a}", f"{SECOND}/P{b}"}
        forth, back = diff(vit.path, changed, images), diff(changed, vit.path, images)
        (merge,), (split,) = (
            [m for m in forth.merges if m.whole == merged],
            [s for s in back.splits if s.whole == merged],
        )
        assert set(merge.parts) == set(split.parts) == halves
        # the whole's activation is a weighted mean of its parts': together they say all of it
        assert merge.together == pytest.approx(1, abs=1e-6) and split.together == pytest.approx(1, abs=1e-6)
        (row,) = [r for r in rows_of(forth, "concept") if r.new == merged]
        assert {row.old, row.rival} == halves and row.correlation > row.rival_correlation > 0.3
        (lost,) = [r for r in rows_of(forth, "concept") if r.old in halves and r.old != row.old]
        assert lost.status in ("only_old", "weak") and lost.runner_up == merged
        (found,) = [r for r in rows_of(back, "concept") if r.old == merged]
        assert {found.new, found.runner_up} == halves

    def test_dead_features_are_nobodys_partner(self, vit: Rewritten, images: Tensor) -> None:
        """The same picture over and over: nothing varies on the class token, and nothing is made up."""
        result = diff(vit.path, vit.path, images[:1].expand(9, -1, -1, -1), batch_size=4)
        for a in (a for a in result.agreement if a.token_type == "cls"):
            assert a.old_dead == a.old and a.pairs == 0 and a.matched == 0 and a.matched_fraction == 0
            assert a.mean is a.median is a.weighted_mean is a.random_mean is None
        rows = [r for r in result.mapping if r.token_type == "cls"]
        assert rows and all(r.status == "dead" and r.correlation is None and r.runner_up is None for r in rows)
        assert json.dumps(result.document(), allow_nan=False)

    def test_one_dead_neuron(self, tmp_path: Path, pictures: Path, images: Tensor) -> None:
        base = tiny_vit()
        with torch.no_grad():
            base.blocks[1].mlp.fc2.weight[5, ::2] = 0
            base.blocks[1].mlp.fc2.weight[9] = 0
        for seed in (0, 1):
            elude.rewrite(base, pictures, out=tmp_path / str(seed), seed=seed, **OPTIONS)
        result = diff(tmp_path / "0", tmp_path / "1", images)
        assert not any("/9/" in (r.old or r.new or "") for r in result.mapping)
        assert all(r.correlation is not None for r in rows_of(result, "subunit") if r.status == "matched")


@pytest.fixture(scope="module")
def successor(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A slightly fine-tuned successor of the tiny ViT."""
    base = tiny_vit()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.02 * p.abs().mean() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    out = tmp_path_factory.mktemp("successor") / "ckpt"
    elude.rewrite(base, pictures, out=out, **OPTIONS)
    return out


class TestBases:
    def test_each_runs_on_its_own(self, vit: Rewritten, successor: Path, images: Tensor) -> None:
        result = diff(vit.path, successor, images)
        assert not result.same_base and "different base models" in result.warnings[0]
        acts = [m.concepts(images, SECOND)[:, 1:, :6].flatten(0, 1) for m in (vit.model, elude.load(successor))]
        expected = np.corrcoef(acts[0].T.double(), acts[1].T.double())[:6, 6:]
        for r in rows_of(result, "concept"):
            if r.old and r.new:
                assert r.correlation == pytest.approx(expected[int(r.old[-1]), int(r.new[-1])], abs=1e-4)
        figures = entry(result, "subunit")
        assert figures.mean is not None and 0.6 < figures.mean < 1

    def test_one_forward_pass_serves_one_base(
        self, vit: Rewritten, successor: Path, other_seed: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = 0
        forward = type(vit.base).forward_features

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(type(vit.base), "forward_features", counted)
        diff(vit.path, other_seed, images, batch_size=10)
        assert calls == 3
        diff(vit.path, successor, images, batch_size=10)
        assert calls == 3 + 6

    def test_other_preprocessing(self, vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
        data = DataConfig((3, 32, 32), (0.4,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
        elude.rewrite(tiny_vit(), pictures, out=tmp_path / "c", **{**OPTIONS, "data_config": data})
        result = diff(vit.path, tmp_path / "c", pictures)
        assert result.same_base and any("differently (mean)" in w for w in result.warnings)
        new = elude.load(tmp_path / "c")
        acts = [
            m.concepts(torch.cat(list(ImageSource(pictures, m.data_config).batches())), SECOND)[:, 1:, :6].flatten(0, 1)
            for m in (vit.model, new)
        ]
        expected = np.corrcoef(acts[0].T.double(), acts[1].T.double())[:6, 6:]
        (row,) = [r for r in rows_of(result, "concept") if r.old == f"{SECOND}/P0"]
        assert row.new and row.correlation == pytest.approx(expected[0, int(row.new[-1])], abs=1e-4)

    def test_layers_that_cannot_be_compared(self, vit: Rewritten, tmp_path: Path, pictures: Path) -> None:
        args = {**VIT_ARGS, "img_size": 64}
        data = DataConfig((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
        options = {**OPTIONS, "model_args": args, "data_config": data}
        elude.rewrite(tiny_vit(img_size=64), pictures, out=tmp_path / "c", max_images=4, **options)
        with pytest.raises(LayerError, match=f"{SECOND} has tokens 17 against 65"):
            diff(vit.path, tmp_path / "c", pictures)

    def test_nothing_in_common(self, vit: Rewritten, tmp_path: Path, pictures: Path, images: Tensor) -> None:
        elude.rewrite(tiny_vit(), pictures, out=tmp_path / "c", **{**OPTIONS, "layers": ["blocks.0.mlp.fc2"]})
        with pytest.raises(LayerError, match="no split layer in common.*--layers"):
            diff(vit.path, tmp_path / "c", images)
        elude.rewrite(tiny_vit(), pictures, out=tmp_path / "d", **{**OPTIONS, "layers": ["blocks.0.mlp.fc2", SECOND]})
        result = diff(vit.path, tmp_path / "d", images)
        assert (result.only_old, result.only_new) == ([FIRST], ["blocks.0.mlp.fc2"])
        assert {a.layer for a in result.agreement} == {SECOND}


class TestBounded:
    def test_layers_in_several_passes(self, vit: Rewritten, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        together = diff(vit.path, vit.path, images)
        monkeypatch.setattr("elude_runtime.offline.diff._PASS_BYTES", 1)
        assert diff(vit.path, vit.path, images).document() == together.document()

    def test_as_many_layers_a_pass_as_have_room(
        self, vit: Rewritten, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """8 bytes a pair of inputs and token type: 32 inputs of the first layer, 128 of the second."""
        passes = []
        stream = module._stream

        def told(pair: Any, moments: Any, *args: Any, **options: Any) -> int:
            passes.append(list(dict.fromkeys(name for name, _ in moments)))
            return stream(pair, moments, *args, **options)

        monkeypatch.setattr(module, "_stream", told)
        room = 8 * 2 * (32**2 + 128**2)
        for limit, subunits in ((room, True), (room - 1, True), (0, True), (0, False)):
            monkeypatch.setattr(module, "_PASS_BYTES", limit)
            diff(vit.path, vit.path, images[:4], subunits=subunits)
        together, apart = [[FIRST, SECOND]], [[FIRST], [SECOND]]
        assert passes == [*together, *apart, *apart, *together]

    def test_a_few_images_unfolded_at_a_time(self, mobilenet: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
        together = diff(mobilenet.path, mobilenet.path, mobilenet.images)
        monkeypatch.setattr("elude_runtime.offline.diff._UNFOLDED_FLOATS", 1)
        single = diff(mobilenet.path, mobilenet.path, mobilenet.images)
        assert [a.tokens for a in single.agreement] == [a.tokens for a in together.agreement]
        for a, b in zip(single.mapping, together.mapping, strict=True):
            assert (a.old, a.new, a.correlation) == (b.old, b.new, b.correlation)
            assert a.runner_up_correlation == pytest.approx(b.runner_up_correlation, abs=1e-9)

    def test_concepts_only(self, vit: Rewritten, other_seed: Path, images: Tensor) -> None:
        whole, part = diff(vit.path, other_seed, images), diff(vit.path, other_seed, images, subunits=False)
        assert part.agreement == [a for a in whole.agreement if a.kind == "concept"]
        assert part.mapping == [r for r in whole.mapping if r.kind == "concept"] and part.splits == whole.splits

    def test_nothing_is_left_on_the_models(
        self, vit: Rewritten, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded = []
        load = elude.load

        def keep(*args: Any, **kwargs: Any) -> Any:
            loaded.append(load(*args, **kwargs))
            return loaded[-1]

        monkeypatch.setattr("elude_runtime.offline.diff.load", keep)
        diff(vit.path, vit.path, images)
        assert [hook_count(m.base) for m in loaded] == [0, 0]

    def test_progress(self, vit: Rewritten, images: Tensor) -> None:
        done: dict[str, int] = {}
        totals: dict[str, int | None] = {}

        def report(stage: str, newly: int, total: int | None) -> None:
            done[stage], totals[stage] = done.get(stage, 0) + newly, total

        diff(vit.path, vit.path, images, progress=report)
        assert done == totals and done["correlations"] == 30 and done[f"matching {SECOND}"] == 64


class TestLabels:
    @pytest.fixture
    def labelled(self, vit: Rewritten, tmp_path: Path) -> Path:
        """The tiny ViT's checkpoint with a label in its table and a labels.csv beside it."""
        out = tmp_path / "labelled"
        shutil.copytree(vit.path, out)
        table = pq.read_table(out / "features.parquet")
        labels = [
            "ear" if n == f"{SECOND}/P0" else "paw" if n == f"{SECOND}/C1" else "" for n in table["feature"].to_pylist()
        ]
        pq.write_table(table.set_column(table.column_names.index("label"), "label", [labels]), out / "features.parquet")
        (out / "labels.csv").write_text(f'feature,label\n{SECOND}/P0,"stripe, thin"\n{SECOND}/P3,fur\n{SECOND}/P4,\n')
        return out

    def test_go_where_the_feature_went(self, vit: Rewritten, labelled: Path, images: Tensor, tmp_path: Path) -> None:
        order = [3, 5, 0, 1, 2, 4]
        changed = tamper(vit.path, tmp_path / "c", permuted(SECOND, order))
        result = diff(labelled, changed, images)
        expected = {f"{SECOND}/P3": "stripe, thin", f"{SECOND}/P1": "fur", f"{SECOND}/C1": "paw"}
        assert result.carried_labels() == expected
        write_labels(tmp_path / "out.csv", result.carried_labels())
        with (tmp_path / "out.csv").open(newline="") as file:
            assert {r["feature"]: r["label"] for r in csv.DictReader(file)} == expected
        shutil.copyfile(tmp_path / "out.csv", changed / "labels.csv")  # what is written is what is read
        assert {r.old: r.label for r in diff(changed, vit.path, images).mapping if r.label} == expected

    def test_only_where_each_is_the_others_best(
        self, vit: Rewritten, other_seed: Path, images: Tensor, tmp_path: Path
    ) -> None:
        """And where random members would hardly do as well."""
        result = diff(self.every_one_named(vit.path, tmp_path / "c"), other_seed, images, threshold=0.3)
        chance = {(a.layer, a.token_type, a.kind): a.random_high for a in result.agreement}
        carried = result.carried_labels()
        left = {"sibling": 0, "chance": 0}
        for r in (r for r in result.mapping if r.status == "matched"):
            assert r.correlation is not None and r.old is not None and r.new is not None
            bar = chance[r.layer, r.token_type, r.kind]
            assert bar is not None
            assert carried.get(r.new) == (f"name of {r.old}" if r.mutual and r.correlation >= bar else None)
            left["sibling"] += not r.mutual
            left["chance"] += bool(r.mutual) and r.correlation < bar
        assert len(carried) > 30 and min(left.values()) > 0

    def test_an_unrelated_model_gets_few(self, vit: Rewritten, pictures: Path, images: Tensor, tmp_path: Path) -> None:
        """Neurons of other random weights have nothing to do with those of the same number, though many correlate."""
        base = tiny_vit()
        with torch.no_grad():
            for p in base.parameters():
                p.copy_(p.flatten()[torch.randperm(p.numel(), generator=torch.Generator().manual_seed(2))].view_as(p))
        elude.rewrite(base, pictures, out=tmp_path / "new", **OPTIONS)
        named = self.every_one_named(vit.path, tmp_path / "old")
        result = diff(named, tmp_path / "new", images, threshold=0.3)
        matched = sum(r.status == "matched" for r in result.mapping)
        assert matched > 50 and len(result.carried_labels()) < matched / 3

    def every_one_named(self, checkpoint: Path, out: Path) -> Path:
        shutil.copytree(checkpoint, out)
        names = pq.read_table(out / "features.parquet")["feature"].to_pylist()
        (out / "labels.csv").write_text("feature,label\n" + "".join(f"{n},name of {n}\n" for n in names))
        return out

    def test_below_the_threshold_they_stay_behind(self, labelled: Path, other_seed: Path, images: Tensor) -> None:
        result = diff(labelled, other_seed, images, threshold=1.0)
        assert result.carried_labels() == {}
        assert {r.label for r in result.mapping if r.label} == {"stripe, thin", "fur", "paw"}

    @pytest.mark.parametrize("text", ["0,cat\n", "feature,name\nx,y\n", "\xff"])
    def test_a_file_that_is_none(self, labelled: Path, images: Tensor, text: str) -> None:
        (labelled / "labels.csv").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match="columns feature and label"):
            diff(labelled, labelled, images)


class TestFiles:
    def test_the_mapping_in_three_formats(
        self, vit: Rewritten, other_seed: Path, images: Tensor, tmp_path: Path
    ) -> None:
        result = diff(vit.path, other_seed, images)
        for ending in ("csv", "parquet", "json"):
            write_mapping(tmp_path / f"m.{ending}", result)
        document = json.loads((tmp_path / "m.json").read_text())
        assert document == json.loads(json.dumps(result.document()))
        rows = document["mapping"]
        assert pq.read_table(tmp_path / "m.parquet").to_pylist() == rows
        with (tmp_path / "m.csv").open(newline="") as file:
            read = list(csv.DictReader(file))
        assert [{k: "" if v is None else str(v) for k, v in r.items()} for r in rows] == read

    def test_another_ending(self, vit: Rewritten, images: Tensor, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"\.csv, \.parquet or \.json"):
            write_mapping(tmp_path / "m.xlsx", diff(vit.path, vit.path, images, subunits=False))


class TestRefusals:
    @pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan"), -1.0])
    def test_thresholds(self, vit: Rewritten, images: Tensor, threshold: float) -> None:
        with pytest.raises(SettingsError, match="threshold"):
            diff(vit.path, vit.path, images, threshold=threshold)

    def test_no_device(self, vit: Rewritten, images: Tensor) -> None:
        with pytest.raises(SettingsError, match="warp"):
            diff(vit.path, vit.path, images, device="warp")

    def test_no_checkpoint_or_no_table(self, vit: Rewritten, images: Tensor, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is not a directory"):
            diff(vit.path, tmp_path / "nowhere", images)
        shutil.copytree(vit.path, tmp_path / "c")
        (tmp_path / "c" / "features.parquet").unlink()
        with pytest.raises(CheckpointError, match=r"features\.parquet is missing"):
            diff(vit.path, tmp_path / "c", images)

    def test_no_images(self, vit: Rewritten, tmp_path: Path) -> None:
        with pytest.raises(EludeError, match="is not there"):
            diff(vit.path, vit.path, tmp_path / "nowhere")

    def test_weights_that_are_not_numbers(self, vit: Rewritten, images: Tensor, tmp_path: Path) -> None:
        def change(stored: dict[str, Tensor]) -> None:
            stored["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan

        with pytest.raises(CheckpointError, match="not finite"):
            diff(vit.path, tamper(vit.path, tmp_path / "c", change), images)

    def test_unreadable_images_are_left_out(self, vit: Rewritten, tmp_path: Path) -> None:
        folder = write_pictures(tmp_path / "p", 5)
        (folder / "002.png").write_bytes(b"x")
        assert diff(vit.path, vit.path, folder).images == 4
