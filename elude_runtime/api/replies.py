"""Parts of a reply: what was computed, as wire documents."""

from __future__ import annotations

from torch import Tensor

from elude_runtime.analysis.attribution import Explanation, LayerExplanation
from elude_runtime.api import schema


def label(labels: list[str], index: int | None) -> str | None:
    """The name of a class, where the checkpoint has one."""
    return labels[index] if index is not None and index < len(labels) else None


def predictions(logits: Tensor, labels: list[str], top_k: int) -> list[schema.Prediction]:
    """The most probable classes of one image: logits [K] as the model gave them, softmax in float64."""
    logits = logits.float()
    top = logits.topk(min(top_k, len(logits)))
    probability = logits.double().softmax(-1)
    return [
        schema.Prediction(index=i, label=label(labels, i), probability=float(probability[i]), logit=value)
        for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def explanation(found: Explanation, labels: list[str]) -> schema.ExplanationReply:
    target = found.target
    return schema.ExplanationReply(
        target=schema.TargetReply(
            index=target.index,
            label=label(labels, target.index),
            versus=target.versus,
            direction=target.direction is not None,
        ),
        value=found.value,
        layers=[_layer(e) for e in found.layers],
    )


def _layer(found: LayerExplanation) -> schema.LayerReply:
    features = []
    for f in found.features:
        heatmap = None
        if f.heatmap is not None:
            heatmap = schema.Heatmap(shape=list(f.heatmap.shape), values=f.heatmap.tolist())
        features.append(
            schema.FeatureReply(
                feature=f.feature.name,
                label=None,
                activation=f.activation,
                token=f.token,
                attribution=f.attribution,
                effect=f.effect,
                ablation_error=f.ablation_error,
                heatmap=heatmap,
            )
        )
    return schema.LayerReply(
        layer=found.layer,
        method=found.method,
        baseline=found.baseline,
        completeness_error=found.completeness_error,
        features=features,
    )
