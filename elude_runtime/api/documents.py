"""The reply document of one answered image, from what stands on its job."""

from __future__ import annotations

from elude_runtime.api.batch import Job, milliseconds
from elude_runtime.api.intake import Picture
from elude_runtime.api.policies import PolicyBook
from elude_runtime.api.replies import ReplyWriter
from elude_runtime.api.schema import reply as wire
from elude_runtime.network.preprocessing import DataConfig


class ReplyDocuments:
    """Puts replies together for one checkpoint, and sees to the audit of the policies behind them."""

    def __init__(
        self, data_config: DataConfig, info: wire.ModelInfo, writer: ReplyWriter, policies: PolicyBook
    ) -> None:
        self._data_config, self._info, self._writer, self._policies = data_config, info, writer, policies

    def text(self, job: Job, batch: int, started: float) -> str:
        """JSON. batch: images of the forward pass; started: when the batch came in. Raises the job's problem."""
        if job.problem is not None:
            raise job.problem
        assert job.output is not None
        request, writer = job.question.request, self._writer
        heatmaps = request.explain.heatmaps if request.explain else "none"
        predictions = writer.predictions(job.output, request.top_k)
        steered = shadow = explanations = None
        if job.explanations is not None:
            explanations = [writer.explanation(e, heatmaps) for e in job.explanations]
        if job.steered is not None:
            again = job.steered_explanations
            explained = None if again is None else [writer.explanation(e, heatmaps) for e in again]
            steered = writer.steered(job.steered, predictions, request.top_k, explained)
        if job.shadowed is not None:
            shadow = writer.shadow(
                job.shadowed, predictions, request.top_k, [rule.name for rule in self._policies.shadows]
            )
        best = next(iter(steered.predictions if steered else predictions), None)
        reply = wire.Reply(
            id=job.identity,
            batch_size=batch,
            timing_ms={**job.timing, "total": milliseconds(started)},
            model=self._info,
            input=self._input(job.question.picture),
            answer=wire.Answer(
                source="steered" if job.plan and job.plan.parts else "default",
                policies=[rule.name for rule in job.rules],
                index=best.index if best else None,
                label=best.label if best else None,
                probability=best.probability if best else None,
            ),
            predictions=predictions,
            embedding=writer.embedding(job.output),
            explanations=explanations,
            steered=steered,
            shadow=shadow,
            activations=self._activations(job),
            warnings=self._warnings(job),
        )
        return reply.model_dump_json()

    def audit(self, job: Job) -> None:
        """Leave a line for the policies behind an answer that goes out."""
        self._policies.record(job.identity, job.rules + (self._policies.shadows if job.shadowed else []))

    def _input(self, picture: Picture) -> wire.InputInfo:
        if picture.size is None:
            height, width = picture.tensor.shape[-2:]
            return wire.InputInfo(width=width, height=height, crop=[0, 0, width, height], window=[0, 0, width, height])
        (width, height), data = picture.size, self._data_config
        crop, window = data.seen(width, height), data.window(width, height)
        return wire.InputInfo(width=width, height=height, crop=list(crop), window=list(window))

    def _activations(self, job: Job) -> list[wire.ActivationReply] | None:
        asked = job.question.request.activations
        if asked is None or job.activations is None:
            return None
        return [
            wire.ActivationReply(
                feature=found.feature.name,
                label=self._writer.feature_label(found.feature.name),
                reduce=asked.reduce,
                value=found.value,
                token=found.token,
                values=None if found.values is None else found.values.tolist(),
            )
            for found in job.activations
        ]

    def _warnings(self, job: Job) -> list[wire.Warning]:
        found = [wire.Warning(code=code, detail=detail) for code, detail in job.idle]
        steer = job.question.request.steer
        if steer and steer.policies and self._policies.off:
            detail = "The operator turned all policies off; the named ones were not applied."
            found.append(wire.Warning(code="policies-off", detail=detail))
        return found
