"""What a rewrite costs: its time in plain passes over the same images, its peak memory, and what serving it adds.

Machines drift, so times are only compared within a run: what is compared is measured alternately, and the ratio of
neighbours is reported as a median with a bootstrap interval.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from elude_runtime.analysis.model import EludeModel
from elude_runtime.errors import EludeError
from elude_runtime.network.conditions import borrowed
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.image_files import FileList, ShardList, find_images
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.offline.rewrite import BaseModel, rewrite_checkpoint
from elude_runtime.partition import SplitConfig

_POLL_SECONDS = 0.02
_LEAST_SECONDS = 0.25  # a time is taken over as many calls as last this long


@dataclass(frozen=True)
class Ratio:
    """Median of the pairs' ratios with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, ratios: list[float], seed: int = 0) -> Ratio:
        draws = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios)))
        low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
        return cls(round(statistics.median(ratios), 4), round(float(low), 4), round(float(high), 4), len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} (95 % {self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"


@dataclass(frozen=True)
class Workload:
    """What is rewritten, and how: the arguments of `rewrite_checkpoint`."""

    images: str | Path
    data: DataConfig
    layers: list[str] | None
    split: SplitConfig
    batch_size: int = 25
    workers: int = 0
    limit: int | None = None

    def source(self) -> ImageSource:
        return ImageSource(self.images, self.data, batch_size=self.batch_size, workers=self.workers, limit=self.limit)

    def rewrite(self, base: BaseModel, out: Path, progress: Progress | None = None) -> None:
        rewrite_checkpoint(
            base, self.images, out, self.split, layers=self.layers, batch_size=self.batch_size, workers=self.workers,
            max_images=self.limit, data_config=self.data, progress=progress,
        )  # fmt: skip


def rewrite_time(base: BaseModel, work: Workload, rounds: int) -> dict[str, Any]:
    """The whole rewrite over a plain pass (images read, decoded and run through the model), measured in turns: each
    rewrite is compared with the mean of the passes before and after it. Seconds by stage are those of the last."""
    plain = [_timed(lambda: plain_pass(base.model, work.source()))]
    whole: list[float] = []
    stages: dict[str, float] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            clock = StageClock()
            whole.append(_timed(lambda: work.rewrite(base, Path(folder) / "ckpt", clock)))  # noqa: B023
            stages = clock.seconds
        plain.append(_timed(lambda: plain_pass(base.model, work.source())))
    ratios = [2 * w / (a + b) for w, a, b in zip(whole, plain, plain[1:], strict=False)]
    return {
        "images": work.source().count,
        "ratio": asdict(Ratio.of(ratios)),
        "plain_seconds": round(statistics.median(plain), 2),
        "rewrite_seconds": round(statistics.median(whole), 2),
        "stages_seconds": {name: round(seconds, 2) for name, seconds in stages.items()},
    }


def inference_ratio(base: BaseModel, work: Workload, pairs: int, batch_size: int = 8) -> dict[str, Any]:
    """A prediction by the loaded model over one by the base model, from copies with weights of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ckpt"
        few = replace(work, split=SplitConfig(2, 2), workers=0, limit=8)
        few.rewrite(base, out)
        loaded = _load_beside(base, out)
        images = next(few.source().batches())
        images = images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size]
        images = images.to(next(base.model.parameters()).dtype)
        with borrowed(base.model) as model, torch.no_grad():
            if not torch.equal(model(images), loaded(images)):
                raise EludeError("The loaded model answers differently from the base model; run `elude verify`.")
            calls = max(1, round(_LEAST_SECONDS / _timed(lambda: model(images))))
            ratios = []
            for pair in range(pairs):
                times = {}
                for which in ((model, loaded), (loaded, model))[pair % 2]:  # neither always goes first
                    times[which] = _timed(lambda: [which(images) for _ in range(calls)])  # noqa: B023
                ratios.append(times[loaded] / times[model])
    return {"batch_size": batch_size, "ratio": asdict(Ratio.of(ratios))}


def peak_memory(build: Callable[[], BaseModel], work: Workload, counts: list[int]) -> dict[str, Any]:
    """Peak resident memory, MiB, of a process (and its children) that builds the model and makes a plain pass, and of
    one that rewrites it, for each number of images. More images than there are: the same again."""
    weights = sum(t.numel() * t.element_size() for t in build().model.state_dict().values())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            listed = _list_of(work, count, Path(folder) / f"{count}.txt")
            plain = _peak_of(_plain_child, (build, replace(listed, limit=min(count, 4 * work.batch_size))))
            rows.append({"images": count, "plain_mib": plain, "rewrite_mib": _peak_of(_rewrite_child, (build, listed))})
    return {"weights_mib": round(weights / 2**20), "runs": rows}


def plain_pass(model: nn.Module, source: ImageSource) -> None:
    """Every image of the source through the model, nothing kept."""
    parameter = next(model.parameters())
    with borrowed(model), torch.no_grad():
        for images in source.batches():
            model(images.to(parameter.device, parameter.dtype))


class StageClock:
    """A progress callback that adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "preparation", time.perf_counter()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.perf_counter()
        # what passed before a stage's first call belongs to the one before
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


def _load_beside(base: BaseModel, checkpoint: Path) -> EludeModel:
    import elude_runtime

    return elude_runtime.load(checkpoint, trust_factory=base.source.kind == "factory")


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _list_of(work: Workload, count: int, file: Path) -> Workload:
    """The same work on a list of `count` of its images (or of their shards), repeated where there are fewer."""
    files = find_images(work.images)
    if isinstance(files, ShardList):
        paths, lines = [os.fsencode(s) for s in files.shards], len(files.shards) * -(-count // len(files))
    else:
        assert isinstance(files, FileList)
        paths, lines = [files.path(place) for place in range(len(files))], count
    file.write_bytes(b"".join(os.path.abspath(path) + b"\n" for path in islice(cycle(paths), lines)))
    return replace(work, images=file, limit=count)


def _plain_child(build: Callable[[], BaseModel], work: Workload) -> None:
    plain_pass(build().model, work.source())


def _rewrite_child(build: Callable[[], BaseModel], work: Workload) -> None:
    with tempfile.TemporaryDirectory(dir=Path(work.images).parent) as folder:
        work.rewrite(build(), Path(folder) / "ckpt")


def _peak_of(target: Callable[..., None], args: tuple) -> int:
    """MiB, from the operating system: of the process what it remembers itself, of its children what polling sees."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    assert process.pid is not None
    watched, peak = psutil.Process(process.pid), 0
    while process.is_alive():
        with suppress(psutil.NoSuchProcess):
            children = sum(map(_resident, watched.children(recursive=True)))
            peak = max(peak, _resident(watched) + children, _high_water(process.pid) + children)
        process.join(_POLL_SECONDS)
    process.join()
    if process.exitcode:
        raise EludeError("The process whose memory was measured failed; its error stands above.")
    return round(peak / 2**20)


def _resident(process: psutil.Process) -> int:
    """Bytes; 0 for a process that ended since it was listed."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _high_water(pid: int) -> int:
    """Bytes; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def environment() -> dict[str, Any]:
    """What figures depend on."""
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": psutil.cpu_count()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {})
