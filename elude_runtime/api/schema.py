"""The wire documents (interface "HTTP"): what a request may say and what a reply says. Strict: no coercion, no NaN, no
unknown or duplicate keys. This module knows no torch, so that clients can use it."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from elude_runtime.errors import EludeError

API_VERSION = 1
LONGEST_LIST = (
    1000  # validation names every wrong item: an endless list would cost endless time before any limit is met
)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# --- requests ---------------------------------------------------------------------------------------------------------


class Expect(_Document):
    """Refuse (412) to be answered by another checkpoint than this."""

    checkpoint_sha256: str


class ImageBytes(_Document):
    """An encoded image (JPEG, PNG, WebP) in base64. No URLs: a server that fetches is a server that can be sent."""

    b64: str


class TopTarget(_Document):
    """The n most probable classes, each a target."""

    top: Annotated[int, Field(ge=1)]


class LabelTarget(_Document):
    label: str


class IndexTarget(_Document):
    """A class's logit minus the mean logit, or minus the logit of `versus`."""

    index: Annotated[int, Field(ge=0)]
    versus: Annotated[int, Field(ge=0)] | None = None


class DirectionTarget(_Document):
    """The dot product of the output with a direction [d]: for models without a head."""

    direction: Annotated[list[float], Field(max_length=65536)]


TargetDocument = Literal["top1"] | Annotated[int, Field(ge=0)] | TopTarget | LabelTarget | IndexTarget | DirectionTarget


class Explain(_Document):
    """Which features carried the decision."""

    targets: Annotated[list[TargetDocument], Field(min_length=1, max_length=LONGEST_LIST)] = ["top1"]
    method: Literal["auto", "gradient", "integrated_gradients", "ablation"] = "auto"
    steps: Annotated[int, Field(ge=1)] = 4
    layers: Annotated[list[str], Field(max_length=LONGEST_LIST)] | None = None
    level: Literal["concepts", "subunits"] = "concepts"
    top_features: Annotated[int, Field(ge=1)] = 10
    sign: Literal["both", "positive", "negative"] = "both"
    heatmaps: Literal["none", "values"] = "none"


class AllTokens(_Document):
    tokens: Literal["all"] = "all"


class ScaleEdit(_Document):
    """t -> value * t on all tokens of the feature's type; on a concept, on every member."""

    feature: str
    mode: Literal["scale"]
    value: float
    apply: AllTokens = AllTokens()


class AblateEdit(_Document):
    """t -> 0: the feature at its calibration mean."""

    feature: str
    mode: Literal["ablate"]
    apply: AllTokens = AllTokens()


EditDocument = Annotated[ScaleEdit | AblateEdit, Field(discriminator="mode")]


class Steer(_Document):
    edits: Annotated[list[EditDocument], Field(min_length=1, max_length=LONGEST_LIST)]


class Request(_Document):
    """One request document. The image comes in `image`, or as a part of its own in a multipart request."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    expect: Expect | None = None
    image: ImageBytes | None = None
    top_k: Annotated[int, Field(ge=1)] = 5
    explain: Explain | None = None
    steer: Steer | None = None


# --- replies ----------------------------------------------------------------------------------------------------------


def shortest_float32(value: Any) -> float:
    """The float whose text is the shortest that reads back as the same float32 (interface, "HTTP")."""
    import numpy as np

    return float(str(np.float32(value)))


Float32 = Annotated[float, BeforeValidator(shortest_float32)]


class ModelInfo(_Document):
    name: str
    version: str
    base_sha256: str
    checkpoint_sha256: str


class InputInfo(_Document):
    """Size of the upright image, and the rectangle of it that the model saw, in its pixels."""

    width: int
    height: int
    crop: list[int]


class Prediction(_Document):
    index: int
    label: str | None
    probability: Float32
    logit: Float32


class Answer(_Document):
    """What the caller should act on: the steered answer where edits are in force."""

    source: Literal["default", "steered"]
    policies: list[str] = []
    index: int | None
    label: str | None
    probability: Float32 | None  # null for a model without classes


class Heatmap(_Document):
    """Activations of a feature on the token grid, row by row from the top left of `input.crop`."""

    shape: list[int]
    values: list[list[Float32]]


class FeatureReply(_Document):
    feature: str
    label: str | None
    activation: Float32
    token: int
    attribution: Float32
    effect: Float32 | None
    ablation_error: Float32 | None = None
    heatmap: Heatmap | None = None


class LayerReply(_Document):
    layer: str
    method: str
    baseline: Float32
    completeness_error: Float32 | None
    features: list[FeatureReply]


class TargetReply(_Document):
    index: int | None = None
    label: str | None = None
    versus: int | None = None
    direction: bool = False


class ExplanationReply(_Document):
    target: TargetReply
    value: Float32
    layers: list[LayerReply]


class Change(_Document):
    """A class's logit by default and steered; `change` is measured against a null edit in the same tail batch."""

    index: int
    label: str | None
    default: Float32
    steered: Float32
    change: Float32


class SteeredReply(_Document):
    predictions: list[Prediction]
    changes: list[Change]
    edits_applied: int
    relative_norm: dict[str, Float32]


class Reply(_Document):
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
    warnings: list[dict[str, str]] = []


class ProblemError(_Document):
    loc: list[str | int]
    msg: str
    suggestions: list[str] | None = None


class ProblemDocument(_Document):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[ProblemError] | None = None


# --- JSON -------------------------------------------------------------------------------------------------------------


class JSONError(EludeError):
    """A body that is not JSON, or JSON that the API does not take (duplicate keys, NaN, too deep)."""


def parse_json(body: bytes, max_depth: int) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinities (1e400 is one), nested at most `max_depth` deep."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise JSONError(f"The key {twice[:60]!r} stands twice in one object.")
        return made

    def constant(name: str) -> Any:
        raise JSONError(f"{name} is not a number in JSON.")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise JSONError(f"The number {text[:40]} is too large.")
        return value

    if _depth(body) > max_depth:
        raise JSONError(f"The document is nested deeper than {max_depth} levels.")
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_float=finite)
    except UnicodeDecodeError as error:
        raise JSONError("The document is not UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise JSONError(f"The body is not JSON: {error}.") from error


# Strings are skipped whole, so that an image in base64 costs one step and not millions.
# An unterminated string runs to the end in one step too: to try again at its every quote would take quadratic time.
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


def _depth(body: bytes) -> int:
    """Deepest nesting of brackets outside strings."""
    depth = deepest = 0
    for token in _STRUCTURE.finditer(body):
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    return deepest
