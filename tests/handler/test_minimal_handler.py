"""The minimal handler, from its archive: its answers are the base model's, digit for digit."""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Rewritten
from PIL import Image
from support import LABELS, VIT, VIT_ARGS, VIT_DATA, encoded, picture

pytest.importorskip("ts.context")
from ts.context import Context, RequestProcessor

from elude_runtime.cli.minimal_archive import build_minimal_archive
from elude_runtime.cli.model_options import ModelOptions
from elude_runtime.errors import CheckpointError
from elude_runtime.offline.rewrite import rewrite_checkpoint
from elude_runtime.partition import SplitConfig

FACTORY = """
import timm
import part

def build(**args):
    return timm.create_model(part.NAME, **args)
"""


def unpacked(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    return folder


def answers(folder: Path, bodies: list[bytes]) -> list[list[dict[str, Any]]]:
    """What the archive's own handler says to a batch."""
    spec = importlib.util.spec_from_file_location("minimal_handler", folder / "minimal_handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    context = Context("m", str(folder), {}, 8, None, "0.12.0", model_yaml_config={})
    context.request_ids = {n: str(n) for n in range(len(bodies))}
    context.request_processor = [RequestProcessor({}) for _ in bodies]
    handler = module.MinimalHandler()
    handler.initialize(context)
    texts = handler.handle([{"body": bytearray(body)} for body in bodies], context)
    assert [context.get_response_content_type(n) for n in range(len(bodies))] == ["application/json"] * len(bodies)
    return [json.loads(text)["predictions"] for text in texts]


def test_answers_are_the_base_models(vit: Rewritten, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    sent = [encoded(picture(7)), encoded(picture(8, 60, 40), "JPEG", exif=turned), encoded(picture(9).convert("L"))]
    upright = [
        picture(7),
        Image.open(io.BytesIO(sent[1])).transpose(Image.Transpose.ROTATE_270),
        picture(9).convert("L"),
    ]
    transform = vit.data.transform()
    with torch.no_grad():
        logits = vit.base(torch.stack([transform(image.convert("RGB")) for image in upright]))
    folder = unpacked(build_minimal_archive(vit.path, tmp_path / "store", name="m"), tmp_path / "m")
    assert not list(folder.rglob("elude*"))  # nothing of ours
    for found, own in zip(answers(folder, sent), logits, strict=True):
        best = own.topk(5).indices.tolist()
        assert [p["index"] for p in found] == best and [p["label"] for p in found] == [LABELS[i] for i in best]
        assert [np.float32(p["logit"]) for p in found] == [own[i].numpy() for i in best]
        assert [p["probability"] for p in found] == pytest.approx(own.softmax(-1)[best].tolist(), rel=1e-6)


def test_of_a_factory(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "make.py").write_text(FACTORY)
    (tmp_path / "code" / "part.py").write_text(f"NAME = {VIT!r}\n")
    given = tuple(f"{name}={value}" for name, value in VIT_ARGS.items())
    base = ModelOptions(None, factory=f"{tmp_path}/code/make.py:build", args=given).build()
    rewrite_checkpoint(base, pictures, tmp_path / "ckpt", SplitConfig(2, 8), max_images=4, data_config=VIT_DATA)
    with pytest.raises(CheckpointError, match=r"carries code \(make\.py\).*--trust-factory"):
        build_minimal_archive(tmp_path / "ckpt", tmp_path / "store", name="m")
    made = build_minimal_archive(tmp_path / "ckpt", tmp_path / "store", name="m", trust_factory=True)
    (found,) = answers(unpacked(made, tmp_path / "m"), [encoded(picture(7))])
    with torch.no_grad():
        (own,) = base.model(VIT_DATA.transform()(picture(7))[None])
    assert [np.float32(p["logit"]) for p in found] == own.topk(5).values.numpy().tolist()


def test_a_model_without_classes(headless: Rewritten, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no classes"):
        build_minimal_archive(headless.path, tmp_path, name="m")
