"""The generator in a process of its own, on processor cores of its own where the host has several."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType

from elude_runtime.errors import EludeError
from elude_runtime.traffic.generator import Answer, Ask, Generator

Cores = frozenset[int]


def split_cores() -> tuple[Cores, Cores]:
    """(cores for the servers, cores for the generator): the generator gets the last core that this process may use, the
    servers all others. Two empty sets where there is one core only, or the system cannot pin."""
    if not hasattr(os, "sched_setaffinity"):
        return frozenset(), frozenset()
    cores = sorted(os.sched_getaffinity(0))
    return (frozenset(cores[:-1]), frozenset(cores[-1:])) if len(cores) > 1 else (frozenset(), frozenset())


@contextmanager
def pinned(cores: Cores) -> Iterator[None]:
    """This process, and what it starts meanwhile, runs on these cores for the length of the block; empty: as before."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class LoadProcess:
    """A process that asks, as a context manager; one run at a time.

    with LoadProcess(cores) as load:
        answers = load.closed([Ask(url, image)] * 100, clients=4)
    """

    def __init__(self, cores: Cores = frozenset(), timeout: float = 120.0) -> None:
        """cores: to run on; empty: wherever the system likes. timeout: seconds until an answer counts as failed."""
        spawn = multiprocessing.get_context("spawn")  # a fork would take along whatever this process has loaded
        self._ours, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, cores, timeout), daemon=True)
        self._theirs = theirs

    def __enter__(self) -> LoadProcess:
        self._process.start()
        self._theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._ours.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._ours.close()

    def closed(self, asks: Sequence[Ask], clients: int) -> list[Answer]:
        """`Generator.closed`; answers in the order of the requests."""
        return self._run("closed", asks, clients)

    def open(self, asks: Sequence[Ask], times: Sequence[float]) -> list[Answer]:
        """`Generator.open`; answers in the order of the requests."""
        return self._run("open", asks, list(times))

    def _run(self, how: str, asks: Sequence[Ask], argument: int | list[float]) -> list[Answer]:
        try:
            self._ours.send((how, list(asks), argument))  # a body that stands there many times travels once
            return list(self._ours.recv())
        except (EOFError, OSError) as error:
            raise EludeError("The load generator's process ended by itself; run the command again.") from error


def _work(connection: Connection, cores: Cores, timeout: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    if cores:
        os.sched_setaffinity(0, cores)
    asyncio.run(_serve(connection, timeout))


async def _serve(connection: Connection, timeout: float) -> None:
    generator = Generator(timeout)
    try:
        while (order := _receive(connection)) is not None:
            how, asks, argument = order
            gc.collect()
            gc.disable()  # no pause of the generator's own inside a run
            try:
                run = generator.closed(asks, argument) if how == "closed" else generator.open(asks, argument)
                connection.send(await run)
            finally:
                gc.enable()
    finally:
        await generator.close()


def _receive(connection: Connection) -> tuple | None:
    try:
        return connection.recv()
    except EOFError:
        return None
