"""Where the images of a tar shard lie: one scan of its headers, so that each can be read alone.

Python's tarfile reads the same (the tests compare them), at five times the cost, which a million images at the start of
every run make felt; and it takes a damaged header for the end of the archive.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from itertools import groupby
from posixpath import dirname, join, normpath
from typing import BinaryIO

from elude_runtime.errors import ImagesError

DAMAGE = -1  # stands for the size where a shard cannot be followed any further
ELSEWHERE = -2  # and for that of a file whose bytes are not in the shard in one piece
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_PADDING = 1 << 20  # tar fills its last record with zeros; megabytes of them behind the end mark are something else
_LONGEST = 1 << 20  # bytes of an extension header; a longer one is damage
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b'\x04"M': "lz4"}

Entry = tuple[bytes, int, int]  # member name, first byte, size


def tar_images(shard: str, suffixes: frozenset[str]) -> Iterator[Entry]:
    """The images of an uncompressed tar file in its order, one a sample as WebDataset groups them: neighbours whose
    names agree up to the first dot. `a.jpg` stands for its sample, and `a.mask.png` beside it is left out; where only
    names like the latter are (`frame.0001.png`, `frame.0002.png`), each is an image. A link to a member before it gives
    that member's place.

    A shard that is cut off or damaged, or goes on behind its end mark, ends with an entry of size DAMAGE, at the byte
    where that shows; its name is the member that is cut, or empty. A link to anything else has the size ELSEWHERE, and
    so has a sparse file. ImagesError for what is no tar file from the start.
    """
    wanted = {s.encode() for s in suffixes}
    for _, sample in groupby(_members(shard), key=lambda member: member[0]):
        images = [m for m in sample if m[2][2] == DAMAGE or os.path.splitext(m[2][0])[1].lower() in wanted]
        plain = [m for m in images if b"." not in m[1]]
        yield from (m[2] for m in plain[:1] or images)


def _members(shard: str) -> Iterator[tuple[bytes, bytes, Entry]]:
    """(key of the sample, extensions, entry) of the files that belong to a sample; last an entry of size DAMAGE, with
    neither key nor extensions, if the shard cannot be read to its end."""
    try:
        facts = os.stat(shard)
        if not stat.S_ISREG(facts.st_mode):
            raise ImagesError(f"{shard} is not a file; give uncompressed tar shards.")
        with open(shard, "rb", buffering=0) as file:
            for name, offset, size in _files(file, facts.st_size):
                if size == DAMAGE and offset == 0:
                    file.seek(0)
                    raise ImagesError(f"{shard} {_what_else(file.read(_BLOCK))}")
                entry = name.removeprefix(b"./"), offset, size
                folder, slash, base = entry[0].rpartition(b"/")
                stem, _, extensions = base.partition(b".")
                if size == DAMAGE:
                    yield b"", b"", entry
                elif stem and extensions:
                    yield folder + slash + stem, extensions, entry
    except OSError as error:
        raise ImagesError(f"{shard} cannot be read ({error.strerror}); give tar shards that are there.") from error


def _what_else(start: bytes) -> str:
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            return f"is compressed ({kind}), so that no image in it can be reached alone; decompress it first."
    return "is not a tar file; give uncompressed tar shards."


def _files(file: BinaryIO, end: int) -> Iterator[Entry]:
    """The regular files of a tar of `end` bytes (v7, ustar, GNU or pax) and its links, in order; see _members for the
    last."""
    offset = 0
    extended: dict[bytes, bytes] = {}  # what an extension header says of the next member
    linkable: dict[bytes, tuple[int, int]] | None = None  # the files before, once there is a link
    while offset < end or not end:  # a shard that ends without its end mark is taken as complete, as by other readers
        file.seek(offset)
        block = file.read(_BLOCK)
        if block == _ZEROS:
            # concatenated archives, too, would end here for other readers
            if end - offset > _PADDING or file.read(_PADDING).strip(b"\0"):
                yield b"", offset, DAMAGE
            return
        try:
            kind, name, size = _header(block)
            data = offset + _BLOCK
            if kind in b"KLx":
                if size > min(_LONGEST, end - data):
                    raise ValueError("longer than the file")
                text = file.read(size)
                named = b"path" if kind == b"L" else b"linkpath"
                extended |= _pax(text) if kind == b"x" else {named: text.partition(b"\0")[0]}
                offset = data + _blocks(size)
                continue
            name, size = extended.get(b"path", name), int(extended.get(b"size", size))
            if size < 0:
                raise ValueError("a damaged record")
        except ValueError:
            yield b"", offset, DAMAGE
            return
        link = extended.get(b"linkpath", block[157:257].partition(b"\0")[0])
        extended = {}
        if kind == b"S":  # a sparse file by GNU tar, with more blocks of header
            more = block[482]
            while more and data + _BLOCK <= end:
                file.seek(data)
                more = file.read(_BLOCK)[504]
                data += _BLOCK
        regular = kind in b"07" or (kind == b"\0" and not name.endswith(b"/"))  # v7 marks folders by a slash
        has_data = regular or kind not in b"0\x00123456"
        if has_data and data + size > end:
            yield name, data, DAMAGE
            return
        if kind in b"12":
            if linkable is None:
                linkable = {normpath(n): (first, length) for n, first, length in _files(file, offset)} if offset else {}
            target = link if kind == b"1" else join(dirname(name), link)
            yield name, *linkable.get(normpath(target), (data, ELSEWHERE))
        elif kind == b"S":
            yield name, data, ELSEWHERE
        elif regular:
            yield name, data, size
            if linkable is not None:
                linkable[normpath(name)] = data, size
        offset = data + _blocks(size) if has_data else data


def _header(block: bytes) -> tuple[bytes, bytes, int]:
    """(type, name, size in bytes) of a header block. ValueError for what is none."""
    if len(block) < _BLOCK or _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise ValueError("not a header")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return block[156:157], name, _number(block[124:136])


def _number(field: bytes) -> int:
    """Octal digits, or big-endian bytes where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") - (1 << (8 * len(field) - 1))
    else:
        value = int(field.partition(b"\0")[0].strip() or b"0", 8)
    if not 0 <= value < 1 << 62:
        raise ValueError("a damaged number")
    return value


def _pax(text: bytes) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    records = {}
    while text:
        digits, _, _ = text.partition(b" ")
        length = int(digits)
        if not len(digits) + 1 < length <= len(text):
            raise ValueError("a damaged record")
        key, _, value = text[len(digits) + 1 : length - 1].partition(b"=")
        records[key] = value
        text = text[length:]
    return records


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
