"""How long a slider waits for its answer, in plain predictions: both over HTTP, measured alternately."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import httpx

from elude_runtime.client import Client
from elude_runtime.errors import ServerError
from elude_runtime.explore.app import Explorer
from elude_runtime.explore.guard import HEADER
from elude_runtime.explore.listen import in_background
from elude_runtime.offline.bench import Ratio
from elude_runtime.offline.image_files import Progress

_FACTORS = (-2.0, -1.0, 0.5, 2.0, 3.0)
_WARM = 5  # questions of either kind before any is timed


def slider_time(
    explorer: Explorer, token: str | None, images: Sequence[bytes], pairs: int, progress: Progress | None = None
) -> dict[str, Any]:
    """`pairs` of a plain prediction, asked of the server itself as a client does (the encoded image alone, on a kept
    connection), and a slider's question through the explorer as its page asks it (the image was sent before; its top
    concept scaled; default and steered prediction), in turns, neither always first. Milliseconds are medians.

    ServerError for a reply that is no answer.
    """
    served = explorer.served
    key = {"Authorization": f"Bearer {token}"} if token else {}
    with (
        in_background(explorer.app()) as address,
        httpx.Client(headers=key, timeout=90, trust_env=False) as server,
        httpx.Client(base_url=address, headers={HEADER: "1"}, timeout=90, trust_env=False) as page,
        Client(served.url, served.model, token=token) as api,
    ):
        _checked(page.get("/", params={"key": explorer.secret}, follow_redirects=True))
        sent = [_checked(page.post("/api/images", content=image)).json()["image"] for image in images]
        features = [_top_concept(api, image) for image in images]
        path = f"{served.url}/predictions/{served.model}"

        def plain(turn: int) -> httpx.Response:
            body = images[turn % len(images)]
            return server.post(path, content=body, headers={"Content-Type": "application/octet-stream"})

        def slider(turn: int) -> httpx.Response:
            which = turn % len(images)
            edit = {"feature": features[which], "mode": "scale", "value": _FACTORS[turn % len(_FACTORS)]}
            asked = {"image": sent[which], "request": {"top_k": 5, "steer": {"edits": [edit]}}}
            return page.post("/api/ask", json=asked)

        for turn in range(_WARM):
            assert (
                "steered" in _checked(slider(turn)).json() and "steered" not in _checked(plain(turn)).json()["answer"]
            )
        seconds: dict[Callable[[int], httpx.Response], list[float]] = {plain: [], slider: []}
        for turn in range(pairs):
            for ask in ((plain, slider), (slider, plain))[turn % 2]:
                start = time.perf_counter()
                reply = ask(turn)
                seconds[ask].append(time.perf_counter() - start)
                _checked(reply)
            if progress:
                progress("pairs", 1, pairs)
    ratios = [b / a for a, b in zip(seconds[plain], seconds[slider], strict=True)]
    return {
        "images": len(images),
        "plain_ms": round(1000 * statistics.median(seconds[plain]), 2),
        "slider_ms": round(1000 * statistics.median(seconds[slider]), 2),
        "ratio": asdict(Ratio.of(ratios)),
    }


def _top_concept(api: Client, image: bytes) -> str:
    found = api.explain(image, top_features=1).explanations
    assert found is not None
    return found[0].layers[-1].features[0].feature


def _checked(reply: httpx.Response) -> httpx.Response:
    if reply.status_code != 200:
        raise ServerError(f"A question was not answered ({reply.status_code}): {reply.text[:200]}")
    return reply
