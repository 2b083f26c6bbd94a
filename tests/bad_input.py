"""The table of bad and strange input: a row each, what is sent, and what has to come back.

`tests/api/test_bad_input.py` runs it in process, `tests/integration/test_bad_input_served.py` through the server.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from support import CLASSES, SECOND, VIT_ARGS, VIT_DATA, encoded, input_tensor, picture, tiny_vit

import elude_runtime as elude
from elude_runtime.api.intake import Row

# The checkpoints: a ViT with a class token; a convolutional network; a ViT split where only the class token matters.
VIT_MODEL, CONV_MODEL, LAST_MODEL = "vit", "conv", "last"
CONV_LAYER, LAST_LAYER, HEAD = "blocks.6.0.conv_pwl", "blocks.2.mlp.fc2", "head"
WIDTH = VIT_ARGS["embed_dim"]
P0, C0 = f"{SECOND}/P0", f"{SECOND}/C0"
PICTURE = picture(300)
PNG = encoded(PICTURE)
MULTIPART, JSON, RAW = "multipart/form-data", "application/json", "application/octet-stream"


@dataclass(frozen=True)
class Input:
    """One request and its answer. body: raw or JSON; parts: of a multipart request; kind: the problem's type, empty for
    an answer; said: stands in the problem; same_as: a PNG that is the same picture to the model; size: of the image."""

    name: str
    body: bytes | None = None
    content_type: str = RAW
    status: int = 200
    kind: str = ""
    said: str = ""
    parts: Mapping[str, bytes] | None = None
    same_as: bytes | None = None
    size: tuple[int, int] | None = None
    model: str = VIT_MODEL
    route: str = ""
    explain: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def row(self) -> Row:
        """The request as the handler hands it to the engine."""
        parts = {"body": self.body or b""} if self.parts is None else dict(self.parts)
        return Row(parts, self.content_type.partition(";")[0].strip().lower(), self.explain, self.route, "r")


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def document(values: Mapping[str, Any], image: bytes | None = PNG) -> bytes:
    """A JSON body with an image."""
    return json.dumps({**({} if image is None else {"image": b64(image)}), **values}).encode()


def last_block(out: Path) -> Path:
    """A checkpoint of a layer where patches have no effect, and of one that sees no tokens."""
    elude.rewrite(
        tiny_vit(), input_tensor(VIT_DATA, 12, 0), out=out, layers=[LAST_LAYER, HEAD], subunits=4, concepts=4,
        tokens=12, data_config=VIT_DATA, model_args=VIT_ARGS,
    )  # fmt: skip
    return out


# --- images -----------------------------------------------------------------------------------------------------------


def _png(width: int, height: int, depth: int, colour: int, lines: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these scan lines, filter bytes included."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b"")]
    made = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def _sixteen_bits(image: Image.Image) -> bytes:
    """Greys or colours v as 16-bit values v * 257."""
    values = np.asarray(image).astype(">u2") * np.uint16(257)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return _png(image.width, image.height, 16, 2 if values.ndim == 3 else 0, lines)


def _plain(width: int, height: int, grey: int) -> bytes:
    """A grey PNG of one colour."""
    return _png(width, height, 8, 0, (b"\0" + bytes([grey]) * width) * height)


def _oriented(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PICTURE, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def _turned(orientation: int) -> Image.Image:
    """What people see of `_oriented`: numpy turns and flips where the package asks Pillow to."""
    pixels = np.asarray(Image.open(io.BytesIO(encoded(PICTURE, "JPEG", quality=95))))
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(turned))


def _damaged_exif() -> bytes:
    made = _oriented(1)
    start = made.index(b"Exif\0\0") + 6
    return made[:start] + b"\xff" * 8 + made[start + 8 :]


def _animated(kind: str) -> bytes:
    return encoded(PICTURE, kind, save_all=True, append_images=[picture(301), picture(302)], duration=50, lossless=True)


def _with_alpha() -> bytes:
    image = PICTURE.copy()
    image.putalpha(Image.new("L", image.size, 0))
    return encoded(image)


def decoded(data: bytes) -> bytes:
    """The picture as Pillow reads it, as a lossless PNG."""
    return encoded(Image.open(io.BytesIO(data)).convert("RGB"))


_GREY = PICTURE.convert("L")
_JPEG = encoded(PICTURE, "JPEG", quality=95)
_PALETTE = PICTURE.quantize(64)
_CMYK = encoded(PICTURE.convert("CMYK"), "JPEG", quality=100, subsampling=0)
_WEBP = encoded(PICTURE, "WEBP", lossless=True)
_ONE = Image.new("RGB", (1, 1), (200, 30, 90))
_JUNK = np.random.default_rng(7).bytes(2_000_000)

READ_RIGHT = [
    ("JPEG", _JPEG, decoded(_JPEG), PICTURE.size),
    ("PNG", PNG, PNG, PICTURE.size),
    ("WebP", _WEBP, PNG, PICTURE.size),
    ("progressive JPEG", encoded(PICTURE, "JPEG", quality=95, progressive=True), decoded(_JPEG), PICTURE.size),
    ("JPEG with junk after its end", _JPEG + _JUNK[:5000], decoded(_JPEG), PICTURE.size),
    ("grey JPEG", encoded(_GREY, "JPEG", quality=95), decoded(encoded(_GREY, "JPEG", quality=95)), PICTURE.size),
    ("16-bit grey PNG", _sixteen_bits(_GREY), encoded(_GREY.convert("RGB")), PICTURE.size),
    ("16-bit colour PNG", _sixteen_bits(PICTURE), PNG, PICTURE.size),
    ("1-bit PNG", encoded(_GREY.convert("1")), encoded(_GREY.convert("1").convert("RGB")), PICTURE.size),
    ("palette PNG", encoded(_PALETTE), encoded(_PALETTE.convert("RGB")), PICTURE.size),
    ("palette PNG with a transparent colour", encoded(_PALETTE, transparency=3), encoded(_PALETTE.convert("RGB")),
     PICTURE.size),
    ("PNG with alpha, wholly transparent", _with_alpha(), PNG, PICTURE.size),
    ("CMYK JPEG", _CMYK, decoded(_CMYK), PICTURE.size),
    ("animated PNG: its first frame", _animated("PNG"), PNG, PICTURE.size),
    ("animated WebP: its first frame", _animated("WEBP"), PNG, PICTURE.size),
    *[
        (f"JPEG turned by EXIF {o}", _oriented(o), encoded(_turned(o)), _turned(o).size)
        for o in range(1, 9)
    ],
    ("PNG turned by EXIF", _oriented(6, "PNG"), encoded(PICTURE.rotate(-90, expand=True)), PICTURE.size[::-1]),
    ("JPEG with a damaged EXIF block", _damaged_exif(), decoded(_JPEG), PICTURE.size),
    ("1 x 1", encoded(_ONE), encoded(_ONE.resize((9, 9))), (1, 1)),
    ("20,000 x 250", _plain(20_000, 250, 90), encoded(Image.new("RGB", (250, 250), (90, 90, 90))), (20_000, 250)),
]  # fmt: skip
IMAGES = [Input(name, data, same_as=same, size=size) for name, data, same, size in READ_RIGHT]


def _image(name: str, data: bytes, said: str, status: int = 422) -> Input:
    return Input(name, data, "image/jpeg", status, "image-too-large" if status == 413 else "invalid-image", said)


_TEXT_BOMB = (b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000, 9))
BAD_IMAGES = [
    _image("not an image", b"hello world", "known format"),
    _image("HTML", b"<html><img src=x></html>", "known format"),
    _image("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "known format"),
    _image("GIF, not served", encoded(PICTURE, "GIF"), "known format"),
    _image("TIFF, not served", encoded(PICTURE, "TIFF"), "known format"),
    _image("BMP, not served", encoded(PICTURE, "BMP"), "known format"),
    _image("EPS, which would run a program", encoded(PICTURE, "EPS"), "known format"),
    _image("truncated JPEG", _JPEG[: len(_JPEG) // 2], "damaged or cut off"),
    _image("truncated PNG", PNG[: len(PNG) // 2], "damaged or cut off"),
    _image("truncated WebP", _WEBP[: len(_WEBP) // 2], ""),
    _image("a PNG's signature", PNG[:8], ""),
    _image("a JPEG's first bytes", _JPEG[:4], ""),
    _image("PNG of no size", _png(0, 0, 8, 2, b""), ""),
    _image("20,000 x 20,000", _png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)), "too many pixels", 413),
    _image("20,000 x 1", _plain(20_000, 1, 90), "crop", 413),
    _image("bomb: a header of 60,000 x 60,000", _png(60_000, 60_000, 8, 2, b"\0" * 10), "smaller", 413),
    _image("bomb: 4 billion x 4 billion", _png(2**31 - 1, 2**31 - 1, 8, 2, b"\0" * 10), "", 413),
    _image("bomb: a comment of 50 MB", _png(8, 8, 8, 0, b"\0" * 72, _TEXT_BOMB), "damaged"),
    _image("more bytes than the limit", PNG + b"\0" * 5_000_000, "bytes", 413),
    _image("two megabytes of junk", _JUNK, "known format"),
    Input("empty body", b"", RAW, 422, "invalid-image", "empty"),
    Input("empty body of an image type", b"", "image/jpeg", 422, "invalid-image", "empty"),
]


# --- documents --------------------------------------------------------------------------------------------------------


def _json(name: str, body: bytes, said: str, kind: str = "not-json", status: int = 400) -> Input:
    return Input(name, body, JSON, status, kind, said)


_IMAGE = json.dumps(b64(PNG)).encode()
NOT_JSON = [
    _json("empty JSON body", b"", "not JSON"),
    _json("half an object", b"{", "not JSON"),
    _json("two documents", b"{}{}", "not JSON"),
    _json("single quotes", b"{'top_k': 5}", "not JSON"),
    _json("NaN", b'{"top_k": NaN}', "NaN"),
    _json("infinity", b'{"top_k": Infinity}', "Infinity"),
    _json("minus infinity", b'{"top_k": -Infinity}', "-Infinity"),
    _json("1e400", b'{"top_k": 1e400}', "too large"),
    _json("-1e400, deep inside", b'{"steer": {"edits": [{"value": -1e400}]}}', "too large"),
    _json("a duplicate key", b'{"image": ' + _IMAGE + b', "top_k": 1, "top_k": 2}', "twice"),
    _json("a duplicate key inside", b'{"image": ' + _IMAGE + b', "explain": {"steps": 1, "steps": 2}}', "twice"),
    _json("deep nesting", b'{"image": ' + b"[" * 50 + b"]" * 50 + b"}", "deeper"),
    _json("very deep nesting", b"[" * 100_000 + b"]" * 100_000, "deeper"),
    _json("deep nesting without an end", b'{"a":' * 200_000, "deeper"),
    _json("UTF-16", '{"top_k": 5}'.encode("utf-16"), "UTF-8"),
    _json("Latin-1", '{"id": "\xe9"}'.encode("latin-1"), "UTF-8"),
    _json("two megabytes of junk as JSON", _JUNK, ""),
    _json("two megabytes of brackets", b"[" * 2_000_000, "deeper"),
    _json("two megabytes of quotes", b'"' * 2_000_000, "strings"),
    _json("two megabytes of empty objects", b"[" + b"{}," * 700_000 + b"{}]", "objects"),
    _json("a number of 5,000 digits", b'{"top_k": ' + b"9" * 5000 + b"}", ""),
]


def _invalid(
    name: str, values: Mapping[str, Any], said: str, kind: str = "invalid-document", model: str = VIT_MODEL
) -> Input:
    status = {"other-checkpoint": 412, "unknown-route": 404, "not-json": 400}.get(kind, 422)
    return Input(name, document(values), JSON, status, kind, said, model=model)


def _edit(
    name: str, edit: Mapping[str, Any], said: str, kind: str = "invalid-document", model: str = VIT_MODEL
) -> Input:
    return _invalid(name, {"steer": {"edits": [edit]}}, said, kind, model)


def _vector(
    name: str, vector: Mapping[str, Any], said: str, kind: str = "invalid-document", model: str = VIT_MODEL
) -> Input:
    return _invalid(name, {"steer": {"vectors": [vector]}}, said, kind, model)


def _scope(name: str, apply: Any, said: str, kind: str = "invalid-document") -> Input:
    return _edit(name, {"feature": P0, "mode": "ablate", "apply": apply}, said, kind)


_NAN32 = base64.b64encode(struct.pack("<32f", *[float("nan")] * WIDTH)).decode()
WRONG_TYPES = [
    Input("a list", b"[]", JSON, 422, "invalid-document", ""),
    Input("a number", b"3", JSON, 422, "invalid-document", ""),
    Input("null", b"null", JSON, 422, "invalid-document", ""),
    _invalid("text for a number", {"top_k": "5"}, "top_k"),
    _invalid("a fraction for a number", {"top_k": 5.5}, "top_k"),
    _invalid("true for a number", {"top_k": True}, "top_k"),
    _invalid("null for a number", {"top_k": None}, "top_k"),
    _invalid("no classes", {"top_k": 0}, "top_k"),
    _invalid("text for an object", {"explain": "yes"}, "explain"),
    _invalid("a list for an object", {"steer": []}, "steer"),
    _invalid("text for true", {"explain": {"pixels": "true"}}, "pixels"),
    _invalid("text for an edit's value", {"steer": {"edits": [{"feature": P0, "mode": "set", "value": "1"}]}}, "value"),
    _invalid("an unknown key", {"colour": 1}, "colour"),
    _invalid("an unknown key inside", {"explain": {"methods": ["gradient"]}}, "methods"),
    _edit("an unknown key of an edit", {"feature": P0, "mode": "ablate", "strength": 2}, "strength"),
    _invalid("an image's address", {"image": {"url": "http://127.0.0.1/"}}, "url"),
    _invalid("an image that is text", {"image": "AAAA"}, "image"),
    _invalid("an identity with a line break", {"id": "a\r\nX-Evil: 1"}, "id"),
    _invalid("an identity of 129 characters", {"id": "a" * 129}, "id"),
    _invalid("an unknown method", {"explain": {"method": "magic"}}, "method"),
    _invalid("no targets", {"explain": {"targets": []}}, "targets"),
    _invalid("a target of no kind", {"explain": {"targets": [{"class": 3}]}}, "target"),
    _invalid("a lone surrogate as a key", {"\ud800": 1}, ""),
    _invalid("a lone surrogate as a label", {"explain": {"targets": [{"label": "\ud800"}]}}, "", "unknown-label"),
    Input("a document without an image", b'{"top_k": 3}', JSON, 422, "invalid-document", "no image"),
    Input("base64 that is none", b'{"image": {"b64": "%%%"}}', JSON, 422, "invalid-image", "base64"),
    Input("base64 of no image", b'{"image": {"b64": "AAAA"}}', JSON, 422, "invalid-image", "known format"),
    Input("base64 of nothing", b'{"image": {"b64": ""}}', JSON, 422, "invalid-image", ""),
]
UNKNOWN = [
    _edit("an unknown feature", {"feature": f"{SECOND}/P999", "mode": "ablate"}, SECOND, "unknown-feature"),
    _edit("a feature of no layer", {"feature": "blocks.9/P0", "mode": "ablate"}, "", "unknown-feature"),
    _edit("a feature of no form", {"feature": "P17", "mode": "ablate"}, "", "unknown-feature"),
    _edit(
        "an unknown feature in a condition",
        {"feature": P0, "mode": "ablate", "when": {"feature": f"{SECOND}/P999", "op": ">", "value": 0.0}},
        SECOND,
        "unknown-feature",
    ),
    _edit("a class feature of a model without a class token", {"feature": f"{CONV_LAYER}/C0", "mode": "ablate"},
          "", "unknown-feature", CONV_MODEL),
    _invalid("unknown features of activations", {"activations": {"features": [P0, f"{SECOND}/P999"]}}, SECOND,
             "unknown-feature"),
    _invalid("an unknown layer", {"explain": {"layers": [SECOND, "blocks.1.mlp.fc3"]}}, SECOND, "unknown-layer"),
    _vector("a vector of an unknown layer", {"layer": "blocks.1.mlp.fc3", "vector": [0.5] * WIDTH}, SECOND,
            "unknown-layer"),
    _invalid("an unknown label", {"explain": {"targets": [{"label": "bea"}]}}, "bee", "unknown-label"),
    _vector("an unknown vector", {"name": "stripes"}, "stripes", "unknown-vector"),
    _invalid("an unknown policy", {"steer": {"policies": ["no-watermark"]}}, "no-watermark", "unknown-policy"),
    _invalid("a policy's name of no form", {"steer": {"policies": ["../../etc/passwd"]}}, "policies"),
    _invalid("a class beyond the last", {"explain": {"targets": [CLASSES]}}, f"0 to {CLASSES - 1}", "invalid-target"),
    _invalid("a class of 30 digits", {"explain": {"targets": [{"index": 0, "versus": 10**30}]}}, "", "invalid-target"),
    _invalid("a direction of the wrong length", {"explain": {"targets": [{"direction": [1.0]}]}}, f"{CLASSES} numbers",
             "invalid-target"),
    _invalid("another checkpoint", {"expect": {"checkpoint_sha256": "00"}}, "checkpoint", "other-checkpoint"),
    _invalid("an unknown operation", {"op": "train"}, "train", "unknown-route"),
    Input("an unknown sub-route", b"", JSON, 404, "unknown-route", "train", route="train"),
]  # fmt: skip
_BOX = {"feature": P0, "mode": "ablate"}
STEERING = [
    _edit("a scale without a value", {"feature": P0, "mode": "scale"}, "value"),
    _edit("an ablation with a value", {"feature": P0, "mode": "ablate", "value": 1.0}, "value"),
    _edit("an unknown mode", {"feature": P0, "mode": "paint", "value": 1.0}, "mode"),
    _edit("no mode", {"feature": P0}, "mode"),
    _edit("an unknown unit", {"feature": P0, "mode": "set", "value": 1.0, "unit": "volt"}, "unit"),
    _edit("an unknown side", {"feature": P0, "mode": "ablate", "side": "left"}, "side"),
    _edit("an unknown comparison", {**_BOX, "when": {"feature": P0, "op": "=", "value": 0.0}}, "op"),
    _invalid("conflicting edits", {"steer": {"edits": [_BOX, {"feature": P0, "mode": "scale", "value": 2.0}]}}, P0,
             "invalid-edit"),
    _scope("a box outside the image", {"box": [0.5, 0.5, 1.5, 1.0]}, "box"),
    _scope("a box left of the image", {"box": [-0.5, 0.0, 0.5, 1.0]}, "box"),
    _scope("a box in pixels", {"box": [10, 10, 200, 200]}, "box"),
    _scope("a box the wrong way round", {"box": [0.8, 0.0, 0.2, 1.0]}, "x0 < x1"),
    _scope("a box without an area", {"box": [0.2, 0.0, 0.2, 1.0]}, "x0 < x1"),
    _scope("a box of three numbers", {"box": [0.0, 0.0, 1.0]}, "box"),
    _scope("a mask of uneven rows", {"mask": [[0, 1], [1]]}, "one length"),
    _scope("a mask of twos", {"mask": [[0, 2]]}, "mask"),
    _scope("an empty mask", {"mask": []}, "mask"),
    _scope("a mask of 800,000 twos", {"mask": [[2] * 900] * 900}, "mask"),
    _scope("a scope of no kind", {"tokens": "left"}, "tokens"),
    _scope("a patch feature on the class token", {"tokens": "cls"}, "", "invalid-edit"),
    _edit("a class feature on patches", {"feature": C0, "mode": "ablate", "apply": {"tokens": "patches"}}, "",
          "invalid-edit"),
    _edit("a class feature in a box", {"feature": C0, "mode": "ablate", "apply": {"box": [0, 0, 1, 0.5]}}, "",
          "invalid-edit"),
    _edit("`cls` on a model without one", {"feature": f"{CONV_LAYER}/P0", "mode": "ablate", "apply": {"tokens": "cls"}},
          "", "invalid-edit", CONV_MODEL),
    _vector("a vector on `cls` of a model without one",
            {"layer": CONV_LAYER, "vector": [0.5] * 112, "apply": {"tokens": "cls"}}, "", "invalid-edit", CONV_MODEL),
    _edit("a patch feature where patches have no effect", {"feature": f"{LAST_LAYER}/0/p0", "mode": "ablate"}, "",
          "invalid-edit", LAST_MODEL),
    _vector("a vector on patches that have no effect",
            {"layer": LAST_LAYER, "vector": [0.5] * WIDTH, "apply": {"tokens": "patches"}}, "", "invalid-edit",
            LAST_MODEL),
    _vector("a box where patches have no effect",
            {"layer": LAST_LAYER, "vector": [0.5] * WIDTH, "apply": {"box": [0.0, 0.0, 1.0, 0.5]}}, "", "invalid-edit",
            LAST_MODEL),
    _vector("a box on a layer without a grid",
            {"layer": HEAD, "vector": [0.5] * CLASSES, "apply": {"box": [0.0, 0.0, 1.0, 0.5]}}, "", "invalid-edit",
            LAST_MODEL),
    _vector("a vector of the wrong length", {"layer": SECOND, "vector": [0.5] * (WIDTH - 1)}, str(WIDTH),
            "invalid-edit"),
    _vector("a vector of nothing", {"layer": SECOND, "vector": []}, "vector"),
    _vector("a vector of text", {"layer": SECOND, "vector": ["1"] * WIDTH}, "vector"),
    _vector("a vector of NaN as bytes", {"layer": SECOND, "vector": {"b64_f32": _NAN32}}, "finite"),
    _vector("a vector of half a number", {"layer": SECOND, "vector": {"b64_f32": "AAAA"}}, "float32"),
    _vector("a vector that is no base64", {"layer": SECOND, "vector": {"b64_f32": "%"}}, "base64"),
    _vector("a vector without any of it", {"strength": 1.0}, "vector"),
]  # fmt: skip
LIMITS = [
    _invalid("too many targets", {"explain": {"targets": [{"top": 11}]}}, "targets", "limit-exceeded"),
    _invalid("too many features", {"explain": {"top_features": 201}}, "top_features", "limit-exceeded"),
    _invalid("too many steps", {"explain": {"steps": 65}}, "steps", "limit-exceeded"),
    _invalid("too many ablations", {"explain": {"method": "ablation", "top_features": 100}}, "ablation",
             "limit-exceeded"),
    _invalid("too many edits", {"steer": {"edits": [{"feature": f"{SECOND}/{k % WIDTH}/p0", "mode": "ablate"}
                                                     for k in range(65)]}}, "edits", "limit-exceeded"),
    _invalid("more edits than are read", {"steer": {"edits": [_BOX] * 1001}}, "1000"),
]  # fmt: skip
ENVELOPES = [
    Input("no instances", b'{"instances": []}', JSON, 422, "invalid-document", "instances"),
    Input("instances that are no objects", b'{"instances": [3]}', JSON, 422, "invalid-document", "instances"),
    Input("no inputs", b'{"inputs": []}', JSON, 422, "invalid-document", "inputs"),
    Input(
        "an input of another type",
        json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [1]}]}).encode(),
        JSON, 422, "invalid-document", "datatype",
    ),
    Input(
        "an input of another shape",
        json.dumps({"inputs": [{"name": "x", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": [0.0] * 12}]}).encode(),
        JSON, 422, "invalid-document", "shape",
    ),
    Input(
        "an input of too few numbers",
        json.dumps({"inputs": [{"name": "x", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": [0.0]}]}).encode(),
        JSON, 422, "invalid-document", "3072",
    ),
    Input(
        "numbers of another type",
        json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": [7]}]}).encode(),
        JSON, 422, "invalid-document", "base64",
    ),
    Input("multipart without an image", None, MULTIPART, 422, "invalid-document", "multipart", {"request": b"{}"}),
    Input("multipart with another part", None, MULTIPART, 422, "invalid-document", "multipart",
          {"image": PNG, "extra": b"x"}),
    Input("multipart with a request that is no JSON", None, MULTIPART, 400, "not-json", "not JSON",
          {"image": PNG, "request": b"{"}),
    Input("multipart with two images", None, MULTIPART, 422, "invalid-document", "part of its own",
          {"image": PNG, "request": document({})}),
    Input("multipart with junk for an image", None, MULTIPART, 422, "invalid-image", "known format",
          {"image": _JUNK}),
    Input("multipart with junk for a request", None, MULTIPART, 400, "not-json", "",
          {"image": PNG, "request": _JUNK}),
    *[
        Input(f"content type {kind}", PNG, kind, 415, "unsupported-content-type", kind.partition(";")[0])
        for kind in ("text/html", "text/plain; charset=utf-8", "application/xml", "application/pdf", "video/mp4")
    ],
    Input("JSON sent as an image", document({}), "image/png", 422, "invalid-image", "known format"),
    Input("an image sent as JSON", PNG, JSON, 400, "not-json", ""),
]  # fmt: skip
# What a client writes into headers is not asked; the answer is an ordinary prediction.
HEADERS = [
    Input("header describe: True", PNG, "image/png", headers={"describe": "True"}, same_as=PNG),
    Input(
        "header describe: True without a body", b"", RAW, 422, "invalid-image", "empty", headers={"describe": "True"}
    ),
    Input("header Explain: True", PNG, "image/png", headers={"Explain": "True"}, same_as=PNG),
    Input("header Url_Path", PNG, "image/png", headers={"Url_Path": "describe"}, same_as=PNG),
    Input("header of 4,000 characters", PNG, "image/png", headers={"X-Long": "a" * 4000}, same_as=PNG),
    Input("header request id", PNG, "image/png", headers={"X-Request-Id": "%0d%0aX-Evil:1"}, same_as=PNG),
    Input("a content type with a parameter that tells lies", PNG, 'image/png; x="%0d%0aX-Evil: 1"', same_as=PNG),
]

TABLE = [
    *IMAGES, *BAD_IMAGES, *NOT_JSON, *WRONG_TYPES, *UNKNOWN, *STEERING, *LIMITS, *ENVELOPES, *HEADERS,
]  # fmt: skip
