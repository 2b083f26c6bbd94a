"""The engine: a batch of requests in, a list of documents or problems out; one forward pass for all of them.

It knows no server. `handler/` turns TorchServe's batches into `Row`s and the replies back; another server needs another
adapter and nothing else.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.api import operations
from elude_runtime.api.batch import Job, Watch, internal_error, milliseconds, run_batch
from elude_runtime.api.changes import near_features, places, plan, steering_of
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.decoding import DecodePool
from elude_runtime.api.documents import ReplyDocuments
from elude_runtime.api.intake import Body, ImageReader, Picture, Question, Row, read_body, read_question, validated
from elude_runtime.api.kserve import is_kserve, open_envelope
from elude_runtime.api.memory import keep_freed
from elude_runtime.api.policies import PolicyBook
from elude_runtime.api.precision import run_under_autocast, set_tf32
from elude_runtime.api.problems import Problem, at
from elude_runtime.api.replies import ReplyWriter
from elude_runtime.api.rows import (
    JSON,
    Answered,
    Asked,
    Operation,
    TakenIn,
    answered_problem,
    asked_identity,
    identified,
    overloaded,
    seen_row,
    utf8_length,
)
from elude_runtime.api.schema import operations as ops
from elude_runtime.api.schema import reply as wire
from elude_runtime.api.schema.request import Activations, Expect, Explain, Request
from elude_runtime.api.targets import TargetReader
from elude_runtime.api.work import admitted, check_limits, check_work, explain_work, steer_work, tail_shares
from elude_runtime.checkpoint.catalogue import FeatureCatalogue, read_catalogue
from elude_runtime.checkpoint.policies import read_policies
from elude_runtime.checkpoint.vectors import StoredVector, read_vectors
from elude_runtime.errors import CheckpointError, FeatureError, closest
from elude_runtime.network.compiled import CompiledNetwork
from elude_runtime.network.served_transform import served_transform

__all__ = ["Answered", "Engine", "Row"]
logger = logging.getLogger(__name__)


class Engine:
    """A loaded checkpoint that answers batches. Not thread-safe: tails patch the model while they run."""

    def __init__(
        self,
        model: EludeModel,
        config: ServingConfig,
        *,
        name: str,
        version: str,
        catalogue: FeatureCatalogue | None = None,
        vectors: Mapping[str, StoredVector] | None = None,
        policies: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """policies: documents stored with the checkpoint, by name. ConfigError for a policy that cannot be used."""
        self.model, self.config = model, config
        manifest = model.manifest
        self.info = wire.ModelInfo(
            name=name,
            version=version,
            base_sha256=manifest.base_sha256,
            checkpoint_sha256=manifest.checkpoint_sha256,
        )
        self.vectors, self.catalogue = dict(vectors or {}), catalogue
        self.transform = served_transform(model.data_config)
        # as many threads decode as compute: one after the other, they share the same cores
        self.pool = DecodePool(torch.get_num_threads(), config.max_request_pixels)
        self.shares = tail_shares(model)  # plans the tails too, before the server says that it is ready
        classes = manifest.output == "logits"
        self.writer = ReplyWriter(manifest.labels, catalogue, model.data_config.input_size, classes=classes)
        self.targets = TargetReader(manifest.labels, model.tails.output_size, classes=classes)
        self.policies = PolicyBook(model, config, policies or {}, self.vectors)
        self.documents = ReplyDocuments(model.data_config, self.info, self.writer, self.policies)
        # last: whatever is wrong with the checkpoint or the settings is told before minutes go by
        self.compiled: CompiledNetwork | None = None
        if config.compile:
            coarse = config.tf32 or config.autocast is not None
            self.compiled = CompiledNetwork(model.base, model.data_config.input_size, coarse=coarse)
        self.watch: Watch | None = None
        """Looks on at forward passes, where somebody put it here."""

    @classmethod
    def open(cls, checkpoint: Path, config: ServingConfig, *, name: str, version: str) -> Engine:
        """Load a checkpoint for serving. Raises EludeError with one sentence."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        keep_freed(config.keep_memory_bytes)
        set_tf32(config.tf32)
        device = "cpu" if config.device == "auto" else config.device
        model = load(checkpoint, device, trust_factory=config.trust_factory)
        run_under_autocast(model.base, config.autocast)
        expected, found = config.expected_checkpoint_sha256, model.manifest.checkpoint_sha256
        if expected is not None and expected != found:
            raise CheckpointError(
                f"The configuration expects checkpoint {expected[:12]}…, this one is {found[:12]}…; "
                "archive the right checkpoint, or change expected_checkpoint_sha256."
            )
        catalogue = read_catalogue(checkpoint)
        catalogue.facts("")  # read now, not under the first request
        partition = model.manifest.partition_sha256
        stored: Mapping[str, Mapping[str, Any]] = {}
        vectors: Mapping[str, StoredVector] = {}
        try:
            vectors = read_vectors(checkpoint, partition)
            stored = read_policies(checkpoint, partition)
        except CheckpointError as error:
            if not config.policies_off:  # the switch has to work just when a policy is at fault
                raise
            logger.warning("%s", error)
        return cls(
            model,
            config,
            name=name,
            version=version,
            catalogue=catalogue,
            vectors=vectors,
            policies=stored,
        )

    def describe(self) -> dict[str, Any]:
        """Layers, feature counts, data configuration, digests, limits, policies, threads, and the JSON schemas."""
        apart = self.compiled.difference if self.compiled else None
        made = operations.describe(self.model, self.config, self.info, self.shares, self.policies, self.vectors, apart)
        return made.model_dump(mode="json")

    def answer(self, rows: Sequence[Row]) -> list[Answered]:
        """One reply a row, in order. A bad row gets a problem document and no other row notices."""
        started = time.perf_counter()
        taken_in = self.pool.map(lambda row: self._guard(self._take_in, row, row, len(rows) == 1), rows)
        asked_for = [self._guard(self._read, row, row, taken) for row, taken in zip(rows, taken_in, strict=True)]
        read = list(asked_for)
        costly = [n for n, asked in enumerate(read) if isinstance(asked, Asked | Operation)]
        let_in = admitted([read[n].work for n in costly], self.config.max_batch_work)
        for n, allowed in zip(costly, let_in, strict=True):
            if not allowed:  # all of a request or nothing of it, so that it can be sent again as it is
                read[n] = answered_problem(overloaded())
        running = [job for asked in read if isinstance(asked, Asked) for job in asked.jobs]
        if running:
            run_batch(self.model, self.targets, running, self.watch, self.compiled)
        answered = []
        for row, asked in zip(rows, read, strict=True):
            if isinstance(asked, Operation):
                asked = self._guard(asked.run, row)
            elif isinstance(asked, Asked):
                asked = self._guard(self._close, row, asked, len(running), started)
            answered.append(asked)
        seconds = time.perf_counter() - started  # the batch's answers leave together
        return [
            replace(reply, seen=seen_row(row, asked, reply, seconds))
            for row, asked, reply in zip(rows, asked_for, answered, strict=True)
        ]

    def _guard(self, work: Any, row: Row, *arguments: Any) -> Any:
        """The result of `work`, or the problem that it met, for this row alone."""
        try:
            return work(*arguments)
        except Problem as problem:
            return answered_problem(problem)
        except Exception:
            logger.exception("request %s failed", row.request_id)
            return answered_problem(internal_error())

    # --- in -----------------------------------------------------------------------------------------------------------

    def _take_in(self, row: Row, alone: bool) -> TakenIn:
        """Everything about a request that does not need the model, from any thread. alone: in its batch, so that its
        images may be decoded side by side; otherwise the rows are."""
        started = time.perf_counter()
        body = read_body(row, self.config)
        if body.operation:
            return TakenIn(body)
        reader = ImageReader(self.config, self.transform, self.pool, spread=alone)
        with identified(body.document):
            if is_kserve(body.document) and body.image is None:
                size = self.model.data_config.input_size
                envelope = open_envelope(body.document, self.config, self.info, size, reader, explain=row.explain)
                return TakenIn(body, envelope.questions, envelope, milliseconds(started))
            question = read_question(body.document, body.image, reader, explain=row.explain)
            return TakenIn(body, [question], None, milliseconds(started))

    def _read(self, row: Row, taken: TakenIn | Answered) -> Asked | Operation | Answered:
        if isinstance(taken, Answered):
            return taken
        with identified(taken.body.document):
            if taken.body.operation:
                return replace(self._operation(taken.body), identity=asked_identity(taken.body.document))
            return self._asked(row, taken)

    def _asked(self, row: Row, taken: TakenIn) -> Asked:
        envelope = taken.envelope
        if envelope is None:
            (question,) = taken.questions
            assert isinstance(question, Question)
            return Asked([self._job(question, row.request_id, taken.milliseconds)])
        place, whole = envelope.place, envelope.whole
        parts = [
            self._part(question, row, taken.milliseconds, place if whole else [*place, n])
            for n, question in enumerate(taken.questions)
        ]
        asked = Asked(parts, envelope)
        check_work(asked.work, self.config)
        return asked

    def _operation(self, body: Body) -> Operation:
        if body.image is not None:
            raise Problem("invalid-document", f"The operation {body.operation} takes one JSON document, no parts.")
        if body.operation == "describe":
            asked: Any = validated(ops.DescribeRequest, body.document)
            self._expected(asked.expect)
            return Operation("describe", lambda: Answered(200, JSON, json.dumps(self.describe(), allow_nan=False)))
        if body.operation == "features":
            asked = validated(ops.FeaturesRequest, body.document)
            self._expected(asked.expect)
            catalogue = self.catalogue
            if catalogue is None:
                raise Problem("internal-error", "The server has no feature catalogue.")
            return Operation("features", lambda: self._features(asked, catalogue))
        asked = validated(ops.VectorsRequest, body.document)
        self._expected(asked.expect)
        operations.check_vectors(asked, self.model, self.config)
        return Operation("vectors", lambda: self._vectors(asked), float(len(asked.positive) + len(asked.negative)))

    def _features(self, asked: ops.FeaturesRequest, catalogue: FeatureCatalogue) -> Answered:
        made = operations.features(asked, catalogue, self.model.layers, self.info, _identity(asked.id))
        return self._sized(made.model_dump_json(), "a lower limit")

    def _vectors(self, asked: ops.VectorsRequest) -> Answered:
        images = operations.vector_images(asked, self.model, ImageReader(self.config, self.transform, self.pool))
        made = operations.vectors(asked, images, self.model, self.info, self.writer, _identity(asked.id))
        return self._sized(made.model_dump_json(), "fewer features")

    def _part(self, question: Question | Problem, row: Row, decode: float, place: list[str | int]) -> Job | Problem:
        """A job, or what is wrong with it, at its place in the envelope."""
        try:
            if isinstance(question, Problem):
                raise question
            return self._job(question, row.request_id, decode)
        except Problem as problem:
            return problem.within(place)

    def _job(self, question: Question, request_id: str, decode: float) -> Job:
        """A validated question, with all that it names looked up. decode: milliseconds that reading its request took.
        Raises Problem."""
        request = question.request
        self._expected(request.expect)
        check_limits(request, self.config, len(self.model.layers))
        explained = self._explained(request.explain) if request.explain else []
        if request.explain:
            self.targets.check(request.explain)
        activations = self._activated(request.activations) if request.activations else []
        rules = self.policies.named(request.steer.policies if request.steer else [])
        window = self._window(question.picture)
        in_force = [rule.steering for rule in rules]
        if request.steer is not None:
            in_force.append(steering_of(request.steer, self.vectors))
        steered = plan(self.model, in_force, window, own=request.steer is not None) if in_force else None
        shadows = [rule.steering for rule in self.policies.shadows]
        shadow = plan(self.model, shadows, window) if shadows else None
        work = self._work(request, explained, steered.edited if steered else [])
        check_work(work, self.config)
        return Job(
            question, _identity(request.id), request_id, explained, rules, steered,
            places(rules, request.steer), shadow, activations, work, {"decode": decode},
        )  # fmt: skip

    def _work(self, request: Request, explained: list[str], edited: Sequence[str]) -> float:
        """In predictions. The operator's own policies cost nothing: a plain row is never too much work."""
        work = steer_work(edited, self.shares) if request.steer is not None else 0.0
        if request.explain is not None:
            passes = explain_work(request.explain, explained, self.shares)
            work += passes + (passes + 1 if edited else 0)  # the steered answer is explained too, from its own pass
        if self.compiled and (request.explain or request.steer or request.activations):
            work += 1  # the pass through the network itself, beside the compiled one
        return work

    def _expected(self, expect: Expect | None) -> None:
        if expect is not None and expect.checkpoint_sha256 != self.info.checkpoint_sha256:
            raise Problem("other-checkpoint", f"The checkpoint served is {self.info.checkpoint_sha256}.")

    def _explained(self, explain: Explain) -> list[str]:
        for number, layer in enumerate(explain.layers or []):
            if layer not in self.model.layers:
                near = closest(layer, self.model.layers) or self.model.layers
                detail = f"The checkpoint has no split layer {layer[:80]!r}."
                raise Problem("unknown-layer", detail, at(["explain", "layers", number], "unknown layer", near))
        return [n for n in self.model.layers if explain.layers is None or n in explain.layers]

    def _activated(self, asked: Activations) -> list[Feature]:
        found = []
        for number, name in enumerate(asked.features):
            try:
                found.append(self.model.feature(name))
            except FeatureError as error:
                loc: list[str | int] = ["activations", "features", number]
                near = near_features(self.model, name)
                raise Problem("unknown-feature", str(error), at(loc, "unknown feature", near)) from error
        return found

    def _window(self, picture: Picture) -> tuple[float, float, float, float]:
        """What the token grid covers, as fractions of the upright image."""
        if picture.size is None:
            return 0.0, 0.0, 1.0, 1.0
        width, height = picture.size
        x0, y0, x1, y1 = self.model.data_config.window(width, height)
        return x0 / width, y0 / height, x1 / width, y1 / height

    # --- out ----------------------------------------------------------------------------------------------------------

    def _close(self, asked: Asked, batch: int, started: float) -> Answered:
        if asked.envelope is None:
            (job,) = asked.jobs
            made = self._sized(self.documents.text(job, batch, started), "fewer targets, layers, features or heatmaps")
            self.documents.audit(job)
            return made
        documents, outputs = [], []
        for part in asked.parts:
            try:
                if isinstance(part, Problem):
                    raise part
                documents.append(self.documents.text(part, batch, started))
                assert part.output is not None
                outputs.append(part.output.float().tolist())
            except Problem as problem:
                if asked.envelope.whole:
                    raise
                documents.append(problem.document().model_dump_json(exclude_none=True))
        made = self._sized(asked.envelope.close(documents, outputs), "fewer images, targets, layers or features")
        for job in asked.jobs:
            if job.problem is None:
                self.documents.audit(job)
        return made

    def _sized(self, body: str, advice: str) -> Answered:
        size = utf8_length(body)
        if size > self.config.max_response_bytes:
            limit = self.config.max_response_bytes
            detail = f"The response would have {size} bytes, the limit is {limit}; ask for {advice}."
            raise Problem("response-too-large", detail)
        return Answered(200, JSON, body)


def _identity(asked: str | None) -> str:
    return asked or uuid.uuid4().hex
