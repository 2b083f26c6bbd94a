"""Asks a server: closed loop (N clients, each waits for its answer) or open loop (a schedule that waits for none)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx


@dataclass(frozen=True)
class Ask:
    """One POST request. kind: a name under which figures are taken."""

    url: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = "plain"


@dataclass(frozen=True)
class Answer:
    """What came of an `Ask`. due: seconds after the run's start when it was to be sent; late: seconds by which the
    generator missed that; seconds: from `due` until the whole answer was there, so that a generator that lags behind
    makes nothing look faster; status: 0 where the connection failed, with the reason in `error`."""

    kind: str
    status: int
    due: float
    late: float
    seconds: float
    error: str = ""


class Generator:
    """Asks over connections that are kept from run to run. To be used inside one event loop."""

    def __init__(self, timeout: float = 120.0) -> None:
        """timeout: seconds until an answer counts as failed."""
        # no bound on connections: an open loop must never queue on the client's side
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=600)
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def closed(self, asks: Sequence[Ask], clients: int) -> list[Answer]:
        """All requests, in order, by so many clients: each takes the next one as soon as its last is answered."""
        start, left = time.perf_counter(), iter(enumerate(asks))
        answers: list[Answer | None] = [None] * len(asks)

        async def client() -> None:
            for number, ask in left:  # one iterator for all of them
                answers[number] = await self._ask(ask, start, time.perf_counter() - start)

        await asyncio.gather(*(client() for _ in range(clients)))
        return [answer for answer in answers if answer is not None]

    async def open(self, asks: Sequence[Ask], times: Sequence[float]) -> list[Answer]:
        """Every request at its time (seconds after the start, ascending), whatever was answered by then."""
        start, running = time.perf_counter(), []
        for ask, due in zip(asks, times, strict=True):
            wait = due - (time.perf_counter() - start)
            if wait > 0:
                await asyncio.sleep(wait)
            running.append(asyncio.create_task(self._ask(ask, start, due)))
        return list(await asyncio.gather(*running))

    async def _ask(self, ask: Ask, start: float, due: float) -> Answer:
        late, status, error = time.perf_counter() - start - due, 0, ""
        try:
            reply = await self._client.post(ask.url, content=ask.body, headers=dict(ask.headers))
            status = reply.status_code
            if status != 200:
                error = reply.text[:200]
        except httpx.HTTPError as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Answer(ask.kind, status, due, late, time.perf_counter() - start - due, error)
