"""What a row is on its way through the engine: read, asked of the model, answered; and what may be told of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from elude_runtime.api.batch import Job
from elude_runtime.api.intake import Body, Question, Row
from elude_runtime.api.kserve import Envelope
from elude_runtime.api.problems import Problem
from elude_runtime.api.seen import REJECTED, Seen, seen_jobs

_IDENTITY = re.compile(r"[A-Za-z0-9._:-]{1,128}")
JSON, PROBLEM_JSON = "application/json", "application/problem+json"


@dataclass(frozen=True)
class Answered:
    """The reply to one row: status, content type, body text and further headers. problem: its type, "" for an answer;
    identity: the client's, of a problem; seen: what metrics and logs may tell of it."""

    status: int
    content_type: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    identity: str = ""
    seen: Seen | None = None


@dataclass(frozen=True)
class Operation:
    """Something else than predictions. work: that a batch has to have room for."""

    name: str
    run: Callable[[], Answered]
    work: float = 0.0
    identity: str = ""


@dataclass(frozen=True)
class TakenIn:
    """A request as far as it can be read without the model. questions: one, or an envelope's; milliseconds: it took."""

    body: Body
    questions: Sequence[Question | Problem] = ()
    envelope: Envelope | None = None
    milliseconds: float = 0.0


@dataclass
class Asked:
    """One row's questions on their way. envelope: KServe's, around them; parts: a job, or what was wrong with it."""

    parts: list[Job | Problem]
    envelope: Envelope | None = None

    @property
    def jobs(self) -> list[Job]:
        return [part for part in self.parts if isinstance(part, Job)]

    @property
    def work(self) -> float:
        return sum(job.work for job in self.jobs)


def answered_problem(problem: Problem) -> Answered:
    body = problem.document().model_dump_json(exclude_none=True)
    return Answered(problem.status, PROBLEM_JSON, body, problem.headers, problem.kind, problem.identity)


def asked_identity(document: Any) -> str:
    """The client's `id` in a document that may be wrong in anything; "" where it has none of safe characters."""
    found = document.get("id") if isinstance(document, dict) else None
    return found if isinstance(found, str) and _IDENTITY.fullmatch(found) else ""


@contextmanager
def identified(document: Any) -> Iterator[None]:
    """A problem raised inside carries the client's `id`, so that the log can be searched for it."""
    try:
        yield
    except Problem as problem:
        problem.identity = asked_identity(document)
        raise


def utf8_length(text: str) -> int:
    """Bytes of a body; of a lone surrogate, those of what is sent in its place."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def seen_row(row: Row, asked: Asked | Operation | Answered, reply: Answered, seconds: float) -> Seen:
    """asked: what was read of the row, or the problem that this met."""
    problems: tuple[str, ...] = (reply.problem,) if reply.problem else ()
    if isinstance(asked, Asked) and not problems:  # those of single instances stand inside a KServe reply
        failed = [part if isinstance(part, Problem) else part.problem for part in asked.parts]
        problems = tuple(problem.kind for problem in failed if problem)
    kind = asked.name if isinstance(asked, Operation) else REJECTED
    received = sum(map(len, row.parts.values()))
    seen = Seen(kind, reply.status, seconds, problems=problems, received=received, sent=utf8_length(reply.body))
    if isinstance(asked, Operation):
        return replace(seen, work=asked.work, identity=asked.identity)
    if isinstance(asked, Answered):
        return replace(seen, identity=asked.identity)
    return seen_jobs(asked.jobs, seen, answered=not reply.problem) if asked.jobs else seen


def overloaded() -> Problem:
    detail = "Requests beside this one used up what one batch may cost; try again in a second."
    return Problem("overloaded", detail, headers={"Retry-After": "1"})
