"""What watches an engine in a worker: metrics, drift and the request log, by the configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elude_runtime.analysis.features import Feature
from elude_runtime.api.engine import Answered, Engine, Row
from elude_runtime.api.seen import FAILED, Seen
from elude_runtime.checkpoint.catalogue import BIN_SHARES
from elude_runtime.errors import StorageError
from elude_runtime.metrics.drift import DriftWatch, Watched, watched
from elude_runtime.metrics.logs import log_request
from elude_runtime.metrics.worker import WorkerMetrics

logger = logging.getLogger(__name__)
Sample = tuple[str, float, list[str]]
"""A declared metric's name, the amount, and its labels' values."""


class Monitor:
    """Sees every batch of one engine. Nothing that goes wrong here touches an answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._model = {"model": engine.info.name, "version": engine.info.version}
        self.metrics: WorkerMetrics | None = None
        self.drift: DriftWatch | None = None
        folder = engine.config.metrics_dir
        if folder is None:
            return
        try:
            self.metrics = WorkerMetrics(folder, engine.info.name)
            self._tell_what_is_served(self.metrics)
            self.drift = self._watch(self.metrics)
            engine.watch = self.drift
        except StorageError as error:
            logger.error("%s The worker goes on without these metrics.", error)
        except Exception:  # a damaged file of an earlier worker, say
            self.metrics = None
            logger.exception("metrics could not be set up; the worker goes on without them")

    def saw(self, rows: Sequence[Row], replies: Sequence[Answered | None]) -> list[Sample]:
        """A batch and its replies, None for a row over which the engine failed. Gives what the server's own metrics
        port is to carry, as (metric, amount, labels)."""
        try:
            batch = [_of(row, reply) for row, reply in zip(rows, replies, strict=True)]
            if self.metrics is not None:
                self.metrics.saw(batch)
            if self._engine.config.log_requests:
                for row, seen in zip(rows, batch, strict=True):
                    log_request(seen, row.request_id, row.traceparent, self._model)
            return list(_samples(batch))
        except Exception:
            logger.exception("metrics of a batch failed")
            return []

    def close(self) -> None:
        if self.drift is not None:
            self.drift.close()
        if self.metrics is not None:
            self.metrics.close()

    def _tell_what_is_served(self, metrics: WorkerMetrics) -> None:
        info = self._engine.info
        metrics.set(
            "elude_model_info", 1, version=info.version, checkpoint_sha256=info.checkpoint_sha256,
            base_sha256=info.base_sha256,
        )  # fmt: skip
        policies = self._engine.policies
        for rule in (*policies.defaults, *policies.shadows):
            metrics.set("elude_policy_in_force", 1, policy=rule.name, mode=rule.mode, sha256=rule.sha256)

    def _watch(self, metrics: WorkerMetrics) -> DriftWatch | None:
        engine, config = self._engine, self._engine.config
        if engine.catalogue is None or not config.drift_sample:
            return None
        groups, unknown = watched(engine.model, engine.catalogue, config.drift_features, config.drift_most)
        if unknown:
            logger.warning("not watched for drift, for want of such a feature or of its quantiles: %s", unknown)
        if not groups:
            logger.warning("no feature is watched for drift: run `elude catalogue`, and archive again")
            return None
        counters = {feature: self._series(metrics, feature) for group in groups for feature in group.features}
        self._tell_what_is_watched(metrics, groups)

        def count(feature: Feature, buckets: NDArray[np.int64]) -> None:
            for counter, amount in zip(counters[feature], buckets.tolist(), strict=True):
                if amount:
                    counter.inc(amount)

        return DriftWatch(
            engine.model, groups, config.drift_sample, count, lambda: metrics.add("elude_drift_dropped_total", 1)
        )

    def _tell_what_is_watched(self, metrics: WorkerMetrics, groups: Sequence[Watched]) -> None:
        checkpoint = self._checkpoint
        for number, share in enumerate(BIN_SHARES):
            metrics.set("elude_drift_expected_share", share, checkpoint=checkpoint, bucket=_bucket(number))
        images = self._engine.catalogue.peak_images if self._engine.catalogue else 0
        metrics.set("elude_drift_expected_images", images, checkpoint=checkpoint)
        for group in groups:
            for feature in group.features:
                facts = self._engine.catalogue.facts(feature.name) if self._engine.catalogue else None
                metrics.set(
                    "elude_feature_info", 1, checkpoint=checkpoint, feature=feature.name,
                    label=(facts.label if facts else None) or "", feature_kind=feature.kind, layer=feature.layer,
                )  # fmt: skip

    @property
    def _checkpoint(self) -> str:
        """A feature's name means something else in another checkpoint: their counts must not mix."""
        return self._engine.info.checkpoint_sha256[:12]

    def _series(self, metrics: WorkerMetrics, feature: Feature) -> list[Any]:
        """The counters of one feature, by bucket."""
        own = {"checkpoint": self._checkpoint, "feature": feature.name}
        return [metrics.series("elude_drift_bucket_total", **own, bucket=_bucket(n)) for n in range(len(BIN_SHARES))]


def _bucket(number: int) -> str:
    """00 … 11: in this order in every list that is sorted by text."""
    return f"{number:02d}"


def _of(row: Row, reply: Answered | None) -> Seen:
    if reply is None or reply.seen is None:
        return Seen(FAILED, 500, 0.0, problems=("internal-error",), received=sum(map(len, row.parts.values())))
    return reply.seen


def _samples(batch: Sequence[Seen]) -> Iterator[Sample]:
    """What the server's port carries: each time by itself, counts added up, for a line of its log costs time."""
    counts: dict[tuple[str, tuple[str, ...]], float] = {}

    def count(name: str, amount: float, *labels: str) -> None:
        counts[name, labels] = counts.get((name, labels), 0) + amount

    for seen in batch:
        if seen.kind != FAILED:
            yield "elude_request_seconds", seen.seconds, [seen.kind]
        count("elude_rows_total", 1, seen.kind, str(seen.status))
        for problem in seen.problems:
            count("elude_problems_total", 1, problem)
    for (name, labels), amount in counts.items():
        yield name, amount, list(labels)
