"""What drawings are made of: text that fits, blocks below and beside each other, the model's window, heat over it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

PAPER: Colour = (255, 255, 255)
INK: Colour = (27, 31, 36)
FAINT: Colour = (101, 109, 118)
LINE: Colour = (208, 215, 222)
PADDING: Colour = (176, 182, 188)  # beyond the image, where the model's input is padded
POSITIVE: Colour = (200, 16, 46)
NEGATIVE: Colour = (16, 92, 190)
DEFAULT_BAR: Colour = (110, 119, 129)
STEERED: Colour = (225, 112, 0)

_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
_STRONGEST = 0.85  # opacity of the largest value, so that the picture still shows through it
_COLOUR_KEPT = 0.25  # of the picture under a heatmap, whose own colours must not be taken for its


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A sans-serif of the system, else the one that Pillow carries, which knows little beyond ASCII."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def printable(text: str, size: int) -> str:
    """The text with what the font has no glyph for as its nearest ASCII, or `?`."""
    known = font(size)
    missing = bytes(known.getmask("\uffff"))
    made = []
    for char in text:
        if char.isascii():
            made.append(char if char.isprintable() else " ")
        elif bytes(known.getmask(char)) != missing:
            made.append(char)
        else:
            plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
            made.append(plain or "?")
    return "".join(made)


def fitted(text: str, size: int, width: float) -> str:
    """The text, cut in its middle where it is wider than `width` pixels: names differ at their ends."""
    text = printable(text, size)
    known = font(size)
    if known.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        front = kept // 3
        shorter = f"{text[:front]}...{text[len(text) - (kept - front) :]}"
        if known.getlength(shorter) <= width:
            return shorter
    return ""


def wrapped(text: str, size: int, width: float) -> list[str]:
    """The text as lines no wider than `width` pixels."""
    known = font(size)
    lines: list[str] = []
    for word in printable(text, size).split():
        word = fitted(word, size, width)
        if lines and known.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    made = Image.new("RGB", (max(1, width), max(1, height)), PAPER)
    return made, ImageDraw.Draw(made)


def text_block(text: str, size: int, width: int, colour: Colour = INK) -> Image.Image:
    """Lines of text, broken at `width`."""
    lines = wrapped(text, size, width)
    step = round(size * 1.35)
    made, draw = blank(width, step * len(lines))
    for number, line in enumerate(lines):
        draw.text((0, number * step), line, colour, font(size))
    return made


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: Colour = INK,
    *,
    width: float = 1e6,
    right: bool = False,
) -> None:
    """One line from its top left corner, or `right` from its top right one, cut to `width`."""
    draw.text(at, fitted(text, size, width), colour, font(size), anchor="ra" if right else "la")


def stack(blocks: Sequence[Image.Image], gap: int) -> Image.Image:
    """Blocks below each other."""
    height = sum(b.height for b in blocks) + gap * max(0, len(blocks) - 1)
    made, _ = blank(max((b.width for b in blocks), default=1), height)
    y = 0
    for block in blocks:
        made.paste(block, (0, y))
        y += block.height + gap
    return made


def beside(blocks: Sequence[Image.Image], gap: int) -> Image.Image:
    """Blocks beside each other, their tops level."""
    width = sum(b.width for b in blocks) + gap * max(0, len(blocks) - 1)
    made, _ = blank(width, max((b.height for b in blocks), default=1))
    x = 0
    for block in blocks:
        made.paste(block, (x, 0))
        x += block.width + gap
    return made


def view(image: Image.Image, region: Box, size: tuple[int, int]) -> Image.Image:
    """The region x0, y0, x1, y1 (pixels of the image, may reach beyond it) at that size; PADDING beyond the image."""
    x0, y0, x1, y1 = region
    across, down = size[0] / (x1 - x0), size[1] / (y1 - y0)
    inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(image.width)), min(y1, float(image.height))
    made = Image.new("RGB", size, PADDING)
    left, top = round((inside[0] - x0) * across), round((inside[1] - y0) * down)
    right, bottom = round((inside[2] - x0) * across), round((inside[3] - y0) * down)
    if inside[0] < inside[2] and inside[1] < inside[3]:
        part = image.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.LANCZOS, box=inside)
        made.paste(part, (left, top))
    return made


def cell_edges(count: int, length: int) -> list[int]:
    """Where `count` equal cells begin and end on `length` pixels: count + 1 numbers."""
    return [round(i * length / count) for i in range(count + 1)]


def heat(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """The picture in pale colours under its heatmap [rows, columns]: red above zero, blue below, opacity by size over
    the largest, which is outlined."""
    made = Image.blend(picture.convert("L").convert("RGB"), picture, _COLOUR_KEPT)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest:
        return made
    columns, rows = cell_edges(values.shape[1], made.width), cell_edges(values.shape[0], made.height)
    opacity = Image.new("L", made.size, 0)
    colours = Image.new("RGB", made.size, POSITIVE)
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            cell = (columns[c], rows[r], columns[c + 1], rows[r + 1])
            opacity.paste(round(255 * _STRONGEST * abs(float(value)) / largest), cell)
            if value < 0:
                colours.paste(NEGATIVE, cell)
    made.paste(colours, (0, 0), opacity)
    r, c = divmod(int(np.abs(values).argmax()), values.shape[1])
    corner = (columns[c], rows[r], columns[c + 1] - 1, rows[r + 1] - 1)
    if corner[2] - corner[0] > 4 and corner[3] - corner[1] > 4:
        ImageDraw.Draw(made).rectangle(corner, outline=INK, width=1)
    return made


def heat_scale(largest: float, width: int, size: int, number: str) -> Image.Image:
    """The heatmap's scale, from -largest to largest, with its ends in words."""
    ends = f"-{number}", f"+{number}"
    made, draw = blank(width, round(size * 1.35))
    known = font(size)
    first, last = round(known.getlength(ends[0])) + 6, width - round(known.getlength(ends[1])) - 6
    write(draw, (0, 0), ends[0], size, NEGATIVE)
    write(draw, (width, 0), ends[1], size, POSITIVE, right=True)
    paper = np.array(PAPER, dtype=float)
    for x in range(first, last) if largest else ():
        place = 2 * (x - first) / max(1, last - 1 - first) - 1
        colour = np.array(POSITIVE if place > 0 else NEGATIVE, dtype=float)
        mixed = paper + (colour - paper) * _STRONGEST * abs(place)
        red, green, blue = (round(v) for v in mixed)
        draw.line((x, 4, x, size), (red, green, blue))
    return made


def outline_cells(
    draw: ImageDraw.ImageDraw, cells: Sequence[Sequence[bool]], region: Box, colour: Colour
) -> tuple[float, float] | None:
    """The border of the cells that are True, spread over the region; gives the top left corner of the first of them."""
    rows, columns = len(cells), len(cells[0])
    xs = [region[0] + i * (region[2] - region[0]) / columns for i in range(columns + 1)]
    ys = [region[1] + i * (region[3] - region[1]) / rows for i in range(rows + 1)]

    def marked(r: int, c: int) -> bool:
        return 0 <= r < rows and 0 <= c < columns and bool(cells[r][c])

    lines = []
    for r in range(rows + 1):
        for c in range(columns + 1):
            if c < columns and marked(r, c) != marked(r - 1, c):
                lines.append((xs[c], ys[r], xs[c + 1], ys[r]))
            if r < rows and marked(r, c) != marked(r, c - 1):
                lines.append((xs[c], ys[r], xs[c], ys[r + 1]))
    for shade, width in ((INK, 5), (colour, 3)):  # a dark rim, to be seen on any picture
        for line in lines:
            draw.line(line, shade, width)
    first = next(((r, c) for r in range(rows) for c in range(columns) if marked(r, c)), None)
    return None if first is None else (xs[first[1]], ys[first[0]])
