"""What a reply says: the unchanged prediction always, and beside it what was asked for."""

from __future__ import annotations

from typing import Literal

from elude_runtime.api.schema.base import API_VERSION, Document, Float32


class ModelInfo(Document):
    name: str
    version: str
    base_sha256: str
    checkpoint_sha256: str


class InputInfo(Document):
    """Size of the upright image, and the rectangle x0, y0, x1, y1 of it that the model saw, in its pixels. window: the
    same before rounding; it reaches outside the image where that was padded, and heatmaps spread over it."""

    width: int
    height: int
    crop: list[int]
    window: list[float]


class Prediction(Document):
    index: int
    label: str | None
    probability: Float32
    logit: Float32


class Answer(Document):
    """What the caller should act on: the steered answer where a policy or the request's own edits are in force."""

    source: Literal["default", "steered"]
    policies: list[str] = []
    index: int | None
    label: str | None
    probability: Float32 | None  # null for a model without classes


class Heatmap(Document):
    """Numbers on the token grid, row by row from the top left of `input.window`; as values, or as a PNG in base64 of
    the model's input size: red above zero, blue below, opacity by size, to be laid over `input.window`."""

    shape: list[int]
    values: list[list[Float32]] | None = None
    png: str | None = None


class FeatureReply(Document):
    """activation: at the token (`token`) where it is largest in absolute value; effect: target with the feature ablated
    minus without, where that was run; ablation_error: attribution + effect; pixels: gradient of the activation times
    the input, summed over image patches."""

    feature: str
    label: str | None
    activation: Float32
    token: int
    attribution: Float32
    effect: Float32 | None
    ablation_error: Float32 | None = None
    heatmap: Heatmap | None = None
    pixels: Heatmap | None = None


class LayerReply(Document):
    """completeness_error: sum of all attributions of the layer minus (value - baseline), null for ablation;
    edit_attribution: share of the edits themselves, where a steered pass is explained at a layer they changed."""

    layer: str
    method: str
    baseline: Float32
    completeness_error: Float32 | None
    edit_attribution: Float32 | None = None
    features: list[FeatureReply]


class TargetReply(Document):
    index: int | None = None
    label: str | None = None
    versus: int | None = None
    direction: bool = False


class ExplanationReply(Document):
    """value: the target's; within a layer attributions add up to value - baseline, across layers never."""

    target: TargetReply
    value: Float32
    layers: list[LayerReply]


class Change(Document):
    """A class's logit by default and steered; `change` is measured against a null edit in the same tail batch."""

    index: int
    label: str | None
    default: Float32
    steered: Float32
    change: Float32


class SteeredReply(Document):
    """edits_applied: edits and vectors that acted (their condition held, some token was in their scope);
    relative_norm: per layer, norm of the change of its output over the norm of that output, over the edited tokens."""

    predictions: list[Prediction]
    embedding: list[Float32] | None = None
    changes: list[Change]
    edits_applied: int
    relative_norm: dict[str, Float32]
    explanations: list[ExplanationReply] | None = None


class ShadowReply(Document):
    """What policies in shadow mode would have answered; the answer does not follow it."""

    policies: list[str]
    predictions: list[Prediction]
    embedding: list[Float32] | None = None
    changes: list[Change]
    edits_applied: int
    relative_norm: dict[str, Float32]


class ActivationReply(Document):
    """One number (value, and for a peak its token), or a number a token from the first that the feature lives on."""

    feature: str
    label: str | None
    reduce: Literal["peak", "mean", "tokens"]
    value: Float32 | None = None
    token: int | None = None
    values: list[Float32] | None = None


class Warning(Document):
    """What was done less than asked for, and is no error."""

    code: Literal["no-token-in-scope", "condition-not-met", "no-effect", "policies-off"]
    detail: str


class Reply(Document):
    id: str
    api_version: int = API_VERSION
    batch_size: int
    timing_ms: dict[str, float]
    model: ModelInfo
    input: InputInfo
    answer: Answer
    predictions: list[Prediction]
    embedding: list[Float32] | None = None
    explanations: list[ExplanationReply] | None = None
    steered: SteeredReply | None = None
    shadow: ShadowReply | None = None
    activations: list[ActivationReply] | None = None
    warnings: list[Warning] = []


class ProblemError(Document):
    """loc: where in the document; suggestions: the closest known names."""

    loc: list[str | int]
    msg: str
    suggestions: list[str] | None = None


class ProblemDocument(Document):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[ProblemError] | None = None
