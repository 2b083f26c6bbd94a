"""What a prediction request may say (interface, "HTTP"): explanations, steering, activations."""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from elude_runtime.api.schema.base import LONGEST_LIST, LONGEST_VECTOR, Document, FeatureName, Identity, Name


class Expect(Document):
    """Refuse (412) to be answered by another checkpoint than this."""

    checkpoint_sha256: str


class ImageBytes(Document):
    """An encoded image (JPEG, PNG, WebP) in base64. No URLs: a server that fetches is a server that can be sent."""

    b64: str


# --- explain ----------------------------------------------------------------------------------------------------------


class TopTarget(Document):
    """The n most probable classes, each a target."""

    top: Annotated[int, Field(ge=1)]


class LabelTarget(Document):
    """The class of this name."""

    label: str


class IndexTarget(Document):
    """A class's logit minus the mean logit, or minus the logit of `versus`."""

    index: Annotated[int, Field(ge=0)]
    versus: Annotated[int, Field(ge=0)] | None = None


class DirectionTarget(Document):
    """The dot product of the output with a direction [d]: for models without a head."""

    direction: Annotated[list[float], Field(min_length=1, max_length=LONGEST_VECTOR, fail_fast=True)]


def _kind_of_target(value: Any) -> str | None:
    if isinstance(value, str):
        return "name"
    if isinstance(value, int) and not isinstance(value, bool):
        return "class"
    return _first_key(value, ("top", "label", "index", "direction"))


def _first_key(value: Any, keys: tuple[str, ...]) -> str | None:
    """Which of the keys an object, as JSON or as a document, has."""
    if isinstance(value, dict):
        return next((k for k in keys if k in value), None)
    return next((k for k in keys if k in type(value).model_fields), None) if isinstance(value, Document) else None


Target = Annotated[
    Annotated[Literal["top1"], Tag("name")]
    | Annotated[int, Field(ge=0), Tag("class")]
    | Annotated[TopTarget, Tag("top")]
    | Annotated[LabelTarget, Tag("label")]
    | Annotated[IndexTarget, Tag("index")]
    | Annotated[DirectionTarget, Tag("direction")],
    Discriminator(
        _kind_of_target,
        custom_error_type="target",
        custom_error_message=(
            'A target is "top1", a class index, {"top": n}, {"label": …}, {"index": …} or {"direction": […]}'
        ),
    ),
]


class Explain(Document):
    """Which features carried the decision. method "auto": as the checkpoint recommends for each layer; steps: nodes of
    integrated gradients; layers: default all; effects: each listed feature is ablated too, so that its `effect` stands
    beside its attribution; pixels: the gradient of each listed feature's activation on the image."""

    targets: Annotated[list[Target], Field(min_length=1, max_length=LONGEST_LIST)] = ["top1"]
    method: Literal["auto", "gradient", "integrated_gradients", "ablation"] = "auto"
    steps: Annotated[int, Field(ge=1)] = 4
    layers: Annotated[list[FeatureName], Field(min_length=1, max_length=LONGEST_LIST)] | None = None
    level: Literal["concepts", "subunits"] = "concepts"
    top_features: Annotated[int, Field(ge=1)] = 10
    sign: Literal["both", "positive", "negative"] = "both"
    effects: bool = False
    heatmaps: Literal["none", "values", "png"] = "none"
    pixels: bool = False


# --- steer ------------------------------------------------------------------------------------------------------------

Fraction = Annotated[float, Field(ge=0, le=1)]
Cell = Annotated[int, Field(ge=0, le=1)]


class TokenScope(Document):
    """All tokens that the feature or vector can act on, or those of one type."""

    tokens: Literal["all", "cls", "patches"]


class BoxScope(Document):
    """Patches that meet the box x0, y0, x1, y1: fractions of the upright image, from its top left corner."""

    box: Annotated[list[Fraction], Field(min_length=4, max_length=4)]

    @field_validator("box")
    @classmethod
    def _has_an_area(cls, box: list[float]) -> list[float]:
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError("a box is [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
        return box


class MaskScope(Document):
    """Patches that meet a 1 of the mask: rows of 0 and 1, spread over the upright image."""

    mask: Annotated[
        list[Annotated[list[Cell], Field(min_length=1, max_length=LONGEST_LIST, fail_fast=True)]],
        Field(min_length=1, max_length=LONGEST_LIST, fail_fast=True),
    ]

    @field_validator("mask")
    @classmethod
    def _is_a_rectangle(cls, mask: list[list[int]]) -> list[list[int]]:
        if len({len(row) for row in mask}) > 1:
            raise ValueError("the rows of a mask are of one length")
        return mask


Apply = Annotated[
    Annotated[TokenScope, Tag("tokens")] | Annotated[BoxScope, Tag("box")] | Annotated[MaskScope, Tag("mask")],
    Discriminator(
        lambda value: _first_key(value, ("tokens", "box", "mask")),
        custom_error_type="apply",
        custom_error_message='apply is {"tokens": "all", "cls" or "patches"}, {"box": […]} or {"mask": [[…]]}',
    ),
]
_EVERYWHERE = TokenScope(tokens="all")


class When(Document):
    """Only for images whose activation of the feature (peak, on the unedited pass) compares so."""

    feature: FeatureName
    op: Literal[">", ">=", "<", "<="]
    value: float


class _Edit(Document):
    feature: FeatureName
    side: Literal["both", "positive", "negative"] = "both"
    apply: Apply = _EVERYWHERE
    when: When | None = None


class _ValueEdit(_Edit):
    value: float
    unit: Literal["raw", "std"] = "raw"


class ScaleEdit(_Edit):
    """t -> value * t; on a concept, on every member."""

    mode: Literal["scale"]
    value: float


class SetEdit(_ValueEdit):
    """t -> value; a concept's members move by the same number of their own standard deviations,
    each by its sign in the concept."""

    mode: Literal["set"]


class CapEdit(_ValueEdit):
    """t -> min(t, value)"""

    mode: Literal["cap"]


class FloorEdit(_ValueEdit):
    """t -> max(t, value)"""

    mode: Literal["floor"]


class AddEdit(_ValueEdit):
    """t -> t + value. Does not use the split: it shifts the neuron whatever the sub-unit's activation is."""

    mode: Literal["add"]


class AblateEdit(_Edit):
    """t -> 0: the feature at its calibration mean."""

    mode: Literal["ablate"]


class ZeroEdit(_Edit):
    """s -> 0: the feature's uncentred sum at zero."""

    mode: Literal["zero"]


Edit = Annotated[
    ScaleEdit | SetEdit | CapEdit | FloorEdit | AddEdit | AblateEdit | ZeroEdit, Field(discriminator="mode")
]


class VectorBytes(Document):
    """Little-endian float32 numbers in base64."""

    b64_f32: str

    @field_validator("b64_f32")
    @classmethod
    def _is_float32(cls, text: str) -> str:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("not base64") from error
        if not data or len(data) % 4 or len(data) > 4 * LONGEST_VECTOR:
            raise ValueError(f"{len(data)} bytes are not a vector of float32 numbers")
        if any(byte[3] & 0x7F == 0x7F and byte[2] & 0x80 for byte in struct.iter_unpack("4B", data)):
            raise ValueError("the numbers of a vector must be finite")
        return text

    def numbers(self) -> list[float]:
        data = base64.b64decode(self.b64_f32)
        return list(struct.unpack(f"<{len(data) // 4}f", data))


class _Vector(Document):
    strength: float = 1.0
    apply: Apply = _EVERYWHERE
    when: When | None = None


class DenseVector(_Vector):
    """strength * vector is added to the layer's output."""

    layer: FeatureName
    vector: Annotated[
        Annotated[list[float], Field(min_length=1, max_length=LONGEST_VECTOR, fail_fast=True), Tag("numbers")]
        | Annotated[VectorBytes, Tag("bytes")],
        Discriminator(lambda value: "numbers" if isinstance(value, list) else "bytes"),
    ]


class NamedVector(_Vector):
    """A vector that is stored with the checkpoint (`describe` lists them)."""

    name: Name


Vector = Annotated[
    Annotated[NamedVector, Tag("name")] | Annotated[DenseVector, Tag("vector")],
    Discriminator(
        lambda value: _first_key(value, ("name", "vector")),
        custom_error_type="vector",
        custom_error_message='A vector is {"layer": …, "vector": […]} or {"name": …}',
    ),
]


class Change(Document):
    """Edits and vectors that act together. What policies hold, and most of what `steer` says."""

    edits: Annotated[list[Edit], Field(max_length=LONGEST_LIST)] = []
    vectors: Annotated[list[Vector], Field(max_length=LONGEST_LIST)] = []
    strength_multiplier: float = 1.0
    conflict: Literal["error", "sum", "last"] = "error"


class Policy(Change):
    """A named list of edits and vectors, made for one partition. when: a condition on all of them."""

    partition_sha256: str
    description: str | None = None
    when: When | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Policy:
        if not self.edits and not self.vectors:
            raise ValueError("a policy has at least one edit or vector")
        return self


class Steer(Change):
    """Edits of features and dense vectors on this request, and stored policies by name. strength_multiplier scales the
    change that each of the request's own edits and vectors makes; conflict: what two edits of one sub-unit at one
    token are."""

    policies: Annotated[list[Name], Field(max_length=LONGEST_LIST)] = []


class Activations(Document):
    """Activations of chosen features: at the token where it is largest in absolute value, the mean, or all tokens."""

    features: Annotated[list[FeatureName], Field(min_length=1, max_length=LONGEST_LIST)]
    reduce: Literal["peak", "mean", "tokens"] = "peak"


class Request(Document):
    """One request document. The image comes in `image`, or as a part of its own in a multipart request."""

    id: Identity | None = None
    expect: Expect | None = None
    image: ImageBytes | None = None
    top_k: Annotated[int, Field(ge=1)] = 5
    explain: Explain | None = None
    steer: Steer | None = None
    activations: Activations | None = None
