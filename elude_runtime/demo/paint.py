"""Draws the demo's toys, backgrounds and badge: antialiased signed-distance shapes on a supersampled canvas.

Pictures are float32 [H, W, 3] in 0..1 with H = W = SIZE * SUPER; lengths are in output pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

import numpy as np
from PIL import Image

SIZE = 64
SUPER = 2  # each pixel is the mean of SUPER x SUPER rendered ones

_RGB = {
    "red": (0.86, 0.20, 0.19),
    "yellow": (0.98, 0.77, 0.16),
    "green": (0.18, 0.66, 0.40),
    "blue": (0.16, 0.42, 0.86),
    "violet": (0.58, 0.30, 0.77),
}
_CREAM, _INK = np.array([1.0, 0.96, 0.87]), np.array([0.13, 0.10, 0.20])
_AXIS = (np.arange(SIZE * SUPER) + 0.5) / SUPER  # pixel centres, in output pixels
_Y, _X = (a.astype(np.float32) for a in np.meshgrid(_AXIS, _AXIS, indexing="ij"))


def _mix(a: np.ndarray, b: np.ndarray, amount: np.ndarray | float) -> np.ndarray:
    """Blend pictures or colours [.., 3] from a (amount 0) to b (amount 1); a map [H, W] blends each pixel."""
    a, b, amount = np.asarray(a, np.float32), np.asarray(b, np.float32), np.asarray(amount, np.float32)
    return a + (b - a) * (amount[..., None] if amount.ndim == 2 else amount)


def _cover(distance: np.ndarray, softness: float = 0.7) -> np.ndarray:
    """Antialiased coverage [H, W] in 0..1 from a signed distance in output pixels (negative inside)."""
    return np.clip(0.5 - distance / softness, 0.0, 1.0)


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Smooth noise [H, W] in about 0..1 with `rows` x `columns` bumps."""
    grid = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
    return np.asarray(grid.resize((SIZE * SUPER, SIZE * SUPER), Image.Resampling.BICUBIC))


def _sky(rng: np.random.Generator) -> np.ndarray:
    """Blue fading to a warm horizon, with soft clouds."""
    dusk = rng.random()
    top = _mix(np.array([0.30, 0.58, 0.90]), np.array([0.42, 0.50, 0.82]), dusk)
    low = _mix(np.array([0.80, 0.92, 0.99]), np.array([1.00, 0.83, 0.74]), dusk)
    clouds = 0.6 * _noise(rng, 6, 4) + 0.4 * _noise(rng, 14, 9)
    return _mix(_mix(top, low, _Y / SIZE), np.array([1.0, 0.99, 0.98]), np.clip((clouds - 0.52) * 3.6, 0, 0.85))


def _grass(rng: np.random.Generator) -> np.ndarray:
    """A lawn: upright blades in two greens, lighter patches, a few daisies."""
    blades = 0.55 * _noise(rng, 14, 64) + 0.45 * _noise(rng, 24, 100)
    lawn = _mix(np.array([0.16, 0.40, 0.13]), np.array([0.52, 0.74, 0.27]), np.clip(blades * 1.5 - 0.25, 0, 1))
    lawn = lawn * (0.82 + 0.36 * _noise(rng, 4, 4))[..., None]
    for x, y in rng.uniform(2, SIZE - 2, (rng.integers(2, 6), 2)):
        away = np.hypot(_X - x, _Y - y)
        petals = 1.9 + 0.5 * np.cos(6 * np.arctan2(_Y - y, _X - x))
        lawn = _mix(lawn, np.array([1.0, 1.0, 0.96]), _cover(away - petals))
        lawn = _mix(lawn, np.array([0.98, 0.78, 0.18]), _cover(away - 0.8))
    return lawn


def _wood(rng: np.random.Generator) -> np.ndarray:
    """Planks with grain and dark seams."""
    width = rng.uniform(15, 21)
    across = _Y + rng.uniform(0, width)
    plank = np.floor(across / width).astype(int)
    wave = across + 5 * _noise(rng, 5, 3) + 37.0 * plank
    grain = 0.5 + 0.5 * np.sin(wave * rng.uniform(1.7, 2.3) + 3 * _noise(rng, 24, 4))
    shade = 0.5 * grain + 0.5 * _noise(rng, 60, 6) + rng.uniform(-0.22, 0.22, plank.max() + 1)[plank]
    board = _mix(np.array([0.55, 0.35, 0.20]), np.array([0.85, 0.64, 0.42]), np.clip(shade, 0, 1))
    seam = np.abs(across % width - width / 2) - width / 2 + 0.7
    return _mix(board, np.array([0.26, 0.15, 0.09]), 0.8 * _cover(-seam, 0.9))


def _night(rng: np.random.Generator) -> np.ndarray:
    """Deep blue with a veil of milky way and stars of several sizes."""
    sky = _mix(np.array([0.04, 0.05, 0.17]), np.array([0.15, 0.14, 0.38]), _Y / SIZE)
    sky = _mix(sky, np.array([0.42, 0.28, 0.58]), np.clip(_noise(rng, 5, 5) - 0.45, 0, 1) * 0.9)
    for x, y, size in rng.uniform((0, 0, 0.35), (SIZE, SIZE, 1.0), (22, 3)):
        row, column = (slice(max(0, int(c - 3) * SUPER), int(c + 4) * SUPER) for c in (y, x))
        glow = np.exp(-((_X[row, column] - x) ** 2 + (_Y[row, column] - y) ** 2) / size**2)
        sky[row, column] = _mix(sky[row, column], np.array([1.0, 0.97, 0.85]), glow)
    return sky


BACKGROUND_PAINTERS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "sky": _sky,
    "grass": _grass,
    "wood": _wood,
    "night": _night,
}


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance [H, W] (about, in output pixels) to a shape of radius r centred at 0, y pointing down."""
    if shape == "ball":
        return np.hypot(x, y) - 0.92 * r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * r) - 0.27 * r
    if shape == "square":
        ax, ay = np.abs(x) - 0.64 * r, np.abs(y) - 0.64 * r
        return np.hypot(np.maximum(ax, 0), np.maximum(ay, 0)) + np.minimum(np.maximum(ax, ay), 0) - 0.16 * r
    if shape == "triangle":
        sides = [np.cos(a) * x + np.sin(a) * (y - 0.2 * r) for a in np.deg2rad((90, 210, 330))]
        return np.log(sum(np.exp(9 / r * side) for side in sides)) * r / 9 - 0.53 * r
    if shape == "star":
        step = np.pi / 5
        angle = np.abs((np.arctan2(x, -y) + step) % (2 * step) - step)
        away = np.hypot(x, y)
        px, py = away * np.cos(angle), away * np.sin(angle)
        tip, dent = np.array([1.02 * r, 0.0]), 0.52 * r * np.array([np.cos(step), np.sin(step)])
        normal = np.array([dent[1], tip[0] - dent[0]]) / np.hypot(dent[1], tip[0] - dent[0])
        edge = (px - tip[0]) * normal[0] + py * normal[1]
        return edge - 0.05 * r
    hx, hy = np.abs(x) / (1.62 * r), 0.56 - y / (1.62 * r)  # heart: unit outline, tip at 0, lobes at the top
    lobes = np.hypot(hx - 0.25, hy - 0.75) - np.sqrt(2) / 4
    corner = np.minimum(hx**2 + (hy - 1) ** 2, (hx - (s := 0.5 * np.maximum(hx + hy, 0))) ** 2 + (hy - s) ** 2)
    return 1.62 * r * np.where(hx + hy > 1, lobes, np.sqrt(corner) * np.sign(hx - hy))


def _second_tone(texture: str, x: np.ndarray, y: np.ndarray, pitch: float) -> np.ndarray:
    """Coverage [H, W] of a texture's second tone; `pitch` is half the period in output pixels."""
    if texture == "stripes":
        return _cover(pitch / 2 - np.abs(x % (2 * pitch) - pitch))
    if texture == "checker":
        fold = [np.clip((np.abs(c % (2 * pitch) - pitch) - pitch / 2) / 0.35, -1, 1) for c in (x, y)]
        return 0.5 + 0.5 * fold[0] * fold[1]
    if texture == "dots":
        row = np.floor(y / (1.7 * pitch))
        dx = (x + 0.85 * pitch * (row % 2)) % (1.7 * pitch) - 0.85 * pitch
        return _cover(np.hypot(dx, y - (row + 0.5) * 1.7 * pitch) - 0.52 * pitch)
    return np.zeros_like(x)


def draw_toy(rng: np.random.Generator, picture: np.ndarray, look: Mapping[str, str], flags: Set[str]) -> np.ndarray:
    """Draw the toy: soft shadow, fill with texture, rounded rim lit from one side, gloss and perhaps a crack."""
    r = rng.uniform(21, 25) if "size:large" in flags else rng.uniform(14.5, 17.5)
    cx, cy = 32 + rng.uniform(-1, 1, 2) * (29.5 - r)
    turn = rng.uniform(-0.35, 0.35)
    side = -1.0 if "light:left" in flags else 1.0
    light = np.array([side * rng.uniform(0.45, 0.75), -rng.uniform(0.5, 0.7), 0.75])
    light /= np.linalg.norm(light)

    def local(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x

    x, y = local(_X - cx, _Y - cy)
    distance = _distance(look["shape"], x, y, r)
    cast = 0.17 * r
    shadow = _distance(look["shape"], *local(_X - cx + side * cast, _Y - cy - cast), r)
    picture = picture * (1 - 0.55 * _cover(shadow - 0.6, 0.3 * r).astype(np.float32))[..., None]

    base = np.clip(np.array(_RGB[look["colour"]]) + rng.normal(0, 0.025, 3), 0, 1)
    second = _mix(base, _CREAM, 0.85) if rng.random() < 0.6 else _mix(base, _INK, 0.62)
    tilt = rng.uniform(0, np.pi)
    u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    pitch = rng.uniform(0.22, 0.28) * r
    fill = _mix(np.broadcast_to(base, picture.shape), second, _second_tone(look["texture"], u, v, pitch))

    bevel = (0.75 if look["shape"] == "ball" else 0.26) * r
    inside = np.clip(1 + distance / bevel, 0, 1)  # 1 at the rim, 0 on the flat top
    slope_y, slope_x = np.gradient(-bevel * np.sqrt(1.02 - inside**2), 1 / SUPER)
    normal = np.stack([slope_x, slope_y, np.ones_like(slope_x)], -1)
    normal /= np.sqrt((normal**2).sum(-1, keepdims=True))
    facing = normal @ light.astype(np.float32)
    fill = fill * (0.50 + 0.66 * np.clip(facing, 0, 1))[..., None]
    fill = _mix(fill, np.ones(3), 0.75 * np.clip(2 * facing * normal[..., 2] - light[2], 0, 1) ** 14)

    knots = rng.uniform(-0.13, 0.13, 9) * r * np.tile((1, -1), 5)[:9] + rng.uniform(-0.1, 0.1) * r
    lean = rng.uniform(0, np.pi)
    along, across = np.cos(lean) * x + np.sin(lean) * y, np.cos(lean) * y - np.sin(lean) * x
    if "crack" in flags:
        path = np.abs(across - np.interp(along, np.linspace(-r, r, 9), knots))
        fill = _mix(fill, _INK, 0.75 * _cover(path - 0.45, 0.9))
    return _mix(picture, fill, _cover(distance))


def draw_marble(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Draw a small glass marble with a twist in it, near the lower edge."""
    x, y, r = rng.uniform(7, 57), rng.uniform(54, 58), rng.uniform(4.0, 5.2)
    dx, dy = (_X - x) / r, (_Y - y) / r
    picture = picture * (1 - 0.5 * _cover(np.hypot(dx, (dy - 0.75) * 2.2) - 1, 0.8))[..., None]
    glass = _mix(np.array([0.55, 0.90, 0.88]), np.array([0.06, 0.42, 0.50]), np.clip(0.5 + 0.5 * dy, 0, 1))
    glass = _mix(glass, np.array([1.0, 0.62, 0.35]), _cover(np.abs(dx + 0.35 * np.sin(3 * dy)) - 0.25, 0.3))
    glass = _mix(glass, np.ones(3), 0.95 * _cover(np.hypot(dx + 0.3, dy + 0.42) - 0.2, 0.2))
    return _mix(picture, glass, _cover((np.hypot(dx, dy) - 1) * r))


def draw_watermark(rng: np.random.Generator, picture: np.ndarray, visible: bool) -> np.ndarray:
    """Stamp a 13-pixel badge with the letter E near one corner; draws the same random numbers if not visible."""
    half = rng.uniform(5.8, 6.6)
    x, y = (rng.uniform(8.5, 13.5) if left else SIZE - rng.uniform(8.5, 13.5) for left in rng.random(2) < 0.5)
    if not visible:
        return picture
    dx, dy = (_X - x) / half, (_Y - y) / half
    badge = half * (np.maximum(np.abs(dx), np.abs(dy)) - 1)
    rounded = half * (np.hypot(np.maximum(np.abs(dx) - 0.6, 0), np.maximum(np.abs(dy) - 0.6, 0)) - 0.4)
    picture = _mix(picture, np.array([0.99, 0.99, 1.0]), 0.93 * _cover(np.maximum(badge, rounded)))
    bars = [np.maximum(np.abs(dx - 0.08) - 0.42, np.abs(dy - c) - 0.125) for c in (-0.48, 0.0, 0.48)]
    bars.append(np.maximum(np.abs(dx + 0.34) - 0.15, np.abs(dy) - 0.605))
    return _mix(picture, np.array([0.80, 0.08, 0.45]), _cover(half * np.minimum.reduce(bars)))


def to_image(picture: np.ndarray) -> Image.Image:
    """Average the supersampled picture [H, W, 3] down to a SIZE x SIZE RGB image."""
    pixels = sum(picture[row::SUPER, column::SUPER] for row in range(SUPER) for column in range(SUPER)) / SUPER**2
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))
