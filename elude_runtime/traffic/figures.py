"""Figures of answers: throughput, medians and high quantiles, and ratios between runs with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elude_runtime.errors import ServerError
from elude_runtime.offline.bench import Ratio
from elude_runtime.traffic.generator import Answer


def answered(answers: Sequence[Answer]) -> Sequence[Answer]:
    """The answers, all of them good. ServerError with the first that is not: figures of refusals mean nothing."""
    bad = [answer for answer in answers if answer.status != 200]
    if bad:
        what = f"{bad[0].status or 'no answer'}: {' '.join(bad[0].error.split())[:200]}"
        raise ServerError(f"{len(bad)} of {len(answers)} requests failed ({what}); nothing can be said of the speed.")
    return answers


def throughput(answers: Sequence[Answer]) -> float:
    """Answers a second, from the first request to the last answer."""
    return len(answers) / (max(a.due + a.seconds for a in answers) - min(a.due for a in answers))


def seconds_of(answers: Sequence[Answer], kind: str | None = None) -> list[float]:
    """How long each answer took; kind: only those of that kind."""
    return [answer.seconds for answer in answers if kind is None or answer.kind == kind]


def quantile(seconds: Sequence[float], q: float) -> float:
    return float(np.quantile(np.asarray(seconds), q))


def pooled_ratio(
    others: Sequence[Sequence[float]], plains: Sequence[Sequence[float]], q: float, draws: int = 2000, seed: int = 0
) -> Ratio:
    """A quantile of all of `others` over that of all of `plains`, runs that were made in pairs; the interval comes from
    drawing pairs anew. A high quantile needs them pooled: a single run has too few answers."""
    rng, count, found = np.random.default_rng(seed), len(others), []
    one, two = [np.asarray(run) for run in others], [np.asarray(run) for run in plains]
    for _ in range(draws):
        drawn = rng.integers(0, count, count)
        top, bottom = (np.quantile(np.concatenate([runs[i] for i in drawn]), q) for runs in (one, two))
        found.append(top / bottom)
    ratio = np.quantile(np.concatenate(one), q) / np.quantile(np.concatenate(two), q)
    low, high = np.quantile(found, (0.025, 0.975))
    return Ratio(round(float(ratio), 4), round(float(low), 4), round(float(high), 4), count)
