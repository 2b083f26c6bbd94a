"""What serving with ELUDe costs beside a minimal handler: measured in turns, so that a machine's moods hit both."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import httpx
import numpy as np

from elude_runtime.offline.bench import Ratio
from elude_runtime.offline.image_files import Progress
from elude_runtime.traffic.figures import answered, pooled_ratio, quantile, seconds_of, throughput
from elude_runtime.traffic.generator import Answer, Ask
from elude_runtime.traffic.process import LoadProcess

# What serving may cost, as ratios to the minimal handler or, for P99, to the same load without explained rows.
THROUGHPUT, P50, P99, READY = 0.97, 1.03, 1.3, 1.2
EXPLAINED = "explained"
_REQUEST = '{"explain": {"method": "gradient"}}'


@dataclass(frozen=True)
class Target:
    """A model behind a server, and the encoded images that it is asked about in turn."""

    url: str
    images: Sequence[bytes]

    def plain(self, count: int) -> list[Ask]:
        """Predictions, each from the bytes of an image."""
        headers = {"Content-Type": "application/octet-stream"}
        return [Ask(self.url, self.images[n % len(self.images)], headers) for n in range(count)]

    def mixed(self, explained: Sequence[bool]) -> list[Ask]:
        """The same, explained by gradients where it says so."""
        asks = self.plain(len(explained))
        forms = [self._form(image) for image in self.images]
        return [forms[n % len(forms)] if explained[n] else ask for n, ask in enumerate(asks)]

    def _form(self, image: bytes) -> Ask:
        files: dict[str, Any] = {
            "image": ("image", image, "application/octet-stream"),
            "request": (None, _REQUEST, "application/json"),
        }
        made = httpx.Request("POST", self.url, files=files)
        return Ask(self.url, made.read(), {"Content-Type": made.headers["Content-Type"]}, EXPLAINED)


@dataclass(frozen=True)
class Plan:
    """How much is measured. seconds: of a closed-loop run; mixed_seconds: of an open-loop run; load: of the open loop,
    as a share of the throughput of both servers' slower one with the most clients; share: of explained rows."""

    clients: Sequence[int] = (1, 4, 16)
    pairs: int = 20
    seconds: float = 1.5
    mixed_seconds: float = 3.0
    load: float = 0.5
    share: float = 0.1
    batch: int = 8
    seed: int = 0


def compare_plain(
    load: LoadProcess, ours: Target, minimal: Target, plan: Plan, tell: Progress = lambda *_: None
) -> list[dict[str, Any]]:
    """Plain predictions in a closed loop, for every number of clients: throughput and median latency of `ours` over
    `minimal`, with what they may be. ServerError where a request fails."""
    found = []
    for clients in plan.clients:
        count = _enough(load, minimal, clients, plan)
        targets = {"elude": ours, "minimal": minimal}
        rates: dict[str, list[float]] = {name: [] for name in targets}
        halves: dict[str, list[float]] = {name: [] for name in targets}
        for pair in range(plan.pairs):
            for name in (("elude", "minimal"), ("minimal", "elude"))[pair % 2]:
                _closed(load, targets[name], clients, clients)  # the other one was asked before: caches are cold
                answers = _closed(load, targets[name], count, clients)
                rates[name].append(throughput(answers))
                halves[name].append(quantile(seconds_of(answers), 0.5))
            tell(f"{clients} clients", 1, plan.pairs)
        rate, half = (Ratio.of(_over(values["elude"], values["minimal"])) for values in (rates, halves))
        found.append(
            {
                "clients": clients,
                "requests": count,
                "per_second": {name: _median(values) for name, values in rates.items()},
                "p50_ms": {name: _median(values, 1e3) for name, values in halves.items()},
                "throughput": {**asdict(rate), "at_least": THROUGHPUT, "met": rate.high >= THROUGHPUT},
                "p50": {**asdict(half), "at_most": P50, "met": half.low <= P50},
            }
        )
    return found


def compare_mixed(
    load: LoadProcess, ours: Target, rate: float, plan: Plan, tell: Progress = lambda *_: None
) -> dict[str, Any]:
    """Requests at random times, `rate` a second, in an open loop: the 99th percentile of the plain rows' latency where
    a share of all rows is explained by gradients, over the same rows' where none is. Both runs of a pair have the same
    schedule."""
    count, rng = max(10, round(rate * plan.mixed_seconds)), np.random.default_rng(plan.seed)
    plain: dict[bool, list[list[float]]] = {True: [], False: []}  # seconds of the plain rows, run by run
    explained, late = list[float](), 0.0
    for ask in (ours.mixed([True] * 2), ours.plain(2)):
        answered(load.closed(ask, 1))
    for pair in range(plan.pairs):
        times = np.sort(rng.uniform(0, plan.mixed_seconds, count))  # what arrives at random, given how many arrive
        drawn = set(rng.choice(count, max(1, round(plan.share * count)), replace=False).tolist())
        chosen = [number in drawn for number in range(count)]
        for mixed in ((False, True), (True, False))[pair % 2]:
            asks = ours.mixed(chosen) if mixed else ours.plain(count)
            answers = answered(load.open(asks, times.tolist()))
            plain[mixed].append([a.seconds for a, other in zip(answers, chosen, strict=True) if not other])
            explained += seconds_of(answers, EXPLAINED)
            late = max(late, *(answer.late for answer in answers))
        tell("with explained rows", 1, plan.pairs)
    ratio = pooled_ratio(plain[True], plain[False], 0.99)
    pooled = {name: list(chain(*plain[mixed])) for name, mixed in (("with", True), ("without", False))}
    return {
        "per_second": round(rate, 2),
        "load": plan.load,
        "share_explained": plan.share,
        "plain_rows": len(pooled["with"]),
        "p50_ms": {name: round(1e3 * quantile(seconds, 0.5), 2) for name, seconds in pooled.items()},
        "p99_ms": {name: round(1e3 * quantile(seconds, 0.99), 2) for name, seconds in pooled.items()},
        "explained_p50_ms": round(1e3 * quantile(explained, 0.5), 2),
        "generator_late_ms": round(1e3 * late, 2),
        "p99": {**asdict(ratio), "at_most": P99, "met": ratio.median <= P99},
    }


def compare_starts(
    ours: Callable[[], float], minimal: Callable[[], float], pairs: int, tell: Progress = lambda *_: None
) -> dict[str, Any]:
    """Seconds from a server's start until its worker is READY, ours over the minimal handler's. ours, minimal: start a
    server, give these seconds, and stop it."""
    seconds: dict[str, list[float]] = {"elude": [], "minimal": []}
    starts = {"elude": ours, "minimal": minimal}
    for pair in range(pairs):
        for name in (("elude", "minimal"), ("minimal", "elude"))[pair % 2]:
            seconds[name].append(starts[name]())
        tell("starts", 1, pairs)
    ratio = Ratio.of(_over(seconds["elude"], seconds["minimal"]))
    return {
        "seconds": {name: _median(values) for name, values in seconds.items()},
        "ready": {**asdict(ratio), "at_most": READY, "met": ratio.median <= READY},
    }


def open_rate(plain: Sequence[dict[str, Any]], plan: Plan) -> float:
    """Requests a second of the open loop."""
    most = max(plain, key=lambda entry: entry["clients"])
    return plan.load * min(most["per_second"].values())


def _enough(load: LoadProcess, target: Target, clients: int, plan: Plan) -> int:
    """Requests that last about `plan.seconds`, all clients and whole batches alike often busy."""
    step = math.lcm(clients, min(clients, plan.batch))
    _closed(load, target, 2 * step, clients)  # a server's first requests are slow
    start = time.perf_counter()
    _closed(load, target, 2 * step, clients)
    each = (time.perf_counter() - start) / (2 * step)
    return step * max(2, math.ceil(plan.seconds / each / step))


def _closed(load: LoadProcess, target: Target, count: int, clients: int) -> Sequence[Answer]:
    return answered(load.closed(target.plain(count), clients))


def _over(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, others, strict=True)]


def _median(values: Sequence[float], factor: float = 1.0) -> float:
    return round(factor * statistics.median(values), 3)
