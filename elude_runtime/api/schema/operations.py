"""Operations beside predictions: `features`, `vectors`, `describe`; by sub-route or by the body's `op`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elude_runtime.api.schema.base import API_VERSION, LONGEST_LIST, Document, FeatureName, Float32, Identity, Name
from elude_runtime.api.schema.reply import ModelInfo
from elude_runtime.api.schema.request import AddEdit, Expect, ImageBytes


class FeaturesRequest(Document):
    """Features by name, layer, or words of their label; concepts before sub-units."""

    op: Literal["features"] = "features"
    id: Identity | None = None
    expect: Expect | None = None
    query: Annotated[str, Field(max_length=200)] | None = None
    layer: FeatureName | None = None
    ids: Annotated[list[FeatureName], Field(max_length=LONGEST_LIST)] | None = None
    limit: Annotated[int, Field(ge=1, le=LONGEST_LIST)] = 50
    cursor: Annotated[str, Field(max_length=64)] | None = None


class FeatureInfo(Document):
    """A feature's calibration statistics, in units of the layer's output (a concept: standard deviations). share: of
    the layer output's variance; density: of tokens beyond two standard deviations; size: a concept's sub-units, a
    sub-unit's edges; sign: -1 for a sub-unit that falls as its concept's activation rises, else 1."""

    feature: str
    kind: Literal["concept", "subunit"]
    layer: str
    token_type: str
    concept: str | None
    label: str | None
    label_source: str | None
    sign: Literal[1, -1] = 1
    size: int
    mean: Float32
    std: Float32
    quantiles: dict[str, Float32]
    density: Float32
    share: Float32


class FeaturesReply(Document):
    """total: how many match; next_cursor: ask with it for more, null at the end."""

    id: str
    api_version: int = API_VERSION
    model: ModelInfo
    features: list[FeatureInfo]
    total: int
    next_cursor: str | None


class VectorsRequest(Document):
    """What sets images apart from other images, as features and as a direction of one layer's output."""

    op: Literal["vectors"] = "vectors"
    id: Identity | None = None
    expect: Expect | None = None
    layer: FeatureName
    positive: Annotated[list[ImageBytes], Field(min_length=1, max_length=LONGEST_LIST)]
    negative: Annotated[list[ImageBytes], Field(min_length=1, max_length=LONGEST_LIST)]
    top_features: Annotated[int, Field(ge=1)] = 10


class FeatureWeight(Document):
    """weight: difference of the two sets' mean peak activations over the pooled standard deviation; share: its square
    over the sum of all squares."""

    feature: str
    label: str | None
    weight: Float32
    share: Float32


class VectorsReply(Document):
    """edits: the profile that moves images without towards images with, to be sent back as `steer.edits`; direction:
    difference of the mean outputs, for `steer.vectors`; auc: of the weighted peaks, on images held out of the sets."""

    id: str
    api_version: int = API_VERSION
    model: ModelInfo
    layer: str
    features: list[FeatureWeight]
    edits: list[AddEdit]
    direction: list[Float32]
    auc: Float32 | None


class DescribeRequest(Document):
    op: Literal["describe"] = "describe"
    id: Identity | None = None
    expect: Expect | None = None


class LayerInfo(Document):
    """attribution: the measured completeness error of each method, and which `auto` takes; tail: how tails run
    ("replay" or "full"); tail_share: floating-point operations of a tail over those of a prediction."""

    name: str
    kind: str
    neurons: int
    inputs: int
    subunits: int
    token_types: list[dict[str, Any]]
    grid: list[int] | None
    follows: str
    attribution: dict[str, Any]
    tail: str
    tail_share: float


class PolicyInfo(Document):
    """mode: "default" (in force on every request), "shadow" (computed beside every answer), "on request", or "off" by
    the operator's switch; since: when this server took it up."""

    name: Name
    sha256: str
    mode: Literal["default", "shadow", "on request", "off"]
    since: str
    edits: int
    vectors: int
    description: str | None


class VectorInfo(Document):
    name: Name
    layer: str
    auc: float | None


class PrecisionInfo(Document):
    """How forward passes compute; the base model run in the same way on the same batch gives the same bits."""

    tf32: bool
    autocast: Literal["bfloat16", "float16"] | None
    compiled: bool = Field(False, description="predictions come from torch.compile")
    compiled_difference: float | None = Field(
        None, description="compiled: of its outputs to the plain pass's, relative, the largest seen at the start"
    )


class Description(Document):
    """What is served, and how to ask it."""

    api_version: int = API_VERSION
    elude_version: str
    model: ModelInfo
    output: Literal["logits", "embedding"]
    classes: int | None
    layers: list[LayerInfo]
    data_config: dict[str, Any]
    partition_sha256: str
    policies: list[PolicyInfo]
    vectors: list[VectorInfo]
    limits: dict[str, int]
    threads: int
    precision: PrecisionInfo | None = Field(None, description="null: a server that does not say")
    problems: list[str]
    openapi: dict[str, Any]
