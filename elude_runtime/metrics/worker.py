"""The metrics of one worker process, in files that the exporter reads (prometheus-client's multiprocess mode)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values

from elude_runtime.metrics.declared import DECLARED, Declared, of_port
from elude_runtime.metrics.slots import Slot

if TYPE_CHECKING:
    from elude_runtime.api.seen import Seen

_STATM = Path("/proc/self/statm")  # Linux; elsewhere there is no such metric
_MEMORY_SECONDS = 5.0
_MAKERS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class WorkerMetrics:
    """Counts what a worker does, under a slot of its own in `directory`. One for each process: prometheus-client keeps
    its files by process."""

    def __init__(self, directory: Path, model: str) -> None:
        """StorageError where the folder cannot be used."""
        self._slot, self._model = Slot(directory), model
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
        values.ValueClass = values.MultiProcessValue(lambda: self._slot.number)  # type: ignore[misc, unused-ignore]
        registry = CollectorRegistry()  # nobody collects from it: the files are read, by the exporter
        self._metrics = {metric.name: _made(metric, registry) for metric in of_port("exporter")}
        self.set("elude_workers", 1)
        self.add("elude_worker_starts_total", 1)
        self._measured = 0.0

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Count up, or observe where the metric is a histogram."""
        metric = self.series(name, **labels)
        if DECLARED[name].kind == "histogram":
            metric.observe(amount)
        else:
            metric.inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        self.series(name, **labels).set(value)

    def series(self, name: str, **labels: str) -> Any:
        """One series of a metric, for those that count into many of them often."""
        return self._metrics[name].labels(self._model, *(labels[label] for label in DECLARED[name].labels))

    def saw(self, batch: Iterable[Seen]) -> None:
        """One batch's rows."""
        rows = list(batch)
        self._measure_memory()
        self.add("elude_batch_rows", len(rows))
        self.add("elude_batch_work", sum(row.work for row in rows))
        self.add("elude_received_bytes_total", sum(row.received for row in rows))
        for stage, seconds in _stages(rows).items():
            self.add("elude_stage_seconds", seconds, stage=stage)
        for row in rows:
            self.add("elude_reply_bytes", row.sent, kind=row.kind)
            if row.edits:
                self.add("elude_edits_total", row.edits)
            for policy in row.policies:
                self.add("elude_policy_answers_total", 1, policy=policy)
            for layer, method, error in row.completeness:
                self.add("elude_completeness_error", error, layer=layer, method=method)

    def _measure_memory(self) -> None:
        """Now and then."""
        if time.monotonic() - self._measured > _MEMORY_SECONDS and _STATM.exists():
            self._measured = time.monotonic()
            self.set("elude_worker_memory_bytes", int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    def close(self) -> None:
        self._slot.release()


def _stages(rows: list[Seen]) -> dict[str, float]:
    """Seconds of each stage of a batch: every request is decoded by itself, everything else is done for all at once."""
    found: dict[str, float] = {}
    for row in rows:
        for stage, seconds in row.stages.items():
            found[stage] = found.get(stage, 0.0) + seconds if stage == "decode" else max(found.get(stage, 0.0), seconds)
    return found


def _made(metric: Declared, registry: CollectorRegistry) -> Any:
    options: dict[str, Any] = {"registry": registry}
    if metric.kind == "histogram":
        options["buckets"] = metric.buckets
    if metric.kind == "gauge":
        options["multiprocess_mode"] = metric.mode
    name = metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name
    return _MAKERS[metric.kind](name, metric.help, ("model", *metric.labels), **options)
