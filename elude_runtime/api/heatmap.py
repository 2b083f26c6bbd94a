"""A heatmap as a picture: transparent where nothing is, to be laid over what the model saw."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from elude_runtime.api.schema.reply import Heatmap

_ABOVE, _BELOW = (214, 39, 40), (31, 119, 180)  # red and blue that colour-blind people tell apart


def heatmap(values: np.ndarray, form: str, input_size: tuple[int, int, int]) -> Heatmap:
    """values [rows, columns]; form: "values" or "png"."""
    if form == "values":
        return Heatmap(shape=list(values.shape), values=values.tolist())
    return Heatmap(shape=list(values.shape), png=base64.b64encode(_png(values, input_size[1:])).decode())


def _png(values: np.ndarray, size: tuple[int, ...]) -> bytes:
    """RGBA, size (height, width): a cell is a rectangle, its opacity the value over the largest absolute value."""
    values = np.asarray(values, dtype=np.float64)
    largest = np.abs(values).max()
    opacity = np.abs(values) / largest if largest > 0 else np.zeros_like(values)
    colours = np.where((values > 0)[..., None], _ABOVE, _BELOW)
    pixels = np.concatenate([colours, (255 * opacity)[..., None].round()], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").resize((size[1], size[0]), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
