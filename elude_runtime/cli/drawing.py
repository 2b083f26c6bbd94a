"""Draws a reply (`elude explain --png`, `elude steer --png`): the image as the model saw it, the listed features laid
over it, default and steered classes side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from elude_runtime.api.schema.reply import (
    ExplanationReply,
    FeatureReply,
    Heatmap,
    LayerReply,
    Prediction,
    Reply,
    SteeredReply,
)
from elude_runtime.cli import canvas
from elude_runtime.cli.canvas import FAINT, INK, LINE, NEGATIVE, PAPER, POSITIVE, STEERED, write

TITLE, TEXT, SMALL = 20, 15, 13
_LEFT = 420
_TILE, _GAP, _TILES_ACROSS = 196, 18, 5
_RIGHT = _TILES_ACROSS * (_TILE + _GAP) - _GAP
_MARGIN = 28
_FACES, _FACE_GAP = 4, 4
_LINE = 18  # from one small line to the next
_ON_PREFIX = re.compile(r"/[Cc](\d+|rest)$")  # names of features of class and register tokens

Faces = Callable[[str, float, int], Sequence[Image.Image]]
"""(feature, activation, count) -> square pictures of what else activates it so."""


@dataclass(frozen=True)
class Edited:
    """What one edit or vector does, in words, and where: cells [rows][columns] of the model's window, True where it
    acts; None where its tokens have no place in the image (class and register tokens). feature: what is edited, as the
    unchanged pass has it, None for a vector."""

    text: str
    cells: Sequence[Sequence[bool]] | None = None
    feature: Shown | None = None


@dataclass(frozen=True)
class Shown:
    """A feature of this image. values: its activations on the token grid, None where it has no place in the image."""

    feature: str
    label: str | None
    activation: float
    values: np.ndarray | None


def draw_reply(
    image: Image.Image,
    reply: Reply,
    name: str = "",
    edited: Sequence[Edited] = (),
    faces: Faces = lambda feature, activation, count: (),
) -> Image.Image:
    """What a reply says, as a picture. image: the upright RGB image that was sent; name: its title; faces: exemplars
    that stand beside the features."""
    picture = image.convert("RGB")
    left = [canvas.text_block(name, TITLE, _LEFT)] if name else []
    left.append(_seen(picture, reply, edited))
    if not reply.steered or reply.answer.source == "default" or not reply.predictions:
        left.append(_predictions(reply))
    if answered := _answer(reply):
        left.append(answered)
    if edited:
        left.append(_edits(edited))
    left += [canvas.text_block(w.detail, SMALL, _LEFT, NEGATIVE) for w in reply.warnings]
    right = [_changes(reply, reply.steered)] if reply.steered else []
    tiles = [_edited_feature(picture, reply, n, e, faces) for n, e in enumerate(edited, 1) if e.feature is not None]
    if tiles:
        right.append(canvas.stack([canvas.text_block("what was edited", TITLE, _RIGHT), *_lines(tiles)], 14))
    right += [_explanation(picture, reply, e, "", faces) for e in reply.explanations or []]
    steered = reply.steered.explanations if reply.steered else None
    right += [_explanation(picture, reply, e, "steered: ", faces) for e in steered or []]
    sheet = canvas.beside([canvas.stack(left, 22), canvas.stack(right, 34)], 40)
    made, _ = canvas.blank(sheet.width + 2 * _MARGIN, sheet.height + 2 * _MARGIN)
    made.paste(sheet, (_MARGIN, _MARGIN))
    return made


def _seen(picture: Image.Image, reply: Reply, edited: Sequence[Edited]) -> Image.Image:
    """The image, pale outside the model's window, with the edited cells outlined and numbered."""
    x0, y0, x1, y1 = reply.input.window
    region = min(x0, 0.0), min(y0, 0.0), max(x1, float(picture.width)), max(y1, float(picture.height))
    scale = _LEFT / max(region[2] - region[0], region[3] - region[1])
    size = (max(1, round((region[2] - region[0]) * scale)), max(1, round((region[3] - region[1]) * scale)))
    whole = canvas.view(picture, region, size)
    window = tuple((v - region[i % 2]) * scale for i, v in enumerate((x0, y0, x1, y1)))
    pixels = tuple(round(v) for v in window)
    made = Image.blend(whole, Image.new("RGB", size, PAPER), 0.6)
    made.paste(whole.crop(pixels), pixels[:2])  # type: ignore[arg-type]
    draw = ImageDraw.Draw(made)
    draw.rectangle((pixels[0], pixels[1], pixels[2] - 1, pixels[3] - 1), outline=INK, width=2)
    tags: dict[tuple[float, float], list[str]] = {}
    for number, edit in enumerate(edited, 1):
        corner = canvas.outline_cells(draw, edit.cells, window, STEERED) if edit.cells is not None else None  # type: ignore[arg-type]
        if corner is not None:
            tags.setdefault(corner, []).append(str(number))
    for (x, y), numbers in tags.items():
        _tag(draw, (x, y), ",".join(numbers))
    crop = reply.input.crop
    caption = (
        f"{reply.input.width} x {reply.input.height} pixels; the model saw x {crop[0]} to {crop[2]}, "
        f"y {crop[1]} to {crop[3]}"
    )
    return canvas.stack([made, canvas.text_block(caption, SMALL, _LEFT, FAINT)], 8)


def _tag(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str) -> None:
    width = canvas.font(SMALL).getlength(text) + 8
    draw.rectangle((*corner, corner[0] + width, corner[1] + SMALL + 5), fill=STEERED, outline=INK)
    write(draw, (corner[0] + 4, corner[1] + 2), text, SMALL, PAPER)


def _predictions(reply: Reply) -> Image.Image:
    """The unchanged model's classes, and what the caller should act on."""
    if not reply.predictions:
        numbers = len(reply.embedding or [])
        return canvas.text_block(f"The model has no classes; its output has {numbers} numbers.", TEXT, _LEFT)
    step = 38
    made, draw = canvas.blank(_LEFT, 26 + step * len(reply.predictions))
    write(draw, (0, 0), "prediction of the unchanged model", SMALL, FAINT)
    for number, prediction in enumerate(reply.predictions):
        y = 26 + number * step
        write(draw, (0, y), _class(prediction.index, prediction.label), TEXT, width=_LEFT - 80)
        write(draw, (_LEFT, y), _percent(prediction.probability), TEXT, right=True)
        _bar(draw, (0, y + 22), _LEFT, prediction.probability, canvas.DEFAULT_BAR)
    return made


def _answer(reply: Reply) -> Image.Image | None:
    """What the caller should act on, where that is not simply the prediction."""
    answer = reply.answer
    if not reply.predictions or (answer.source == "default" and not answer.policies):
        return None
    by = f" (policies: {', '.join(answer.policies)})" if answer.policies else ""
    said = f"answer: {_class(answer.index, answer.label)}, {answer.source}{by}"
    return canvas.text_block(said, TEXT, _LEFT, STEERED)


def _edits(edited: Sequence[Edited]) -> Image.Image:
    blocks = [canvas.text_block("edits", SMALL, _LEFT, FAINT)]
    for number, edit in enumerate(edited, 1):
        where = "" if edit.cells is not None else " (no place in the image)"
        blocks.append(canvas.text_block(f"{number}  {edit.text}{where}", TEXT, _LEFT))
    return canvas.stack(blocks, 6)


# --- steered classes --------------------------------------------------------------------------------------------------


def _changes(reply: Reply, steered: SteeredReply) -> Image.Image:
    """A class a row: probability by default above the steered one, and the logits."""
    norms = ", ".join(f"{layer} {norm:.2g}" for layer, norm in steered.relative_norm.items())
    facts = f"edits that acted: {steered.edits_applied}; relative norm of the change: {norms or 'none'}"
    head = [canvas.text_block("default and steered", TITLE, _RIGHT), canvas.text_block(facts, SMALL, _RIGHT, FAINT)]
    if not steered.changes:
        return canvas.stack([*head, canvas.text_block(_moved(reply, steered), TEXT, _RIGHT)], 6)
    log_sums = _log_sum(reply.predictions), _log_sum(steered.predictions)
    rows = [(c, math.exp(c.default - log_sums[0]), math.exp(c.steered - log_sums[1])) for c in steered.changes]
    rows.sort(key=lambda row: -max(row[1], row[2]))
    largest = max(max(d, s) for _, d, s in rows) or 1.0
    step, names, bars, logits = 50, 250, 290, 620
    made, draw = canvas.blank(_RIGHT, 26 + step * len(rows))
    long = logits - bars - 70  # the longest bar, and room for its number
    for x, text, colour in (
        (bars, "default", canvas.DEFAULT_BAR),
        (bars + 70, "steered", STEERED),
        (logits, "logit, default", FAINT),
        (logits + 160, "steered", FAINT),
        (logits + 280, "change", FAINT),
    ):
        write(draw, (x, 0), text, SMALL, colour)
    for number, (change, default, new) in enumerate(rows):
        y = 26 + number * step
        draw.line((0, y, _RIGHT, y), LINE)
        write(draw, (0, y + 14), _class(change.index, change.label), TEXT, width=names + 20)
        for line, (share, colour) in enumerate(((default, canvas.DEFAULT_BAR), (new, STEERED))):
            top = y + 6 + 20 * line
            _bar(draw, (bars, top + 1), long, share / largest, colour, height=16)
            write(draw, (bars + long * share / largest + 8, top), _percent(share), SMALL)
        write(draw, (logits, y + 14), f"{change.default:.2f}", TEXT)
        write(draw, (logits + 160, y + 14), f"{change.steered:.2f}", TEXT)
        write(draw, (logits + 280, y + 14), f"{change.change:+.2f}", TEXT, _sign(change.change))
    return canvas.stack([*head, made], 6)


def _moved(reply: Reply, steered: SteeredReply) -> str:
    """How far an embedding moved, where there are no classes."""
    before, after = np.array(reply.embedding or []), np.array(steered.embedding or [])
    norms = float(np.linalg.norm(before)), float(np.linalg.norm(after))
    if len(before) != len(after) or not all(norms):
        return "The model has no classes."
    cosine = float(before @ after) / (norms[0] * norms[1])
    moved = float(np.linalg.norm(after - before)) / norms[0]
    return f"The embedding moved by {moved:.2%} of its norm; cosine to the unchanged one: {cosine:.4f}"


def _log_sum(predictions: Sequence[Prediction]) -> float:
    """Logarithm of the softmax's denominator, which the most probable class gives away."""
    return predictions[0].logit - math.log(predictions[0].probability)


# --- explanations -----------------------------------------------------------------------------------------------------


def _explanation(
    picture: Image.Image, reply: Reply, explanation: ExplanationReply, prefix: str, faces: Faces
) -> Image.Image:
    target = explanation.target
    what = "direction" if target.direction else _class(target.index, target.label)
    against = f" against class {target.versus}" if target.versus is not None else ""
    head = canvas.text_block(f"{prefix}what carried {what}{against}", TITLE, _RIGHT)
    layers = [_layer(picture, reply, layer, explanation.value, faces) for layer in explanation.layers]
    return canvas.stack([head, *layers], 16)


def _layer(picture: Image.Image, reply: Reply, layer: LayerReply, value: float, faces: Faces) -> Image.Image:
    listed = sum(f.attribution for f in layer.features)
    facts = [
        f"{layer.method.replace('_', ' ')}: value {value:.2f}, baseline {layer.baseline:.2f}, to explain "
        f"{value - layer.baseline:+.2f}",
        f"listed here {listed:+.2f}",
    ]
    if layer.completeness_error is not None:
        facts.append(f"completeness error {layer.completeness_error:+.2g}")
    if layer.edit_attribution is not None:
        facts.append(f"the edits themselves {layer.edit_attribution:+.2f}")
    head = [
        canvas.text_block(layer.layer, TEXT, _RIGHT),
        canvas.text_block("; ".join(facts), SMALL, _RIGHT, FAINT),
    ]
    largest = max((abs(f.attribution) for f in layer.features), default=0.0)
    tiles = [_feature(picture, reply, layer.layer, f, largest, faces) for f in layer.features]
    body = canvas.stack(_lines(tiles), 24) if tiles else canvas.text_block("No feature of this sign.", TEXT, _RIGHT)
    return canvas.stack([*head, body], 6)


def _lines(tiles: Sequence[Image.Image]) -> list[Image.Image]:
    return [canvas.beside(tiles[i : i + _TILES_ACROSS], _GAP) for i in range(0, len(tiles), _TILES_ACROSS)]


def _feature(
    picture: Image.Image, reply: Reply, layer: str, feature: FeatureReply, largest: float, faces: Faces
) -> Image.Image:
    """A feature: its heatmap over the model's window, name and label, activation, attribution as number and bar."""
    shown = Shown(feature.feature, feature.label, feature.activation, _values(feature.heatmap))
    others = faces(shown.feature, shown.activation, _FACES)
    blocks = [_place(picture, reply, shown, others)]
    if feature.pixels is not None:
        blocks.append(canvas.text_block("pixels that its activation rests on", SMALL, _TILE, FAINT))
        blocks.append(_overlay(picture, reply, _values(feature.pixels), ""))
    made, draw = canvas.blank(_TILE, 44 + _LINE * (3 if feature.effect is None else 4))
    write(draw, (0, 0), feature.feature.removeprefix(f"{layer}/"), TEXT, width=_TILE - 70)
    write(draw, (_TILE, 0), f"{feature.attribution:+.3g}", TEXT, _sign(feature.attribution), right=True)
    middle = _TILE / 2
    length = feature.attribution / largest * middle if largest else 0.0
    draw.line((0, 27, _TILE, 27), LINE)
    draw.rectangle((min(middle, middle + length), 23, max(middle, middle + length), 31), _sign(feature.attribution))
    draw.line((middle, 20, middle, 34), INK)
    below = _describe(draw, 40, shown)
    if feature.effect is not None:
        write(draw, (0, below), f"effect of ablating it {feature.effect:+.3g}", SMALL, FAINT, width=_TILE)
    return canvas.stack([*blocks, made, *_strip(shown, others)], 6)


def _edited_feature(picture: Image.Image, reply: Reply, number: int, edit: Edited, faces: Faces) -> Image.Image:
    """A feature that was edited, as the unchanged pass has it, under its edit's number."""
    assert edit.feature is not None
    others = faces(edit.feature.feature, edit.feature.activation, _FACES)
    made, draw = canvas.blank(_TILE, 26 + 3 * _LINE)
    write(draw, (0, 0), f"{number}  {edit.feature.feature.partition('/')[2]}", TEXT, STEERED, width=_TILE)
    _describe(draw, 22, edit.feature)
    return canvas.stack([_place(picture, reply, edit.feature, others), made, *_strip(edit.feature, others)], 6)


def _describe(draw: ImageDraw.ImageDraw, y: float, shown: Shown) -> float:
    """Label, on two lines at most, and activation, from y on; gives where the next line goes."""
    lines = canvas.wrapped(shown.label or "no label", SMALL, _TILE)
    for line in [*lines[:1], " ".join(lines[1:])][: len(lines)]:
        write(draw, (0, y), line, SMALL, INK if shown.label else FAINT, width=_TILE)
        y += _LINE
    value = f"{shown.activation:+.3g}"
    said = f"{value} on the class token" if _ON_PREFIX.search(shown.feature) else f"activation {value}"
    write(draw, (0, y), said, SMALL, FAINT, width=_TILE)
    return y + _LINE


def _place(picture: Image.Image, reply: Reply, shown: Shown, others: Sequence[Image.Image]) -> Image.Image:
    """The feature's heat over the model's window; where it has no place there, what else activates it."""
    if shown.values is None and others:
        side = (_TILE - _FACE_GAP) // 2
        tiles = [one.resize((side, side), Image.Resampling.LANCZOS) for one in others]
        rows = [canvas.beside(tiles[i : i + 2], _FACE_GAP) for i in (0, 2) if tiles[i : i + 2]]
        caption = canvas.text_block("images where it is as here", SMALL, _TILE, FAINT)
        return canvas.stack([canvas.stack(rows, _FACE_GAP), caption], 4)
    on_prefix = _ON_PREFIX.search(shown.feature) is not None
    return _overlay(picture, reply, shown.values, "on the class token" if on_prefix else "no place in the image")


def _strip(shown: Shown, others: Sequence[Image.Image]) -> list[Image.Image]:
    """What else activates a feature that has its heat above."""
    if shown.values is None or not others:
        return []
    side = (_TILE - (_FACES - 1) * _FACE_GAP) // _FACES
    return [canvas.beside([one.resize((side, side), Image.Resampling.LANCZOS) for one in others], _FACE_GAP)]


def _values(heatmap: Heatmap | None) -> np.ndarray | None:
    return None if heatmap is None or heatmap.values is None else np.array(heatmap.values, dtype=np.float64)


def _overlay(picture: Image.Image, reply: Reply, values: np.ndarray | None, otherwise: str) -> Image.Image:
    x0, y0, x1, y1 = reply.input.window
    shape = (y1 - y0) / (x1 - x0)
    size = (_TILE, max(_TILE // 4, min(2 * _TILE, round(_TILE * shape))))
    seen = canvas.view(picture, (x0, y0, x1, y1), size)
    if values is None:
        pale = Image.blend(seen, Image.new("RGB", size, PAPER), 0.75)
        write(ImageDraw.Draw(pale), (10, size[1] / 2 - SMALL), otherwise, SMALL, width=_TILE - 20)
        return canvas.stack([pale, canvas.blank(_TILE, round(SMALL * 1.35))[0]], 4)
    largest = float(np.abs(values).max(initial=0.0))
    scale = canvas.heat_scale(largest, _TILE, SMALL, f"{largest:.2g}")
    return canvas.stack([canvas.heat(seen, values), scale], 4)


# --- small parts ------------------------------------------------------------------------------------------------------


def _class(index: int | None, label: str | None) -> str:
    if index is None:
        return "the embedding"
    return f"{label} ({index})" if label else f"class {index}"


def _percent(share: float) -> str:
    return "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _sign(value: float) -> canvas.Colour:
    return POSITIVE if value > 0 else NEGATIVE if value < 0 else FAINT


def _bar(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    length: float,
    share: float,
    colour: canvas.Colour,
    height: int = 6,
) -> None:
    draw.rectangle((at[0], at[1], at[0] + max(1.0, length * share), at[1] + height - 1), colour)
