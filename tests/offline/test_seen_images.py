"""What pass one read: kept by place, put together from several processes, and told from anything else."""

from __future__ import annotations

import pytest
import torch
from support import VIT_DATA, input_tensor

from elude_runtime.errors import ImagesError
from elude_runtime.offline.image_loading import Batch
from elude_runtime.offline.images import ImageSource
from elude_runtime.offline.seen_images import SeenImages

IMAGES = input_tensor(VIT_DATA, 9)


def seen_by(rank: int = 0, world: int = 1) -> SeenImages:
    """Batches of two; of the second one image could not be read."""
    seen = SeenImages()
    for batch in ImageSource(IMAGES, VIT_DATA, batch_size=2).numbered(0, rank, world):
        if batch.number == 1:
            batch = Batch(1, batch.places[1:], batch.images[1:], batch.hashes[16:], [("2", "It is damaged.")])
        seen.add(batch)
    return seen


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_from_several_processes(world: int) -> None:
    alone = seen_by()
    assert alone.places.tolist() == [0, 1, 3, 4, 5, 6, 7, 8] and alone.skipped == [("2", "It is damaged.")]
    together = SeenImages.of(seen_by(rank, world).state() for rank in range(world))
    assert torch.equal(together.places, alone.places) and together.places.dtype == torch.int64
    assert together.hashes == alone.hashes and together.skipped == alone.skipped
    assert together.digest == alone.digest != SeenImages().digest


def test_goes_on_from_a_state() -> None:
    source, seen = ImageSource(IMAGES, VIT_DATA, batch_size=4), SeenImages()
    for batch in source.numbered():
        seen = SeenImages.of([seen.state()])
        seen.add(batch)
    seen.check(next(ImageSource(IMAGES, VIT_DATA, batch_size=9).numbered()), source)
    assert len(seen.places) == len(seen.hashes) == 9


def test_the_same_images_in_other_batches() -> None:
    seen, source = seen_by(), ImageSource(IMAGES, VIT_DATA, batch_size=3)
    for batch in source.at(torch.tensor([0, 3, 5, 8])).numbered():
        seen.check(batch, source)


@pytest.mark.parametrize(
    ("places", "shown", "said"),
    [
        ([0, 3, 5], [0, 3, 6], "Image 5 is another"),
        ([0, 1], [1, 0], "Image 0 is another"),
        ([1, 2, 3], [1, 2, 3], "Image 2 is another"),  # could not be read before
        ([8, 9], [8, 8], "Image 9 is another"),
    ],
)
def test_another_image(places: list[int], shown: list[int], said: str) -> None:
    source = ImageSource(IMAGES, VIT_DATA)
    hashes = b"".join(b.hashes for b in source.at(torch.tensor(shown)).numbered())
    batch = Batch(0, torch.tensor(places), IMAGES[shown], hashes, [])
    with pytest.raises(ImagesError, match=said):
        seen_by().check(batch, source)


def test_an_image_that_cannot_be_read_again() -> None:
    batch = Batch(0, torch.empty(0, dtype=torch.int64), IMAGES[:0], b"", [("a.jpg", "It is gone.")])
    with pytest.raises(ImagesError, match=r"a\.jpg could be read before and cannot any more \(It is gone\)"):
        seen_by().check(batch, ImageSource(IMAGES, VIT_DATA))
