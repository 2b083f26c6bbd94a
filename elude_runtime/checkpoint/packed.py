"""Arrays of numbers inside JSON: base64 of their little-endian bytes, exact and half as long as decimal text."""

from __future__ import annotations

import base64
import binascii

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pack_f32(values: ArrayLike) -> str:
    return _pack(values, "<f4")


def pack_i32(values: ArrayLike) -> str:
    return _pack(values, "<i4")


def unpack_f32(text: str) -> NDArray[np.float32]:
    """float32 [N]. ValueError for what is not such a text."""
    return _unpack(text, "<f4").astype(np.float32, copy=False)


def unpack_i32(text: str) -> NDArray[np.int32]:
    """int32 [N]. ValueError for what is not such a text."""
    return _unpack(text, "<i4").astype(np.int32, copy=False)


def _pack(values: ArrayLike, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def _unpack(text: str, dtype: str) -> NDArray:
    if not isinstance(text, str):
        raise ValueError(f"a text in base64 was expected, not {type(text).__name__}")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
    if len(data) % np.dtype(dtype).itemsize:
        raise ValueError(f"{len(data)} bytes are no whole number of {dtype} values")
    return np.frombuffer(data, dtype)
