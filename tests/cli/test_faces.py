"""Exemplars in drawings: the right end, cut around the right patch, none where there is no catalogue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from report_checkpoint import LAYER, Made, checkpoint

from elude_runtime.checkpoint.exemplars import read_exemplars
from elude_runtime.cli.faces import Faces


def test_the_end_that_the_activation_points_to(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "ckpt")
    exemplars = read_exemplars(folder)
    for image in exemplars.images.values():  # an image a colour
        assert image.thumbnail is not None
        Image.new("RGB", (96, 96), (10 * image.id, 0, 0)).save(image.thumbnail, "WEBP", lossless=True)
    feature = f"{LAYER}/P0"
    for end, activation in (("positive", 2.0), ("negative", -0.1)):
        tops = [e.image for e in exemplars.of(feature) if e.role == "top" and e.end == end][:4]
        colours = [np.asarray(face)[5, 5, 0] for face in Faces(folder).of(feature, activation, 4)]
        assert colours == [10 * image for image in tops]


def test_the_part_is_cut_around_the_patch(tmp_path: Path) -> None:
    """A dot on the patch's middle stands in the middle of the picture, or nearer to the rim than half a part."""
    folder = checkpoint(tmp_path / "ckpt", Made(grid=(8, 8)))
    exemplars = read_exemplars(folder)
    feature = f"{LAYER}/P1"
    best = next(e for e in exemplars.of(feature) if (e.end, e.role, e.rank) == ("positive", "top", 0))
    row, column = divmod(best.token - 1, 8)
    pixels = np.zeros((160, 160, 3), np.uint8)
    pixels[row * 20 + 5 : row * 20 + 15, column * 20 + 5 : column * 20 + 15] = 255
    thumbnail = exemplars.images[best.image].thumbnail
    assert thumbnail is not None
    Image.fromarray(pixels).save(thumbnail, "WEBP", lossless=True)
    (face,) = Faces(folder).of(feature, 1.0, 1)
    assert face.size == (67, 67)
    seen = np.argwhere(np.asarray(face)[..., 0] > 128).mean(0)
    clamp = lambda c: min(max(c * 20 + 10 - 33.6, 0), 160 - 67.2)  # noqa: E731
    assert np.abs(seen - [row * 20 + 9.5 - clamp(row), column * 20 + 9.5 - clamp(column)]).max() < 1.5


def test_class_tokens_show_all_of_the_image(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "ckpt")
    assert [face.size for face in Faces(folder).of(f"{LAYER}/C0", 1.0, 2)] == [(96, 96)] * 2


def test_nothing_to_show(tmp_path: Path) -> None:
    assert Faces(checkpoint(tmp_path / "plain", catalogue=False)).of(f"{LAYER}/P0", 1.0, 4) == []
    folder = checkpoint(tmp_path / "ckpt")
    faces = Faces(folder)
    assert faces.of("elsewhere/P0", 1.0, 4) == []
    thumbs = sorted((folder / "exemplars" / "thumbs").iterdir())
    thumbs[0].write_bytes(b"damaged")
    for thumb in thumbs[1:]:
        thumb.unlink()
    assert faces.of(f"{LAYER}/P0", 1.0, 9) == []
