"""Parts of a reply: what was computed, as wire documents."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from elude_runtime.analysis.attribution import Explanation, FeatureAttribution
from elude_runtime.analysis.steering import SteeredRow
from elude_runtime.api.heatmap import heatmap
from elude_runtime.api.schema import reply as wire
from elude_runtime.checkpoint.catalogue import FeatureCatalogue

_CHANGES_LISTED = 10


class ReplyWriter:
    """Writes documents for one checkpoint. labels: of classes, by index; catalogue: labels of features; input_size
    (channels, height, width) of the model; classes: whether its output [K] is logits."""

    def __init__(
        self, labels: list[str], catalogue: FeatureCatalogue | None, input_size: tuple[int, int, int], *, classes: bool
    ) -> None:
        self._labels, self._catalogue, self._input_size, self._classes = labels, catalogue, input_size, classes

    def predictions(self, output: Tensor, top_k: int) -> list[wire.Prediction]:
        """The most probable classes: logits [K] as the model gave them, softmax in float64. None for an embedding."""
        if not self._classes:
            return []
        logits = output.float()
        top = logits.topk(min(top_k, len(logits)))
        chosen = logits.double().softmax(-1)[top.indices]
        return [
            wire.Prediction(index=i, label=self.label(i), probability=p, logit=value)
            for i, value, p in zip(top.indices.tolist(), top.values.tolist(), chosen.tolist(), strict=True)
        ]

    def embedding(self, output: Tensor) -> list[float] | None:
        return None if self._classes else output.float().tolist()

    def label(self, index: int | None) -> str | None:
        """The name of a class, where the checkpoint has one."""
        return self._labels[index] if index is not None and index < len(self._labels) else None

    def feature_label(self, name: str) -> str | None:
        facts = self._catalogue.facts(name) if self._catalogue else None
        return facts.label if facts else None

    def steered(
        self,
        found: SteeredRow,
        default: list[wire.Prediction],
        top_k: int,
        explanations: list[wire.ExplanationReply] | None,
    ) -> wire.SteeredReply:
        """default: the unchanged prediction, whose classes are listed among the changes."""
        predictions = self.predictions(found.steered, top_k)
        shown = list(dict.fromkeys([p.index for p in default] + [p.index for p in predictions]))[:_CHANGES_LISTED]
        before, after, change = found.default.tolist(), found.steered.tolist(), found.change.tolist()
        return wire.SteeredReply(
            predictions=predictions,
            embedding=self.embedding(found.steered),
            changes=[
                wire.Change(index=i, label=self.label(i), default=before[i], steered=after[i], change=change[i])
                for i in shown
            ],
            edits_applied=sum(found.applied),
            relative_norm=found.relative_norm,
            explanations=explanations,
        )

    def shadow(
        self, found: SteeredRow, default: list[wire.Prediction], top_k: int, policies: list[str]
    ) -> wire.ShadowReply:
        made = self.steered(found, default, top_k, None)
        fields = {name: getattr(made, name) for name in wire.ShadowReply.model_fields if name != "policies"}
        return wire.ShadowReply(policies=policies, **fields)

    def explanation(self, found: Explanation, heatmaps: str) -> wire.ExplanationReply:
        """heatmaps: "none", "values" or "png"."""
        target = found.target
        return wire.ExplanationReply(
            target=wire.TargetReply(
                index=target.index,
                label=self.label(target.index),
                versus=target.versus,
                direction=target.direction is not None,
            ),
            value=found.value,
            layers=[
                wire.LayerReply(
                    layer=layer.layer,
                    method=layer.method,
                    baseline=layer.baseline,
                    completeness_error=layer.completeness_error,
                    edit_attribution=layer.edit_attribution,
                    features=[self._feature(f, heatmaps) for f in layer.features],
                )
                for layer in found.layers
            ],
        )

    def _feature(self, found: FeatureAttribution, heatmaps: str) -> wire.FeatureReply:
        name = found.feature.name
        drawn: Callable[..., wire.Heatmap] = lambda values, form: heatmap(values, form, self._input_size)  # noqa: E731
        return wire.FeatureReply(
            feature=name,
            label=self.feature_label(name),
            activation=found.activation,
            token=found.token,
            attribution=found.attribution,
            effect=found.effect,
            ablation_error=found.ablation_error,
            heatmap=None if found.heatmap is None else drawn(found.heatmap, heatmaps),
            pixels=None if found.pixels is None else drawn(found.pixels, "png" if heatmaps == "png" else "values"),
        )
