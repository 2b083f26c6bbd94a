"""How long each part of an evaluation took, so that users know what to leave out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """seconds {phase: of the wall clock}, in the order in which the phases first came."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The block belongs to this phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def document(self) -> dict[str, float]:
        """Every phase, and `total`, which has what is in none of them, too."""
        total = time.perf_counter() - self._start
        return {name: round(seconds, 1) for name, seconds in (*self.seconds.items(), ("total", total))}
