"""The explorer's web application: the pages as files, and the few operations that they need of the served model."""

from __future__ import annotations

import io
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from PIL import Image
from pydantic import Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as WebRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from elude_runtime.api.problems import invalid_document
from elude_runtime.api.schema.base import LONGEST_LIST, Document, FeatureName, Name
from elude_runtime.api.schema.json_text import JSONError, parse_json
from elude_runtime.api.schema.operations import FeaturesRequest
from elude_runtime.api.schema.request import Change, Policy, Request, Steer
from elude_runtime.client import ProblemError
from elude_runtime.errors import CheckpointError, EludeError
from elude_runtime.explore.guard import Guard
from elude_runtime.explore.images import ImageStore
from elude_runtime.explore.material import Material
from elude_runtime.explore.served import Answer, ServedModel, problem

D = TypeVar("D", bound=Document)
_LONGEST_DOCUMENT = 1_000_000
_USUAL_IMAGE_LIMIT = 5_000_000  # until the server has said its own
_DEPTH = 32


class Ask(Document):
    """A question about an image that was sent before. request: as the API takes it, without the image."""

    image: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    request: Request


class OfFeatures(Document):
    """Features whose faces are wanted."""

    features: Annotated[list[FeatureName], Field(max_length=LONGEST_LIST)]


class NewPolicy(Document):
    """What is to be stored beside the checkpoint."""

    name: Name
    description: Annotated[str, Field(max_length=500)] | None = None
    change: Change


@dataclass(frozen=True)
class Explorer:
    """One run. pages: the folder of rendered pages; secret: what the printed address carries."""

    served: ServedModel
    material: Material
    pages: Path
    secret: str
    cookie: str = "elude-explore"

    def app(self) -> ASGIApp:
        return Guard(_application(self), self.secret, self.cookie)


def new_secret() -> str:
    return secrets.token_urlsafe(24)


def _application(explorer: Explorer) -> Starlette:
    service = _Service(explorer)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await explorer.served.close()

    return Starlette(
        routes=[
            Route("/api/checkpoint", service.checkpoint),
            Route("/api/server", service.server),
            Route("/api/samples/{number:int}", service.sample),
            Route("/api/samples/{number:int}/original", service.original),
            Route("/api/images", service.image, methods=["POST"]),
            Route("/api/ask", service.ask, methods=["POST"]),
            Route("/api/features", service.features, methods=["POST"]),
            Route("/api/exemplars", service.exemplars, methods=["POST"]),
            Route("/api/policies", service.policy, methods=["POST"]),
            Mount("/", _Pages(directory=explorer.pages, html=True)),
        ],
        exception_handlers={ProblemError: service.problem, EludeError: service.user_error},
        lifespan=lifespan,
    )


class _Pages(StaticFiles):
    """Files of the pages' folder alone: no links out of it, no listing; looked at again on every visit."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


class _Service:
    """The operations behind /api/."""

    def __init__(self, explorer: Explorer) -> None:
        self._served, self._material = explorer.served, explorer.material
        self._images = ImageStore()
        self._image_limit = _USUAL_IMAGE_LIMIT

    async def checkpoint(self, request: WebRequest) -> Response:
        """What the checkpoint says, whether or not its server answers."""
        return JSONResponse(self._material.facts(), headers={"Cache-Control": "no-store"})

    async def server(self, request: WebRequest) -> Response:
        """What the server says of itself. A problem where there is none, or one of another checkpoint or version."""
        described = await self._served.describe()
        self._image_limit = described.limits.get("max_image_bytes", _USUAL_IMAGE_LIMIT)
        return JSONResponse(
            {
                "url": self._served.url,
                "model": self._served.model,
                "has_token": self._served.has_token,
                "elude_version": described.elude_version,
                "output": described.output,
                "limits": described.limits,
                "policies": [one.model_dump(mode="json") for one in described.policies],
            },
            headers={"Cache-Control": "no-store"},
        )

    async def sample(self, request: WebRequest) -> Response:
        """The thumbnail of an exemplar image."""
        file = self._material.sample(request.path_params["number"])
        if file is None:
            raise problem("unknown-image", "No such image", "The catalogue has no picture of this number.", 404)
        return FileResponse(file, headers={"Cache-Control": "no-cache"})

    async def original(self, request: WebRequest) -> Response:
        """An exemplar image itself, where it has not moved or changed."""
        encoded = await run_in_threadpool(self._material.original, request.path_params["number"])
        if encoded is None:
            raise problem("unknown-image", "The image has moved", "Its file is not there any more, or another.", 404)
        return Response(encoded, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    async def image(self, request: WebRequest) -> Response:
        """Keeps an image for questions about it."""
        encoded = await _body(request, self._image_limit, "The image")
        if not encoded:
            raise problem("invalid-image", "The image is empty", "The file has no bytes; choose another.", 422)
        return JSONResponse({"image": self._images.put(encoded)})

    async def ask(self, request: WebRequest) -> Response:
        """A question to the served model about an image that it was sent."""
        asked = await _document(request, Ask)
        extra = asked.request.model_fields_set & {"id", "expect", "image"}
        if extra:
            raise problem(
                "invalid-document", "Not for the explorer", f"request.{min(extra)}: the explorer sets it itself.", 422
            )
        image = self._images.get(asked.image)
        if image is None:
            raise problem("unknown-image", "The image is not here any more", "Send the image again.", 404)
        return _response(await self._served.ask(image, asked.request))

    async def features(self, request: WebRequest) -> Response:
        return _response(await self._served.features(await _document(request, FeaturesRequest)))

    async def exemplars(self, request: WebRequest) -> Response:
        """What the catalogue knows of features: label, and the images at both ends."""
        wish = await _document(request, OfFeatures)
        return JSONResponse({name: self._material.face(name) for name in wish.features})

    async def policy(self, request: WebRequest) -> Response:
        """Stores a policy beside the checkpoint, after the served model has carried it out once."""
        wish = await _document(request, NewPolicy)
        change = wish.change.model_dump(mode="json", exclude_unset=True)
        fields = {**change, "partition_sha256": self._material.partition_sha256}
        if wish.description:
            fields["description"] = wish.description
        try:
            policy = Policy.model_validate(fields)
        except ValidationError as error:
            raise ProblemError(invalid_document(error, fields).document(), None) from error
        tried = await self._served.ask(_blank_image(), Request(top_k=1, steer=Steer.model_validate(change)))
        if tried.status != 200:
            return _response(tried)
        document = policy.model_dump(mode="json", exclude_unset=True)
        replaced = await run_in_threadpool(self._material.save_policy, wish.name, document)
        return JSONResponse({"name": wish.name, "replaced": replaced, "file": str(self._material.policies_file)})

    def problem(self, request: WebRequest, error: Exception) -> Response:
        """The reply for a ProblemError, of the server or of a document."""
        assert isinstance(error, ProblemError)
        return _response(self._served.problem(error))

    def user_error(self, request: WebRequest, error: Exception) -> Response:
        """What the checkpoint or the disk refuses, in its own sentence."""
        kind = "checkpoint" if isinstance(error, CheckpointError) else "storage"
        return self.problem(request, problem(kind, "It could not be stored", str(error), 409))


# --- bodies and replies -----------------------------------------------------------------------------------------------


async def _body(request: WebRequest, limit: int, what: str) -> bytes:
    """The whole body. ProblemError for one that is larger than the limit, without reading it to its end."""
    made = bytearray()
    async for chunk in request.stream():
        made += chunk
        if len(made) > limit:
            detail = f"{what} has more than {limit:,} bytes, the limit."
            raise problem("image-too-large", f"{what} is too large", detail, 413)
    return bytes(made)


async def _document(request: WebRequest, kind: type[D]) -> D:
    """The validated document of a JSON body."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise problem("unsupported-content-type", "Unsupported content type", "Send application/json.", 415)
    body = await _body(request, _LONGEST_DOCUMENT, "The document")
    try:
        values = parse_json(body, _DEPTH)
        return kind.model_validate(values)
    except JSONError as error:
        raise problem("not-json", "The body is not JSON", str(error), 400) from error
    except ValidationError as error:
        raise ProblemError(invalid_document(error, values).document(), None) from error


def _blank_image() -> bytes:
    """A small grey picture to try a policy on."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(out, "PNG")
    return out.getvalue()


def _response(answer: Answer) -> Response:
    headers = {"Cache-Control": "no-store", **answer.headers}
    return Response(answer.body, answer.status, headers, answer.media_type)
