"""Threads that decode the images of a batch side by side, within a bound on the pixels that are held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class DecodePool:
    """Maps a function over a few items, on threads of its own; results stand in the items' order.

    What is mapped must not map in turn: threads that wait for threads of the same pool may wait for ever.
    """

    def __init__(self, threads: int, pixels: int) -> None:
        """threads: at a time, one or more; one: the caller's. pixels: of all images that are decoded at a time; a
        larger one goes alone."""
        self.threads, self._limit, self._used = threads, pixels, 0
        self._changed = Condition()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None

    def spreads(self, count: int) -> bool:
        """Whether so many items would go to several threads."""
        return self._executor is not None and count > 1

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`work` of every item; an exception of one is raised here."""
        if self._executor is None or len(items) < 2:
            return [work(item) for item in items]
        return list(self._executor.map(work, items))

    @contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Waits until so many more pixels may be held, and holds them for the length of the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._limit)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()
