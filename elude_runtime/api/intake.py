"""From the bytes of one request to validated documents and images."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.decoding import DecodePool
from elude_runtime.api.problems import Problem, at, invalid_document
from elude_runtime.api.schema.base import Document
from elude_runtime.api.schema.json_text import JSONError, parse_json
from elude_runtime.api.schema.operations import DescribeRequest, FeaturesRequest, VectorsRequest
from elude_runtime.api.schema.request import Request
from elude_runtime.errors import ImagesError, ImageTooLargeError
from elude_runtime.network.preprocessing import SERVED_FORMATS, announced_pixels, decode_image, to_input

OPERATIONS: dict[str, type[Document]] = {
    "features": FeaturesRequest,
    "vectors": VectorsRequest,
    "describe": DescribeRequest,
}
_RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
D = TypeVar("D", bound=BaseModel)


@dataclass(frozen=True)
class Row:
    """One request of a batch, as bytes. parts: {"body": …} of a raw or JSON body, {"image": …, "request": …} of a
    multipart one; content_type: lower case, without parameters; explain: it came in on /explanations; route: what
    follows the version in the path; traceparent: the header of W3C's Trace Context, as it came."""

    parts: Mapping[str, bytes]
    content_type: str
    explain: bool
    route: str
    request_id: str
    traceparent: str = ""


@dataclass(frozen=True)
class Body:
    """What one request brought. image: encoded, where it came as bytes of its own; operation: of `OPERATIONS`, or ""
    for a prediction."""

    document: Any
    image: bytes | None
    operation: str


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it, float32 [3, H, W], and the size in pixels that it had upright, None where it came
    as the model's own input."""

    tensor: Tensor
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Question:
    """What is asked about one image: the validated document, and the image."""

    request: Request
    picture: Picture


class ImageReader:
    """Reads the images of one request, however many: each is decoded, preprocessed and dropped, one after another, or
    side by side where there is a pool."""

    def __init__(
        self,
        config: ServingConfig,
        transform: Callable[[Image.Image], Tensor],
        pool: DecodePool,
        *,
        spread: bool = True,
    ) -> None:
        """pool: bounds what is decoded at a time; spread: several images of this request may go to its threads."""
        self._config, self._transform, self._pool, self._spread = config, transform, pool, spread
        self._pixels = 0

    def read(self, encoded: bytes) -> Picture:
        """Problem for an image that is too large or cannot be decoded, or where it and those before are too large."""
        return self._counted(self._decode(encoded))

    def read_all(self, encoded: Sequence[bytes]) -> list[Picture | Problem]:
        """What `read` would give or raise for each, one after another."""
        sure = self._sure_to_be_read(encoded) if self._spread and self._pool.spreads(len(encoded)) else 0
        first = self._pool.map(partial(_attempt, self._decode), encoded[:sure])
        found = [self._counted(one) if isinstance(one, Picture) else one for one in first]
        return found + [_attempt(self.read, one) for one in encoded[sure:]]

    def _sure_to_be_read(self, encoded: Sequence[bytes]) -> int:
        """How many of the first images stay within the request's limit even if none of them is refused: nobody may have
        more decoded side by side than one after another."""
        pixels = self._pixels
        for number, one in enumerate(encoded):
            if len(one) <= self._config.max_image_bytes:  # larger ones are refused unopened
                pixels += announced_pixels(one, SERVED_FORMATS)
            if pixels > self._config.max_request_pixels:
                return number
        return len(encoded)

    def _decode(self, encoded: bytes) -> Picture:
        """From any thread; counts nothing."""
        limit = self._config.max_image_bytes
        if len(encoded) > limit:
            raise Problem("image-too-large", f"The image has {len(encoded)} bytes, the limit is {limit}.")
        with ExitStack() as held:

            def begin(pixels: int) -> None:
                if self._pixels + pixels > self._config.max_request_pixels:
                    raise ImageTooLargeError(
                        f"The request's images have over {self._config.max_request_pixels} pixels in all; send fewer, "
                        "or smaller ones."
                    )
                held.enter_context(self._pool.room(pixels))

            try:
                image = decode_image(encoded, self._config.max_image_pixels, SERVED_FORMATS, begin)
                return Picture(to_input(image, self._transform), image.size)
            except ImagesError as error:
                too_large = isinstance(error, ImageTooLargeError)
                raise Problem("image-too-large" if too_large else "invalid-image", str(error)) from error

    def _counted(self, picture: Picture) -> Picture:
        assert picture.size is not None
        self._pixels += picture.size[0] * picture.size[1]
        return picture


def _attempt(read: Callable[[bytes], Picture], encoded: bytes) -> Picture | Problem:
    try:
        return read(encoded)
    except Problem as problem:
        return problem


def read_body(row: Row, config: ServingConfig) -> Body:
    """The document of a request as plain JSON values. Problem for what is no JSON, or no operation (404)."""
    route = row.route
    if route and route not in OPERATIONS:
        raise Problem("unknown-route", f"There is no sub-route {route[:40]!r}; there are {', '.join(OPERATIONS)}.")
    document, image = _document(row, config, route)
    if not route and isinstance(document, dict) and "op" in document and image is None:
        route = document["op"] if isinstance(document["op"], str) else ""
        if route not in OPERATIONS:
            raise Problem(
                "unknown-route",
                f"There is no operation {str(document['op'])[:40]!r}; there are {', '.join(OPERATIONS)}.",
                at(["op"], "unknown operation"),
            )
    elif isinstance(document, dict) and document.get("op", route) != route:
        raise Problem("invalid-document", f"op: the path says {route!r}.", at(["op"], "differs from the path"))
    return Body(document, image, route)


def read_question(document: Any, image: bytes | None, reader: ImageReader, *, explain: bool) -> Question:
    """A prediction request and its image, read. explain: `explain` defaults to {}. Raises Problem."""
    request, encoded = read_asked(document, image, explain=explain)
    return Question(request, reader.read(encoded))


def read_asked(document: Any, image: bytes | None, *, explain: bool) -> tuple[Request, bytes]:
    """(a prediction request, its image as it came). Raises Problem."""
    request = read_request(document, explain=explain)
    if image is None:
        if request.image is None:
            raise Problem("invalid-document", "image: the request has no image.", at(["image"], "Field required"))
        image = from_base64(request.image.b64, ["image", "b64"])
    elif request.image is not None:
        raise Problem("invalid-document", "image: the image came as a part of its own; leave it out of the document.")
    return request, image


def read_request(document: Any, *, explain: bool) -> Request:
    """Validate a prediction request. Raises Problem."""
    if explain and isinstance(document, dict) and document.get("explain") is None:
        document = {**document, "explain": {}}
    return validated(Request, document)


def validated(kind: type[D], document: Any) -> D:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise invalid_document(error, document) from error


def from_base64(text: str, loc: list[str | int]) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        where = ".".join(map(str, loc))
        raise Problem("invalid-image", f"{where}: the text is not base64.", at(loc, "not base64")) from error


def _document(row: Row, config: ServingConfig, route: str) -> tuple[Any, bytes | None]:
    """(document, encoded image where it came as bytes of its own)."""
    parts = row.parts
    if row.content_type == "multipart/form-data" or "image" in parts or "request" in parts:
        unknown = sorted(set(parts) - {"image", "request"})
        if unknown or "image" not in parts:
            raise Problem(
                "invalid-document", "A multipart request has the parts `image` (a file) and `request` (JSON)."
            )
        return _json(parts["request"], config) if parts.get("request") else {}, bytes(parts["image"])
    body = bytes(parts.get("body", parts.get("data", b"")))
    if not body and route:
        return {}, None  # `describe` and `features` can be asked without a word
    if row.content_type == "application/json" or (row.content_type in _RAW_TYPES and body[:1] == b"{"):
        return _json(body, config), None
    if row.content_type in _RAW_TYPES or row.content_type.startswith("image/"):
        if not body:
            raise Problem("invalid-image", "The body is empty; send an image, or a JSON document with one.")
        return {}, body
    raise Problem(
        "unsupported-content-type",
        f"Content type {row.content_type[:60]!r} is not taken; send an image, application/json or multipart/form-data.",
    )


def _json(body: bytes, config: ServingConfig) -> Any:
    try:
        return parse_json(bytes(body), config.max_json_depth)
    except JSONError as error:
        raise Problem("not-json", str(error)) from error
