"""What the explorer reads of a checkpoint: faces of features, exemplar images and where they went."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_checkpoint import HOSTILE, LAYER, Made, checkpoint, relabelled

from elude_runtime.errors import CheckpointError
from elude_runtime.explore.material import Material

FEATURE = f"{LAYER}/P0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "ckpt")


def renamed(folder: Path, names: dict[int, tuple[str, str]]) -> None:
    """Files and digests of images, as the catalogue names them."""
    file = folder / "exemplars" / "images.parquet"
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        row["name"], row["sha256"] = names.get(row["image"], (row["name"], row["sha256"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file)


def test_a_face_has_both_ends_the_strongest_first(folder: Path) -> None:
    relabelled(folder, {FEATURE: HOSTILE})
    face = Material(folder).face(FEATURE)
    assert (face["label"], face["automatic"]) == (HOSTILE, False)
    for end, sign in (("positive", 1), ("negative", -1)):
        sizes = [sign * one["activation"] for one in face["ends"][end]]
        assert len(sizes) == 9 and sizes[0] > 0
    first = face["ends"]["positive"][0]
    assert first["aspect"] == 1.0 and first["file"] is None and Path(first["thumbnail"]).is_file()
    assert Material(folder).face("nothing/P0") == {
        "label": None,
        "automatic": False,
        "ends": {"positive": [], "negative": []},
    }


def test_samples_are_spread_over_the_images_that_have_a_picture(tmp_path: Path) -> None:
    material = Material(checkpoint(tmp_path / "ckpt", Made(images=100)))
    numbers = [sample["number"] for sample in material.facts()["samples"]]
    assert len(numbers) == 24 and numbers[0] == 0 and numbers[-1] > 90
    file = material.sample(numbers[3])
    assert file is not None and file.name == f"{numbers[3]:06d}.webp"
    file.unlink()
    assert material.sample(numbers[3]) is None
    assert material.sample(10**9) is None


def test_an_exemplar_itself_is_given_where_it_is_the_same_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "b.png").write_bytes(b"another by now")
    digest = hashlib.sha256(b"picture").hexdigest()[:32]
    renamed(folder, {0: ("a.png", digest), 1: ("b.png", digest), 2: ("gone.png", digest), 3: ("a\0.png", digest)})
    material = Material(folder)
    assert [material.original(number) for number in (0, 1, 2, 3, 999)] == [b"picture", None, None, None, None]
    files = {sample["number"]: sample["file"] for sample in material.facts()["samples"]}
    assert (files[0], files[2], files[3]) == ("a.png", None, None)


def test_a_digest_that_is_missing_fits_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    renamed(folder, {0: (str(tmp_path / "a.png"), "")})
    assert Material(folder).original(0) is None


@pytest.mark.parametrize("damage", ["none", "json", "table"])
def test_a_catalogue_that_cannot_be_read_is_a_state(tmp_path: Path, damage: str) -> None:
    folder = checkpoint(tmp_path / "ckpt", catalogue=damage != "none")
    if damage == "json":
        (folder / "exemplars" / "catalogue.json").write_text("{")
    elif damage == "table":
        (folder / "exemplars" / "exemplars.parquet").write_bytes(b"PAR1")
    material = Material(folder)
    facts = material.facts()
    assert facts["samples"] == [] and "elude catalogue" in facts["catalogue_missing"]
    assert material.sample(0) is None and material.original(0) is None
    assert material.face(FEATURE)["ends"] == {"positive": [], "negative": []}


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Material(tmp_path)
