"""Drawings: cells where the window has them, signs by colour, edited regions outlined, nothing that a reply can hold
breaks them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from elude_runtime.api.schema.reply import (
    Answer,
    Change,
    ExplanationReply,
    FeatureReply,
    Heatmap,
    InputInfo,
    LayerReply,
    ModelInfo,
    Prediction,
    Reply,
    SteeredReply,
    TargetReply,
    Warning,
)
from elude_runtime.cli import canvas
from elude_runtime.cli.drawing import Edited, Shown, draw_reply

LAYER = "blocks.10.mlp.fc2"


def heatmap(values: np.ndarray) -> Heatmap:
    return Heatmap(shape=list(values.shape), values=values.tolist())


def feature(name: str = "P0", attribution: float = 0.7, **more: Any) -> FeatureReply:
    given = {"label": None, "activation": 3.1, "token": 5, "effect": None, "heatmap": heatmap(np.eye(4)), **more}
    return FeatureReply(feature=f"{LAYER}/{name}", attribution=attribution, **given)


def explanation(*features: FeatureReply, label: str | None = "bee") -> ExplanationReply:
    layer = LayerReply(layer=LAYER, method="gradient", baseline=0.4, completeness_error=0.03, features=list(features))
    return ExplanationReply(target=TargetReply(index=1, label=label), value=9.1, layers=[layer])


def reply(image: Image.Image, window: tuple[float, ...] | None = None, **more: Any) -> Reply:
    x0, y0, x1, y1 = window or (0.0, 0.0, float(image.width), float(image.height))
    crop = [max(0, round(x0)), max(0, round(y0)), min(image.width, round(x1)), min(image.height, round(y1))]
    given = {
        "predictions": [Prediction(index=1, label="bee", probability=0.8, logit=2.0)],
        "answer": Answer(source="default", index=1, label="bee", probability=0.8),
        **more,
    }
    return Reply(
        id="a", batch_size=1, timing_ms={},
        model=ModelInfo(name="m", version="1", base_sha256="", checkpoint_sha256=""),
        input=InputInfo(width=image.width, height=image.height, crop=crop, window=[x0, y0, x1, y1]), **given,
    )  # fmt: skip


def steered(default: list[float], new: list[float]) -> dict[str, Any]:
    """The parts of a reply that steering makes, from whole logits."""

    def predictions(logits: list[float]) -> list[Prediction]:
        p = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-p)
        return [Prediction(index=int(i), label=None, probability=float(p[i]), logit=logits[i]) for i in order]

    changes = [
        Change(index=i, label=None, default=d, steered=s, change=s - d)
        for i, (d, s) in enumerate(zip(default, new, strict=True))
    ]
    made = SteeredReply(predictions=predictions(new), changes=changes, edits_applied=1, relative_norm={LAYER: 0.1})
    return {"predictions": predictions(default), "steered": made}


def counted(image: Image.Image, colour: canvas.Colour) -> int:
    """Pixels of exactly this colour."""
    return int((np.asarray(image) == colour).all(-1).sum())


GREY = Image.new("RGB", (60, 40), (128, 128, 128))


class TestWindow:
    def test_a_region_of_the_image_fills_the_view(self) -> None:
        """Whatever stands in one cell of the window is in that cell of the view, at fractional edges too."""
        image = Image.new("RGB", (200, 120), "black")
        region = (30.5, 10.25, 130.5, 110.25)  # 5 x 5 cells of 20 pixels
        ImageDraw.Draw(image).rectangle((90.5, 30.25, 110.5, 50.25), fill="white")  # row 1, column 3
        seen = np.asarray(canvas.view(image, region, (100, 100)).convert("L"), dtype=float)
        cells = seen.reshape(5, 20, 5, 20).mean((1, 3))
        assert cells[1, 3] > 220
        cells[1, 3] = 0
        assert cells.max() < 30

    def test_beyond_the_image_is_padding(self) -> None:
        seen = np.asarray(canvas.view(GREY, (-20, 0, 60, 80), (80, 80)))
        assert (seen[:, :20] == canvas.PADDING).all() and (seen[40:] == canvas.PADDING).all()
        assert (seen[:40, 20:] == 128).all()

    def test_a_region_without_any_image(self) -> None:
        assert counted(canvas.view(GREY, (70, 0, 90, 20), (10, 10)), canvas.PADDING) == 100


class TestHeat:
    def test_signs_are_colours_and_size_is_opacity(self) -> None:
        values = np.array([[2.0, -2.0, 0.0], [1.0, -1.0, 0.0]])
        drawn = np.asarray(canvas.heat(Image.new("RGB", (90, 60), (128, 128, 128)), values), dtype=int)
        centre = lambda r, c: drawn[30 * r + 15, 30 * c + 15]  # noqa: E731
        strong, weak = centre(0, 0), centre(1, 0)
        assert strong[0] > 180 and strong[2] < 80
        assert 128 < weak[0] < strong[0] and strong[2] < weak[2] < 128
        blue, pale = centre(0, 1), centre(1, 1)
        assert blue[2] > 150 and blue[0] < 60 and blue[2] > pale[2] > 128
        assert (centre(0, 2) == 128).all() and (centre(1, 2) == 128).all()

    @pytest.mark.parametrize("size", [(196, 196), (197, 111), (50, 90)])
    def test_cells_cover_the_window_evenly(self, size: tuple[int, int]) -> None:
        """The checkerboard's changes of sign are where equal cells end, whatever the size."""
        rows, columns = 7, 9
        values = np.where((np.arange(rows)[:, None] + np.arange(columns)) % 2, 1.0, -1.0)
        drawn = np.asarray(canvas.heat(Image.new("RGB", size, (128, 128, 128)), values), dtype=int)
        red = drawn[..., 0] > drawn[..., 2]
        for r in range(rows):
            for c in range(columns):
                y, x = int((r + 0.5) * size[1] / rows), int((c + 0.5) * size[0] / columns)
                assert red[y, x] == (values[r, c] > 0)

    def test_the_largest_is_outlined(self) -> None:
        values = np.zeros((4, 4))
        values[2, 1] = -3.0
        drawn = canvas.heat(Image.new("RGB", (80, 80), (128, 128, 128)), values)
        found = np.argwhere((np.asarray(drawn) == canvas.INK).all(-1))
        assert found.min(0).tolist() == [40, 20] and found.max(0).tolist() == [59, 39]

    def test_nothing_but_zeros(self) -> None:
        drawn = np.asarray(canvas.heat(Image.new("RGB", (20, 20), (10, 10, 10)), np.zeros((2, 2))))
        assert (drawn == 10).all()
        assert canvas.heat_scale(0.0, 60, 12, "0").width == 60

    def test_the_scale_runs_from_blue_to_red(self) -> None:
        scale = np.asarray(canvas.heat_scale(3.0, 196, 13, "3"), dtype=int)[8]
        left, middle, right = scale[28], scale[98], scale[-29]
        assert left[2] > left[0] + 50 and right[0] > right[2] + 50 and middle.min() > 240


class TestOutline:
    def test_the_border_of_the_cells_and_no_line_between_them(self) -> None:
        cells = [[False] * 5 for _ in range(5)]
        for r in (1, 2):
            for c in (1, 2, 3):
                cells[r][c] = True
        image = Image.new("RGB", (100, 100), "white")
        corner = canvas.outline_cells(ImageDraw.Draw(image), cells, (0, 0, 100, 100), canvas.STEERED)
        assert corner == (20, 20)
        coloured = lambda x, y: image.getpixel((x, y)) == canvas.STEERED  # noqa: E731
        assert all(coloured(x, y) for x in (30, 50, 70) for y in (20, 60))
        assert all(coloured(x, y) for x in (20, 80) for y in (30, 50))
        assert not any(coloured(x, y) for x, y in [(40, 30), (60, 50), (50, 40), (10, 10), (90, 90)])

    def test_two_apart(self) -> None:
        cells = [[True, False, True]]
        image = Image.new("RGB", (90, 30), "white")
        canvas.outline_cells(ImageDraw.Draw(image), cells, (0, 0, 90, 30), canvas.STEERED)
        assert [image.getpixel((x, 15)) == canvas.STEERED for x in (30, 45, 60)] == [True, False, True]

    def test_none(self) -> None:
        image = Image.new("RGB", (30, 30), "white")
        assert canvas.outline_cells(ImageDraw.Draw(image), [[False]], (0, 0, 30, 30), canvas.STEERED) is None
        assert counted(image, (255, 255, 255)) == 900


class TestText:
    @pytest.mark.parametrize("text", ["blocks.10.mlp.fc2/P17" * 4, "short", "", "x" * 5000])
    def test_it_fits(self, text: str) -> None:
        made = canvas.fitted(text, 15, 120)
        assert canvas.font(15).getlength(made) <= 120
        assert made == text or (made[-3:] == text[-3:] and "..." in made)

    def test_lines_fit_and_keep_every_word(self) -> None:
        words = [f"word{i}" for i in range(40)]
        lines = canvas.wrapped(" ".join(words), 13, 150)
        assert all(canvas.font(13).getlength(line) <= 150 for line in lines)
        assert " ".join(lines).split() == words

    def test_glyphs_that_the_font_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without fonts on the system, Pillow's own draws accents as their letters and the rest as `?`."""
        monkeypatch.setattr(canvas, "_FONTS", ())
        canvas.font.cache_clear()
        try:
            assert canvas.printable("Amélie \u4e2d\n!", 13) == "Amelie ? !"
        finally:
            canvas.font.cache_clear()


class TestReply:
    def test_a_tile_shows_its_features_own_heatmap(self) -> None:
        """Red for the one, blue for the other, in the order of the reply, a greyed picture where there is none."""
        up, down = heatmap(np.ones((2, 2))), heatmap(-np.ones((2, 2)))
        features = [feature(heatmap=up), feature("P1", heatmap=down), feature("C0", heatmap=None)]
        square = Image.new("RGB", (40, 40), (128, 128, 128))
        drawn = np.asarray(draw_reply(square, reply(square, explanations=[explanation(*features)])), dtype=int)
        right = drawn[:, 28 + 420 + 40 :]
        tiles = [right[:, i * 214 : i * 214 + 196] for i in range(3)]
        reds = [int(((t[..., 0] > 170) & (t[..., 2] < 90)).sum()) for t in tiles]
        blues = [int(((t[..., 2] > 150) & (t[..., 0] < 60)).sum()) for t in tiles]
        assert reds[0] > 30_000 and max(reds[1:]) < 10_000
        assert blues[1] > 30_000 and max(blues[0], blues[2]) < 10_000

    def test_attribution_bars_have_a_length_and_a_side(self) -> None:
        def bar(attribution: float, colour: canvas.Colour) -> int:
            features = [feature(heatmap=None), feature("P1", attribution, heatmap=None)]
            drawn = np.asarray(draw_reply(GREY, reply(GREY, explanations=[explanation(*features)])))
            second = drawn[:, 28 + 420 + 40 + 214 : 28 + 420 + 40 + 214 + 196]
            return int((second == colour).all(-1).sum(1).max())  # the widest line of the bar

        assert bar(0.7, canvas.POSITIVE) >= 96
        assert 45 <= bar(0.35, canvas.POSITIVE) <= 52
        assert bar(-0.7, canvas.NEGATIVE) >= 96 and bar(-0.7, canvas.POSITIVE) < 20

    def test_more_features_make_it_longer(self) -> None:
        heights = [
            draw_reply(GREY, reply(GREY, explanations=[explanation(*[feature()] * n)])).height for n in (5, 6, 11)
        ]
        assert heights[0] < heights[1] < heights[2]

    def test_pixels_are_drawn_below_the_heatmap(self) -> None:
        plain = draw_reply(GREY, reply(GREY, explanations=[explanation(*[feature()] * 12)]))
        more = [feature(pixels=heatmap(np.eye(3)))] * 12
        assert draw_reply(GREY, reply(GREY, explanations=[explanation(*more)])).height > plain.height + 3 * 100

    def test_bars_are_probabilities(self) -> None:
        """Their lengths are as the softmax of the whole logits, though a reply lists but some of the classes."""
        default, new = [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]
        drawn = np.asarray(draw_reply(GREY, reply(GREY, **steered(default, new))))
        right = drawn[:, 28 + 420 + 40 + 290 : 28 + 420 + 40 + 600]

        def lengths(colour: canvas.Colour) -> list[int]:
            widths = (right == colour).all(-1).sum(1)
            runs, before = [], 0
            for width in widths:
                if width > 3 and width != before and before <= 3:
                    runs.append(int(width))
                before = width
            return sorted(runs[-3:])

        p = np.exp(default) / np.exp(default).sum()
        expected = sorted(260 * p / p.max())
        for colour in (canvas.DEFAULT_BAR, canvas.STEERED):
            assert lengths(colour) == pytest.approx(expected, abs=3)

    def test_an_edited_region_is_where_its_cells_are(self) -> None:
        """The outline lies on the window's cells, not on the image's."""
        image = Image.new("RGB", (420, 210), (128, 128, 128))  # drawn in its own size
        cells = [[r < 1 and c < 1 for c in range(2)] for r in range(2)]
        window = (105.0, 0.0, 315.0, 210.0)
        edits = [Edited("P0 ablate", cells), Edited("C1 ablate")]
        drawn = draw_reply(image, reply(image, window, **steered([1.0, 0.0], [0.0, 1.0])), edited=edits)
        part = np.asarray(drawn)[28 : 28 + 210, 28 : 28 + 420]
        found = np.argwhere((part == canvas.STEERED).all(-1))
        assert found.min(0).tolist() == pytest.approx([0, 105], abs=2)
        assert found.max(0).tolist() == pytest.approx([105, 210], abs=2)

    def test_what_was_edited_stands_below_with_its_heat(self) -> None:
        """In the order of the edits; a vector has no tile."""
        up = Shown(f"{LAYER}/P0", "fur", 1.0, np.ones((2, 2)))
        down = Shown(f"{LAYER}/P1", None, -1.0, -np.ones((2, 2)))
        edits = [Edited("a", feature=up), Edited("vector"), Edited("b", feature=down)]
        made = reply(GREY, **steered([1.0, 0.0], [0.0, 1.0]))
        drawn = np.asarray(draw_reply(GREY, made, edited=edits), dtype=int)
        assert len(drawn) > draw_reply(GREY, made, edited=edits[1:2]).height
        right = drawn[:, 28 + 420 + 40 :]
        tiles = [right[:, i * 214 : i * 214 + 196] for i in range(3)]
        reds = [int(((t[..., 0] > 170) & (t[..., 2] < 90)).sum()) for t in tiles]
        blues = [int(((t[..., 2] > 150) & (t[..., 0] < 60)).sum()) for t in tiles]
        assert reds[0] > 15_000 and max(reds[1:]) < 5_000
        assert blues[1] > 15_000 and max(blues[0], blues[2]) < 5_000

    def test_exemplars_stand_beside_heat_and_in_its_place(self) -> None:
        """Of the end that the activation points to; four below a feature with heat, two by two where there is none."""
        asked: list[tuple[str, float, int]] = []
        colour = (1, 254, 3)

        def faces(feature: str, activation: float, count: int) -> list[Image.Image]:
            asked.append((feature, activation, count))
            return [Image.new("RGB", (9, 9), colour)] * count

        features = [feature(activation=-3.1), feature("C0", heatmap=None)]
        made = reply(GREY, explanations=[explanation(*features)])
        drawn = draw_reply(GREY, made, faces=faces)
        assert asked == [(f"{LAYER}/P0", -3.1, 4), (f"{LAYER}/C0", 3.1, 4)]
        right = np.asarray(drawn)[:, 28 + 420 + 40 :]
        beside, instead = (int((right[:, i * 214 : i * 214 + 196] == colour).all(-1).sum()) for i in (0, 1))
        assert (beside, instead) == (4 * 46**2, 4 * 96**2)

    def test_a_steered_picture_says_its_prediction_once(self) -> None:
        plain = reply(GREY, **steered([1.0, 0.0], [0.0, 1.0]))
        answer = Answer(source="steered", index=1, label=None, probability=0.7)
        acted_on = plain.model_copy(update={"answer": answer})
        bars = [counted(draw_reply(GREY, made), canvas.DEFAULT_BAR) for made in (plain, acted_on)]
        assert bars[1] < bars[0]

    def test_outside_the_window_is_pale(self) -> None:
        image = Image.new("RGB", (420, 210), (0, 0, 0))
        drawn = draw_reply(image, reply(image, (105.0, 0.0, 315.0, 210.0), explanations=[explanation(feature())]))
        assert drawn.getpixel((28 + 210, 28 + 105)) == (0, 0, 0)
        assert min(drawn.getpixel((28 + 50, 28 + 105))) > 120  # type: ignore[type-var, arg-type]

    @pytest.mark.parametrize(
        ("size", "window"),
        [
            ((1, 1), (0.0, 0.0, 1.0, 1.0)),
            ((2000, 20), (0.0, 0.0, 2000.0, 20.0)),
            ((20, 2000), (0.0, 990.0, 20.0, 1010.0)),
            ((30, 40), (-5.5, -1.25, 35.5, 41.25)),
            ((3000, 4000), (500.0, 1000.0, 2500.0, 3000.0)),
        ],
    )
    def test_any_size_of_image_and_window(self, size: tuple[int, int], window: tuple[float, ...]) -> None:
        image = Image.new("RGB", size, (128, 128, 128))
        cells = [[True] * 4] * 4
        made = {**steered([1.0, 0.0], [0.0, 1.0]), "explanations": [explanation(feature())]}
        drawn = draw_reply(image, reply(image, window, **made), "a" * 300, [Edited("x", cells)])
        assert drawn.width == draw_reply(GREY, reply(GREY, **made)).width
        assert drawn.height < 3000

    def test_an_embedding(self) -> None:
        change = SteeredReply(predictions=[], embedding=[0.0, 1.0], changes=[], edits_applied=1, relative_norm={})
        answer = Answer(source="steered", index=None, label=None, probability=None)
        plain = reply(GREY, predictions=[], embedding=[1.0, 0.0], answer=answer, steered=change)
        assert draw_reply(GREY, plain).width > 1000

    def test_strange_numbers_and_names(self) -> None:
        features = [
            feature("P" + "9" * 300, 0.0, label="\x00\u202e\ud7ff [bold] " * 30),
            feature("P1", 1e30, activation=-1e-30, effect=-3.0, heatmap=heatmap(np.full((1, 1), 1e30))),
        ]
        warning = Warning(code="condition-not-met", detail="word " * 200)
        made = reply(GREY, explanations=[explanation(*features, label=None), explanation()], warnings=[warning])
        assert draw_reply(GREY, made, "\n").height > 300

    def test_logits_far_apart(self) -> None:
        """A class of probability 0 has no bar, and nothing overflows."""
        drawn = draw_reply(GREY, reply(GREY, **steered([300.0, -300.0], [-300.0, 300.0])))
        assert counted(drawn, canvas.STEERED) > 1000 and math.isfinite(drawn.height)
