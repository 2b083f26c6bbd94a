"""The benchmark's own arithmetic and measuring; what it measures is not a test's business."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from support import SECOND, VIT_ARGS, VIT_DATA, tiny_vit, write_tar

from elude_runtime.checkpoint.manifest import ModelSource
from elude_runtime.errors import EludeError
from elude_runtime.offline import bench
from elude_runtime.offline.bench import Ratio, Workload, inference_ratio, peak_memory, rewrite_time
from elude_runtime.offline.rewrite import BaseModel
from elude_runtime.partition import SplitConfig


def tiny_base(depth: int = 3) -> BaseModel:
    source = ModelSource(kind="timm", name="vit_tiny_patch16_224", args={**VIT_ARGS, "depth": depth})
    return BaseModel(tiny_vit(depth=depth), source)


@pytest.fixture
def work(pictures: Path) -> Workload:
    return Workload(pictures, VIT_DATA, [SECOND], SplitConfig(4, 20), batch_size=8)


class TestRatio:
    def test_the_interval_holds_the_median_and_shrinks_with_the_pairs(self) -> None:
        values = np.random.default_rng(3).normal(2.0, 0.1, 400).tolist()
        few, many = Ratio.of(values[:20]), Ratio.of(values)
        assert few.low <= few.median <= few.high and many.low < 2.0 < many.high
        assert many.high - many.low < few.high - few.low

    def test_coverage(self) -> None:
        """Of 200 intervals over 25 pairs, about 95 % hold the true median."""
        random = np.random.default_rng(4)
        held = 0
        for _ in range(200):
            ratio = Ratio.of(random.lognormal(0, 0.1, 25).tolist())
            held += ratio.low <= 1.0 <= ratio.high
        assert 180 <= held <= 199

    def test_one_pair(self) -> None:
        assert Ratio.of([1.5]) == Ratio(1.5, 1.5, 1.5, 1)


def test_the_time_of_a_rewrite_is_told_by_stage(work: Workload) -> None:
    found = rewrite_time(tiny_base(), work, rounds=2)
    assert found["images"] == 24 and found["ratio"]["pairs"] == 2
    stages = found["stages_seconds"]
    expected = {"preparation", "token statistics", "attribution accuracy", "writing"}
    assert expected | {f"partition of {SECOND}", f"concepts of {SECOND}"} <= set(stages)
    assert sum(stages.values()) <= found["rewrite_seconds"] * 1.5 + 0.5


def test_a_rewrite_is_compared_with_the_passes_on_both_sides_of_it(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that becomes slower moves both sides: neither the pass before nor the one after decides alone."""
    seconds = iter([1.0, 6.0, 3.0, 20.0, 5.0])
    monkeypatch.setattr(bench, "_timed", lambda run: next(seconds))
    ratio = rewrite_time(tiny_base(), work, rounds=2)["ratio"]
    assert (ratio["low"], ratio["median"], ratio["high"]) == (3.0, 4.0, 5.0)  # 6 / mean(1, 3) and 20 / mean(3, 5)


def test_neither_of_a_pair_always_goes_first(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second of a pair takes twice the time of the first, the loaded model is twice as slow and twice as fast
    equally often."""
    seconds = iter([1.0, *[1.0, 2.0] * 4])  # the first is the calibration of the number of calls
    monkeypatch.setattr(bench, "_timed", lambda run: next(seconds))
    ratio = inference_ratio(tiny_base(), work, pairs=4)["ratio"]
    assert (ratio["low"], ratio["median"], ratio["high"]) == (0.5, 1.25, 2.0)


def test_stages_hold_their_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = bench.StageClock()
    clock("reading", 0, 10)
    clock("reading", 10, 10)
    clock("writing", 0, 1)
    assert clock.seconds == {"preparation": 1.0, "reading": 6.0}


def test_a_loaded_model_costs_about_what_its_base_costs(work: Workload) -> None:
    found = inference_ratio(tiny_base(), work, pairs=4)
    assert found["ratio"]["pairs"] == 4 and 0.3 < found["ratio"]["median"] < 3


def test_a_loaded_model_with_other_answers_is_not_measured(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(base: BaseModel, checkpoint: Path) -> object:
        return lambda images: torch.zeros(len(images), base.model.num_classes)

    monkeypatch.setattr(bench, "_load_beside", other)
    with pytest.raises(EludeError, match="elude verify"):
        inference_ratio(tiny_base(), work, pairs=1)


def allocate(mebibytes: int) -> None:
    block = bytearray(mebibytes * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])


def fail() -> None:
    raise SystemExit(3)


class TestPeakMemory:
    def test_of_a_process_is_read_from_the_system(self) -> None:
        small, large = (
            bench._peak_of(allocate, (600,)),
            bench._peak_of(allocate, (900,)),
        )  # importing torch takes some too
        assert 290 < large - small < 320

    def test_a_child_that_ends_while_it_is_looked_at_ends_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Decoding processes come and go: what the process takes afterwards still counts."""
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ghost = psutil.Process(ended.pid)
        ended.wait()
        listed = psutil.Process.children
        monkeypatch.setattr(psutil.Process, "children", lambda *args, **options: [*listed(*args, **options), ghost])
        assert bench._peak_of(allocate, (900,)) > 900

    def test_a_process_that_fails_is_no_figure(self) -> None:
        with pytest.raises(EludeError, match="failed"):
            bench._peak_of(fail, ())

    def test_of_a_rewrite(self, work: Workload) -> None:
        found = peak_memory(partial(tiny_base, 2), work, [30])
        (run,) = found["runs"]
        assert run["images"] == 30 and run["plain_mib"] > 50 and run["rewrite_mib"] > 50

    @pytest.mark.parametrize("given", ["folder", "shards", "shard", "folder of shards", "list"])
    @pytest.mark.parametrize("count", [1, 5, 24, 30])
    def test_as_many_images_as_asked_from_any_source(
        self, work: Workload, pictures: Path, tmp_path: Path, given: str, count: int
    ) -> None:
        members = [(p.name, p.read_bytes()) for p in sorted(pictures.iterdir())]
        for number in range(2):
            write_tar(tmp_path / f"{number}.tar", members[number::2])
        (tmp_path / "list.txt").write_text("\n".join(str(p) for p in sorted(pictures.iterdir())))
        images: dict[str, str | Path] = {
            "folder": pictures, "shards": f"{tmp_path}/{{0..1}}.tar", "shard": tmp_path / "1.tar",
            "folder of shards": tmp_path, "list": tmp_path / "list.txt",
        }  # fmt: skip
        source = bench._list_of(replace(work, images=images[given]), count, tmp_path / "asked.txt").source()
        assert source.count == count == sum(map(len, source.batches())) and not source.report.skipped
        there = 12 if given == "shard" else 24
        assert len(set(source.report.hashes)) >= min(count, there) // 2

    def test_of_a_rewrite_of_shards(self, work: Workload, pictures: Path, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [(p.name, p.read_bytes()) for p in sorted(pictures.iterdir())])
        (run,) = peak_memory(partial(tiny_base, 2), replace(work, images=str(tmp_path / "a.tar")), [30])["runs"]
        assert run["images"] == 30 and run["plain_mib"] > 50 and run["rewrite_mib"] > 50
