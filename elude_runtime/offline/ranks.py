"""Several processes on one rewrite, as torchrun starts them: who reads which batch, and how their results meet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elude_runtime.errors import EludeError, SettingsError


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, and among those of its machine. Work is shared in units that do not depend on `world`
    (batches of images, chunks of neurons), so that every number of processes computes the same thing."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the checkpoint and shows progress."""
        return self.rank == 0

    def owns(self, unit: int) -> bool:
        return unit % self.world == self.rank

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, once every process has come here. EludeError when one has ended."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as error:
            raise EludeError("Another process of this run has ended; its own message says why.") from error
        return found

    def wait(self) -> None:
        """Until every process has come here."""
        self.gather(None)

    def agree(self, settings: dict[str, Any]) -> None:
        """SettingsError unless the settings are the same in every process."""
        of_all = self.gather(settings)
        differing = [name for name in settings if any(other[name] != of_all[0][name] for other in of_all)]
        if differing:
            raise SettingsError(
                f"The processes of this run do not have the same {', '.join(differing)}; start all with the same "
                "command where they find the same files, and give the weights (random ones differ)."
            )

    def device(self, wanted: str | torch.device) -> str | torch.device:
        """Where this process computes: with `cuda`, the processes of a machine take its GPUs in turn."""
        gpus = torch.cuda.device_count() if self.world > 1 and str(wanted) == "cuda" else 0
        return f"cuda:{self.local % gpus}" if gpus else wanted


def launched() -> Ranks:
    """The ranks that torchrun put into the environment; one process without it."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    try:
        ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in names.items()))
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
    try:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # the first may write for long while others wait
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SettingsError(
            f"The processes of this run do not find each other ({reason}); start them with torchrun."
        ) from error
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
