"""Images as numbered batches: stretches, ranks, resuming, worker processes, tensors."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support import VIT_DATA, encoded, input_tensor, picture, write_pictures, write_tar
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from elude_runtime.errors import ImagesError, SettingsError
from elude_runtime.network.preprocessing import DataConfig, decode_image, to_input
from elude_runtime.offline import image_loading
from elude_runtime.offline.images import Batch, ImageHashes, ImageSource, image_hash

KINDS = ["folder", "shards", "tensor", "batches"]
COUNT = 11


@pytest.fixture(scope="module")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures; and the same ones in two shards beside the folder."""
    root = tmp_path_factory.mktemp("eleven")
    folder = write_pictures(root / "set", COUNT)
    members = [(p.name, p.read_bytes()) for p in sorted(folder.iterdir())]
    write_tar(root / "0.tar", members[:6])
    write_tar(root / "1.tar", members[6:])
    return root


def given_as(root: Path, kind: str) -> Any:
    if kind == "folder":
        return root / "set"
    if kind == "shards":
        return f"{root}/{{0,1}}.tar"
    images = torch.stack([loaded(root / "set" / f"{i:03}.png") for i in range(COUNT)])
    return images if kind == "tensor" else list(images.split(3))


def loaded(file: Path, config: DataConfig = VIT_DATA) -> Tensor:
    return to_input(decode_image(file.read_bytes()), config.transform())


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        a.number == b.number
        and torch.equal(a.places, b.places)
        and torch.equal(a.images, b.images)
        and (a.hashes, a.skipped) == (b.hashes, b.skipped)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_stretches_of_the_source(eleven: Path, kind: str) -> None:
    source = ImageSource(given_as(eleven, kind), VIT_DATA, batch_size=3)
    found = list(source.numbered())
    assert [b.number for b in found] == [0, 1, 2, 3]
    assert [b.places.tolist() for b in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert all(b.places.dtype == torch.int64 and b.images.dtype == torch.float32 for b in found)
    assert torch.equal(torch.cat([b.images for b in found]), given_as(eleven, "tensor"))
    assert torch.equal(torch.cat(list(source.batches())), given_as(eleven, "tensor"))
    assert b"".join(b.hashes for b in found) == bytes(source.report.hashes.data)
    assert source.count == (None if kind == "batches" else COUNT)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_hashes_are_those_of_the_files(eleven: Path, kind: str) -> None:
    source = ImageSource(given_as(eleven, kind), VIT_DATA)
    list(source.batches())
    assert source.report.hashes == [image_hash(p.read_bytes()) for p in sorted((eleven / "set").iterdir())]
    assert source.read(7) == (eleven / "set/007.png").read_bytes()
    assert source.name(7) == str(eleven / ("set/007.png" if kind == "folder" else "1.tar/007.png"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_ranks_share_the_batches_from_any_start(eleven: Path, kind: str, world: int, start: int) -> None:
    source = ImageSource(given_as(eleven, kind), VIT_DATA, batch_size=3)
    parts = [list(source.numbered(start, rank, world)) for rank in range(world)]
    assert all(b.number % world == rank for rank, part in enumerate(parts) for b in part)
    together = sorted((b for part in parts for b in part), key=lambda b: b.number)
    assert same(together, [b for b in source.numbered() if b.number >= start])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_what_others_read_is_not_touched(tmp_path: Path, kind: str, workers: int) -> None:
    """Resumed in the middle, and as one of two: the files of all other batches may be gone."""
    for number in range(6):
        if kind == "folder":
            write_pictures(tmp_path, 2, 2 * number)
        else:
            write_tar(tmp_path / f"{number}.tar", [(f"{i}.png", encoded(picture(2 * number + i))) for i in range(2)])
    source = ImageSource(tmp_path, VIT_DATA, batch_size=2, workers=workers)
    expected = [b for b in source.numbered() if b.number in (3, 5)]
    files = sorted(tmp_path.iterdir())
    for number in (0, 1, 2, 4):
        for file in files[2 * number : 2 * number + 2] if kind == "folder" else files[number : number + 1]:
            file.unlink()
    assert same(list(source.numbered(start=2, rank=1, world=2)), expected)


@settings(max_examples=25)
@given(st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)), st.integers(1, 8))
def test_unreadable_images_leave_gaps_and_move_nothing(
    tmp_path_factory: pytest.TempPathFactory, broken: set[int], gone: set[int], size: int
) -> None:
    folder = write_pictures(tmp_path_factory.mktemp("broken"), 7)
    whole = torch.stack([loaded(p) for p in sorted(folder.iterdir())])
    hashes = [image_hash(p.read_bytes()) for p in sorted(folder.iterdir())]
    for place in broken:
        damaged = (b"", b"not an image", (folder / f"{place:03}.png").read_bytes()[:200])[place % 3]
        (folder / f"{place:03}.png").write_bytes(damaged)
    source = ImageSource(folder, VIT_DATA, batch_size=size)
    for place in gone:  # between listing and reading
        (folder / f"{place:03}.png").unlink()
    bad = broken | gone
    batches = list(source.numbered())
    assert [b.number for b in batches] == list(range(-(-7 // size)))
    for batch in batches:
        stretch = range(batch.number * size, min(7, (batch.number + 1) * size))
        kept = [p for p in stretch if p not in bad]
        assert batch.places.tolist() == kept
        assert batch.images.shape == (len(kept), 3, 32, 32) and torch.equal(batch.images, whole[kept])
        assert batch.hashes == b"".join(hashes[p] for p in kept)
        assert [f for f, _ in batch.skipped] == [f"{folder}/{p:03}.png" for p in stretch if p in bad]
        assert all(reason.endswith(".") and "\n" not in reason for _, reason in batch.skipped)
    if len(bad) == 7:
        with pytest.raises(ImagesError, match=r"None of the 7 images could be read\. The first: .*000\.png: "):
            list(source.batches())
    else:
        assert [len(b) for b in source.batches()] == [len(b.places) for b in batches if len(b.places)]
        assert len(source.report.hashes) == 7 - len(bad) and len(source.report.skipped) == len(bad)


def test_two_passes_are_the_same(pictures: Path) -> None:
    source = ImageSource(pictures, VIT_DATA, batch_size=7)
    first, again = list(source.batches()), list(source.batches())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(source.report.hashes) == source.count == 24


def test_shards_are_read_as_by_webdataset(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            kind = ("JPEG", "PNG")[number % 2]
            data = encoded(picture(number), kind)
            key = {"JPEG": "jpg", "PNG": "png"}[kind]
            writer.write({"__key__": f"{number:05}", key: data, "cls": str(number)})
    pattern = str(tmp_path / "train-{0000..0002}.tar")
    expected = [data for (data,) in webdataset.WebDataset(pattern, shardshuffle=False).to_tuple("jpg;png")]
    source = ImageSource(pattern, VIT_DATA, batch_size=3)
    assert list(source.encoded()) == expected and len(expected) == 10
    transform = VIT_DATA.transform()
    assert torch.equal(
        torch.cat(list(source.batches())), torch.stack([to_input(decode_image(d), transform) for d in expected])
    )
    assert source.report.hashes == [image_hash(d) for d in expected]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_limit_spreads_over_files(eleven: Path, kind: str) -> None:
    source = ImageSource(given_as(eleven, kind), VIT_DATA, batch_size=2, limit=3)
    whole = ImageSource(given_as(eleven, kind), VIT_DATA)
    assert source.count == 3 and [source.name(i) for i in range(3)] == [whole.name(i) for i in (0, 3, 7)]
    assert list(source.encoded()) == list(whole.encoded(3)) and len(list(whole.encoded())) == COUNT
    assert torch.equal(torch.cat(list(source.batches())), given_as(eleven, "tensor")[[0, 3, 7]])
    assert ImageSource(given_as(eleven, kind), VIT_DATA, limit=99).count == COUNT


@pytest.mark.parametrize("kind", ["tensor", "batches"])
@pytest.mark.parametrize("limit", [2, 3, 5, 11, 99])
def test_a_limit_takes_the_first_of_tensors(eleven: Path, kind: str, limit: int) -> None:
    source = ImageSource(given_as(eleven, kind), VIT_DATA, batch_size=3, limit=limit)
    assert torch.equal(torch.cat(list(source.batches())), given_as(eleven, "tensor")[:limit])
    odd = [p for b in source.numbered(0, 1, 2) for p in b.places.tolist()]
    assert odd == [p for p in range(min(limit, COUNT)) if p // 3 % 2]


@pytest.mark.parametrize("kind", ["folder", "shards", "tensor"])
def test_chosen_images_alone(eleven: Path, kind: str) -> None:
    source = ImageSource(given_as(eleven, kind), VIT_DATA, batch_size=3)
    digest = source.digest
    part = source.at(torch.tensor([1, 4, 6, 7, 10]))
    found = list(part.numbered())
    assert [b.places.tolist() for b in found] == [[1, 4, 6], [7, 10]] and [b.number for b in found] == [0, 1]
    assert torch.equal(torch.cat([b.images for b in found]), given_as(eleven, "tensor")[[1, 4, 6, 7, 10]])
    assert same(list(part.numbered(1)), found[1:])
    assert part.count == 5 and part.name(4) == source.name(4)
    assert part.digest != digest == source.digest and source.count == COUNT
    assert list(part.encoded(2)) == ([] if kind == "tensor" else [source.read(1), source.read(6)])
    assert list(source.at(torch.tensor([], dtype=torch.int64)).numbered()) == []


def test_chosen_images_of_batches_are_all(eleven: Path) -> None:
    source = ImageSource(given_as(eleven, "batches"), VIT_DATA)
    assert source.at(torch.tensor([1])) is source


def test_batches_as_a_dataloader_gives_them(eleven: Path) -> None:
    images = given_as(eleven, "tensor").double().requires_grad_()
    listed = ImageSource([(images[:4], torch.zeros(4)), [images[4:], torch.zeros(7)]], VIT_DATA)
    found = list(listed.numbered())
    assert [b.places.tolist() for b in found] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
    assert all(b.images.dtype == torch.float32 and not b.images.requires_grad for b in found)
    of_tensor = ImageSource(given_as(eleven, "tensor"), VIT_DATA)
    list(of_tensor.batches())
    assert b"".join(b.hashes for b in found) == bytes(of_tensor.report.hashes.data)


def test_what_cannot_be_used() -> None:
    with pytest.raises(ImagesError, match="read twice"):
        ImageSource((torch.zeros(1, 3, 32, 32) for _ in range(2)), VIT_DATA)
    with pytest.raises(ImagesError, match=r"\[N, 3, 32, 32\], not \[3, 32, 32\]"):
        ImageSource(torch.zeros(3, 32, 32), VIT_DATA)
    with pytest.raises(ImagesError, match=r"\[N, 3, 32, 32\], not \[1, 3, 32, 16\]"):
        list(ImageSource([torch.zeros(1, 3, 32, 16)], VIT_DATA).numbered(9))
    for nothing in ([], torch.zeros(0, 3, 32, 32), [torch.zeros(0, 3, 32, 32)]):
        with pytest.raises(ImagesError, match="no images"):
            list(ImageSource(nothing, VIT_DATA).batches())
    with pytest.raises(ImagesError, match="tensors"):
        ImageSource(torch.zeros(1, 3, 32, 32), VIT_DATA).read(0)
    for wrong in ({"batch_size": 0}, {"workers": -1}, {"limit": 0}):
        with pytest.raises(SettingsError):
            ImageSource(torch.zeros(1, 3, 32, 32), VIT_DATA, **wrong)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (None, "NoneType"),
        (3, "int"),
        (b"folder", "int"),
        ({"train": "folder"}, "str"),
        (torch.zeros(1, 3, 32, 32).numpy(), "ndarray"),
        ([torch.zeros(1, 3, 32, 32).numpy()], "ndarray"),
        ([{"pixel_values": torch.zeros(1, 3, 32, 32)}], "dict"),
        ([()], "tuple"),
        (["folder", None], "str"),
    ],
)
def test_what_is_no_kind_of_images(images: Any, named: str) -> None:
    with pytest.raises(ImagesError, match=rf"a folder, a list of files.* an iterable of such tensors, not {named}\.$"):
        list(ImageSource(images, VIT_DATA).numbered())
    with pytest.raises(ImagesError, match=f"not {named}"):
        assert not ImageSource(images, VIT_DATA).digest  # where it cannot be told, nothing is wrong yet
        list(ImageSource(images, VIT_DATA).batches())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_pixels_are_no_input(dtype: torch.dtype) -> None:
    """0 to 255, taken as normalised, would be other images without a word."""
    pixels = torch.ones(2, 3, 32, 32, dtype=dtype)
    for images in (pixels, [pixels], [(pixels, torch.zeros(2))]):
        with pytest.raises(ImagesError, match=f"normalised for the model, not {dtype}"):
            list(ImageSource(images, VIT_DATA).numbered())


def test_a_tuple_of_files(eleven: Path) -> None:
    files = sorted((eleven / "set").iterdir())
    assert list(ImageSource(tuple(files), VIT_DATA).encoded()) == [f.read_bytes() for f in files]
    shards = ImageSource((f"{eleven}/0.tar", eleven / "1.tar"), VIT_DATA)
    assert list(shards.encoded()) == [f.read_bytes() for f in files]


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_tells_sources_apart(eleven: Path, kind: str) -> None:
    def digest(images: Any = None, config: DataConfig = VIT_DATA, **options: Any) -> str:
        return ImageSource(given_as(eleven, kind) if images is None else images, config, **options).digest

    other = DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.9, "center")
    made = [digest(), digest(batch_size=4), digest(limit=5), digest(config=other)]
    if kind in ("tensor", "batches"):
        changed = given_as(eleven, "tensor").clone()
        changed[5, 0, 0, 0] += 1
        made.append(digest(changed if kind == "tensor" else list(changed.split(3))))
    assert len(set(made)) == len(made) and all(len(d) == 64 for d in made)
    assert digest() == made[0] == digest(workers=2)


def test_an_iterable_has_no_digest() -> None:
    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            return iter([torch.zeros(2, 3, 32, 32)])

    assert ImageSource(Batches(), VIT_DATA).digest == ""


class TestHashes:
    def test_they_are_a_sequence_of_bytes(self) -> None:
        items = [image_hash(bytes([i])) for i in range(5)]
        hashes = ImageHashes(items[0])
        hashes.extend(b"".join(items[1:]))
        assert hashes == items and list(hashes) == items and len(hashes) == 5
        assert hashes[0] == items[0] and hashes[-1] == items[-1] and hashes[1:3] == items[1:3]
        assert items[2] in hashes and sorted(hashes) == sorted(items) and hashes != items[:4]
        with pytest.raises(IndexError):
            hashes[5]

    @given(st.lists(st.binary(min_size=16, max_size=16), max_size=30))
    def test_they_sort_as_bytes(self, items: list[bytes]) -> None:
        assert ImageHashes(b"".join(items)).in_order() == b"".join(sorted(items))


class TestWorkers:
    @pytest.fixture(autouse=True)
    def none_is_left(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """No process and no signal handler, in a process that has never used a DataLoader."""
        monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield
        assert multiprocessing.active_children() == []
        assert signal.signal(signal.SIGCHLD, before) == signal.SIG_DFL

    @pytest.mark.parametrize("kind", ["folder", "shards"])
    def test_they_give_what_this_process_gives(self, eleven: Path, tmp_path: Path, kind: str) -> None:
        images = [p.read_bytes() for p in sorted((eleven / "set").iterdir())]
        images[2] = images[6] = images[7] = images[8] = b"broken"
        for number, data in enumerate(images):
            (tmp_path / f"{number:02}.png").write_bytes(data)
        given: Any = tmp_path
        if kind == "shards":
            given = write_tar(tmp_path / "a.tar", [(p.name, p.read_bytes()) for p in sorted(tmp_path.iterdir())])
        alone, helped = (ImageSource(given, VIT_DATA, batch_size=3, workers=w) for w in (0, 2))
        expected = list(alone.numbered())
        assert [len(b.places) for b in expected] == [2, 3, 0, 2]
        assert same(list(helped.numbered()), expected)
        assert same(list(helped.numbered(1, 1, 2)), expected[1::2])
        assert list(helped.numbered(9)) == []
        assert all(torch.equal(a, b) for a, b in zip(helped.batches(), alone.batches(), strict=True))
        assert helped.report == alone.report

    @pytest.mark.parametrize("workers", [0, 2])
    def test_where_images_are_decoded(self, eleven: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
        def tell(_: bytes) -> None:
            raise ImagesError(f"{os.getpid()} {torch.get_num_threads()}")

        monkeypatch.setattr(image_loading, "decode_image", tell)
        torch.set_num_threads(2)
        try:
            found = list(ImageSource(eleven / "set", VIT_DATA, batch_size=2, workers=workers).numbered())
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(1)
        told = {tuple(map(int, reason.split())) for b in found for _, reason in b.skipped}
        if workers:
            assert len(told) == 2 and os.getpid() not in {p for p, _ in told} and {t for _, t in told} == {1}
        else:
            assert told == {(os.getpid(), 2)}

    def test_they_end_when_the_consumer_stops(self, eleven: Path) -> None:
        source = ImageSource(eleven / "set", VIT_DATA, batch_size=1, workers=2)
        for reading in (source.numbered(), source.batches()):
            next(reading)
            assert len(multiprocessing.active_children()) == 2
            reading.close()  # type: ignore[attr-defined]
            assert multiprocessing.active_children() == []
        for _ in source.batches():
            break
        assert multiprocessing.active_children() == []

    def test_the_processs_own_settings_stay(self, eleven: Path) -> None:
        before = torch.get_rng_state(), random.getstate()
        list(ImageSource(eleven / "set", VIT_DATA, workers=1).batches())
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()

    def test_one_that_dies_is_told_where_its_batch_is_due(self, eleven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # torch looks every five seconds whether its processes live
        monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
        reading = ImageSource(eleven / "set", VIT_DATA, batch_size=1, workers=2).numbered()
        next(reading)
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        time.sleep(0.2)  # nothing is raised here, in the middle of the consumer's own work
        with pytest.raises(ImagesError, match="A process that decodes images died .*fewer workers") as caught:
            list(reading)
        assert "\n" not in str(caught.value)

    def test_what_they_are_sent_can_be_pickled(self, eleven: Path) -> None:
        """As on systems where processes are not forked."""
        for kind in ("folder", "shards"):
            files = ImageSource(given_as(eleven, kind), VIT_DATA)._files
            assert files is not None
            stretches = image_loading._Stretches(files, None, VIT_DATA, 4)
            again = pickle.loads(pickle.dumps(stretches))
            assert torch.equal(again[1][2], stretches[1][2])


def test_the_digest_of_sorted_hashes_is_the_manifests(eleven: Path) -> None:
    source = ImageSource(eleven / "set", VIT_DATA)
    list(source.batches())
    hashes = source.report.hashes
    assert sha256(hashes.in_order()).digest() == sha256(b"".join(sorted(hashes))).digest()


def test_encoded_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    source = ImageSource(write_pictures(tmp_path, 4), VIT_DATA)
    (tmp_path / "001.png").unlink()
    assert list(source.encoded(2)) == [source.read(0), source.read(2)]
    assert list(source.encoded()) == [source.read(i) for i in (0, 2, 3)]
    tensors = ImageSource(input_tensor(VIT_DATA, 2), VIT_DATA)
    assert list(tensors.encoded(2)) == [] and source.has_files and not tensors.has_files
