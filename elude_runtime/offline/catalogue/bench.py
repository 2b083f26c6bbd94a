"""What a catalogue costs beside plain passes of the base model over the same images."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from elude_runtime.analysis.model import load
from elude_runtime.checkpoint.exemplars import EXEMPLARS
from elude_runtime.offline.bench import Ratio, StageClock, plain_pass
from elude_runtime.offline.catalogue.run import CatalogueOptions, make_catalogue
from elude_runtime.offline.images import ImageSource

PASSES, SECONDS = 2, 10.0  # what a catalogue of one layer may take: plain passes, and seconds beside them


def catalogue_time(
    checkpoint: Path,
    images: str,
    options: CatalogueOptions,
    layers: Sequence[str] | None,
    rounds: int,
    *,
    batch_size: int = 25,
    workers: int = 0,
    limit: int | None = None,
    trust_factory: bool = False,
) -> dict[str, Any]:
    """A whole catalogue, from loading to the last file, between two plain passes (images read, decoded and run through
    the base model), in turns, on a copy of the checkpoint. Seconds by stage are those of the last round."""
    model = load(checkpoint, trust_factory=trust_factory)
    source = ImageSource(images, model.data_config, batch_size=batch_size, workers=workers, limit=limit)

    def plain() -> float:
        start = time.perf_counter()
        plain_pass(model.base, source)
        return time.perf_counter() - start

    before = [plain()]
    whole: list[float] = []
    clock = StageClock()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "ckpt"
        shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns(EXEMPLARS, ".*"))
        for _ in range(rounds):
            clock, start = StageClock(), time.perf_counter()
            made = make_catalogue(
                copy, images, options, layers=layers, batch_size=batch_size, workers=workers, limit=limit,
                trust_factory=trust_factory, progress=clock,
            )  # fmt: skip
            whole.append(time.perf_counter() - start)
            before.append(plain())
    around = [(a + b) / 2 for a, b in pairwise(before)]
    beyond = [w - PASSES * p for w, p in zip(whole, around, strict=True)]
    return {
        "images": made.images,
        "features": made.features,
        "plain_seconds": round(statistics.median(before), 2),
        "catalogue_seconds": round(statistics.median(whole), 2),
        "ratio": asdict(Ratio.of([w / p for w, p in zip(whole, around, strict=True)])),
        "seconds_beyond_two_passes": round(statistics.median(beyond), 2),
        "bound_seconds": SECONDS,
        "met": statistics.median(beyond) <= SECONDS,
        "stages_seconds": {name: round(seconds, 2) for name, seconds in clock.seconds.items()},
    }
