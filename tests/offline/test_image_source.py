"""Image folders, tensors and iterables as batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import VIT_DATA, encoded, picture, write_pictures

from elude_runtime.errors import ImagesError
from elude_runtime.network.preprocessing import decode_image, to_input
from elude_runtime.offline.images import ImageSource, image_hash, list_images


def test_files_are_sorted_and_spread_by_a_limit(tmp_path: Path) -> None:
    write_pictures(tmp_path / "b", 4)
    write_pictures(tmp_path / "a" / "deep", 6, first=4)
    (tmp_path / "notes.txt").write_text("x")
    picture(1).save(tmp_path / "UPPER.PNG")
    files = list_images(tmp_path)
    assert files == sorted(files) and len(files) == 11
    few = list_images(tmp_path, 3)
    assert few == [files[0], files[3], files[7]]
    assert list_images(tmp_path, 99) == files


def test_no_folder_and_no_images(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="is not there"):
        list_images(tmp_path / "none")
    with pytest.raises(ImagesError, match="holds no images"):
        list_images(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ImagesError, match="holds no images"):
        list_images(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_skipped_counted_and_named(tmp_path: Path, workers: int) -> None:
    write_pictures(tmp_path, 5)
    (tmp_path / "001b.png").write_bytes(b"not an image")
    (tmp_path / "002b.jpg").write_bytes(encoded(picture(9), "JPEG")[:300])
    (tmp_path / "003b.png").write_bytes(b"")
    source = ImageSource(tmp_path, VIT_DATA, batch_size=2, workers=workers)
    batches = list(source.batches())
    assert [len(b) for b in batches] == [2, 2, 1]
    assert [Path(f).name for f, _ in source.report.skipped] == ["001b.png", "002b.jpg", "003b.png"]
    assert all(reason and "\n" not in reason for _, reason in source.report.skipped)
    transform = VIT_DATA.transform()
    expected = torch.stack(
        [to_input(decode_image((tmp_path / f"{i:03}.png").read_bytes()), transform) for i in range(5)]
    )
    assert torch.equal(torch.cat(batches), expected)
    assert source.report.hashes == [image_hash((tmp_path / f"{i:03}.png").read_bytes()) for i in range(5)]


def test_a_folder_without_a_single_readable_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ImagesError, match=r"None of the 1 images could be read.*a\.png"):
        list(ImageSource(tmp_path, VIT_DATA).batches())


def test_two_passes_are_the_same(pictures: Path) -> None:
    source = ImageSource(pictures, VIT_DATA, batch_size=7)
    first, again = list(source.batches()), list(source.batches())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(source.report.hashes) == source.count == 24


def test_tensors_and_iterables() -> None:
    images = torch.randn(7, 3, 32, 32)
    source = ImageSource(images, VIT_DATA, batch_size=3)
    assert [len(b) for b in source.batches()] == [3, 3, 1] and source.count == 7
    listed = ImageSource(
        [(images[:4], torch.zeros(4)), (images[4:], torch.zeros(3))], VIT_DATA
    )  # as a DataLoader gives them
    assert torch.equal(torch.cat(list(listed.batches())), images) and listed.count is None
    assert listed.report.hashes == source.report.hashes


@pytest.mark.parametrize("kind", ["tensor", "batches"])
def test_a_limit_holds_for_every_kind_of_source(kind: str) -> None:
    images = torch.randn(9, 3, 32, 32)
    source = ImageSource(images if kind == "tensor" else list(images.split(4)), VIT_DATA, batch_size=4, limit=5)
    assert sum(len(b) for b in source.batches()) == 5


def test_what_cannot_be_read_twice_or_is_no_batch() -> None:
    with pytest.raises(ImagesError, match="read twice"):
        ImageSource((torch.zeros(1, 3, 32, 32) for _ in range(2)), VIT_DATA)
    with pytest.raises(ImagesError, match=r"\[N, 3, 32, 32\]"):
        list(ImageSource(torch.zeros(3, 32, 32), VIT_DATA).batches())
    with pytest.raises(ImagesError):
        list(ImageSource([], VIT_DATA).batches())
