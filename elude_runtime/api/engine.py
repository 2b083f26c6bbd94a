"""The engine: a batch of requests in, a list of documents or problems out; one forward pass for all of them.

It knows no server. `handler/` turns TorchServe's batches into `Row`s and the `Reply`s back; another server needs
another adapter and nothing else.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import elude_runtime
from elude_runtime.analysis.attribution import ExplainOptions
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.analysis.steering import Edit, EditError, steer_rows
from elude_runtime.analysis.targets import Target, TargetError
from elude_runtime.api import replies, schema
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.intake import Intake, Row, read_row, route_of
from elude_runtime.api.problems import Problem, at
from elude_runtime.errors import CheckpointError, FeatureError, LayerError, closest
from elude_runtime.network.preprocessing import to_input
from elude_runtime.network.tail import Recording

logger = logging.getLogger(__name__)
JSON, PROBLEM_JSON = "application/json", "application/problem+json"
_CHANGES_LISTED = 10


@dataclass(frozen=True)
class Answered:
    """The reply to one row: status, content type, body text and further headers."""

    status: int
    content_type: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Job:
    """One row that got as far as the model. layers: split layers its explanation or edits need."""

    intake: Intake
    id: str
    tensor: Tensor
    layers: list[str]
    edits: list[tuple[Feature, Edit]]
    timing: dict[str, float]


class Engine:
    """A loaded checkpoint that answers batches. Not thread-safe: tails patch the model while they run."""

    def __init__(self, model: EludeModel, config: ServingConfig, *, name: str, version: str) -> None:
        self.model, self.config = model, config
        self.info = schema.ModelInfo(
            name=name,
            version=version,
            base_sha256=model.manifest.base_sha256,
            checkpoint_sha256=model.manifest.checkpoint_sha256,
        )
        self.labels = model.manifest.labels
        self.transform = model.data_config.transform()
        self._tail_modes = {layer: plan.mode for layer, plan in model.tails.plans.items()}  # planned before READY

    @classmethod
    def open(cls, checkpoint: Path, config: ServingConfig, *, name: str, version: str) -> Engine:
        """Load a checkpoint for serving. Raises EludeError with one sentence."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = "cpu" if config.device == "auto" else config.device
        model = load(checkpoint, device, trust_factory=config.trust_factory)
        expected, found = config.expected_checkpoint_sha256, model.manifest.checkpoint_sha256
        if expected is not None and expected != found:
            raise CheckpointError(
                f"The configuration expects checkpoint {expected[:12]}…, this one is {found[:12]}…; "
                "archive the right checkpoint, or change expected_checkpoint_sha256."
            )
        return cls(model, config, name=name, version=version)

    def describe(self) -> dict[str, Any]:
        """Layers, feature counts, data configuration, digests, limits, threads, and the JSON schemas."""
        manifest = self.model.manifest
        return {
            "api_version": schema.API_VERSION,
            "elude_version": elude_runtime.__version__,
            "model": self.info.model_dump(),
            "output": manifest.output,
            "classes": len(self.labels) or None,
            "layers": [
                {
                    **entry.model_dump(
                        include={"name", "kind", "neurons", "inputs", "subunits", "token_types", "follows"}
                    ),
                    "attribution": entry.attribution.model_dump(),
                    "tail": self._tail_modes[entry.name],
                }
                for entry in manifest.layers
            ],
            "data_config": manifest.data_config,
            "partition_sha256": manifest.partition_sha256,
            "limits": self.config.limits(),
            "threads": torch.get_num_threads(),
            "schema": {
                "request": schema.Request.model_json_schema(),
                "reply": schema.Reply.model_json_schema(),
                "problem": schema.ProblemDocument.model_json_schema(),
            },
        }

    def answer(self, rows: Sequence[Row]) -> list[Answered]:
        """One reply a row, in order. A bad row gets a problem document and no other row notices."""
        started = time.perf_counter()
        answered: list[Answered | None] = [None] * len(rows)
        jobs: dict[int, _Job] = {}
        for number, row in enumerate(rows):
            made = self._guard(lambda row=row: self._read(row), row)
            if isinstance(made, _Job):
                jobs[number] = made
            else:
                answered[number] = made
        if jobs:
            recording = self._forward(list(jobs.values()))
            for position, (number, job) in enumerate(jobs.items()):
                work = lambda p=position, j=job: self._finish(recording, p, j, len(jobs), started)  # noqa: E731
                answered[number] = self._guard(work, rows[number])
        return [a for a in answered if a is not None]

    def _guard(self, work: Any, row: Row) -> Any:
        """The result of `work`, or the problem that it met, for this row alone."""
        try:
            return work()
        except Problem as problem:
            return _problem(problem)
        except Exception:
            logger.exception("request %s failed", row.request_id)
            return _problem(Problem("internal-error", "The server failed on this request; its log has the reason."))

    def _read(self, row: Row) -> _Job | Answered:
        started = time.perf_counter()
        if route_of(row, self.config) == "describe":
            return Answered(200, JSON, _dumps(self.describe()))
        intake = read_row(row, self.config, len(self.model.layers))
        request = intake.request
        expect = request.expect
        if expect is not None and expect.checkpoint_sha256 != self.info.checkpoint_sha256:
            raise Problem("other-checkpoint", f"The checkpoint served is {self.info.checkpoint_sha256}.")
        edits = self._edits(request)
        layers = {feature.layer for feature, _ in edits}
        if request.explain is not None:
            layers |= set(self._explained_layers(request.explain))
            self._targets(request.explain, None)
        tensor = to_input(intake.image, self.transform)
        identity = request.id or uuid.uuid4().hex
        timing = {"decode": _milliseconds(started)}
        return _Job(intake, identity, tensor, [n for n in self.model.layers if n in layers], edits, timing)

    def _edits(self, request: schema.Request) -> list[tuple[Feature, Edit]]:
        edits = []
        for number, edit in enumerate(request.steer.edits if request.steer else []):
            loc: list[str | int] = ["steer", "edits", number, "feature"]
            try:
                feature = self.model.feature(edit.feature)
            except FeatureError as error:
                near = self._near(edit.feature)
                raise Problem("unknown-feature", str(error), at(loc, "unknown feature", near)) from error
            edits.append((feature, Edit(edit.feature, edit.mode, getattr(edit, "value", None))))
        return edits

    def _near(self, name: str) -> list[str]:
        names = [n for layer in self.model.layers for n in self.model.concept_names(layer)]
        return closest(name, names)

    def _explained_layers(self, explain: schema.Explain) -> list[str]:
        for number, layer in enumerate(explain.layers or []):
            try:
                self.model.state(layer)
            except LayerError as error:
                near = closest(layer, self.model.layers) or self.model.layers
                loc: list[str | int] = ["explain", "layers", number]
                raise Problem("unknown-layer", str(error), at(loc, "unknown layer", near)) from error
        return [n for n in self.model.layers if explain.layers is None or n in explain.layers]

    def _targets(self, explain: schema.Explain, logits: Tensor | None) -> list[Target]:
        """The targets of a request; before the forward pass (logits None) only what can be checked then."""
        found: list[Target] = []
        embedding = self.model.manifest.output == "embedding"
        for number, target in enumerate(explain.targets):
            if isinstance(target, schema.DirectionTarget):
                found.append(Target(direction=tuple(target.direction)))
            elif embedding:
                detail = 'The model has no classes; give targets as {"direction": [...]}.'
                raise Problem("invalid-target", detail, at(["explain", "targets", number], "needs a direction"))
            elif isinstance(target, schema.LabelTarget):
                found.append(Target(self._class_of(target.label, number)))
            elif isinstance(target, int):
                found.append(Target(target))
            elif isinstance(target, schema.IndexTarget):
                found.append(Target(target.index, target.versus))
            elif logits is not None:
                count = 1 if target == "top1" else min(target.top, logits.shape[-1])
                found += [Target(int(i)) for i in logits[0].topk(count).indices]
        if logits is not None:
            for chosen in found:
                try:
                    chosen.value(logits)
                except TargetError as error:
                    raise Problem("invalid-target", str(error)) from error
        return found

    def _class_of(self, label: str, number: int) -> int:
        if label not in self.labels:
            near = closest(label, self.labels)
            raise Problem(
                "unknown-label",
                f"The model has no label {label[:80]!r}.",
                at(["explain", "targets", number], "unknown", near),
            )
        same = [i for i, name in enumerate(self.labels) if name == label]
        if len(same) > 1:
            raise Problem(
                "unknown-label",
                f"{len(same)} classes are called {label!r}; name one by its index.",
                at(["explain", "targets", number], "ambiguous", [str(i) for i in same]),
            )
        return same[0]

    def _forward(self, jobs: list[_Job]) -> Recording:
        """One pass for all rows; what tails need is kept for the layers that any row asks for."""
        started = time.perf_counter()
        parameter = next(self.model.base.parameters())
        images = torch.stack([j.tensor for j in jobs]).to(parameter.device, parameter.dtype)
        needed = {layer for job in jobs for layer in job.layers}
        recording = self.model.record(images, [n for n in self.model.layers if n in needed])
        for job in jobs:
            job.timing["forward"] = _milliseconds(started)
        return recording

    def _finish(self, recording: Recording, position: int, job: _Job, batch: int, started: float) -> Answered:
        request = job.intake.request
        logits = recording.logits[position]
        if not bool(torch.isfinite(logits).all()):
            raise Problem(
                "non-finite-output", "The model's output for this image is not finite; the image may be extreme."
            )
        has_classes = self.model.manifest.output == "logits"
        predictions = replies.predictions(logits, self.labels, request.top_k) if has_classes else []
        explanations = steered = None
        if request.explain is not None:
            begun = time.perf_counter()
            explanations = self._explain(recording, position, request.explain)
            job.timing["explain"] = _milliseconds(begun)
        if job.edits:
            begun = time.perf_counter()
            steered = self._steer(recording, position, job, predictions)
            job.timing["steer"] = _milliseconds(begun)
        best = next(iter(steered.predictions if steered else predictions), None)
        width, height = job.intake.image.size
        reply = schema.Reply(
            id=job.id,
            batch_size=batch,
            timing_ms={**job.timing, "total": _milliseconds(started)},
            model=self.info,
            input=schema.InputInfo(width=width, height=height, crop=list(self.model.data_config.seen(width, height))),
            answer=schema.Answer(
                source="steered" if steered else "default",
                index=best.index if best else None,
                label=best.label if best else None,
                probability=best.probability if best else None,
            ),
            predictions=predictions,
            embedding=None if has_classes else logits.float().tolist(),
            explanations=explanations,
            steered=steered,
        )
        body = reply.model_dump_json(exclude_none=False)
        if len(body.encode()) > self.config.max_response_bytes:
            raise Problem(
                "response-too-large",
                f"The response would have {len(body.encode())} bytes, the limit is {self.config.max_response_bytes}; "
                "ask for fewer targets, layers, features or heatmaps.",
            )
        return Answered(200, JSON, body)

    def _explain(self, recording: Recording, row: int, explain: schema.Explain) -> list[schema.ExplanationReply]:
        options = ExplainOptions(
            explain.method,
            explain.steps,
            explain.level,
            explain.top_features,
            explain.sign,
            explain.heatmaps == "values",
        )
        targets = self._targets(explain, recording.logits[row : row + 1])
        found = self.model.explain_row(recording, row, targets, self._explained_layers(explain), options)
        return [replies.explanation(e, self.labels) for e in found]

    def _steer(
        self, recording: Recording, row: int, job: _Job, default: list[schema.Prediction]
    ) -> schema.SteeredReply:
        try:
            steered = steer_rows(self.model.tails, recording, [row], self.model.states, job.edits)
        except EditError as error:
            raise Problem("invalid-edit", str(error), at(["steer", "edits"], "overlap")) from error
        logits, change = steered.steered[0], steered.change[0]
        if not bool(torch.isfinite(logits).all()):
            raise Problem("non-finite-output", "The steered output is not finite; use smaller values.")
        if self.model.manifest.output != "logits":
            raise Problem("not-implemented", "This version does not steer models without classes over HTTP yet.")
        predictions = replies.predictions(logits, self.labels, job.intake.request.top_k)
        shown = list(dict.fromkeys([p.index for p in default] + [p.index for p in predictions]))[:_CHANGES_LISTED]
        changes = [
            schema.Change(
                index=i,
                label=replies.label(self.labels, i),
                default=float(recording.logits[row, i]),
                steered=float(logits[i]),
                change=float(change[i]),
            )
            for i in shown
        ]
        norms = {layer: values[0] for layer, values in steered.relative_norm.items()}
        return schema.SteeredReply(
            predictions=predictions, changes=changes, edits_applied=len(job.edits), relative_norm=norms
        )


def _problem(problem: Problem) -> Answered:
    return Answered(problem.status, PROBLEM_JSON, problem.document().model_dump_json(exclude_none=True))


def _milliseconds(since: float) -> float:
    return math.floor((time.perf_counter() - since) * 1e5) / 100


def _dumps(value: Any) -> str:
    import json

    return json.dumps(value, allow_nan=False)
