"""KServe's protocols, version 1 and 2: their envelopes opened into questions, and closed around the answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.intake import (
    ImageReader,
    Picture,
    Question,
    from_base64,
    read_asked,
    read_request,
    validated,
)
from elude_runtime.api.problems import Problem, at
from elude_runtime.api.schema.json_text import JSONError, parse_json
from elude_runtime.api.schema.kserve import V1Request, V2Reply, V2ReplyTensor, V2Request
from elude_runtime.api.schema.reply import ModelInfo
from elude_runtime.api.schema.request import Request


@dataclass(frozen=True)
class Envelope:
    """questions: what is asked about each image, or what is wrong with it; close: the body around the documents (JSON
    text) of the answers, in the same order; place: of the list of questions in the document, or of the question that
    holds for all. whole: it holds for all, and one problem is the whole request's."""

    questions: list[Question | Problem]
    close: Callable[[Sequence[str], Sequence[Sequence[float]]], str]
    place: list[str | int]
    whole: bool


def is_kserve(document: Any) -> bool:
    return isinstance(document, dict) and ("instances" in document or "inputs" in document)


def open_envelope(
    document: dict[str, Any],
    config: ServingConfig,
    info: ModelInfo,
    input_size: tuple[int, int, int],
    reader: ImageReader,
    *,
    explain: bool,
) -> Envelope:
    """Raises Problem where the envelope itself is wrong."""
    if "instances" in document:
        return _open_v1(document, config, reader, explain=explain)
    return _open_v2(document, config, info, input_size, reader, explain=explain)


def _open_v1(document: dict[str, Any], config: ServingConfig, reader: ImageReader, *, explain: bool) -> Envelope:
    instances = validated(V1Request, document).instances
    _few_enough(len(instances), config)
    asked: list[tuple[Request, bytes] | Problem] = []
    for instance in instances:
        try:
            one = {"image": instance} if set(instance) == {"b64"} else instance
            asked.append(read_asked(one, None, explain=explain))
        except Problem as problem:
            asked.append(problem)
    pictures = iter(reader.read_all([one[1] for one in asked if not isinstance(one, Problem)]))
    questions = [one if isinstance(one, Problem) else _question(one[0], next(pictures)) for one in asked]
    return Envelope(
        questions, lambda documents, _: '{"predictions":[' + ",".join(documents) + "]}", ["instances"], whole=False
    )


def _open_v2(
    document: dict[str, Any],
    config: ServingConfig,
    info: ModelInfo,
    input_size: tuple[int, int, int],
    reader: ImageReader,
    *,
    explain: bool,
) -> Envelope:
    asked = validated(V2Request, document)
    given = asked.inputs[0]
    _few_enough(given.shape[0], config)
    template: Any = (asked.parameters.elude if asked.parameters else None) or {}
    if isinstance(template, str):
        try:
            template = parse_json(template.encode(), config.max_json_depth)
        except JSONError as error:
            raise Problem("not-json", f"parameters.elude: {error}", at(["parameters", "elude"], "not JSON")) from error
    try:
        request = read_request(template, explain=explain)
    except Problem as problem:
        raise problem.within(["parameters", "elude"]) from None
    if request.image is not None:
        raise Problem("invalid-document", "parameters.elude: the images stand in `inputs`; leave `image` out.")
    if asked.id is not None and request.id is None:
        request = request.model_copy(update={"id": asked.id})
    if given.datatype == "BYTES":
        if len(given.shape) != 1 or len(given.data) != given.shape[0]:
            raise _wrong_shape(f"BYTES of shape [N] have N images in base64, and there are {len(given.data)}")
        if not all(isinstance(text, str) for text in given.data):
            raise Problem("invalid-document", "inputs.0.data: BYTES are images in base64, as JSON strings.")
        encoded = [from_base64(text, ["inputs", 0, "data", n]) for n, text in enumerate(given.data)]
        pictures = [_placed(one, n) for n, one in enumerate(reader.read_all(encoded))]
    else:
        pictures = [Picture(tensor) for tensor in _tensor(given.data, given.shape, input_size)]
    questions: list[Question | Problem] = [Question(request, picture) for picture in pictures]
    names = [one.name for one in asked.outputs] if asked.outputs else ["logits", "elude"]

    def close(documents: Sequence[str], logits: Sequence[Sequence[float]]) -> str:
        numbers = [float(text) for row in logits for text in np.asarray(row, np.float32).astype(str)]
        found = {
            "logits": ("FP32", [len(logits), len(logits[0])], numbers),
            "elude": ("BYTES", [len(documents)], list(documents)),
        }
        outputs = [
            V2ReplyTensor(name=n, datatype=found[n][0], shape=found[n][1], data=found[n][2])  # type: ignore[arg-type]
            for n in names
        ]
        identity = asked.id or str(json.loads(documents[0])["id"])
        reply = V2Reply(model_name=info.name, model_version=info.version, id=identity, outputs=outputs)
        return reply.model_dump_json()

    return Envelope(questions, close, ["parameters", "elude"], whole=True)


def _tensor(data: list[Any], shape: list[int], input_size: tuple[int, int, int]) -> torch.Tensor:
    """Normalised images float32 [N, 3, H, W], from flat or nested numbers. Problem where they do not fit the model."""
    wanted = [shape[0], *input_size]
    if shape != wanted:
        raise _wrong_shape(f"FP32 images of this model have the shape [N, {', '.join(map(str, input_size))}]")
    flat = data
    for _ in shape[1:]:
        if flat and isinstance(flat[0], list):
            if not all(isinstance(part, list) for part in flat):
                raise _wrong_shape("the data are nested unevenly")
            flat = [value for part in flat for value in part]
    if len(flat) != math.prod(shape):
        raise _wrong_shape(f"the shape asks for {math.prod(shape)} numbers, and there are {len(flat)}")
    if not all(type(value) in (float, int) for value in flat):
        raise Problem("invalid-document", "inputs.0.data: FP32 data are numbers.", at(["inputs", 0, "data"], "numbers"))
    made = torch.tensor(flat, dtype=torch.float64).float()
    if not bool(torch.isfinite(made).all()):
        raise Problem("invalid-document", "inputs.0.data: a number is too large for FP32.")
    return made.view(wanted)


def _question(request: Request, picture: Picture | Problem) -> Question | Problem:
    return picture if isinstance(picture, Problem) else Question(request, picture)


def _placed(picture: Picture | Problem, number: int) -> Picture:
    """Raises a Problem with the image's place in the request."""
    if isinstance(picture, Picture):
        return picture
    loc: list[str | int] = ["inputs", 0, "data", number]
    where = ".".join(map(str, loc))
    raise Problem(picture.kind, f"{where}: {picture.detail}", at(loc, picture.detail)) from picture


def _wrong_shape(reason: str) -> Problem:
    return Problem("invalid-document", f"inputs.0.shape: {reason}.", at(["inputs", 0, "shape"], reason))


def _few_enough(images: int, config: ServingConfig) -> None:
    if images > config.max_instances:
        raise Problem("limit-exceeded", f"The request has {images} images, the limit is {config.max_instances}.")
