"""What a row is on its way through the engine: read, asked of the model, answered; and what may be told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from elude_runtime.api.batch import Job
from elude_runtime.api.intake import Body, Question, Row
from elude_runtime.api.kserve import Envelope
from elude_runtime.api.problems import Problem
from elude_runtime.api.seen import REJECTED, Seen, seen_jobs

JSON, PROBLEM_JSON = "application/json", "application/problem+json"


@dataclass(frozen=True)
class Answered:
    """The reply to one row: status, content type, body text and further headers. problem: its type, "" for an answer;
    seen: what metrics and logs may tell of it."""

    status: int
    content_type: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    seen: Seen | None = None


@dataclass(frozen=True)
class Operation:
    """Something else than predictions. work: that a batch has to have room for."""

    name: str
    run: Callable[[], Answered]
    work: float = 0.0


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
    return Answered(problem.status, PROBLEM_JSON, body, problem.headers, problem.kind)


def seen_row(row: Row, asked: Asked | Operation | Answered, reply: Answered, seconds: float) -> Seen:
    """asked: what was read of the row, or the problem that this met."""
    sent = len(reply.body) if reply.body.isascii() else len(reply.body.encode("utf-8", "replace"))
    problems: tuple[str, ...] = (reply.problem,) if reply.problem else ()
    if isinstance(asked, Asked) and not problems:  # those of single instances stand inside a KServe reply
        failed = [part if isinstance(part, Problem) else part.problem for part in asked.parts]
        problems = tuple(problem.kind for problem in failed if problem)
    kind = asked.name if isinstance(asked, Operation) else REJECTED
    received = sum(map(len, row.parts.values()))
    seen = Seen(kind, reply.status, seconds, problems=problems, received=received, sent=sent)
    if isinstance(asked, Operation):
        return replace(seen, work=asked.work)
    return seen_jobs(asked.jobs, seen) if isinstance(asked, Asked) and asked.jobs else seen


def overloaded() -> Problem:
    detail = "Requests beside this one used up what one batch may cost; try again in a second."
    return Problem("overloaded", detail, headers={"Retry-After": "1"})
