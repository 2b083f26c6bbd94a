"""Decoding as people see a picture, timm's transform, and what of the picture the model sees."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import CONV_DATA, VIT_DATA, encoded, picture, tiny_vit
from timm.data import create_transform
from torchvision.models import VisionTransformer

from elude_runtime.errors import EludeError, ImagesError, ModelError
from elude_runtime.network.preprocessing import DataConfig, decode_image, to_input

FORMATS = {
    "PNG": encoded(picture(1)),
    "JPEG": encoded(picture(1), "JPEG"),
    "WEBP": encoded(picture(1), "WEBP"),
    "GIF": encoded(picture(1), "GIF"),
    "BMP": encoded(picture(1), "BMP"),
    "TIFF": encoded(picture(1), "TIFF", compression="tiff_lzw"),
    "PPM": encoded(picture(1), "PPM"),
}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    end = struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + end


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_picture(kind: str) -> None:
    assert np.array_equal(np.asarray(decode_image(FORMATS[kind])), np.asarray(picture(1)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    marked = Image.new("RGB", (32, 16))
    marked.paste((250, 0, 0), (0, 0, 16, 8))  # red where people see the top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = marked.transpose(undo[orientation]) if orientation > 1 else marked
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(encoded(stored, "JPEG", exif=exif, quality=95))
    assert upright.size == (32, 16)
    assert upright.getpixel((4, 2))[0] > 200 and upright.getpixel((28, 12))[0] < 60


def test_sixteen_bit_greys_keep_their_brightness() -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    found = np.asarray(decode_image(encoded(Image.fromarray(values))))
    np.testing.assert_allclose(found[..., 0], values / 257, atol=1.01)
    assert (found[..., 0] == found[..., 1]).all()


def test_a_dark_sixteen_bit_grey_stays_dark() -> None:
    values = np.full((8, 8), 200, dtype=np.uint16)  # of 65535: black to the eye
    assert np.asarray(decode_image(encoded(Image.fromarray(values)))).max() <= 1


def test_palette_and_transparency() -> None:
    indexed = picture(2).quantize(16)
    assert np.array_equal(np.asarray(decode_image(encoded(indexed))), np.asarray(indexed.convert("RGB")))
    clear = picture(2).convert("RGBA")
    clear.putalpha(0)
    assert np.array_equal(np.asarray(decode_image(encoded(clear))), np.asarray(picture(2)))
    for mode in ("1", "L", "LA"):
        assert decode_image(encoded(picture(2).convert(mode))).mode == "RGB"


def test_cmyk() -> None:
    found = np.asarray(decode_image(encoded(picture(3).convert("CMYK"), "JPEG", quality=98))).astype(int)
    assert np.abs(found - np.asarray(picture(3)).astype(int)).mean() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (12, 9), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"{" * 500])
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ImagesError):
        decode_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_truncated_image_is_refused(kind: str, share: float) -> None:
    with pytest.raises(ImagesError):
        decode_image(FORMATS[kind][: int(len(FORMATS[kind]) * share)])


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=4),
)
def test_damaged_bytes_give_an_image_or_one_sentence(kind: str, cut: float, flips: list[tuple[float, int]]) -> None:
    data = bytearray(FORMATS[kind][: int(len(FORMATS[kind]) * cut) + 1])
    for place, value in flips:
        data[int(place * len(data))] ^= value
    try:
        assert decode_image(bytes(data), max_pixels=10_000).mode == "RGB"
    except ImagesError as error:
        assert "\n" not in str(error)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=60, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 255)), min_size=1, max_size=3))
@example(flips=[(17, 5)])
def test_damaged_exif_gives_an_image_or_one_sentence(flips: list[tuple[int, int]]) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    data = bytearray(encoded(picture(1), "JPEG", exif=exif))
    start = data.index(b"Exif")
    for place, value in flips:
        data[start + place] ^= value
    try:
        decode_image(bytes(data), max_pixels=10_000)
    except ImagesError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("size", [(101, 100), (30_000, 30_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(ImagesError, match="the limit is 10000"):
        decode_image(png_header(*size), max_pixels=10_000)
    assert decode_image(encoded(picture(1, 100, 100)), max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize(
    "config",
    [VIT_DATA, CONV_DATA, DataConfig((3, 32, 48), (0.1, 0.2, 0.3), (0.5, 0.4, 0.3), "bilinear", 1.0, "squash")],
)
def test_the_transform_is_timms(config: DataConfig) -> None:
    timms = create_transform(
        config.input_size, is_training=False, interpolation=config.interpolation, mean=config.mean, std=config.std,
        crop_pct=config.crop_pct, crop_mode=config.crop_mode,
    )  # fmt: skip
    image = picture(4, 57, 91)
    found = to_input(image, config.transform())
    assert found.dtype == torch.float32 and tuple(found.shape) == config.input_size
    assert torch.equal(found, timms(image))


def seen_pixels(config: DataConfig, width: int, height: int) -> tuple[int, int, int, int]:
    """The rectangle that changes the input, found by asking the transform which columns and rows reach it."""
    transform = config.transform()
    plain = to_input(Image.new("RGB", (width, height)), transform)
    columns = [i for i in range(width) if _differs(plain, transform, (width, height), (i, 0, i + 1, height))]
    rows = [i for i in range(height) if _differs(plain, transform, (width, height), (0, i, width, i + 1))]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _differs(plain: torch.Tensor, transform: object, size: tuple[int, int], box: tuple[int, int, int, int]) -> bool:
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    return float((to_input(image, transform) - plain).abs().max()) > 0.12


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (50, 50)])
def test_what_the_model_sees(mode: str, size: tuple[int, int]) -> None:
    config = DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.8, mode)
    found = config.seen(*size)
    assert all(abs(a - b) <= 2 for a, b in zip(found, seen_pixels(config, *size), strict=True)), (
        found,
        seen_pixels(config, *size),
    )


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is the column, whose green is the row, and whose blue says that it is the picture."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(pixels)


SIDES = st.integers(20, 255)
CONFIGS = st.builds(
    lambda size, crop_pct, mode: DataConfig((3, *size), (0.0,) * 3, (1.0,) * 3, "nearest", crop_pct, mode),
    st.sampled_from([(32, 32), (37, 37), (32, 48), (56, 24)]),
    st.sampled_from([0.5, 0.8, 0.875, 0.9, 0.95, 1.0, 1.1, 1.4]),
    st.sampled_from(["center", "squash", "border"]),
)


@settings(max_examples=400)
@given(width=SIDES, height=SIDES, config=CONFIGS)
def test_the_window_is_where_each_input_pixel_comes_from(width: int, height: int, config: DataConfig) -> None:
    """Nearest-neighbour interpolation carries the coordinates through timm's own transform: they are read back."""
    found = (to_input(coordinates(width, height), config.transform()) * 255).round().numpy()
    x0, y0, x1, y1 = config.window(width, height)
    rows, columns = found.shape[1:]
    xs = x0 + (np.arange(columns) + 0.5) / columns * (x1 - x0)
    ys = y0 + (np.arange(rows) + 0.5) / rows * (y1 - y0)
    inside = found[2] == 255
    expected = ((xs > 0) & (xs < width))[None] & ((ys > 0) & (ys < height))[:, None]
    assert (inside == expected).all()  # the rest is padding
    assert np.abs(found[0] + 0.5 - xs[None])[inside].max() <= 0.5 + 1e-9
    assert np.abs(found[1] + 0.5 - ys[:, None])[inside].max() <= 0.5 + 1e-9


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("input_size", [(32, 32), (28, 56)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(301, 200), (180, 333), (256, 256)])
def test_painted_borders(interpolation: str, input_size: tuple[int, int], mode: str, size: tuple[int, int]) -> None:
    """Red outside of what is seen never shows; a white frame just inside of it shows on every side."""
    config = DataConfig((3, *input_size), (0.5,) * 3, (0.25,) * 3, interpolation, 0.8, mode)
    x0, y0, x1, y1 = config.seen(*size)
    assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
    reach = 2 * max(x1 - x0, y1 - y0) / min(input_size) + 2  # of the interpolation, in pixels of the picture
    outside = Image.new("RGB", size, (255, 0, 0))
    outside.paste((0, 0, 0), tuple(round(v) for v in (x0 - reach, y0 - reach, x1 + reach, y1 + reach)))
    plain = Image.new("RGB", size)
    transform = config.transform()
    nothing = to_input(plain, transform)
    assert torch.equal(to_input(outside, transform), nothing)
    thick = round(reach)
    for box in ((x0, y0, x0 + thick, y1), (x0, y0, x1, y0 + thick), (x1 - thick, y0, x1, y1), (x0, y1 - thick, x1, y1)):
        framed = plain.copy()
        framed.paste((255, 255, 255), box)
        assert float((to_input(framed, transform) - nothing).abs().max()) > 2


def test_padding_is_outside_of_the_picture() -> None:
    """A wide picture under crop_mode border: the input's upper and lower rows show none of it."""
    config = DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "border")
    assert config.window(200, 100) == (0.0, -50.0, 200.0, 150.0)
    assert config.seen(200, 100) == (0, 0, 200, 100)


def test_a_picture_too_narrow_for_the_border() -> None:
    config = DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "border")
    with pytest.raises(ImagesError, match="4 x 400, too narrow"):
        to_input(Image.new("RGB", (4, 400)), config.transform())
    assert to_input(Image.new("RGB", (4, 400)), DataConfig((3, 32, 32), **NORMAL).transform()).shape == (3, 32, 32)


NORMAL = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


class TestOfModel:
    """The size a model was built for counts, whatever its pretrained configuration says."""

    @pytest.mark.parametrize(
        ("name", "size"),
        [
            ("vit_tiny_patch16_224", (64, 96)),
            ("swin_tiny_patch4_window7_224", (64, 64)),
            ("mixer_s32_224", (64, 64)),
            ("test_vit4", (64, 64)),
        ],
    )
    def test_timm(self, name: str, size: tuple[int, int]) -> None:
        model = timm.create_model(name, img_size=size)
        assert DataConfig.of_model(model).input_size == (3, *size)

    def test_torchvision(self) -> None:
        model = VisionTransformer(48, 16, 1, 2, 16, 16)
        found = DataConfig.of_model(model)
        assert found.input_size == (3, 48, 48) and found.mean == (0.485, 0.456, 0.406)

    def test_a_factory_that_says_it(self) -> None:
        model = torch.nn.Conv2d(3, 3, 1)
        model.pretrained_cfg = {"input_size": (3, 40, 48), "mean": (0.1, 0.2, 0.3), "crop_mode": "border"}
        found = DataConfig.of_model(model)
        assert found.input_size == (3, 40, 48) and found.mean == (0.1, 0.2, 0.3) and found.crop_mode == "border"


def test_timms_configuration_with_values_over_it() -> None:
    model = tiny_vit()
    plain = DataConfig.of_model(model)
    assert plain.input_size == (3, 32, 32)
    changed = DataConfig.of_model(model, crop_pct=0.7, mean=None, interpolation="bilinear")
    assert (changed.crop_pct, changed.mean, changed.interpolation) == (0.7, plain.mean, "bilinear")
    assert DataConfig.parse(changed.as_dict()) == changed


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_pct": 0},
        {"crop_pct": float("nan")},
        {"crop_pct": 3},
        {"crop_pct": "much"},
        {"crop_mode": "left"},
        {"std": [0, 1, 1]},
        {"std": [float("nan"), 1, 1]},
        {"mean": [float("nan"), 0, 0]},
        {"mean": [0.5, 0.5]},
        {"mean": 0.5},
        {"input_size": [1, 32, 32]},
        {"input_size": [3, 32]},
        {"input_size": [3, 0, 32]},
        {"input_size": []},
        {"interpolation": "nonsense"},
        {"colour": "red"},
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        DataConfig.parse({**VIT_DATA.as_dict(), **changes})
    assert isinstance(caught.value, EludeError) and "\n" not in str(caught.value)


def test_a_configuration_that_lacks_a_value() -> None:
    with pytest.raises(ModelError):
        DataConfig.parse({"input_size": [3, 32, 32]})


def test_decoding_does_not_depend_on_the_way_in() -> None:
    """The server's bytes and a folder's file give the same tensor."""
    transform = VIT_DATA.transform()
    data = FORMATS["PNG"]
    assert torch.equal(to_input(decode_image(data), transform), transform(Image.open(io.BytesIO(data)).convert("RGB")))
