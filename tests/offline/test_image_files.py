"""Folders, lists and shards as compact lists of images: what is found, in what order, under which name."""

from __future__ import annotations

import os
import random
import tarfile
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_tar

from elude_runtime.errors import ImagesError
from elude_runtime.offline.image_files import FileList, ImageFiles, Names, ShardList, find_images, spread


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def names_of(files: ImageFiles) -> list[str]:
    return [files.name(i) for i in range(len(files))]


def contents(files: ImageFiles) -> list[bytes]:
    return [files.read(i) for i in range(len(files))]


@contextmanager
def listed_in_another_order(seed: int) -> Iterator[None]:
    """While the block runs, folders list their entries in a random order."""
    scan = os.scandir

    @contextmanager
    def shuffled(path: Any) -> Iterator[Any]:
        with scan(path) as entries:
            found = list(entries)
        random.Random(seed).shuffle(found)
        yield iter(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", shuffled)
        yield


PART = st.text("ab.-é", min_size=1, max_size=3).filter(lambda p: p.strip("."))


@settings(max_examples=20)
@given(st.sets(st.lists(PART, min_size=1, max_size=3).map("/".join), max_size=12), st.integers(0, 9))
def test_files_come_in_the_order_of_their_paths_whatever_the_folders_say(drawn: set[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        touch(root, "first.png", *(f"{d}/{n}.JPG" for n, d in enumerate(sorted(drawn))), *(f"{d}.d.png" for d in drawn))
        touch(root, *(f"{d}/notes.md" for d in drawn))
        with listed_in_another_order(seed):
            files = find_images(root)
        pictures = [p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".png")]
        expected = sorted(p.relative_to(root).as_posix().encode() for p in pictures)
        assert isinstance(files, FileList)
        assert [files.names[i] for i in range(len(files))] == expected
        assert contents(files) == expected


def test_a_limit_spreads_over_the_list(tmp_path: Path) -> None:
    files = find_images(touch(tmp_path, *(f"{i:02}.png" for i in range(11)), "notes.txt"))
    assert names_of(files) == [f"{tmp_path}/{i:02}.png" for i in range(11)]
    assert names_of(files.take(spread(11, 3))) == [f"{tmp_path}/{i:02}.png" for i in (0, 3, 7)]
    assert spread(11, 3).tolist() == [0, 3, 7] and spread(2, 5).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["é 猫.png", "two\nlines.png", "a'b\"c\\.png", "-rf.png", "{1..3}.png"])
def test_any_name(tmp_path: Path, name: str) -> None:
    files = find_images(touch(tmp_path, name))
    assert names_of(files) == [f"{tmp_path}/{name}"] and contents(files) == [name.encode()]


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"\xe9.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    files = find_images(tmp_path)
    assert names_of(files) == [rf"{tmp_path}/\xe9.png"] and contents(files) == [b"x"]


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path, "set/deep/1.png", "elsewhere/2.png", "elsewhere/3.txt")
    (tmp_path / "set/again").symlink_to(tmp_path / "set")  # a circle
    (tmp_path / "set/deep/up").symlink_to("..")
    (tmp_path / "set/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/4.png").symlink_to(tmp_path / "elsewhere/2.png")
    (tmp_path / "set/gone.png").symlink_to("nowhere")
    (tmp_path / "set/self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "set/pipe.png")
    files = find_images(tmp_path / "set")
    found = [Path(n).relative_to(tmp_path / "set").as_posix() for n in names_of(files)]
    assert found == ["4.png", "deep/1.png", "gone.png", "other/2.png", "self.png"]
    assert files.read(0) == files.read(3) == b"elsewhere/2.png"
    for dead in (2, 4):  # not passed over in silence
        with pytest.raises(OSError):
            files.read(dead)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "lost+found/b.png", "z.png")
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if os.fsencode(path).rstrip(b"/").endswith(refused):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refused = b"lost+found"
    files = find_images(tmp_path)
    assert [n.removeprefix(f"{tmp_path}/") for n in names_of(files)] == ["a.png", "lost+found/", "z.png"]
    with pytest.raises(ImagesError, match="cannot be listed"):
        files.read(1)
    refused = os.fsencode(tmp_path)
    with pytest.raises(ImagesError, match="cannot be listed .Permission denied"):
        find_images(tmp_path)


def test_a_folder_of_shards(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    for name in ("b/0.tar", "a/1.TAR", "c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [("x.jpg", name.encode()), ("y.png", b"y")])
    write_tar(tmp_path / "empty.tar", [])
    files = find_images(tmp_path)
    assert isinstance(files, ShardList)
    short = [n.removeprefix(f"{tmp_path}/") for n in names_of(files)]
    assert short == ["a/1.TAR/x.jpg", "a/1.TAR/y.png", "b/0.tar/x.jpg", "b/0.tar/y.png", "c.tar/x.jpg", "c.tar/y.png"]
    assert contents(files)[::2] == [b"a/1.TAR", b"b/0.tar", b"c.tar"]


def test_a_folder_of_shards_and_pictures(tmp_path: Path) -> None:
    """A preview beside the shards is not the set."""
    write_tar(tmp_path / "b.tar", [("x.jpg", b"x")])
    touch(tmp_path, "d/preview.webp")
    with pytest.raises(ImagesError, match="holds tar shards and image files; give one kind"):
        find_images(tmp_path)
    assert contents(find_images(tmp_path / "d")) == [b"d/preview.webp"]


def test_a_link_out_of_a_shard_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in (("a.jpg", tarfile.SYMTYPE, "/data/a.jpg"), ("b.jpg", tarfile.LNKTYPE, "gone.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    files = find_images(tmp_path / "a.tar")
    assert names_of(files) == [f"{tmp_path}/a.tar/a.jpg", f"{tmp_path}/a.tar/b.jpg"]
    for place in range(2):
        with pytest.raises(ImagesError, match="only a link .*--dereference"):
            files.read(place)


@pytest.mark.parametrize("suffix", [".txt", ".lst"])
def test_a_list_of_files(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "set/b.png", "set/a.png", "set/no suffix")
    lines = ["# a comment", "", "b.png", "  ", f"{tmp_path}/set/a.png", "no suffix\r", "gone.png", "b.png", "../set"]
    listed = tmp_path / f"set/list{suffix}"
    listed.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    files = find_images(str(listed))
    folder = f"{tmp_path}/set"
    assert names_of(files) == [
        f"{folder}/b.png", f"{folder}/a.png", f"{folder}/no suffix", f"{folder}/gone.png", f"{folder}/b.png",
        f"{folder}/../set",
    ]  # fmt: skip
    assert [files.read(i) for i in (0, 1, 2, 4)] == [b"set/b.png", b"set/a.png", b"set/no suffix", b"set/b.png"]
    with pytest.raises(FileNotFoundError):
        files.read(3)
    with pytest.raises(ImagesError, match="not a file"):
        files.read(5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", r"list\.txt is empty"),
        ("a.png\n".encode("utf-16"), r"list\.txt is no UTF-8 text"),
        (b"a.png\nb.tar\n", r"list\.txt names tar shards and image files"),
        (b"a.tar\nb.tar\n", r"2 of the 2 shards of .*list\.txt are not there, first .*/a\.tar"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ImagesError, match=message):
        find_images(tmp_path / "list.txt")


def test_shards_by_pattern_by_list_and_one_alone(tmp_path: Path) -> None:
    for number in range(8, 12):
        write_tar(tmp_path / f"train-{number:04}.tar", [("0.jpg", b"%d" % number)])
    expected = [b"8", b"9", b"10", b"11"]
    shards = [tmp_path / f"train-{number:04}.tar" for number in range(8, 12)]
    (tmp_path / "shards.lst").write_text("\n".join(s.name for s in shards))
    pattern = f"{tmp_path}/train-{{0008..0011}}.tar"
    for given_as in (pattern, Path(pattern), shards, [str(s) for s in shards], tmp_path / "shards.lst", tmp_path):
        files = find_images(given_as)  # type: ignore[arg-type]
        assert contents(files) == expected and names_of(files) == [f"{s}/0.jpg" for s in shards]
    assert contents(find_images(shards[1])) == [b"9"]
    assert contents(find_images(f"{tmp_path}/train-00{{11,08}}.tar")) == [b"11", b"8"]
    shards[0].rename(tmp_path / "{a}.tar")  # a file of that very name
    assert contents(find_images(tmp_path / "{a}.tar")) == [b"8"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("none", "none is not there"),
        ("none.tar", r"none\.tar is not there"),
        ("t-{0..3}.tar", r"3 of the 4 shards of .* are not there, first .*t-1\.tar"),
        ("t-{0..3.tar", "braces .* do not match"),
        ("{a,b}.png", "pattern with braces stands for tar shards"),
        ("t-0.tar", r"t-0\.tar holds no images"),
        ("notes.md", "is no folder, list of files .* or tar shard"),
        ("packed.tar.gz", r"compressed \(gzip\)"),
        ("empty", "holds no images"),
    ],
)
def test_what_holds_no_images(tmp_path: Path, images: str, message: str) -> None:
    touch(tmp_path, "notes.md", "empty/notes.txt")
    write_tar(tmp_path / "t-0.tar", [("a.txt", b"x")])
    (tmp_path / "packed.tar.gz").write_bytes(b"\x1f\x8b" + bytes(99))
    for given_as in (f"{tmp_path}/{images}", tmp_path / images):
        with pytest.raises(ImagesError, match=message):
            find_images(given_as)


def test_a_damaged_shard_gives_what_is_before_the_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"0" * 600), ("1.jpg", b"1" * 600)])
    whole = path.read_bytes()
    path.write_bytes(whole[:2100])
    files = find_images(path)
    assert names_of(files) == [f"{path}/0.jpg", f"{path}/1.jpg"] and files.read(0) == b"0" * 600
    with pytest.raises(ImagesError, match="damaged or cut off at byte 2048"):
        files.read(1)
    path.write_bytes(whole[:1536] + b"x" * 512 + whole[2048:])
    files = find_images(path)
    assert names_of(files) == [f"{path}/0.jpg", str(path)]
    with pytest.raises(ImagesError, match="damaged or cut off at byte 1536"):
        files.read(1)
    path.write_bytes(whole)
    files = find_images(path)
    path.write_bytes(whole[:2100])  # cut after it was listed
    with pytest.raises(ImagesError, match="cut off inside this image"):
        files.read(1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        files.read(0)


def test_a_part(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"%d" % i) for i in range(4)])
    write_tar(tmp_path / "b.tar", [(f"{i}.jpg", b"%d" % i) for i in range(4, 8)])
    touch(tmp_path / "set", *(f"{i}.png" for i in range(8)))
    chosen = np.array([1, 4, 6])
    assert contents(find_images(tmp_path / "set").take(chosen)) == [b"1.png", b"4.png", b"6.png"]
    part = find_images(f"{tmp_path}/{{a,b}}.tar").take(chosen)
    assert contents(part) == [b"1", b"4", b"6"] and names_of(part)[1] == f"{tmp_path}/b.tar/4.jpg"


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_identity_is_that_of_the_files_wherever_they_lie(tmp_path: Path, kind: str) -> None:
    def identity(folder: str, members: list[tuple[str, bytes]]) -> bytes:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        if kind == "shards":
            return b"".join(find_images(write_tar(root / "a.tar", members)).identity())
        for old in root.iterdir():
            old.unlink()
        for name, data in members:
            (root / name).write_bytes(data)
        return b"".join(find_images(root).identity())

    members = [("a.png", b"1"), ("b.png", b"2")]
    assert identity("here", members) == identity("there", members)
    others = [
        members[:1],
        [*members, ("c.png", b"")],
        [("a.png", b"1"), ("d.png", b"2")],
        [("a.png", b"1"), ("b.png", b"23")],
    ]
    seen = {identity("here", m) for m in (members, *others)}
    assert len(seen) == 5


def test_a_million_names_take_little_more_than_their_letters() -> None:
    count = 50_000
    tracemalloc.start()
    names = Names(b"n%08d/n%08d_%05d.JPEG" % (i % 1000, i % 1000, i) for i in range(count))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    letters = len(names.blob)
    assert len(names) == count and names[count - 1] == b"n00000999/n00000999_49999.JPEG"
    assert kept < letters + 9 * count and peak < 3 * (letters + 9 * count)
