"""What an image may cost to decode: files that would keep a decoder busy are refused unseen, ordinary ones are not."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import encoded, picture

from elude_runtime.errors import ImagesError
from elude_runtime.network import image_cost, preprocessing
from elude_runtime.network.image_cost import MAX_PASSES, check_cost
from elude_runtime.network.preprocessing import SERVED_FORMATS, decode_image

BYTES = st.integers(0, 255)
MEGABYTES = 5_000_000  # the service's own limit of an image's bytes


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def scan(components: int) -> bytes:
    """The header of a progressive scan that refines the first coefficient, and no pixels: decoders take zeros."""
    each = b"".join(bytes([number + 1, 0]) for number in range(components))
    return segment(0xDA, bytes([components]) + each + b"\x00\x00\x10")


def progressive(scans: int, components: int = 1, side: int = 64) -> bytes:
    """A grey or CMYK progressive JPEG of a few bytes a scan."""
    frame = struct.pack(">BHHB", 8, side, side, components)
    frame += b"".join(bytes([number + 1, 0x11, 0]) for number in range(components))
    tables = segment(0xDB, b"\0" + b"\1" * 64)
    tables += b"".join(segment(0xC4, bytes([kind, 1]) + bytes(15) + b"\0") for kind in (0x00, 0x10))
    first = scan(components)[:-1] + b"\x00"
    return b"\xff\xd8" + tables + segment(0xC2, frame) + first + scan(components) * (scans - 1) + b"\xff\xd9"


def filled(start: bytes, piece: bytes, end: bytes) -> bytes:
    """As many pieces between the two as make five megabytes."""
    return start + piece * ((MEGABYTES - len(start) - len(end)) // len(piece)) + end


JPEG, PNG = encoded(picture(1), "JPEG"), encoded(picture(1))
HEAD, TAIL = PNG[:33], PNG[33:]  # signature and IHDR; the pixels and IEND
MEGABYTE_OF_ZEROS = zlib.compress(bytes(2**20 - 10), 9)

COSTLY: dict[str, Callable[[], bytes]] = {
    "hundreds of thousands of scans": lambda: filled(progressive(1)[:-2], scan(1), b"\xff\xd9"),
    "scans of all four components": lambda: progressive(MAX_PASSES // 4 + 1, 4),
    "comments before the pixels": lambda: filled(JPEG[:2], segment(0xFE, b""), JPEG[2:]),
    "EXIF in pieces": lambda: filled(JPEG[:2], segment(0xE1, b"Exif\0\0a"), JPEG[2:]),
    "fill bytes": lambda: filled(JPEG[:2], b"\xff", JPEG[2:]),
    "zeros between segments": lambda: filled(JPEG[:20], b"\0", JPEG[20:]),
    "zeros to the end": lambda: filled(JPEG[:20], b"\0", b""),
    "empty pixel chunks": lambda: filled(PNG[:-12], chunk(b"IDAT"), PNG[-12:]),
    "unknown chunks before the pixels": lambda: filled(HEAD, chunk(b"abCd"), TAIL),
    "unknown chunks behind the pixels": lambda: filled(PNG[:-12], chunk(b"abCd"), PNG[-12:]),
    "profiles that unpack to a megabyte": lambda: filled(HEAD, chunk(b"iCCP", b"a\0\0" + MEGABYTE_OF_ZEROS), TAIL),
    "texts with a wrong checksum": lambda: filled(
        HEAD, chunk(b"zTXt", b"a\0\0" + MEGABYTE_OF_ZEROS[:-4] + b"none"), TAIL
    ),
    "texts that are no UTF-8": lambda: filled(
        HEAD, chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"\xff" * (2**20 - 10), 9)), TAIL
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_files_are_refused_before_a_decoder_sees_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoder(*_: Any, **__: Any) -> None:
        pytest.fail("a decoder was given the file")

    data = COSTLY[name]()
    assert len(data) <= MEGABYTES
    monkeypatch.setattr(preprocessing.Image, "open", decoder)
    assert preprocessing.announced_pixels(data) == 0  # what decides whether images go side by side
    with pytest.raises(ImagesError, match=r"^The (JPEG|PNG) has more than \d+ [a-z ]+, which .*; save it anew\.$"):
        decode_image(data, formats=SERVED_FORMATS)


def test_the_number_of_passes_is_the_decoders() -> None:
    """The limit itself is decoded, one scan more is refused; scans of several components count as many."""
    assert decode_image(progressive(MAX_PASSES)).size == (64, 64)
    assert decode_image(progressive(MAX_PASSES // 4, 4)).size == (64, 64)
    for one_more in (progressive(MAX_PASSES + 1), progressive(MAX_PASSES // 4 + 1, 4)):
        with pytest.raises(ImagesError, match="passes"):
            decode_image(one_more)


def ordinary() -> dict[str, bytes]:
    """Files as cameras, editors and optimisers write them, each near one of the limits' causes."""
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    thumbnail = encoded(picture(2), "JPEG", progressive=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    with_thumbnail = exif.tobytes() + thumbnail * 40  # scans that belong to nobody's pixels
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.asarray(noise)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 128, 96, 8, 2, 0, 0, 0))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"seen at noon " * 50))
    plain = encoded(noise, "JPEG", quality=95)
    return {
        "baseline": plain,
        "progressive": encoded(noise, "JPEG", quality=95, progressive=True),
        "progressive CMYK": encoded(noise.convert("CMYK"), "JPEG", progressive=True),
        "restart markers": encoded(noise, "JPEG", quality=95, restart_marker_blocks=1),
        "thumbnails in EXIF": encoded(noise, "JPEG", exif=with_thumbnail),
        "colour profile in pieces": encoded(noise, "JPEG", icc_profile=bytes(range(256)) * 2000),
        "a second picture": encoded(noise, "MPO", save_all=True, append_images=[picture(5)] * 3),
        "a film behind the picture": plain + b"\0\0\0\x18ftypmp42" + scan(1) * 500,
        "padding": plain[:2] + b"\xff" * 200 + plain[2:],
        "pixel chunks of a few bytes": PNG[:8]
        + header
        + b"".join(chunk(b"IDAT", rows[n : n + 7]) for n in range(0, len(rows), 7))
        + chunk(b"IEND"),
        "texts": HEAD + text * 100 + TAIL,
        "WebP": encoded(noise, "WEBP", quality=80),
    }


ORDINARY = ordinary()


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ordinary_files_are_decoded_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = np.asarray(decode_image(ORDINARY[name], formats=SERVED_FORMATS))
    monkeypatch.setattr(preprocessing, "check_cost", lambda data: None)
    assert np.array_equal(found, np.asarray(decode_image(ORDINARY[name], formats=SERVED_FORMATS)))


def test_the_limits_are_far_from_ordinary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of each limit would do for all of them, and they go further than what is usually met."""
    for limit in ("MAX_PASSES", "MAX_SEGMENTS", "MAX_PADDING", "MAX_CHUNKS", "MAX_PACKED_CHUNKS"):
        monkeypatch.setattr(image_cost, limit, getattr(image_cost, limit) * 2 // 3)
    for data in ORDINARY.values():
        check_cost(data)


def test_frames_behind_the_first_cost_nothing() -> None:
    """Fifty thousand frames of an animation in one file: only the first is decoded."""
    first, still = encoded(picture(1), "WEBP", lossless=True)[12:], encoded(Image.new("RGB", (1, 1)), "WEBP")[12:]

    def frame(image: bytes, width: int, height: int) -> bytes:
        sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"ANMF" + struct.pack("<I", 16 + len(image)) + bytes(6) + sizes + b"\1\0\0\2" + image

    canvas = (48 - 1).to_bytes(3, "little") + (40 - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += frame(first, 48, 40) + frame(still, 1, 1) * 50_000
    film = b"RIFF" + struct.pack("<I", len(body)) + body
    with Image.open(io.BytesIO(film)) as opened:
        assert opened.n_frames == 50_001
    assert np.array_equal(np.asarray(decode_image(film, formats=SERVED_FORMATS)), np.asarray(picture(1)))


@given(
    st.sampled_from([JPEG, PNG, progressive(9, 3)]), st.floats(0, 1), st.lists(st.tuples(st.floats(0, 0.999), BYTES))
)
def test_damaged_files_are_left_to_the_decoder(whole: bytes, cut: float, changes: list[tuple[float, int]]) -> None:
    """Cut or overwritten anywhere, nothing but the walk's own sentence comes out of it."""
    damaged = bytearray(whole[: 1 + int(len(whole) * cut)])
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    with contextlib.suppress(ImagesError):  # a byte that says how many components a scan has may say 255
        check_cost(bytes(damaged))


def test_sixteen_bits_become_eight_row_by_row() -> None:
    """The same bytes as of the whole array at once, for each kind of wide pixels."""
    values = np.random.default_rng(4).integers(0, 65536, (33, 21))
    whole = (values.clip(0, 65535) * (255.0 / 65535)).round().astype(np.uint8)
    for image in (Image.fromarray(values.astype(np.uint16)), Image.fromarray(values.astype(np.int32))):
        assert np.array_equal(np.asarray(preprocessing._eight_bit(image)), whole)
    small = Image.fromarray((values % 256).astype(np.float32) / 2)
    assert np.array_equal(
        np.asarray(preprocessing._eight_bit(small)), (np.asarray(small, np.float64)).round().astype(np.uint8)
    )
