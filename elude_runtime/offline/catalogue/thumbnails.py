"""The model's view of an image, small: WebP within a number of bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from elude_runtime.network.preprocessing import DataConfig, decode_image

LONGER_SIDE = 160
# longer side and quality, the finest first
_STEPS = ((LONGER_SIDE, 75), (LONGER_SIDE, 50), (128, 50), (96, 40), (64, 40), (48, 30), (32, 20), (16, 10))
_EFFORT = 2  # of the encoder, 0 to 6: twice as fast as its default for files a tenth larger


@dataclass(frozen=True)
class Picture:
    """width, height: of the upright image; window: what the model sees of it; thumbnail: WebP, None where even the
    smallest is beyond the bytes allowed."""

    width: int
    height: int
    window: tuple[float, float, float, float]
    thumbnail: bytes | None


def picture(data: bytes, config: DataConfig, most: int) -> Picture:
    """Of an encoded image, with a thumbnail of at most `most` bytes. ImagesError where it does not decode."""
    image = decode_image(data)
    window = config.window(*image.size)
    return Picture(image.width, image.height, window, _thumbnail(_view(image, window, config), most))


def _view(image: Image.Image, window: tuple[float, float, float, float], config: DataConfig) -> Image.Image:
    """What lies in the window; beyond the image what timm's transform pads with."""
    x0, y0, x1, y1 = (round(side) for side in window)
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    if x0 >= 0 and y0 >= 0 and x1 <= image.width and y1 <= image.height:
        return image.crop((x0, y0, x1, y1))
    red, green, blue = (round(255 * v) for v in config.mean) if config.crop_mode == "border" else (0, 0, 0)
    view = Image.new("RGB", (x1 - x0, y1 - y0), (red, green, blue))
    view.paste(image, (-x0, -y0))
    return view


def _thumbnail(view: Image.Image, most: int) -> bytes | None:
    for longer, quality in _STEPS:
        scale = min(1.0, longer / max(view.size))
        size = (max(1, round(view.width * scale)), max(1, round(view.height * scale)))
        buffer = io.BytesIO()
        small = view.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        small.save(buffer, "WEBP", quality=quality, method=_EFFORT)
        if buffer.tell() <= most:
            return buffer.getvalue()
    return None
