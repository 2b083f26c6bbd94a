"""Several processes on one rewrite, as torchrun starts them: who reads which batch, and how their results meet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elude_runtime.errors import SettingsError


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. Work is shared in units that do not depend on `world` (batches of images, chunks of
    neurons), so that every number of processes computes the same thing."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the checkpoint and shows progress."""
        return self.rank == 0

    def owns(self, unit: int) -> bool:
        return unit % self.world == self.rank

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; a collective call."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world > 1:
            dist.barrier()


def launched() -> Ranks:
    """Rank and world as torchrun put them into the environment; one process without it."""
    try:
        ranks = Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError:
        ranks = Ranks(0, 0)
    if not 0 <= ranks.rank < ranks.world:
        raise SettingsError("RANK and WORLD_SIZE in the environment do not fit; start the processes with torchrun.")
    return ranks


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes of this run, connected (gloo: what they exchange is small and lies in main memory)."""
    ranks = launched()
    if ranks.world == 1 or dist.is_initialized():
        yield ranks
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # the first may write for long while others wait
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
