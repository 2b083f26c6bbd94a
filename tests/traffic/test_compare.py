"""What is compared with what, and the verdicts: with a generator whose answers take as long as the test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from elude_runtime.errors import ServerError
from elude_runtime.traffic.compare import (
    EXPLAINED,
    Plan,
    Target,
    compare_mixed,
    compare_plain,
    compare_starts,
    open_rate,
)
from elude_runtime.traffic.figures import pooled_ratio, throughput
from elude_runtime.traffic.generator import Answer, Ask
from elude_runtime.traffic.process import LoadProcess

OURS, MINIMAL = Target("ours", [b"a", b"b"]), Target("minimal", [b"a", b"b"])
PLAN = Plan(clients=(1, 2), pairs=3, seconds=0.02, mixed_seconds=2.0, batch=2)


class Load(LoadProcess):
    """Asks nobody: `took` says how long an answer takes. runs: what it was given."""

    def __init__(self, took: Callable[[Ask], float], status: int = 200) -> None:
        self.took, self.status = took, status
        self.runs: list[tuple[Sequence[Ask], Any]] = []

    def closed(self, asks: Sequence[Ask], clients: int) -> list[Answer]:
        self.runs.append((asks, clients))
        due, found = 0.0, []
        for ask in asks:
            found.append(Answer(ask.kind, self.status, due, 0.0, self.took(ask)))
            due += self.took(ask)
        return found

    def open(self, asks: Sequence[Ask], times: Sequence[float]) -> list[Answer]:
        self.runs.append((asks, list(times)))
        return [Answer(a.kind, self.status, t, 0.001, self.took(a)) for a, t in zip(asks, times, strict=True)]


class TestPlain:
    @pytest.mark.parametrize(("ours", "met"), [(0.9, True), (1.02, True), (1.04, False)])
    def test_ratios_and_verdicts(self, ours: float, met: bool) -> None:
        found = compare_plain(Load(lambda ask: ours if ask.url == "ours" else 1.0), OURS, MINIMAL, PLAN)
        assert [entry["clients"] for entry in found] == [1, 2]
        for entry in found:
            assert entry["throughput"]["median"] == pytest.approx(1 / ours, abs=1e-4)
            assert entry["p50"]["median"] == pytest.approx(ours, abs=1e-4) and entry["p50"]["pairs"] == 3
            assert entry["throughput"]["met"] is entry["p50"]["met"] is met
            assert entry["p50_ms"] == {"elude": 1000 * ours, "minimal": 1000.0}

    def test_neither_goes_always_first_and_both_are_asked_the_same(self) -> None:
        load = Load(lambda ask: 1.0)
        compare_plain(load, OURS, MINIMAL, PLAN)
        timed = [(asks[0].url, len(asks)) for asks, clients in load.runs if clients == 2][2:]  # two to find the number
        assert [url for url, _ in timed[::2]] == [url for url, _ in timed[1::2]]  # each warmed up before it is timed
        assert [url for url, _ in timed[::2]] == ["ours", "minimal", "minimal", "ours", "ours", "minimal"]
        assert len({count for _, count in timed[1::2]}) == 1
        bodies = {asks[0].url: [ask.body for ask in asks] for asks, _ in load.runs}
        assert bodies["ours"] == bodies["minimal"] and bodies["ours"][:3] == [b"a", b"b", b"a"]

    def test_an_interval_that_reaches_the_bar_is_enough(self) -> None:
        takes = iter([1.0] * 100)
        slow = Load(lambda ask: 1.1 if ask.url == "ours" and next(takes, None) else 1.0)
        (entry, _) = compare_plain(slow, OURS, MINIMAL, PLAN)
        assert entry["p50"]["met"] is (entry["p50"]["low"] <= 1.03)
        assert entry["throughput"]["met"] is (entry["throughput"]["high"] >= 0.97)

    def test_refusals_are_no_figures(self) -> None:
        with pytest.raises(ServerError, match="requests failed"):
            compare_plain(Load(lambda ask: 1.0, status=503), OURS, MINIMAL, PLAN)


class TestMixed:
    def test_the_same_rows_are_compared(self) -> None:
        """Explained rows take long and are not counted; plain ones beside them take 1.2 times as long as without."""
        load = Load(lambda ask: 9.0 if ask.kind == EXPLAINED else 1.0)
        rows = PLAN.pairs * 18
        found = compare_mixed(load, OURS, 10.0, PLAN)
        assert found["p99"]["median"] == 1.0 and found["p99"]["met"] and found["plain_rows"] == rows
        assert found["explained_p50_ms"] == 9000 and found["generator_late_ms"] == 1.0
        runs = [(asks, times) for asks, times in load.runs if isinstance(times, list)]
        assert len(runs) == 2 * PLAN.pairs
        for one, other in zip(runs[::2], runs[1::2], strict=True):
            assert one[1] == other[1] == sorted(one[1]) and min(one[1]) >= 0 and max(one[1]) <= PLAN.mixed_seconds
            counts = sorted(sum(ask.kind == EXPLAINED for ask in asks) for asks, _ in (one, other))
            assert counts == [0, 2]  # a tenth of twenty
        assert runs[0][1] != runs[2][1]  # every pair has times of its own

    def test_what_explained_rows_cost_the_others(self) -> None:
        load = Load(lambda ask: 1.0)
        mixed = [False]

        def took(ask: Ask) -> float:
            return 1.4 if mixed[0] else 1.0

        class Slow(Load):
            def open(self, asks: Sequence[Ask], times: Sequence[float]) -> list[Answer]:
                mixed[0] = any(ask.kind == EXPLAINED for ask in asks)
                return super().open(asks, times)

        load = Slow(took)
        found = compare_mixed(load, OURS, 10.0, PLAN)
        assert found["p99"]["median"] == 1.4 and not found["p99"]["met"]
        assert found["p99_ms"] == {"with": 1400.0, "without": 1000.0}

    def test_the_rate_is_a_share_of_the_slower_server_with_the_most_clients(self) -> None:
        plain = [
            {"clients": 16, "per_second": {"elude": 40.0, "minimal": 50.0}},
            {"clients": 1, "per_second": {"elude": 9.0, "minimal": 9.0}},
        ]
        assert open_rate(plain, PLAN) == 20.0

    def test_an_explained_row_is_a_form_with_image_and_request(self) -> None:
        plain, explained = OURS.mixed([False, True])
        assert (plain.body, plain.kind, explained.kind) == (b"a", "plain", EXPLAINED)
        assert explained.headers["Content-Type"].startswith("multipart/form-data; boundary=")
        assert b'name="image"' in explained.body and b'{"explain": {"method": "gradient"}}' in explained.body


class TestStarts:
    def test_in_turns(self) -> None:
        order: list[str] = []

        def start(name: str, seconds: float) -> Callable[[], float]:
            return lambda: (order.append(name), seconds)[1]

        found = compare_starts(start("a", 6.0), start("b", 5.0), 3)
        assert order == ["a", "b", "b", "a", "a", "b"]
        assert found["ready"]["median"] == 1.2 and found["ready"]["met"]
        assert not compare_starts(start("a", 6.1), start("b", 5.0), 1)["ready"]["met"]


class TestFigures:
    def test_throughput_is_over_all_from_first_request_to_last_answer(self) -> None:
        assert throughput([Answer("plain", 200, 0.5, 0, 1.0), Answer("plain", 200, 1.0, 0, 1.5)]) == 1.0

    def test_a_pooled_quantile_is_that_of_all_answers(self) -> None:
        rng = np.random.default_rng(0)
        runs = [rng.exponential(1, 50).tolist() for _ in range(20)]
        doubled = [[2 * value for value in run] for run in runs]
        ratio = pooled_ratio(doubled, runs, 0.99)
        assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (2.0, 2.0, 2.0, 20)
        others = [rng.exponential(1, 50).tolist() for _ in range(20)]
        ratio = pooled_ratio(others, runs, 0.99)
        expected = np.quantile(np.concatenate(others), 0.99) / np.quantile(np.concatenate(runs), 0.99)
        assert ratio.median == pytest.approx(expected, abs=1e-4) and ratio.low < ratio.median < ratio.high
