"""What goes over the wire: images and documents as HTTP requests, replies as documents, and when to ask again."""

from __future__ import annotations

import base64
import email.utils
import io
import os
import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypedDict, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from elude_runtime.api.schema.reply import Reply
from elude_runtime.api.schema.request import Expect, Request
from elude_runtime.client.lenient import read_reply
from elude_runtime.client.problems import is_torchserves, problem_of, problem_of_document, problem_of_reply
from elude_runtime.errors import ImagesError

if TYPE_CHECKING:
    from PIL import Image

    ImageLike: TypeAlias = bytes | str | os.PathLike[str] | Image.Image

R = TypeVar("R", bound=BaseModel)
D = TypeVar("D", bound=BaseModel)
# A server that says "in an hour" is not waited for that long; the caller hears of it instead.
LONGEST_WAIT = 30.0
_FIRST_WAIT = 0.25


class ExplainFields(TypedDict, total=False):
    """The fields of `schema.request.Explain`."""

    targets: Sequence[Any]
    method: Literal["auto", "gradient", "integrated_gradients", "ablation"]
    steps: int
    layers: Sequence[str] | None
    level: Literal["concepts", "subunits"]
    top_features: int
    sign: Literal["both", "positive", "negative"]
    effects: bool
    heatmaps: Literal["none", "values", "png"]
    pixels: bool


class SteerFields(TypedDict, total=False):
    """The fields of `schema.request.Steer`."""

    edits: Sequence[Any]
    vectors: Sequence[Any]
    policies: Sequence[str]
    strength_multiplier: float
    conflict: Literal["error", "sum", "last"]


@dataclass(frozen=True)
class Exchange(Generic[R]):
    """One request as it goes out, always a POST, and the document that is to come back. content: of httpx's request."""

    reply: type[R]
    content: dict[str, Any]

    def read(self, response: httpx.Response) -> R:
        """The document of a response. Raises ProblemError."""
        if response.status_code != 200:
            raise problem_of(response)
        try:
            return read_reply(self.reply, response.content)
        except ValidationError as error:
            if response.headers.get("content-type", "").startswith("application/json"):
                raise problem_of_reply(response, error) from error
            raise problem_of(response) from error


def validated(model: type[D], fields: Mapping[str, Any]) -> D:
    """A document of Python values: tuples and arrays are lists, documents may be given as dictionaries.

    Raises ProblemError ("invalid-document") where the service would.
    """
    text = _json(fields)
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise problem_of_document(error, from_json(text)) from error


def _json(fields: Mapping[str, Any]) -> bytes:
    try:
        return to_json(dict(fields), inf_nan_mode="constants", fallback=_as_list)
    except PydanticSerializationError as error:
        raise TypeError(str(error).rpartition("Error: ")[2]) from error


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers, PyTorch's tensors
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in a request document")


def prediction(
    image: ImageLike, document: Request | Mapping[str, Any] | None, expect: Expect | None = None
) -> Exchange[Reply]:
    """A request about one image. Defaults are left out, so that older servers take what they know; a dictionary goes
    out as it is, so that newer ones can be asked for what this version does not know. expect: where the document says
    none itself."""
    if isinstance(document, Request):
        text = _expecting(document, expect).model_dump_json(exclude_defaults=True).encode()
    else:
        text = _json(document or {} if expect is None else {"expect": expect, **(document or {})})
    encoded = encoded_image(image)
    if text == b"{}":
        # Declared as what it is: TorchServe takes a body without a type, or with a form's, apart into fields.
        return Exchange(Reply, {"content": encoded, "headers": {"Content-Type": "application/octet-stream"}})
    parts = {
        "image": ("image", encoded, "application/octet-stream"),
        "request": ("request.json", text, "application/json"),
    }
    return Exchange(Reply, {"files": parts})


def operation(document: BaseModel, reply: type[R], expect: Expect | None = None) -> Exchange[R]:
    """`features`, `vectors`, `describe`: by the document's `op`, which needs no version in the path."""
    asked = _expecting(document, expect)
    values = {"op": asked.op, **asked.model_dump(exclude_defaults=True)}  # type: ignore[attr-defined]
    return Exchange(reply, {"content": to_json(values), "headers": {"Content-Type": "application/json"}})


def _expecting(document: D, expect: Expect | None) -> D:
    if expect is None or document.expect is not None:  # type: ignore[attr-defined]
        return document
    return document.model_copy(update={"expect": expect})


def encoded_image(image: ImageLike) -> bytes:
    """The bytes of an encoded image. A path is read; a PIL image is turned upright and encoded as PNG, without loss.

    Raises ImagesError for a file that cannot be read.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    pillow = sys.modules.get("PIL.Image")  # whoever has a PIL image has imported it
    if pillow is not None and isinstance(image, pillow.Image):
        from PIL import ImageOps

        upright: Any = ImageOps.exif_transpose(image)
        if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            upright = upright.convert("RGB")
        out = io.BytesIO()
        upright.save(out, "PNG", compress_level=1)
        return out.getvalue()
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise ImagesError(f"The image {image} cannot be read: {error.strerror or error}.") from error
    raise TypeError(f"an image is bytes, a path or a PIL image, not {type(image).__name__}")


def images_b64(images: Iterable[ImageLike]) -> list[dict[str, str]]:
    """Images as a JSON document carries them."""
    return [{"b64": base64.b64encode(encoded_image(image)).decode()} for image in images]


def seconds_to_wait(outcome: httpx.Response | httpx.HTTPError, attempt: int, retries: int) -> float | None:
    """How long to wait before asking again after attempt 0, 1, …; None for not at all.

    Every call only computes, so it may be made twice. Asked again is where nothing was done (429, 503, no connection)
    and where the server was lost with the request (502 of a proxy, a connection that broke off). Where the request
    itself may be what ended a worker or took too long, it is asked once more and not again, so that it cannot take one
    worker after another. A caller's own time limit and everything else are final. Retry-After is kept to, up to
    `LONGEST_WAIT`; else the wait doubles. Both get a random part, so that many clients do not come back at one moment.
    """
    allowed = retries if _refused(outcome) or _lost(outcome) else min(retries, 1) if _suspect(outcome) else 0
    if attempt >= allowed:
        return None
    grown = _FIRST_WAIT * 2**attempt
    asked = None if isinstance(outcome, httpx.HTTPError) else _retry_after(outcome.headers.get("retry-after", ""))
    wait = grown * random.uniform(0.5, 1.0) if asked is None else asked + grown * random.uniform(0.0, 0.5)
    return min(wait, LONGEST_WAIT)


def _refused(outcome: httpx.Response | httpx.HTTPError) -> bool:
    """Nothing was done: too many requests, no worker, no connection."""
    if isinstance(outcome, httpx.Response):
        return outcome.status_code in (429, 503)
    return isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout)


def _lost(outcome: httpx.Response | httpx.HTTPError) -> bool:
    """The server went away with the request: the connection broke off, or a proxy's did."""
    if isinstance(outcome, httpx.Response):
        return outcome.status_code == 502
    return isinstance(outcome, httpx.NetworkError | httpx.RemoteProtocolError)


def _suspect(outcome: httpx.Response | httpx.HTTPError) -> bool:
    """A worker died over the batch (TorchServe's own 500 or 507; the service's are problems and would come again), or
    a proxy waited in vain."""
    return isinstance(outcome, httpx.Response) and (outcome.status_code == 504 or is_torchserves(outcome))


def _retry_after(text: str) -> float | None:
    """Seconds, from a number of them or a date (RFC 9110)."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
