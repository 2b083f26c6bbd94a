"""Images decoded side by side: order, problems and limits as one after another, digits as timm's own."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Rewritten
from PIL import Image
from support import encoded, picture

from elude_runtime.api import intake
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.decoding import DecodePool
from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import ImageReader, Picture, Row
from elude_runtime.api.problems import Problem
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.served_transform import served_transform

SMALL = [encoded(picture(n, 40 + n, 30)) for n in range(6)]
BROKEN, CUT, LARGE = b"no image", SMALL[0][:200], encoded(picture(1, 200, 100))


Asking = Callable[[int, list[Row]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(vit: Rewritten) -> Asking:
    """An engine's replies with so many threads, without what differs from call to call."""
    engine = Engine(vit.model, ServingConfig(max_request_pixels=30_000), name="tiny", version="1.0")

    def call(threads: int, rows: list[Row]) -> list[dict[str, Any]]:
        engine.pool = DecodePool(threads, 9000)
        found = [json.loads(answered.body) for answered in engine.answer(rows)]
        for reply in found:
            for one in (reply, *reply.get("predictions", [])):
                one.pop("timing_ms", None)
                one.pop("id", None)
        return found

    return call


class TestPool:
    @pytest.mark.parametrize("threads", [1, 3])
    def test_results_stand_in_order_and_exceptions_are_raised(self, threads: int) -> None:
        pool = DecodePool(threads, 10)
        assert pool.map(lambda n: (time.sleep(0.02 * (3 - n)), n)[1], [0, 1, 2]) == [0, 1, 2]
        with pytest.raises(ZeroDivisionError):
            pool.map(lambda n: 1 // n, [1, 0])

    def test_items_are_worked_on_at_the_same_time(self) -> None:
        meeting = threading.Barrier(3, timeout=10)
        names = DecodePool(3, 10).map(lambda _: (meeting.wait(), threading.current_thread().name)[1], range(3))
        assert len(set(names)) == 3

    def test_one_item_or_one_thread_stays_with_the_caller(self) -> None:
        here = threading.get_ident()
        for pool, items in ((DecodePool(3, 10), [1]), (DecodePool(1, 10), [1, 2])):
            assert set(pool.map(lambda _: threading.get_ident(), items)) == {here}
            assert not pool.spreads(len(items))

    def test_room_is_never_exceeded_but_by_one_alone(self) -> None:
        pool, held, lock, seen = DecodePool(4, 100), [0, 0], threading.Lock(), list[tuple[int, int]]()

        def work(pixels: int) -> None:
            with pool.room(pixels):
                with lock:
                    held[0], held[1] = held[0] + pixels, held[1] + 1
                    seen.append((held[0], held[1]))
                time.sleep(0.005)
                with lock:
                    held[0], held[1] = held[0] - pixels, held[1] - 1

        pool.map(work, [60, 40, 60, 500, 30, 30, 40, 60])
        assert all(pixels <= 100 or count == 1 for pixels, count in seen) and len(seen) == 8
        assert max(count for _, count in seen) > 1


class TestReadAll:
    @pytest.mark.parametrize(
        "images",
        [
            SMALL,
            [SMALL[0], BROKEN, SMALL[1], CUT, SMALL[2]],
            [LARGE, LARGE, SMALL[0], BROKEN],
            [SMALL[0], LARGE, BROKEN, SMALL[1], SMALL[2], LARGE, SMALL[3]],
            [CUT, CUT, LARGE, SMALL[0]],
            [SMALL[0], b"x" * 9000, SMALL[1]],
            [],
        ],
    )
    @pytest.mark.parametrize("limit", [1, 2500, 6000, 10**6])
    def test_the_same_as_one_after_another(self, images: list[bytes], limit: int) -> None:
        config = ServingConfig(max_request_pixels=limit, max_image_pixels=30_000, max_image_bytes=8000)
        transform = DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3).transform()

        def told(found: Picture | Problem) -> Any:
            return (found.kind, found.detail) if isinstance(found, Problem) else (found.size, found.tensor.tolist())

        reader, one_by_one = ImageReader(config, transform, DecodePool(1, limit)), []
        for image in images:
            try:
                one_by_one.append(told(reader.read(image)))
            except Problem as problem:
                one_by_one.append(told(problem))
        side_by_side = ImageReader(config, transform, DecodePool(4, limit)).read_all(images)
        assert [told(found) for found in side_by_side] == one_by_one

    def test_no_more_is_decoded_than_one_after_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[Any] = []
        inner = intake.to_input
        monkeypatch.setattr(intake, "to_input", lambda image, *a: (decoded.append(image), inner(image, *a))[1])
        config = ServingConfig(max_request_pixels=59_000)
        reader = ImageReader(config, DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3).transform(), DecodePool(4, 10**6))
        found = reader.read_all([LARGE] * 9)
        assert [isinstance(one, Picture) for one in found] == [True] * 2 + [False] * 7
        assert len(decoded) == 2 and all(one.kind == "image-too-large" for one in found[2:] if isinstance(one, Problem))


class TestEngine:
    def test_a_mixed_batch_answers_the_same(self, ask: Asking) -> None:
        b64 = [{"b64": base64.b64encode(data).decode()} for data in (*SMALL, BROKEN)]
        documents: list[Any] = [
            {"image": b64[0], "explain": {}}, {"image": b64[6]}, {"op": "describe"}, {"instances": b64[3:]},
            {"instances": [b64[1], {"image": b64[2], "top_k": "5"}, b64[6], *b64[:5]]}, {"image": b64[1], "top_k": 3},
        ]  # fmt: skip
        rows = [Row({"body": json.dumps(d).encode()}, "application/json", False, "", "r") for d in documents]
        rows += [Row({"body": data}, "image/png", False, "", "r") for data in (SMALL[3], BROKEN, SMALL[4], b"{")]
        assert ask(4, rows) == ask(1, rows)
        for row in rows:
            assert ask(4, [row]) == ask(1, [row])

    def test_the_order_of_rows_is_kept(self, ask: Asking) -> None:
        rows = [Row({"body": data}, "image/png", False, "", "r") for data in (LARGE, *SMALL, LARGE)]
        widths = [reply["input"]["width"] for reply in ask(4, rows)]
        assert widths == [200, 40, 41, 42, 43, 44, 45, 200]


class TestServedTransform:
    @pytest.mark.parametrize(
        "config",
        [
            DataConfig((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            DataConfig((3, 33, 47), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash"),
            DataConfig((3, 40, 40), (0.0,) * 3, (1.0,) * 3, "bicubic", 0.9, "border"),
        ],
    )
    def test_every_digit_is_timms(self, config: DataConfig) -> None:
        served, own = served_transform(config), config.transform()
        assert type(served) is not type(own)  # the fast way is taken
        for image in (picture(1, 90, 70), picture(2, 31, 64), Image.effect_noise((80, 60), 90).convert("RGB")):
            assert torch.equal(served(image), own(image)) and served(image).is_contiguous()

    def test_other_steps_are_left_to_timm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3).transform()
        own.transforms.append(torch.nn.Identity())
        monkeypatch.setattr(DataConfig, "transform", lambda self: own)
        assert served_transform(DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3)) is own

    def test_other_digits_are_left_to_timm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the arithmetic is not what is known of torchvision's, as in another version."""
        config = DataConfig((3, 32, 32), (0.3,) * 3, (0.7,) * 3)
        own = config.transform()
        inner = type(own.transforms[-1]).forward
        monkeypatch.setattr(type(own.transforms[-1]), "forward", lambda self, x: inner(self, x) * (1 + 2**-20))
        assert type(served_transform(config)) is type(own)
