"""One batch's way through the model: one forward pass for all, tails only for the rows that asked for more."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from elude_runtime.analysis.activations import FeatureActivation, feature_activations
from elude_runtime.analysis.attribution import ExplainOptions, ExplainRequest, Explanation
from elude_runtime.analysis.explain_batch import explain_batch
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.steering import SteeredRow, SteeringPlan, record_steered, steer_batch
from elude_runtime.api.intake import Question
from elude_runtime.api.policies import Rule
from elude_runtime.api.problems import Problem
from elude_runtime.api.schema.request import Explain
from elude_runtime.api.targets import TargetReader
from elude_runtime.network.tail import Recording

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """One image on its way through a batch: what is asked, and what was found so far. row: its place in the recorded
    pass.

    explained: layers to explain; rules: policies in force; plan, shadow: edits, where there are any; places: what each
    part of the plan is called; activated:
    features whose activations are asked for; work: in predictions, beside the prediction itself. problem: ends the way.
    """

    question: Question
    identity: str
    request_id: str
    explained: list[str]
    rules: list[Rule]
    plan: SteeringPlan | None
    places: list[str]
    shadow: SteeringPlan | None
    activated: list[Feature]
    work: float
    timing: dict[str, float] = field(default_factory=dict)
    row: int | None = None
    output: Tensor | None = None
    explanations: list[Explanation] | None = None
    steered: SteeredRow | None = None
    steered_explanations: list[Explanation] | None = None
    shadowed: SteeredRow | None = None
    activations: list[FeatureActivation] | None = None
    problem: Problem | None = None

    @property
    def idle(self) -> Iterator[tuple[Literal["no-token-in-scope", "condition-not-met", "no-effect"], str]]:
        """Codes and sentences for the edits and vectors that did not act."""
        if self.plan is None or self.steered is None:
            return
        for part, place, acted in zip(self.plan.parts, self.places, self.steered.applied, strict=True):
            if acted:
                continue
            if not bool(part.tokens.any()):
                yield "no-token-in-scope", f"{place}: its box or mask meets nothing of what the model saw."
            elif part.when:
                features = " and ".join(str(when.feature) for when in part.when)
                yield "condition-not-met", f"{place}: its condition on {features} does not hold on this image."
            else:
                yield "no-effect", f"{place}: it changes nothing on this image."

    @property
    def asks_more(self) -> bool:
        """Whether something of the pass itself is needed, if only to say that nothing acts."""
        return bool(self.layers) or self.plan is not None or self.shadow is not None

    @property
    def layers(self) -> set[str]:
        """Layers whose inputs and outputs it needs."""
        needed = {*self.explained, *(feature.layer for feature in self.activated)}
        for plan in (self.plan, self.shadow):
            needed |= set(plan.layers) if plan else set()
        return needed


@contextmanager
def guarded(job: Job) -> Iterator[None]:
    """Whatever is raised inside becomes this job's problem, and nobody else's."""
    try:
        yield
    except Problem as problem:
        job.problem = problem
    except Exception:
        logger.exception("request %s failed", job.request_id)
        job.problem = internal_error()


@contextmanager
def unharmed(job: Job) -> Iterator[None]:
    """Whatever is raised inside goes to the log, and the job's answer stays as it is."""
    try:
        yield
    except Exception:
        logger.exception("the shadow policies failed on request %s", job.request_id)


def internal_error() -> Problem:
    return Problem("internal-error", "The server failed on this request; its log has the reason.")


class Watch(Protocol):
    """Looks on at forward passes: the drift of features."""

    def sampled(self, images: int) -> list[int]:
        """Those of a batch's images that are to be looked at."""
        ...

    def looking(self, rows: list[int], images: int) -> AbstractContextManager[None]:
        """A pass of so many images runs inside the block; rows: of these, those to look at."""
        ...


def run_batch(
    model: EludeModel,
    targets: TargetReader,
    jobs: Sequence[Job],
    watch: Watch | None = None,
    compiled: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Answer all jobs; the results stand on them. Those of one layer share tails. compiled: gives the predictions of
    all rows, whatever else is asked; rows of which more is needed then run through the network as well."""
    outputs, recording = _passes(model, jobs, watch, compiled)
    for job, output in zip(jobs, outputs, strict=True):
        job.output = output
        if not bool(torch.isfinite(job.output).all()):
            detail = "The model's output for this image is not finite; the image may be extreme."
            job.problem = Problem("non-finite-output", detail)
    _together([j for j in jobs if j.plan], "steer", lambda chosen: _steer(model, recording, chosen))
    # nobody answers by a shadow policy, so nothing that goes wrong there may touch an answer
    shadowed = [j for j in jobs if j.shadow]
    _together(shadowed, "shadow", lambda chosen: _shadow(model, recording, chosen), guard=unharmed)
    asking = [j for j in jobs if j.question.request.explain is not None]
    _together(asking, "explain", lambda chosen: _explain(model, targets, recording, chosen))
    both = [j for j in asking if j.plan]
    _together(both, "explain_steered", lambda chosen: _explain_steered(model, targets, recording, chosen))
    asking = [j for j in jobs if j.activated]
    _together(asking, "activations", lambda chosen: _activations(model, recording, chosen))


def _together(
    jobs: Sequence[Job],
    stage: str,
    work: Callable[[Sequence[Job]], None],
    guard: Callable[[Job], AbstractContextManager[None]] = guarded,
) -> None:
    """Run the work for all jobs that have no problem. Should it fail, each is tried alone, so that the guilty one does
    not take its neighbours with it."""
    jobs = [job for job in jobs if job.problem is None]
    if not jobs:
        return
    with _timed(jobs, stage):
        if len(jobs) > 1:
            try:
                work(jobs)
                return
            except Exception:
                logger.exception("a batch of %d failed at %s; each is tried alone", len(jobs), stage)
        for job in jobs:
            with guard(job):
                work([job])


@contextmanager
def _timed(jobs: Sequence[Job], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    for job in jobs:
        job.timing[stage] = milliseconds(started)


def milliseconds(since: float) -> float:
    return math.floor((time.perf_counter() - since) * 1e5) / 100


def _passes(
    model: EludeModel, jobs: Sequence[Job], watch: Watch | None, compiled: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Recording]:
    """Outputs [B, K] of all jobs, and a recorded pass of those that ask for more: the same one where nothing is
    compiled."""
    images = _images(model, jobs)
    sampled = watch.sampled(len(jobs)) if watch else []
    if compiled is None:
        with _timed(jobs, "forward"), watch.looking(sampled, len(jobs)) if watch else nullcontext():
            recording = _record(model, images, jobs)
        return recording.logits, recording
    with _timed(jobs, "forward"):
        outputs = compiled(images)
    rows = [row for row, job in enumerate(jobs) if job.asks_more]
    asking = [jobs[row] for row in rows]
    with _timed(asking, "record"):
        recording = _record(model, images[rows], asking)
    if watch and sampled:
        _look(model, images[sampled], watch)
    return outputs, recording


def _images(model: EludeModel, jobs: Sequence[Job]) -> Tensor:
    parameter = next(model.base.parameters())
    return torch.stack([job.question.picture.tensor for job in jobs]).to(parameter.device, parameter.dtype)


def _look(model: EludeModel, images: Tensor, watch: Watch) -> None:
    """A pass for the watch alone."""
    try:
        with torch.inference_mode(), watch.looking(list(range(len(images))), len(images)):
            model.record(images, [])
    except Exception:  # an answer is worth more
        logger.exception("a pass for drift failed")


def _record(model: EludeModel, images: Tensor, jobs: Sequence[Job]) -> Recording:
    """One pass for all of these jobs; what tails need is kept for the layers that any of them asks for."""
    if not jobs:
        return Recording(images, images)
    for row, job in enumerate(jobs):
        job.row = row
    needed = {layer for job in jobs for layer in job.layers}
    if not needed:  # nothing will be asked of this pass but its answers: the same numbers, with less book-keeping
        with torch.inference_mode():
            return model.record(images, [])
    return model.record(images, [layer for layer in model.layers if layer in needed])


def _steer(model: EludeModel, recording: Recording, jobs: Sequence[Job]) -> None:
    found = steer_batch(model, recording, _rows(jobs), [j.plan for j in jobs if j.plan])
    for job, steered in zip(jobs, found, strict=True):
        job.steered = _finite(job, _beside_the_answer(job, steered))


def _beside_the_answer(job: Job, found: SteeredRow) -> SteeredRow:
    """The prediction that is answered as the default; a row that nothing changed is that prediction itself. Only of a
    compiled network are these other bits than the recorded pass's."""
    assert job.output is not None
    unchanged = torch.equal(found.steered, found.default)
    return replace(found, default=job.output, steered=job.output if unchanged else found.steered)


def _shadow(model: EludeModel, recording: Recording, jobs: Sequence[Job]) -> None:
    found = steer_batch(model, recording, _rows(jobs), [j.shadow for j in jobs if j.shadow])
    for job, steered in zip(jobs, found, strict=True):
        job.shadowed = _beside_the_answer(job, steered) if _is_finite(steered) else None


def _finite(job: Job, steered: SteeredRow) -> SteeredRow:
    if not _is_finite(steered):
        job.problem = Problem("non-finite-output", "The steered output is not finite; use smaller values.")
    return steered


def _is_finite(steered: SteeredRow) -> bool:
    norms = steered.relative_norm.values()
    return bool(torch.isfinite(steered.steered).all()) and all(map(math.isfinite, norms))


def _explain(model: EludeModel, targets: TargetReader, recording: Recording, jobs: Sequence[Job]) -> None:
    asked = []
    for job in jobs:
        assert job.output is not None
        asked.append(_asked(job, _row(job), targets, job.output))
    for job, found in zip(jobs, explain_batch(model, recording, asked), strict=True):
        job.explanations = _finite_numbers(job, found)


def _explain_steered(model: EludeModel, targets: TargetReader, recording: Recording, jobs: Sequence[Job]) -> None:
    """The steered answers explained, from a recorded pass with the edits in place."""
    layers = [layer for layer in model.layers if any(layer in job.explained for job in jobs)]
    plans = [job.plan for job in jobs if job.plan]
    steered, changes = record_steered(model, recording, _rows(jobs), plans, layers)
    asked = []
    for row, job in enumerate(jobs):
        one = _asked(job, row, targets, steered.logits[row])
        change = {layer: changes[layer][row] for layer in plans[row].edited}  # tails hold later layers' edits too
        asked.append(ExplainRequest(one.row, one.targets, one.layers, one.options, change))
    for job, found in zip(jobs, explain_batch(model, steered, asked), strict=True):
        job.steered_explanations = _finite_numbers(job, found)


def _finite_numbers(job: Job, found: list[Explanation]) -> list[Explanation]:
    for explanation in found:
        numbers = [explanation.value]
        for layer in explanation.layers:
            numbers += [layer.baseline, layer.completeness_error or 0.0, layer.edit_attribution or 0.0]
            numbers += [n for f in layer.features for n in (f.activation, f.attribution, f.effect or 0.0)]
        if not all(map(math.isfinite, numbers)):
            detail = "A number of the explanation is not finite; use smaller values in edits and directions."
            job.problem = Problem("non-finite-output", detail)
    return found


def _row(job: Job) -> int:
    assert job.row is not None, "it was recorded, since it asks for more than a prediction"
    return job.row


def _rows(jobs: Sequence[Job]) -> list[int]:
    return [_row(job) for job in jobs]


def _asked(job: Job, row: int, targets: TargetReader, output: Tensor) -> ExplainRequest:
    explain = job.question.request.explain
    assert explain is not None
    return ExplainRequest(row, targets.resolve(explain, output), job.explained, explain_options(explain))


def explain_options(explain: Explain) -> ExplainOptions:
    return ExplainOptions(
        explain.method,
        explain.steps,
        explain.level,
        explain.top_features,
        explain.sign,
        effects=explain.effects,
        heatmaps=explain.heatmaps != "none",
        pixels=explain.pixels,
    )


def _activations(model: EludeModel, recording: Recording, jobs: Sequence[Job]) -> None:
    for job in jobs:
        asked = job.question.request.activations
        assert asked is not None
        found: dict[Feature, FeatureActivation] = {}
        for layer in {feature.layer for feature in job.activated}:
            ours = [feature for feature in job.activated if feature.layer == layer]
            made = feature_activations(model.state(layer), recording, _row(job), ours, asked.reduce)
            found.update(zip(ours, made, strict=True))
        job.activations = [found[feature] for feature in job.activated]
