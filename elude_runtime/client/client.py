"""`Client` and `AsyncClient`: one method for each thing that the service does, the same in both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from elude_runtime.api.schema.operations import (
    DescribeRequest,
    Description,
    FeatureInfo,
    FeaturesReply,
    FeaturesRequest,
    VectorsReply,
    VectorsRequest,
)
from elude_runtime.api.schema.reply import Reply
from elude_runtime.api.schema.request import Expect, Explain, Request, Steer
from elude_runtime.client.address import Address
from elude_runtime.client.exchange import (
    Exchange,
    ExplainFields,
    SteerFields,
    images_b64,
    operation,
    prediction,
    seconds_to_wait,
    validated,
)
from elude_runtime.client.problems import problem_of_failure

if TYPE_CHECKING:
    from elude_runtime.client.exchange import ImageLike

R = TypeVar("R", bound=BaseModel)


def _predict(top_k: int) -> Request:
    return validated(Request, {"top_k": top_k})


def _explain(document: Explain | None, fields: ExplainFields, top_k: int) -> Request:
    return validated(Request, {"top_k": top_k, "explain": _one(document, fields)})


def _steer(document: Steer | None, fields: SteerFields, explain: Explain | None, top_k: int) -> Request:
    return validated(Request, {"top_k": top_k, "explain": explain, "steer": _one(document, fields)})


def _one(document: BaseModel | None, fields: Mapping[str, Any]) -> BaseModel | Mapping[str, Any]:
    if document is None:
        return fields
    if fields:
        raise TypeError(f"give a whole {type(document).__name__} document or its fields by name, not both")
    return document


def _activations(features: Sequence[str], reduce: str) -> Request:
    return validated(Request, {"activations": {"features": features, "reduce": reduce}})


def _features(query: str | None, layer: str | None, ids: Sequence[str] | None, page: int) -> FeaturesRequest:
    return validated(FeaturesRequest, {"query": query, "layer": layer, "ids": ids, "limit": page})


def _vectors(
    layer: str,
    positive: Iterable[ImageLike],
    negative: Iterable[ImageLike],
    top_features: int,
    expect: Expect | None,
) -> Exchange[VectorsReply]:
    sets = {"positive": images_b64(positive), "negative": images_b64(negative)}
    asked = validated(VectorsRequest, {"layer": layer, **sets, "top_features": top_features})
    return operation(asked, VectorsReply, expect)


class Client(Address):
    """A service at `url` (TorchServe's inference address) that serves `model`, of one `version` or the default one.

        with Client("http://127.0.0.1:8080", "vit", token=key) as client:
            reply = client.explain("shark.jpg", targets=[2], top_features=3)

    An image is encoded bytes, a path or a PIL image. Replies are the documents of `elude_runtime.api.schema`; those of
    a newer server are read too, without what this version does not know. All that goes wrong is a `ProblemError`.
    timeout: seconds for each attempt; retries: further attempts where the server was busy, not there or lost on the
    way (see `exchange.seconds_to_wait`), 0 for none. token: the proxy's key, or TorchServe's inference key.
    checkpoint_sha256: the checkpoint that must answer, else "other-checkpoint", for who stores names of features; all
    requests but `describe` carry it. transport: httpx's, for a proxy, certificates, or tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        token: str | None = None,
        version: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        checkpoint_sha256: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, model, token, version, retries, checkpoint_sha256)
        self._http = httpx.Client(headers=self._headers, timeout=timeout, transport=transport)

    def predict(self, image: ImageLike, top_k: int = 5) -> Reply:
        """The model's own prediction, and no more."""
        return self.request(image, _predict(top_k))

    def explain(
        self, image: ImageLike, explain: Explain | None = None, *, top_k: int = 5, **fields: Unpack[ExplainFields]
    ) -> Reply:
        """Which features carried the decision: `explain`, or its fields by name (`targets`, `method`, …)."""
        return self.request(image, _explain(explain, fields, top_k))

    def steer(
        self,
        image: ImageLike,
        steer: Steer | None = None,
        *,
        explain: Explain | None = None,
        top_k: int = 5,
        **fields: Unpack[SteerFields],
    ) -> Reply:
        """The prediction with `edits`, `vectors` and `policies` in force, beside the unchanged one; `steer`, or its
        fields by name. explain: the steered answer too."""
        return self.request(image, _steer(steer, fields, explain, top_k))

    def activations(
        self, image: ImageLike, features: Sequence[str], reduce: Literal["peak", "mean", "tokens"] = "peak"
    ) -> Reply:
        """Activations of these features, beside the prediction."""
        return self.request(image, _activations(features, reduce))

    def request(self, image: ImageLike, document: Request | Mapping[str, Any] | None = None) -> Reply:
        """Any request about one image. A dictionary is sent as it is, and validated by the service alone."""
        return self._send(prediction(image, document, self._expect))

    def features(
        self, query: str | None = None, *, layer: str | None = None, ids: Sequence[str] | None = None, page: int = 50
    ) -> Iterator[FeatureInfo]:
        """All features that match words of their label or name, best first; asks for `page` at a time, as needed."""
        asked = _features(query, layer, ids, page)
        while True:
            found = self._send(operation(asked, FeaturesReply, self._expect))
            yield from found.features
            if found.next_cursor is None:
                return
            asked = asked.model_copy(update={"cursor": found.next_cursor})

    def vectors(
        self, layer: str, positive: Iterable[ImageLike], negative: Iterable[ImageLike], *, top_features: int = 10
    ) -> VectorsReply:
        """What sets one set of images apart from another: features, edits and a direction for `steer`."""
        return self._send(_vectors(layer, positive, negative, top_features, self._expect))

    def describe(self) -> Description:
        """What is served: layers, digests, limits, policies, the OpenAPI document."""
        return self._send(operation(DescribeRequest(), Description))

    def _send(self, exchange: Exchange[R]) -> R:
        attempt = 0
        while True:
            try:
                outcome: httpx.Response | httpx.HTTPError = self._http.post(self._path, **exchange.content)
            except httpx.HTTPError as error:
                outcome = error
            wait = seconds_to_wait(outcome, attempt, self._retries)
            if wait is None:
                return _result(exchange, outcome)
            time.sleep(wait)
            attempt += 1

    def close(self) -> None:
        """Closes the connections; the client cannot be used after it."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(Address):
    """`Client` for asyncio: the same arguments and methods, awaited; `features` is an asynchronous iterator."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        token: str | None = None,
        version: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        checkpoint_sha256: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, model, token, version, retries, checkpoint_sha256)
        self._http = httpx.AsyncClient(headers=self._headers, timeout=timeout, transport=transport)

    async def predict(self, image: ImageLike, top_k: int = 5) -> Reply:
        """See `Client.predict`; so for the methods below."""
        return await self.request(image, _predict(top_k))

    async def explain(
        self, image: ImageLike, explain: Explain | None = None, *, top_k: int = 5, **fields: Unpack[ExplainFields]
    ) -> Reply:
        return await self.request(image, _explain(explain, fields, top_k))

    async def steer(
        self,
        image: ImageLike,
        steer: Steer | None = None,
        *,
        explain: Explain | None = None,
        top_k: int = 5,
        **fields: Unpack[SteerFields],
    ) -> Reply:
        return await self.request(image, _steer(steer, fields, explain, top_k))

    async def activations(
        self, image: ImageLike, features: Sequence[str], reduce: Literal["peak", "mean", "tokens"] = "peak"
    ) -> Reply:
        return await self.request(image, _activations(features, reduce))

    async def request(self, image: ImageLike, document: Request | Mapping[str, Any] | None = None) -> Reply:
        return await self._send(prediction(image, document, self._expect))

    async def features(
        self, query: str | None = None, *, layer: str | None = None, ids: Sequence[str] | None = None, page: int = 50
    ) -> AsyncIterator[FeatureInfo]:
        asked = _features(query, layer, ids, page)
        while True:
            found = await self._send(operation(asked, FeaturesReply, self._expect))
            for feature in found.features:
                yield feature
            if found.next_cursor is None:
                return
            asked = asked.model_copy(update={"cursor": found.next_cursor})

    async def vectors(
        self, layer: str, positive: Iterable[ImageLike], negative: Iterable[ImageLike], *, top_features: int = 10
    ) -> VectorsReply:
        return await self._send(_vectors(layer, positive, negative, top_features, self._expect))

    async def describe(self) -> Description:
        return await self._send(operation(DescribeRequest(), Description))

    async def _send(self, exchange: Exchange[R]) -> R:
        attempt = 0
        while True:
            try:
                outcome: httpx.Response | httpx.HTTPError = await self._http.post(self._path, **exchange.content)
            except httpx.HTTPError as error:
                outcome = error
            wait = seconds_to_wait(outcome, attempt, self._retries)
            if wait is None:
                return _result(exchange, outcome)
            await asyncio.sleep(wait)
            attempt += 1

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _result(exchange: Exchange[R], outcome: httpx.Response | httpx.HTTPError) -> R:
    if isinstance(outcome, httpx.HTTPError):
        raise problem_of_failure(outcome) from outcome
    return exchange.read(outcome)
