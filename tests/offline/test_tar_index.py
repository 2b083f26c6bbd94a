"""The scan of a tar's headers: against Python's tarfile, WebDataset's reader, and damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import tempfile
from pathlib import Path
from shutil import which

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from support import write_tar

from elude_runtime.errors import ImagesError
from elude_runtime.offline.tar_index import DAMAGE, ELSEWHERE, tar_images

JPG = frozenset({".jpg", ".png"})
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def images_of(path: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of what the scan finds; no bytes for what is not there."""
    whole = path.read_bytes()
    return [(name.decode(), whole[first : first + max(0, size)]) for name, first, size in tar_images(str(path), JPG)]


# Names that tar formats store in different ways: short, with a long folder (ustar's prefix), longer than any field, and
# with letters that only pax and GNU keep whole.
NAMES = st.one_of(
    st.text("abc/é猫", min_size=1, max_size=12),
    st.text("ab/", min_size=90, max_size=300),
).map(lambda t: "/".join(p for p in t.split("/") if p) or "x")


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=6, unique_by=lambda m: m[0]),
    st.sampled_from(sorted(FORMATS)),
)
def test_it_finds_what_tarfile_finds(drawn: list[tuple[str, bytes]], kind: str) -> None:
    members = [(f"{name}-{number}.jpg", data) for number, (name, data) in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        try:
            write_tar(path, members, FORMATS[kind])
        except ValueError:  # ustar holds no name longer than its fields
            return
        with tarfile.open(path) as tar:
            expected = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        assert images_of(path) == expected == members


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a global header"}) as tar:
        for number, kind in enumerate((tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)):
            other = tarfile.TarInfo(f"other{number}.jpg")
            other.type = kind
            tar.addfile(other)
            info = tarfile.TarInfo(f"./{number}.jpg")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert images_of(path) == [(f"{n}.jpg", b"abc") for n in range(4)]


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("folder", ["", "./d/", "f" * 99 + "/" + "g" * 50 + "/"])
def test_links_are_what_they_lead_to(tmp_path: Path, kind: str, folder: str) -> None:
    """As tarfile reads them: hard links by their name in the archive, symbolic ones from the folder they are in."""
    if kind == "ustar" and len(folder) > 99:
        pytest.skip("this format holds no link so long")
    hard, soft, path = tarfile.LNKTYPE, tarfile.SYMTYPE, tmp_path / "a.tar"
    links = [
        ("b.jpg", hard, f"{folder}a.jpg"), ("c.jpg", soft, "a.jpg"), ("d/d.jpg", soft, "../a.jpg"),
        ("f.jpg", hard, f"{folder}e.png"),
    ]  # fmt: skip
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(folder + name)
            info.type, info.linkname, info.size = kind, target, len(data)
            tar.addfile(info, io.BytesIO(data))

        add("a.jpg", b"a" * 600)
        for name, link, target in links[:3]:
            add(name, b"", link, target)
        add("e.png", b"e")
        add("f.jpg", b"", *links[3][1:])
    with tarfile.open(path) as tar:
        expected = [(m.name.removeprefix("./"), tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    assert images_of(path) == expected and [data for _, data in expected] == [b"a" * 600] * 4 + [b"e"] * 2


@pytest.mark.parametrize("target", ["gone.jpg", "/etc/hostname", "self.jpg", "later.jpg", ""])
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("self.jpg", None), ("later.jpg", b"x")):
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = kind, target
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    found = [(name, size) for name, _, size in tar_images(str(tmp_path / "a.tar"), JPG)]
    assert found == [(b"self.jpg", ELSEWHERE), (b"later.jpg", 1)]


@pytest.mark.skipif(which("tar") is None, reason="there is no tar here")
def test_hard_links_as_the_tar_command_packs_them(tmp_path: Path) -> None:
    """The set is a copy made with `cp -l`, so that the archive holds the second name of each as a link."""
    for name in ("a", "b"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / f"set/{name}.jpg").write_bytes(name.encode() * 700)
        (tmp_path / f"set/{name}-again.jpg").hardlink_to(tmp_path / f"set/{name}.jpg")
    subprocess.run(["tar", "--sort=name", "-cf", "a.tar", "-C", "set", "."], cwd=tmp_path, check=True)
    expected = [(f"{n}{more}.jpg", n.encode() * 700) for n in ("a", "b") for more in ("-again", "")]
    assert images_of(tmp_path / "a.tar") == expected


@pytest.mark.skipif(which("tar") is None, reason="there is no tar here")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_the_tar_command(tmp_path: Path, kind: str) -> None:
    """With a file full of holes, which is stored in pieces, in front of the image."""
    with (tmp_path / "a.bin").open("wb") as sparse:
        for piece in range(30):
            sparse.seek(piece * 100_000)
            sparse.write(b"x" * 5000)
    (tmp_path / "b.jpg").write_bytes(b"picture")
    sparsely = [] if kind in ("v7", "ustar") else ["--sparse"]
    subprocess.run(["tar", f"--format={kind}", *sparsely, "-cf", "c.tar", "a.bin", "b.jpg"], cwd=tmp_path, check=True)
    assert images_of(tmp_path / "c.tar") == [("b.jpg", b"picture")]


def test_one_image_a_sample(tmp_path: Path) -> None:
    members = [
        "a/0.cls", "a/0.jpg", "a/0.json", "a/0.png",  # the first of two
        "a/1.JPG", "a/1.mask.png",  # the mask is no picture
        "a/2.mask.png", "a/2.png",
        "b/0.jpg",  # another folder, another sample
        "frame.0001.png", "frame.0002.png",  # no sample: files with dots in their names
        ".hidden.jpg", "b/.hidden.jpg", "nothing", "readme.txt",
        "a/0.jpg",  # not a neighbour: a sample of its own
    ]  # fmt: skip
    found = images_of(write_tar(tmp_path / "a.tar", [(m, m.encode()) for m in members]))
    assert [n for n, _ in found] == [
        "a/0.jpg", "a/1.JPG", "a/2.png", "b/0.jpg", "frame.0001.png", "frame.0002.png", "a/0.jpg",
    ]  # fmt: skip
    assert all(data == name.encode() for name, data in found)


def test_the_order_and_bytes_of_webdatasets_own_reader(tmp_path: Path) -> None:
    pattern = str(tmp_path / "train-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=7, verbose=0) as writer:
        for number in range(24):
            key = f"{number % 5}/café {number}"
            picture = {"jpg": b"jpg%d" % number} if number % 3 else {"png": b"png%d" % number}
            writer.write({"__key__": key, "cls": str(number), "json": b"{}", "txt": "x" * number, **picture})
    shards = sorted(tmp_path.glob("*.tar"))
    assert len(shards) == 4
    reader = webdataset.WebDataset([str(s) for s in shards], shardshuffle=False).to_tuple("__key__", "jpg;png")
    expected = list(reader)
    found = [pair for shard in shards for pair in images_of(shard)]
    assert [(n.rpartition(".")[0], data) for n, data in found] == expected and len(found) == 24


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_a_compressed_shard_says_so(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x")])
    pack = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}[kind]
    path.write_bytes(pack(path.read_bytes()))
    with pytest.raises(ImagesError, match=rf"a\.tar is compressed \({kind}\).*decompress it first\.$"):
        images_of(path)


@pytest.mark.parametrize("content", [b"", b"x", b"not a tar " * 200], ids=["empty", "short", "text"])
def test_what_is_no_tar_from_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ImagesError, match=r"a\.tar is not a tar file"):
        images_of(tmp_path / "a.tar")


def test_a_shard_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="cannot be read"):
        list(tar_images(str(tmp_path / "none.tar"), JPG))
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(ImagesError, match="is not a file"):
        list(tar_images(str(tmp_path / "folder.tar"), JPG))


def test_a_tar_without_members_has_no_images(tmp_path: Path) -> None:
    assert images_of(write_tar(tmp_path / "a.tar", [])) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Four samples; the third with a name that needs an extension header."""
    members = [("0.jpg", b"0" * 700), ("1.cls", b"1"), ("1.jpg", b"1" * 512), ("d" * 120 + "/2.jpg", b"2" * 3)]
    return write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members, tarfile.PAX_FORMAT).read_bytes()


def test_a_cut_at_every_place_is_named_and_keeps_what_is_before_it(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    complete = list(tar_images(str(path), JPG))
    assert len(complete) == 3
    last = complete[-1][1] + complete[-1][2]
    cuts = [*range(1, last, 61), *range(512, last, 512)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        if cut < 512:
            with pytest.raises(ImagesError):
                list(tar_images(str(path), JPG))
            continue
        found = list(tar_images(str(path), JPG))
        kept = [e for e in complete if e[1] + e[2] <= cut]
        assert [e for e in found if e[2] != DAMAGE] == kept
        damage = [e for e in found if e[2] == DAMAGE]
        assert damage == found[len(kept) :] and len(damage) <= 1
        inside = [e for e in complete if e[1] <= cut < e[1] + e[2]]
        if inside:  # a cut between two members, at a header's place, cannot be seen
            assert damage[0][0] == inside[0][0]


def test_a_damaged_header_is_named_and_keeps_what_is_before_it(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    complete = list(tar_images(str(path), JPG))
    header = complete[1][1] - 512
    path.write_bytes(whole[: header + 124] + b"9" + whole[header + 125 :])
    assert list(tar_images(str(path), JPG)) == [complete[0], (b"", header, DAMAGE)]


def test_a_size_that_leads_backwards_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, pax in (("0.jpg", {}), ("1.jpg", {"size": "-4096"})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 3, pax
            tar.addfile(info, io.BytesIO(b"abc"))
    assert [(name, size) for name, _, size in tar_images(str(path), JPG)] == [(b"0.jpg", 3), (b"", DAMAGE)]


def test_megabytes_behind_the_end_mark_are_damage(whole: bytes, tmp_path: Path) -> None:
    """As in a download whose first part never came."""
    path = tmp_path / "a.tar"
    path.write_bytes(whole + bytes(1 << 20))
    assert [e[2] == DAMAGE for e in tar_images(str(path), JPG)] == [False, False, False, True]


def test_an_archive_behind_the_end_mark_is_damage(whole: bytes, tmp_path: Path) -> None:
    """Tars made one by `cat`, which most readers take for the first of them."""
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    complete = list(tar_images(str(path), JPG))
    path.write_bytes(whole + whole)
    found = list(tar_images(str(path), JPG))
    assert found[:3] == complete and [(name, size) for name, _, size in found[3:]] == [(b"", DAMAGE)]
    assert whole[found[3][1] :].strip(b"\0") == b"" and found[3][1] > sum(complete[-1][1:])


def test_an_extension_header_of_a_megabyte_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for length, expected in ((1 << 19, [b"0.jpg", b"1.jpg"]), (1 << 20, [b"0.jpg", b""])):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, pax in (("0.jpg", {}), ("1.jpg", {"comment": "x" * length})):
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = 3, pax
                tar.addfile(info, io.BytesIO(b"abc"))
        found = list(tar_images(str(path), JPG))
        assert [name for name, _, _ in found] == expected and (found[1][2] == DAMAGE) == (expected[1] == b"")


@given(st.lists(st.tuples(st.integers(0, 6143), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
def test_no_damage_is_more_than_damage(whole: bytes, changes: list[tuple[int, int]], resealed: bool) -> None:
    """Whatever the bytes: entries inside the file, in order, or one clear error. resealed: with checksums that fit, so
    that damaged sizes, types and names are met."""
    data = bytearray(whole)
    for place, value in changes:
        data[place % len(data)] = value
    if resealed:
        for place, _ in changes:
            start = place % len(data) // 512 * 512
            block = data[start : start + 512]
            total = sum(block) - sum(block[148:156]) + 256
            data[start + 148 : start + 156] = b"%06o\0 " % total
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(data)
        try:
            found = list(tar_images(str(path), JPG))
        except ImagesError as error:
            assert "\n" not in str(error)
            return
    starts = [first for _, first, _ in found]
    assert resealed or starts == sorted(starts)  # a link may lead back
    assert all(first + max(0, size) <= len(data) for _, first, size in found)
    assert all(size != DAMAGE for _, _, size in found[:-1])
