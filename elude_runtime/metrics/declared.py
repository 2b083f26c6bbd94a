"""Every metric of a worker, declared once: name, labels, buckets, and the port that carries it.

TorchServe's port takes counters and times in seconds (its buckets are fixed at 0.005 … 10), a line of the worker's
output for each, which the front end parses. What has units or buckets of its own, is more than a sum over workers, or
has a label for every feature goes through the exporter, and so does what need not cost such a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Port = Literal["torchserve", "exporter"]

_MILLISECONDS = tuple(n / 1000 for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000))
_BYTES = tuple(float(10**power * factor) for power in range(2, 7) for factor in (1, 3))


@dataclass(frozen=True)
class Declared:
    """One metric. labels: without `model`, which the exporter's all have. mode: how a gauge of several workers becomes
    one number (prometheus-client's multiprocess modes)."""

    name: str
    kind: Kind
    port: Port
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    mode: str = ""


DECLARED = {
    metric.name: metric
    for metric in (
        # TorchServe's port
        Declared(
            "elude_request_seconds", "histogram", "torchserve",
            "From a batch's arrival at the worker until the row's answer is written, by what the row asked for.",
            ("kind",),
        ),
        Declared("elude_rows_total", "counter", "torchserve", "Rows by kind and status.", ("kind", "status")),
        Declared(
            "elude_problems_total", "counter", "torchserve",
            "Problem documents by type, those inside KServe replies too.", ("type",),
        ),
        # the exporter
        Declared("elude_workers", "gauge", "exporter", "Living workers.", mode="livesum"),
        Declared("elude_worker_starts_total", "counter", "exporter", "Workers that were started."),
        Declared(
            "elude_worker_memory_bytes", "gauge", "exporter", "Resident memory; pid: the worker's slot.", mode="liveall"
        ),
        Declared(
            "elude_model_info", "gauge", "exporter", "1; what the living workers serve.",
            ("version", "checkpoint_sha256", "base_sha256"), mode="livemax",
        ),
        Declared(
            "elude_policy_in_force", "gauge", "exporter", "1 for each policy in force by the operator's word.",
            ("policy", "mode", "sha256"), mode="livemax",
        ),
        Declared(
            "elude_policy_answers_total", "counter", "exporter", "Answers given by a policy, asked for or not.",
            ("policy",),
        ),
        Declared("elude_edits_total", "counter", "exporter", "Edits and vectors of requests that were answered."),
        Declared("elude_received_bytes_total", "counter", "exporter", "Bytes of request bodies."),
        Declared(
            "elude_batch_rows", "histogram", "exporter", "Requests of a batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
        ),
        Declared(
            "elude_batch_work", "histogram", "exporter", "Work of a batch beside its predictions, in predictions.",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128),
        ),
        Declared(
            "elude_stage_seconds", "histogram", "exporter",
            "A batch's time in one stage: decode (summed over its requests), forward, steer, explain, …",
            ("stage",), _MILLISECONDS,
        ),
        Declared("elude_reply_bytes", "histogram", "exporter", "Size of a reply by kind.", ("kind",), _BYTES),
        Declared(
            "elude_completeness_error", "histogram", "exporter",
            "Relative completeness error of an explained layer: what its attributions leave of the target's change.",
            ("layer", "method"), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
        ),
        Declared(
            "elude_drift_bucket_total", "counter", "exporter",
            "Sampled images by where a feature's peak lies among its quantiles over the catalogue's images: 00 below "
            "the 1st percentile, 01 up to the first decile, … 11 above the 99th.",
            ("checkpoint", "feature", "bucket"),
        ),
        Declared(
            "elude_drift_expected_share", "gauge", "exporter", "Share of the catalogue's images in a bucket.",
            ("checkpoint", "bucket"), mode="livemax",
        ),
        Declared(
            "elude_drift_expected_images", "gauge", "exporter", "Images behind the expected shares.",
            ("checkpoint",), mode="livemax",
        ),
        Declared("elude_drift_dropped_total", "counter", "exporter", "Sampled batches dropped, for want of time."),
        Declared(
            "elude_feature_info", "gauge", "exporter", "1; label, kind and layer of a watched feature.",
            ("checkpoint", "feature", "label", "feature_kind", "layer"), mode="livemax",
        ),
    )
}  # fmt: skip


def of_port(port: Port) -> list[Declared]:
    return [metric for metric in DECLARED.values() if metric.port == port]
