"""KServe's inference protocols, version 1 (`instances`) and version 2 (`inputs`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elude_runtime.api.schema.base import LONGEST_LIST, Document, Identity
from elude_runtime.api.schema.reply import ProblemDocument, Reply


class V1Request(Document):
    """Each instance is a request document, or {"b64": …}: an image and nothing else. They are validated one by one, so
    that a bad instance gets a problem of its own."""

    instances: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=LONGEST_LIST)]


class V1Reply(Document):
    predictions: list[Reply | ProblemDocument]


class V2Parameters(Document):
    """elude: the request document (without an image) that holds for all images."""

    elude: dict[str, Any] | str | None = None


class V2Tensor(Document):
    """BYTES [N]: encoded images in base64. FP32 [N, 3, H, W]: normalised images of the model's own input size, flat or
    nested, row by row."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=4)]
    datatype: Literal["BYTES", "FP32"]
    parameters: dict[str, Any] | None = None
    data: list[Any]


class V2Output(Document):
    """An output that is asked for."""

    name: Literal["logits", "elude"]
    parameters: dict[str, Any] | None = None


class V2Request(Document):
    id: Identity | None = None
    parameters: V2Parameters | None = None
    inputs: Annotated[list[V2Tensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[V2Output], Field(min_length=1, max_length=2)] | None = None


class V2ReplyTensor(Document):
    """logits: FP32 [N, K], row by row; elude: BYTES [N], the reply documents as JSON text."""

    name: Literal["logits", "elude"]
    shape: list[int]
    datatype: Literal["BYTES", "FP32"]
    data: list[Any]


class V2Reply(Document):
    model_name: str
    model_version: str
    id: str
    outputs: list[V2ReplyTensor]
