"""The model as it is served: the one place that holds the server's address and key, and asks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import quote

import httpx

from elude_runtime.api.schema.operations import DescribeRequest, Description, FeaturesReply, FeaturesRequest
from elude_runtime.api.schema.reply import ProblemDocument, Reply
from elude_runtime.api.schema.request import Expect, Request
from elude_runtime.client import ProblemError
from elude_runtime.client.exchange import Exchange, operation, prediction
from elude_runtime.client.problems import problem_of, problem_of_failure
from elude_runtime.errors import SettingsError

D = TypeVar("D", Request, FeaturesRequest)
_TIMEOUT = httpx.Timeout(90.0, connect=5.0)  # above the server's own responseTimeout, which answers with the reason
_IN_PLACE_OF_THE_KEY = b"***"


@dataclass(frozen=True)
class Answer:
    """What goes back to the page: a document, or a problem with its status. headers: those that the page acts on."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


class ServedModel:
    """A model behind TorchServe's inference address, of the checkpoint that the explorer was started with.

    Every request says which checkpoint it expects, so that a server that was restarted with another one answers 412
    instead of explaining features by names that mean something else there.
    """

    def __init__(
        self,
        url: str,
        model: str,
        checkpoint_sha256: str,
        *,
        token: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise SettingsError(f"The address {url!r} is no http:// or https:// address; give the inference address.")
        self.url, self.model, self.checkpoint_sha256 = url.rstrip("/"), model, checkpoint_sha256
        self.has_token = token is not None
        self._key = (token or "").encode()
        headers = {"Accept": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        # trust_env: a proxy of the environment must not get loopback requests and the key.
        self._http = httpx.AsyncClient(headers=headers, timeout=_TIMEOUT, transport=transport, trust_env=False)
        self._path = f"{self.url}/predictions/{quote(model, safe='')}"

    async def describe(self) -> Description:
        """What the server serves. ProblemError, also for another checkpoint, and for a server that does not describe
        itself as this version needs."""
        exchange = operation(DescribeRequest(), Description)
        response = await self._post(exchange)
        try:
            described = exchange.read(response)
        except ProblemError as error:
            if error.problem.type != "server-reply":
                raise
            raise problem(
                "server-other-version",
                "The server does not describe itself as this explorer needs",
                f"{self.url} is an older version, or another service: {_first(error.problem.detail)} "
                "Serve an archive made by this version (elude archive).",
            ) from error
        if described.model.checkpoint_sha256 != self.checkpoint_sha256:
            raise problem(
                "other-checkpoint",
                "The server serves another checkpoint",
                f"The model {self.model} at {self.url} is of checkpoint {described.model.checkpoint_sha256[:12]}, the "
                f"explorer was started with {self.checkpoint_sha256[:12]}, whose features are others. Serve an archive "
                "of this one, or start the explorer with the checkpoint that is served.",
                status=412,
            )
        return described

    async def features(self, wish: FeaturesRequest) -> Answer:
        """A search, as the server answers it. ProblemError."""
        return await self._answer(operation(self._expecting(wish), FeaturesReply))

    async def ask(self, image: bytes, wish: Request) -> Answer:
        """A prediction with all that the document asks for, byte for byte as the server answers. ProblemError."""
        return await self._answer(prediction(image, self._expecting(wish)))

    async def close(self) -> None:
        await self._http.aclose()

    def _expecting(self, wish: D) -> D:
        return wish.model_copy(update={"expect": Expect(checkpoint_sha256=self.checkpoint_sha256)})

    async def _answer(self, exchange: Exchange[Reply] | Exchange[FeaturesReply]) -> Answer:
        response = await self._post(exchange)
        if response.status_code == 200 and response.headers.get("content-type", "").startswith("application/json"):
            return Answer(200, self._without_key(response.content))
        return self.problem(problem_of(response), response.headers.get("retry-after"))

    async def _post(self, exchange: Exchange) -> httpx.Response:
        try:
            return await self._http.post(self._path, **exchange.content)
        except httpx.HTTPError as error:
            raise problem_of_failure(error) from error

    def problem(self, error: ProblemError, retry_after: str | None = None) -> Answer:
        """A problem as the page gets it, whoever stated it."""
        headers = {"Retry-After": retry_after} if retry_after and retry_after.isdecimal() else {}
        body = error.problem.model_dump_json(exclude_none=True).encode()
        return Answer(error.problem.status, self._without_key(body), "application/problem+json", headers)

    def _without_key(self, body: bytes) -> bytes:
        """A strange server may echo what it was sent."""
        return body.replace(self._key, _IN_PLACE_OF_THE_KEY) if self._key else body


def problem(kind: str, title: str, detail: str, status: int = 502) -> ProblemError:
    """A problem that the explorer itself states."""
    return ProblemError(ProblemDocument(type=kind, title=title, status=status, detail=detail), None)


def _first(detail: str) -> str:
    """The server's own words in a problem of the client, which come after its advice."""
    said = detail.partition("It said: ")[2] or detail
    return said if said.endswith(".") else f"{said}."
