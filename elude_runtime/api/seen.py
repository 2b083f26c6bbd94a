"""What a server may tell of a request it answered, for metrics and logs: kinds, counts and times, no content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from elude_runtime.api.batch import Job
from elude_runtime.api.work import count_changes

REJECTED, FAILED = "rejected", "failed"
"""Kinds of rows that were not understood, and over which the engine itself failed."""


@dataclass(frozen=True)
class Seen:
    """One row of a batch. kind: what it asked (predict, explain, steer, explain_steer, activations, features, vectors,
    describe), rejected or failed; identity: the client's id, or ours; seconds: from the batch's arrival until its
    answers were written; work: in predictions, beside the predictions; problems: their
    types, several only in a KServe reply; edits: edits and vectors of the request; policies: in force for the answer;
    completeness: (layer, method, relative error) of each explained layer; stages: seconds by name; received, sent:
    bytes of the bodies."""

    kind: str
    status: int
    seconds: float
    identity: str = ""
    images: int = 0
    work: float = 0.0
    problems: tuple[str, ...] = ()
    edits: int = 0
    policies: tuple[str, ...] = ()
    completeness: tuple[tuple[str, str, float], ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    received: int = 0
    sent: int = 0


def kind_of(jobs: Sequence[Job]) -> str:
    """By the most that any image of the request asks for."""
    requests = [job.question.request for job in jobs]
    explains, steers = any(r.explain for r in requests), any(r.steer for r in requests)
    if explains or steers:
        return "explain_steer" if explains and steers else "explain" if explains else "steer"
    return "activations" if any(r.activations for r in requests) else "predict"


def seen_jobs(jobs: Sequence[Job], seen: Seen, *, answered: bool) -> Seen:
    """`seen` with what stands on the jobs of its row. answered: the row's reply holds those without a problem."""
    done = [job for job in jobs if answered and job.problem is None and job.output is not None]
    steers = [job.question.request.steer for job in done]
    stages: dict[str, float] = {}
    for job in jobs:
        for stage, milliseconds in job.timing.items():
            stages[stage] = max(stages.get(stage, 0.0), milliseconds / 1000)  # what its images have in common
    return replace(
        seen,
        kind=kind_of(jobs),
        identity=jobs[0].identity,
        images=len(jobs),
        work=sum(job.work for job in jobs),
        edits=sum(count_changes(steer) for steer in steers if steer is not None),
        policies=tuple(dict.fromkeys(rule.name for job in done for rule in job.rules)),
        completeness=tuple(
            (layer.layer, layer.method, layer.completeness_error)
            for job in done
            for explanation in job.explanations or []
            for layer in explanation.layers
            if layer.completeness_error is not None
        ),
        stages=stages,
    )
