"""Rows for the engine and their answers, read: what the tests of batches, policies, protocols and steering share."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import Rewritten
from support import encoded, picture
from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Answered, Engine
from elude_runtime.api.intake import Row
from elude_runtime.api.problems import PROBLEMS
from elude_runtime.api.schema.reply import ProblemDocument, Reply
from elude_runtime.network.preprocessing import decode_image, to_input

PNG = encoded(picture(200))
JSON = "application/json"


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def raw(data: bytes = PNG, *, explain: bool = False) -> Row:
    """A row of plain image bytes."""
    return Row({"body": data}, "application/octet-stream", explain, "", "r")


def body(values: Any, *, explain: bool = False, route: str = "") -> Row:
    """A row of a JSON body, as it is."""
    return Row({"body": json.dumps(values).encode()}, JSON, explain, route, "r")


def document(values: Mapping[str, Any] | None = None, image: bytes = PNG) -> Row:
    """A prediction request with an image."""
    return body({"image": b64(image), **(values or {})})


def steer(*edits: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A document that steers by these edits."""
    return {"steer": {"edits": list(edits), **more}}


def engine_of(model: EludeModel, **config: Any) -> Engine:
    return Engine(model, ServingConfig(**config), name="tiny", version="1.0")


def opened(rewritten: Rewritten, **config: Any) -> Engine:
    """An engine over what stands in the checkpoint's folder: catalogue, vectors and policies too."""
    return Engine.open(rewritten.path, ServingConfig(**config), name="tiny", version="1.0")


def read(answered: Answered) -> dict[str, Any]:
    """The JSON of an answer of any kind."""
    assert (answered.status, answered.content_type) == (200, JSON), answered.body
    return json.loads(answered.body)


def reply(answered: Answered) -> dict[str, Any]:
    made = read(answered)
    Reply.model_validate_json(answered.body)
    return made


def problem(answered: Answered) -> dict[str, Any]:
    assert answered.content_type == "application/problem+json", answered.body
    return problem_document(json.loads(answered.body), answered.status)


def problem_document(made: dict[str, Any], status: int) -> dict[str, Any]:
    ProblemDocument.model_validate(made)
    assert (made["status"], made["title"]) == PROBLEMS[made["type"]] and made["status"] == status
    assert made["detail"].endswith((".", "?", "…")), made["detail"]
    return made


def ask(engine: Engine, row: Row) -> dict[str, Any]:
    """The reply to one row alone."""
    (found,) = engine.answer([row])
    return reply(found)


def refused(engine: Engine, row: Row, kind: str) -> dict[str, Any]:
    """The problem of one row alone, which has to be of this type."""
    (found,) = engine.answer([row])
    made = problem(found)
    assert made["type"] == kind, made
    return made


def content(made: Mapping[str, Any]) -> dict[str, Any]:
    """A reply without what differs from one request to the next."""
    return {k: v for k, v in made.items() if k not in ("id", "timing_ms")}


def inputs(model: EludeModel, *images: bytes) -> Tensor:
    """Encoded images as the model's input [N, 3, H, W]."""
    transform = model.data_config.transform()
    return torch.stack([to_input(decode_image(image), transform) for image in images])


def text32(value: float | Tensor) -> float:
    """A float32 as replies write it: the shortest text that reads back as the same."""
    import numpy as np

    return float(str(np.float32(float(value))))


@dataclass
class Passes:
    """What went through the model. forward: rows of each pass that began at the image; tails: layer and images of each
    tail pass."""

    forward: list[int] = field(default_factory=list)
    tails: list[tuple[str, list[int]]] = field(default_factory=list)


@contextmanager
def counted(model: EludeModel) -> Iterator[Passes]:
    """Look on at a ViT. A pass from the image computes the patch embedding's convolution, a tail replays it."""
    found, embed, run = Passes(), model.base.patch_embed.proj, model.tails.run
    convolve = embed._conv_forward

    def embedding(images: Tensor, *rest: Any) -> Tensor:
        found.forward.append(len(images))
        return convolve(images, *rest)

    def tail(recording: Any, layer: str, y: Tensor, rows: Tensor, *rest: Any) -> Tensor:
        assert len(y) == len(rows)
        found.tails.append((layer, rows.tolist()))
        return run(recording, layer, y, rows, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(embed, "_conv_forward", embedding)
        patched.setattr(model.tails, "run", tail)
        yield found
