"""From image bytes to the model's input: decoding as people see the picture, then timm's own transform."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from elude_runtime.errors import ImagesError, ImageTooLargeError, ModelError
from elude_runtime.network.image_cost import check_cost

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
# Every decoder is a door: clients may send these, a user's own folder may hold a few more.
SERVED_FORMATS = ("JPEG", "PNG", "WEBP")
OFFLINE_FORMATS = (*SERVED_FORMATS, "BMP", "GIF", "TIFF", "PPM")
MAX_RATIO = 100  # longer side over shorter: the shorter is scaled to the input's size, the longer with it
MAX_PIXELS = 89_478_485  # Pillow's own warning limit


@dataclass(frozen=True)
class DataConfig:
    """Preprocessing in timm's terms; input_size is (channels, height, width)."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def of_model(cls, model: Any, **overrides: Any) -> DataConfig:
        """timm's data configuration of `model`, with the given values (None: keep timm's) put over it."""
        known = {f.name for f in fields(cls)}
        # No name list: a model that timm does not know has timm's defaults for what it does not say.
        resolved = resolve_data_config({}, model=model)
        values = {k: v for k, v in resolved.items() if k in known}
        sizes = (
            getattr(getattr(model, "patch_embed", None), "img_size", None),
            (getattr(model, "_traits", None) or {}).get("img_size"),  # timm's other models that are built for one size
            getattr(model, "image_size", None),  # torchvision's transformers
        )
        built_for = next((s for s in sizes if s is not None), None)
        if built_for is not None:  # it may be another size than the pretrained configuration says
            sides = (built_for, built_for) if isinstance(built_for, int) else built_for
            values["input_size"] = (values["input_size"][0], *sides)
        values.update({k: v for k, v in overrides.items() if v is not None})
        return cls.parse(values)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> DataConfig:
        """From a mapping (a manifest's). ModelError for missing, unknown or impossible values."""
        try:
            made = cls(**values)
            made = cls(
                tuple(int(v) for v in made.input_size),  # type: ignore[arg-type]
                tuple(float(v) for v in made.mean),
                tuple(float(v) for v in made.std),
                str(made.interpolation),
                float(made.crop_pct),
                str(made.crop_mode),
            )
        except (TypeError, ValueError) as error:
            raise ModelError(f"The data configuration cannot be used: {error}.") from error
        if len(made.input_size) != 3 or made.input_size[0] != 3 or min(made.input_size) < 1:
            raise ModelError(f"The input size {made.input_size} cannot be used: give 3, HEIGHT, WIDTH.")
        if (
            len(made.mean) != 3
            or len(made.std) != 3
            or not all(map(math.isfinite, made.mean + made.std))
            or min(made.std) <= 0
        ):
            raise ModelError("Mean and std need three finite values, std above zero.")
        if made.interpolation not in _INTERPOLATIONS:
            raise ModelError(
                f"There is no interpolation {made.interpolation!r}; use one of {', '.join(_INTERPOLATIONS)}."
            )
        if not 0 < made.crop_pct <= 2 or made.crop_mode not in ("center", "squash", "border"):
            raise ModelError("crop_pct must be above 0 and at most 2, crop_mode one of center, squash, border.")
        return made

    def as_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def transform(self) -> Any:
        """timm's evaluation transform: PIL image -> float32 [3, H, W]."""
        return create_transform(
            self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def window(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1): where the edges of the input lie on a width x height image, in its pixels.

        Follows timm's transform, its roundings included: the image is scaled so that its shorter side (crop_mode
        center), each side (squash) or its longer side (border) is the input side / crop_pct, and the centre is cut out
        or padded. Beyond the image where the input is padded.
        """
        high, wide = self.input_size[1], self.input_size[2]
        scaled_w, scaled_h = self._scaled(width, height)
        left, top = _first_kept(scaled_w, wide), _first_kept(scaled_h, high)
        per_x, per_y = width / scaled_w, height / scaled_h
        return left * per_x, top * per_y, (left + wide) * per_x, (top + high) * per_y

    def seen(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1): what the model sees of a width x height image: `window` cut to the image, whole pixels."""
        x0, y0, x1, y1 = self.window(width, height)
        return max(0, round(x0)), max(0, round(y0)), min(width, round(x1)), min(height, round(y1))

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the image after timm's resize."""
        scaled_h, scaled_w = (math.floor(side / self.crop_pct) for side in self.input_size[1:])
        if self.crop_mode == "squash":
            return scaled_w, scaled_h
        if self.crop_mode == "center" and scaled_h == scaled_w:  # torchvision's resize of the shorter side
            longer = int(scaled_w * max(width, height) / min(width, height))
            return (scaled_w, longer) if width <= height else (longer, scaled_w)
        pick = min if self.crop_mode == "center" else max
        ratio = pick(width / scaled_w, height / scaled_h)
        return max(1, round(width / ratio)), max(1, round(height / ratio))


def _first_kept(scaled: int, crop: int) -> int:
    """Where a centre crop of `crop` pixels starts in `scaled` pixels; below 0 where it is padded."""
    return -((crop - scaled) // 2) if crop > scaled else round((scaled - crop) / 2)


def decode_image(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = OFFLINE_FORMATS,
    begin: Callable[[int], object] = lambda pixels: None,
) -> Image.Image:
    """Encoded bytes -> upright RGB image: first frame; EXIF orientation applied; 16-bit greys scaled, transparency
    dropped. formats: Pillow's names of what is tried; begin: called with the number of pixels before any is decoded.
    ImagesError when it is none of that, has too many pixels, or would take too long (`check_cost`)."""
    try:
        check_cost(data)
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > max_pixels:
            raise ImageTooLargeError(
                f"The image has {image.width} x {image.height} pixels, the limit is {max_pixels}; send a smaller one."
            )
        if max(image.size) > MAX_RATIO * min(image.size):
            raise ImageTooLargeError(
                f"The image is {image.width} x {image.height}, and the longer side may be {MAX_RATIO} times the "
                "shorter at most; crop it."
            )
        begin(image.width * image.height)
        image.seek(0)
        upright = upright_image(image)
        if upright.mode.startswith("I") or upright.mode == "F":
            upright = _eight_bit(upright)
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except ImagesError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"The image has too many pixels, the limit is {max_pixels}; send a smaller one."
        ) from error
    except UnidentifiedImageError as error:
        raise ImagesError("The bytes are not an image in a known format; send JPEG, PNG or WebP.") from error
    except Exception as error:  # Pillow's parsers raise anything over damaged bytes (struct.error, KeyError, …)
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImagesError(f"The image cannot be decoded ({detail[:120]}); it may be damaged or cut off.") from error


def announced_pixels(data: bytes, formats: tuple[str, ...] = OFFLINE_FORMATS) -> int:
    """How many pixels an image says that it has, none of them decoded; 0 where it is no image, or one that would take
    too long to open (`check_cost`)."""
    try:
        check_cost(data)
        with Image.open(io.BytesIO(data), formats=formats) as image:
            return image.width * image.height
    except Exception:  # Pillow's parsers raise anything over damaged bytes
        return 0


def upright_image(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF block says; as it is where that block is damaged, which the pixels are not."""
    try:
        image.load()  # what stands after the pixels belongs to the EXIF block too
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image  # which would copy it
    except Exception:  # Pillow's EXIF parser raises anything
        image.load()
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Row by row in float64, which for a whole image of 50 megapixels would take 1.2 GB."""
    values = np.asarray(image)
    top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
    scaled = np.empty(values.shape, np.uint8)
    for row, own in zip(scaled, values, strict=True):
        row[:] = (own.astype(np.float64).clip(0, top) * (255.0 / top)).round()
    return Image.fromarray(scaled)


def to_input(image: Image.Image, transform: Any) -> Tensor:
    """Upright RGB image -> float32 [3, H, W], by timm's transform. ImageTooLargeError for one that is too narrow."""
    try:
        tensor = transform(image)
    except ValueError as error:  # crop_mode border: the shorter side is scaled to less than half a pixel
        raise ImageTooLargeError(
            f"The image is {image.width} x {image.height}, too narrow to be scaled to the model's input; crop it."
        ) from error
    return tensor if isinstance(tensor, Tensor) else torch.as_tensor(tensor)
