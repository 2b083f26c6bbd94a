"""Bad and strange input, in process: the status and problem of every row of the table, and neighbours that notice
nothing."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from bad_input import (
    CONV_MODEL,
    IMAGES,
    LAST_MODEL,
    MULTIPART,
    PICTURE,
    PNG,
    READ_RIGHT,
    TABLE,
    VIT_MODEL,
    Input,
    last_block,
)
from conftest import Rewritten
from PIL import Image
from support import encoded, picture

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Answered, Engine
from elude_runtime.api.intake import Row
from elude_runtime.api.problems import PROBLEMS
from elude_runtime.api.schema.reply import ProblemDocument, Reply
from elude_runtime.network.preprocessing import decode_image

NEIGHBOURS = [encoded(picture(400)), encoded(picture(401))]


@pytest.fixture(scope="module")
def engines(vit: Rewritten, mobilenet: Rewritten, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    paths = {
        VIT_MODEL: vit.path,
        CONV_MODEL: mobilenet.path,
        LAST_MODEL: last_block(tmp_path_factory.mktemp("last") / "ckpt"),
    }
    return {name: Engine.open(path, ServingConfig(), name=name, version="1.0") for name, path in paths.items()}


def raw(image: bytes) -> Row:
    return Row({"body": image}, "image/png", False, "", "r")


def same(answered: Answered) -> dict[str, Any]:
    """A reply without what differs from one request to the next."""
    assert answered.status == 200, answered.body
    made = json.loads(answered.body)
    return {k: v for k, v in made.items() if k not in ("id", "timing_ms")}


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_the_answer(engines: dict[str, Engine], case: Input) -> None:
    (answered,) = engines[case.model].answer([case.row()])
    assert answered.status == case.status, answered.body
    if case.kind:
        problem = ProblemDocument.model_validate_json(answered.body)
        assert answered.content_type == "application/problem+json"
        assert (problem.type, problem.status) == (case.kind, case.status) and PROBLEMS[case.kind][0] == case.status
        assert case.said in answered.body, answered.body
        assert problem.detail.endswith((".", "?", "…")) and "Traceback" not in answered.body
        assert len(answered.body) < 6000
        return
    reply = Reply.model_validate_json(answered.body)
    assert case.same_as is not None
    (expected,) = engines[case.model].answer([raw(case.same_as)])
    assert [p.model_dump() for p in reply.predictions] == same(expected)["predictions"]
    if case.size is not None:
        assert (reply.input.width, reply.input.height) == case.size


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_neighbours_notice_nothing(engines: dict[str, Engine], case: Input) -> None:
    """Digit for digit what they are in a batch of as many rows that reach the model."""
    engine = engines[case.model]
    before, bad, after = engine.answer([raw(NEIGHBOURS[0]), case.row(), raw(NEIGHBOURS[1])])
    assert bad.status == case.status
    reached = same(before)["batch_size"]
    assert reached in (2, 3) and (reached == 3 or case.kind)
    middle = [raw(PNG)] if reached == 3 else []
    alone = engine.answer([raw(NEIGHBOURS[0]), *middle, raw(NEIGHBOURS[1])])
    assert same(before) == same(alone[0]) and same(after) == same(alone[-1])


def test_the_whole_table_in_one_batch(engines: dict[str, Engine]) -> None:
    cases = [case for case in TABLE if case.model == VIT_MODEL]
    answered = engines[VIT_MODEL].answer([case.row() for case in cases])
    assert [a.status for a in answered] == [case.status for case in cases]
    kinds = [ProblemDocument.model_validate_json(a.body).type if a.status != 200 else "" for a in answered]
    assert kinds == [case.kind for case in cases]


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_images_are_read_the_same_in_every_envelope(engines: dict[str, Engine], case: Input) -> None:
    """JSON and multipart decode as raw bytes do."""
    engine = engines[VIT_MODEL]
    assert case.body is not None
    (expected,) = engine.answer([raw(case.body)])
    (found,) = engine.answer([Row({"image": case.body}, MULTIPART, False, "", "r")])
    assert same(found) == same(expected)


@pytest.mark.parametrize(
    ("name", "data", "expected", "size"), READ_RIGHT, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_the_table_expects_is_the_picture(name: str, data: bytes, expected: bytes, size: tuple[int, int]) -> None:
    """The expected pictures are what people see, by more than the decoder's own word."""
    read = np.asarray(decode_image(data), dtype=int)
    assert read.shape[1::-1] == size
    if size not in (PICTURE.size, PICTURE.size[::-1]):
        assert len(np.unique(read.reshape(-1, 3), axis=0)) == 1
        return
    shown = np.asarray(Image.open(io.BytesIO(expected)).convert("RGB"), dtype=int)
    assert (read == shown).all()
    if "EXIF" in name and "damaged" not in name:
        return  # turned by numpy in the table
    colours = np.asarray(PICTURE, dtype=int)
    reference = (
        colours if not ("grey" in name or "1-bit" in name) else np.asarray(PICTURE.convert("L"), dtype=int)[..., None]
    )
    coarse = lambda v: v.reshape(5, 8, 6, 8, -1).mean((1, 3))  # noqa: E731
    assert np.abs(coarse(read) - coarse(reference)).max() < 30


def test_every_problem_of_a_document_is_in_the_table() -> None:
    """What is not here needs a broken model, a busy server or a small limit, and is in test_engine.py."""
    elsewhere = {"internal-error", "non-finite-output", "overloaded", "response-too-large"}
    assert {case.kind for case in TABLE} - {""} == set(PROBLEMS) - elsewhere


def test_names_are_unique() -> None:
    assert len({case.name for case in TABLE}) == len(TABLE)
