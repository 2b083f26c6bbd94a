"""Reading a catalogue: what is in it, and one sentence for each way in which it is not there or not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Rewritten
from PIL import Image
from support import SECOND, tamper

import elude_runtime.checkpoint.exemplars as module
from elude_runtime.checkpoint.exemplars import EXEMPLARS, read_exemplars
from elude_runtime.errors import CheckpointError


@pytest.fixture
def copied(catalogued: Path, tmp_path: Path) -> Path:
    out = tmp_path / "ckpt"
    shutil.copytree(catalogued, out)
    return out


def facts(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def meddle(folder: Path) -> None:
        values = json.loads((folder / "catalogue.json").read_text())
        change(values)
        (folder / "catalogue.json").write_text(json.dumps(values))

    return meddle


def rows(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(change(pq.read_table(folder / name)), folder / name)


def test_what_is_in_a_catalogue(catalogued: Path) -> None:
    found = read_exemplars(catalogued)
    assert found.read == 24 and found.settings["effect_images"] == 8 and found.made.endswith("+00:00")
    assert sorted(found.images) == list(range(24))
    for image in found.images.values():
        assert (image.width, image.height) == (48, 40) and len(bytes.fromhex(image.sha256)) == 16
        x0, y0, x1, y1 = image.window
        assert x0 < x1 and y0 < y1
        assert image.thumbnail is not None and max(Image.open(image.thumbnail).size) <= 160
        assert [p for _, p in image.predicted] == sorted((p for _, p in image.predicted), reverse=True)
        assert len(image.predicted) == 3
    first = found.of(f"{SECOND}/P0")[0]
    assert (first.end, first.role, first.rank) == ("positive", "top", 0) and first.heat is not None
    assert first.heat.dtype == np.int8 and len(first.heat) == 16
    assert found.of(f"{SECOND}/P999") == [] and found.inputs("nothing") == [] and found.duplicates("nothing") == []


@pytest.mark.parametrize(
    ("meddle", "message"),
    [
        (lambda f: (f / "catalogue.json").unlink(), "damaged or incomplete .*No such file"),
        (lambda f: (f / "catalogue.json").write_text("{"), "damaged or incomplete"),
        (lambda f: (f / "catalogue.json").write_text("[]"), "damaged or incomplete"),
        (lambda f: (f / "catalogue.json").write_bytes(b"\xff\xfe"), "damaged or incomplete"),
        (facts(lambda v: v.pop("layers")), "lacks 'layers'"),
        (facts(lambda v: v["layers"][0].update(grid=[4])), "damaged or incomplete"),
        (facts(lambda v: v.update(format_version=2)), "has format version 2, this software reads up to 1"),
        (facts(lambda v: v.update(partition_sha256="0" * 64)), "made for another partition .* `elude catalogue"),
        (lambda f: (f / "exemplars.parquet").unlink(), "damaged or incomplete"),
        (lambda f: (f / "links.parquet").write_bytes(b"PAR1"), "damaged or incomplete"),
        (rows("images.parquet", lambda t: t.slice(3)), "images.parquet lacks the image 0"),
        (rows("images.parquet", lambda t: t.drop_columns(["window"])), "lacks 'window'"),
        (rows("exemplars.parquet", lambda t: t.drop_columns(["heat"])), "damaged or incomplete"),
        (rows("exemplars.parquet", lambda t: t.take([*range(0, len(t), 2), *range(1, len(t), 2)])), "together"),
    ],
)  # fmt: skip
def test_a_catalogue_that_is_not_whole(copied: Path, meddle: Callable[[Path], None], message: str) -> None:
    meddle(copied / EXEMPLARS)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_exemplars(copied)
    assert "\n" not in str(caught.value) and "elude catalogue" in str(caught.value)


def test_no_catalogue(vit: Rewritten, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no exemplars; make them with `elude catalogue"):
        read_exemplars(vit.path)
    with pytest.raises(CheckpointError, match="not a directory"):
        read_exemplars(tmp_path / "nowhere")


def test_a_catalogue_of_another_rewrite(catalogued: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"elude.{SECOND}.mean"] += 1

    out = tamper(catalogued, tmp_path / "ckpt", change)
    with pytest.raises(CheckpointError, match="another partition"):
        read_exemplars(out)


def test_without_pyarrow(catalogued: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="needs the package pyarrow"):
        read_exemplars(catalogued)


def test_names_of_thumbnails_stay_in_the_folder(copied: Path) -> None:
    def lead_away(table: Any) -> Any:
        names = ["../../elude.json"] * len(table)
        return table.set_column(table.column_names.index("thumbnail"), "thumbnail", [names])

    rows("images.parquet", lead_away)(copied / EXEMPLARS)
    for image in read_exemplars(copied).images.values():
        assert image.thumbnail == copied / EXEMPLARS / "thumbs" / "elude.json"
