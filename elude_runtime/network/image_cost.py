"""What decoding an encoded image may cost, bounded before a decoder sees it: one that has begun cannot be stopped.

Pixels bound most of the cost, and `decode_image` bounds those. Beside them, a JPEG may go over all of its pixels
thousands of times (progressive scans of ten bytes), and a PNG may hold thousands of compressed texts that unpack to a
megabyte each and are thrown away. The walk here sees the segments of a file as the decoders do, and refuses what no
camera, editor or encoder writes.
"""

from __future__ import annotations

import re

from elude_runtime.errors import ImagesError

# Over one colour component of one JPEG: libjpeg's own progressive script makes 14 of three components, 24 of four.
MAX_PASSES = 40
MAX_SEGMENTS = 2_000  # of one JPEG, restart markers aside: a file of 5 MB in segments of full length has 77
MAX_PADDING = 65_536  # bytes between the segments before a JPEG's pixels, which Pillow reads one by one
MAX_CHUNKS = 20_000  # of one PNG; encoders put 8 KiB or a row of pixels in one
MAX_PACKED_CHUNKS = 256  # of one PNG: profiles and texts that may be compressed, a megabyte each when unpacked

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# The next marker: any byte but a stuffed zero and fill bytes behind 0xFF.
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SOS, _EOI = 0xDA, 0xD9
# Markers without a length behind them: SOI, EOI, restarts, and all below the first frame marker.
_BARE = frozenset([*range(0xC0), 0xC8, *range(0xD0, _SOS), *range(0xF0, 0xFE)])
_RESTARTS = range(0xD0, 0xD8)
_PACKED = frozenset({b"iCCP", b"iTXt", b"zTXt"})


def check_cost(data: bytes) -> None:
    """ImagesError for a JPEG or PNG whose parts, whatever is in them, would keep a decoder busy for too long; what is
    neither, or damaged, is left to the decoder."""
    if data.startswith(_JPEG):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        _check_png(data)


def _check_jpeg(data: bytes) -> None:
    """Goes from marker to marker as libjpeg does, over the length of a segment and through the pixels of a scan."""
    passes = segments = padding = 0
    place = 0
    while place < len(data):
        found = _MARKER.search(data, place)
        if passes == 0:
            padding += (found.end() - 2 if found else len(data)) - place
            if padding > MAX_PADDING:
                raise _refused("JPEG", MAX_PADDING, "bytes of padding")
        if found is None:
            return
        marker, place = found[1][0], found.end()
        if marker == _EOI and passes:
            return
        if marker in _RESTARTS:
            continue
        segments += 1
        if segments > MAX_SEGMENTS:
            raise _refused("JPEG", MAX_SEGMENTS, "segments")
        if marker == _SOS:
            passes += max(1, sum(data[place + 2 : place + 3]))  # how many components the scan names
            if passes > MAX_PASSES:
                raise _refused("JPEG", MAX_PASSES, "passes over its pixels")
        if marker not in _BARE:
            place += int.from_bytes(data[place : place + 2], "big")


def _check_png(data: bytes) -> None:
    chunks = packed = 0
    place = len(_PNG)
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 8]
        if kind == b"IEND":
            return
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise _refused("PNG", MAX_CHUNKS, "chunks")
        packed += kind in _PACKED
        if packed > MAX_PACKED_CHUNKS:
            raise _refused("PNG", MAX_PACKED_CHUNKS, "compressed texts and profiles")
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def _refused(kind: str, limit: int, what: str) -> ImagesError:
    return ImagesError(f"The {kind} has more than {limit} {what}, which no ordinary encoder writes; save it anew.")
