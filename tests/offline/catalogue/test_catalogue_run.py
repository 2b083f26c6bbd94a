"""A whole catalogue: resumed after a kill, within its budget of bytes and memory, and what it says of bad input."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Rewritten
from PIL import Image
from support import FIRST, VIT_ARGS, VIT_DATA, encoded, input_tensor, picture, tamper, write_pictures, write_tar

import elude_runtime as elude
from elude_runtime.checkpoint.exemplars import EXEMPLARS, read_exemplars
from elude_runtime.checkpoint.manifest import read_manifest
from elude_runtime.errors import CheckpointError, FeatureError, ImagesError, LayerError, SettingsError, StorageError
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.catalogue import answers as answers_module
from elude_runtime.offline.catalogue import pictures as pictures_module
from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.best_images import NOWHERE, BestImages
from elude_runtime.offline.catalogue.run import CatalogueOptions, make_catalogue
from elude_runtime.offline.catalogue.thumbnails import picture as thumbnail_of
from elude_runtime.offline.feature_table import read_table
from elude_runtime.offline.resume import resume_folder

FEW = CatalogueOptions(effect_images=3)


@pytest.fixture
def checkpoint(vit: Rewritten, tmp_path: Path) -> Path:
    out = tmp_path / "ckpt"
    shutil.copytree(vit.path, out)
    return out


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "_AT_ONCE", 5)


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Every file of the catalogue and the table, without the time it was made."""
    files = [*(checkpoint / EXEMPLARS).rglob("*"), checkpoint / "features.parquet"]
    found = {str(f.relative_to(checkpoint)): f.read_bytes() for f in files if f.is_file()}
    facts = json.loads(found.pop("exemplars/catalogue.json"))
    assert facts.pop("made")
    return {**found, "facts": json.dumps(facts).encode()}


class Interrupt:
    """A progress callback that ends the run as Ctrl-C does, at the n-th step of a stage."""

    def __init__(self, stage: str, number: int) -> None:
        self.stage, self.left, self.seen = stage, number, list[tuple[str, int]]()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        self.seen.append((stage, done))
        if stage == self.stage and done:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(vit: Rewritten, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "ckpt"
    shutil.copytree(vit.path, out)
    make_catalogue(out, pictures, FEW, batch_size=5)
    return contents(out)


def test_the_checkpoint_stays_the_same(vit: Rewritten, catalogued: Path) -> None:
    assert read_manifest(catalogued) == read_manifest(vit.path)
    for name in ("elude.json", "model.safetensors"):
        assert (catalogued / name).read_bytes() == (vit.path / name).read_bytes()
    before, after = (pq.read_table(path / "features.parquet") for path in (vit.path, catalogued))
    added = ("label", "label_source", "automatic_label", "raises", "lowers", "peak_edges", "peak_images")
    assert before.drop_columns(list(added)).equals(after.drop_columns(list(added)))
    assert not resume_folder(catalogued / EXEMPLARS).exists()


@pytest.mark.parametrize(("stage", "number"), [("exemplars", 3), ("classes", 9), ("classes", 20), ("pictures", 2)])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    checkpoint: Path, pictures: Path, undisturbed: dict[str, bytes], stage: str, number: int
) -> None:
    before = (checkpoint / "features.parquet").read_bytes()
    interrupt = Interrupt(stage, number)
    with pytest.raises(KeyboardInterrupt) as caught:
        make_catalogue(checkpoint, pictures, FEW, batch_size=5, save_every=0, progress=interrupt)
    assert "the same command goes on" in caught.value.__notes__[0]
    assert not (checkpoint / EXEMPLARS).exists() and (checkpoint / "features.parquet").read_bytes() == before
    again = Interrupt("", 0)
    make_catalogue(checkpoint, pictures, FEW, batch_size=5, save_every=0, progress=again)
    assert contents(checkpoint) == undisturbed
    batches = [done for s, done in again.seen if s == "exemplars"][1:]
    assert batches == ([5, 5, 4] if stage == "exemplars" else [])


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from elude_runtime.offline.catalogue.run import CatalogueOptions, make_catalogue
left = 3
def progress(stage, done, total):
    global left
    if stage == "exemplars" and done:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
few = CatalogueOptions(effect_images=3)
make_catalogue(sys.argv[1], sys.argv[2], few, batch_size=5, save_every=0, progress=progress)
"""


def test_a_killed_run_goes_on_and_ends_the_same(
    checkpoint: Path, pictures: Path, undisturbed: dict[str, bytes]
) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED, checkpoint, pictures], check=False)
    assert ran.returncode == -signal.SIGKILL and resume_folder(checkpoint / EXEMPLARS).is_dir()
    seen: list[tuple[str, int]] = []
    make_catalogue(checkpoint, pictures, FEW, batch_size=5, progress=lambda s, done, _: seen.append((s, done)))
    assert [done for s, done in seen if s == "exemplars"] == [10, 5, 5, 4]  # two batches were saved
    assert contents(checkpoint) == undisturbed


def test_other_options_begin_anew(checkpoint: Path, pictures: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_catalogue(checkpoint, pictures, FEW, batch_size=5, save_every=0, progress=Interrupt("exemplars", 3))
    seen: list[int] = []
    other = CatalogueOptions(effect_images=0, seed=1)
    make_catalogue(
        checkpoint, pictures, other, batch_size=5, progress=lambda s, n, _: seen.append(n) if s == "exemplars" else None
    )
    assert sum(seen) == 24 and seen[0] == 0


def test_two_runs_do_not_mix(checkpoint: Path, pictures: Path) -> None:
    def second(stage: str, done: int, total: int | None) -> None:
        with pytest.raises(StorageError, match="Another run is writing"):
            make_catalogue(checkpoint, pictures, FEW)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_catalogue(checkpoint, pictures, FEW, progress=lambda *a: second(*a) if a[0] == "exemplars" else None)


@pytest.mark.parametrize("budget", [0, 900, 6000, 20_000, 64_000_000])
def test_thumbnails_keep_within_the_budget(checkpoint: Path, tmp_path: Path, budget: int) -> None:
    folder = tmp_path / "noise"
    folder.mkdir()
    for seed in range(12):  # noise hardly compresses
        pixels = np.random.default_rng(seed).integers(0, 256, (200, 260, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    result = make_catalogue(checkpoint, folder, CatalogueOptions(budget, effect_images=0))
    written = list((checkpoint / EXEMPLARS / "thumbs").iterdir())
    assert sum(f.stat().st_size for f in written) == result.thumbnail_bytes <= budget
    assert len(written) == result.thumbnails
    longest = [max(Image.open(f).size) for f in written]
    if budget >= 64_000_000:
        assert longest == [160] * 12
    elif budget == 20_000:
        assert len(written) == 12 and max(longest) < 160
    elif budget == 0:
        assert written == [] and all(i.thumbnail is None for i in read_exemplars(checkpoint).images.values())
    for image in read_exemplars(checkpoint).images.values():
        assert (image.thumbnail is not None and image.thumbnail.is_file()) or budget < 20_000


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.3])
@pytest.mark.parametrize("size", [(90, 60), (48, 120)])
def test_a_thumbnail_is_what_the_model_sees(mode: str, crop_pct: float, size: tuple[int, int]) -> None:
    """Its colours are those of the model's own input, also where that is padded."""
    config = DataConfig((3, 64, 64), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", crop_pct, mode)
    image = picture(3, *size)
    found = thumbnail_of(encoded(image), config, 10**6)
    assert (found.width, found.height) == size and found.window == pytest.approx(config.window(*size))
    assert found.thumbnail is not None
    small = Image.open(io.BytesIO(found.thumbnail)).convert("RGB")
    x0, y0, x1, y1 = found.window
    assert small.width / small.height == pytest.approx((x1 - x0) / (y1 - y0), rel=0.05)
    seen = (
        config.transform()(image) * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]
    )
    expected = seen.clamp(0, 1).permute(1, 2, 0).numpy() * 255
    own = np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32)
    assert np.abs(own - expected).mean() < 8 and np.corrcoef(own.ravel(), expected.ravel())[0, 1] > 0.97


def test_images_that_moved_go_without_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 10)

    def meddle(stage: str, done: int, total: int | None) -> None:
        if stage == "putting together" and done:
            (folder / "003.png").unlink()
            picture(99).save(folder / "005.png")
            (folder / "007.png").write_bytes(b"no picture")

    result = make_catalogue(checkpoint, folder, FEW, progress=meddle)
    assert [Path(file).name for file, _ in result.missing] == ["003.png", "005.png", "007.png"]
    assert "No such file" in result.missing[0][1] and "another image" in result.missing[1][1]
    found = read_exemplars(checkpoint)
    gone = {Path(i.name).name: i for i in found.images.values() if i.thumbnail is None}
    assert set(gone) == {"003.png", "005.png", "007.png"} and len(found.images) == 10
    assert [Path(file).name for file, _ in found.skipped] == ["003.png", "005.png", "007.png"]
    assert gone["003.png"].width == 0 and gone["003.png"].predicted


def test_unreadable_images_are_left_out_and_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 6)
    (folder / "002.png").write_bytes(b"no picture")
    result = make_catalogue(checkpoint, folder, FEW)
    assert result.images == 5 and [Path(f).name for f, _ in result.skipped] == ["002.png"]
    assert len(read_exemplars(checkpoint).images) == 5


def test_tar_shards_of_photographs_with_a_limit(checkpoint: Path, tmp_path: Path) -> None:
    members = [(f"{n:02}.jpg", encoded(picture(n), "JPEG", quality=95)) for n in range(12)]
    shard = write_tar(tmp_path / "shard.tar", members)
    result = make_catalogue(checkpoint, shard, FEW, limit=6, workers=1)
    assert result.images == 6
    names = sorted(i.name for i in read_exemplars(checkpoint).images.values())
    assert [n.rpartition("/")[2] for n in names] == ["00.jpg", "02.jpg", "04.jpg", "06.jpg", "08.jpg", "10.jpg"]


def test_some_layers_alone(checkpoint: Path, vit: Rewritten, pictures: Path) -> None:
    make_catalogue(checkpoint, pictures, FEW)
    make_catalogue(checkpoint, pictures, FEW, layers=[vit.layer])
    found = read_exemplars(checkpoint)
    assert [layer.name for layer in found.layers] == [vit.layer]
    for row in read_table(checkpoint).to_pylist():
        there = row["layer"] == vit.layer and row["std"] > 0
        assert bool(found.of(row["feature"])) == there and (row["raises"] is not None) == there


def test_a_model_without_names_of_classes(mobilenet: Rewritten, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    shutil.copytree(mobilenet.path, out)
    result = make_catalogue(out, pictures, FEW)
    rows = read_table(out).to_pylist()
    assert {r["label"] for r in rows} == {""} and "no class names" in result.warnings[0]
    assert all(r["raises"] for r in rows if r["std"] > 0)


@pytest.mark.parametrize("setting", ["thumbnail_budget", "effect_images", "seed"])
def test_settings_below_zero(setting: str) -> None:
    with pytest.raises(SettingsError, match="at least 0"):
        CatalogueOptions(**{setting: -1})


def test_what_cannot_be_catalogued(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ImagesError, match="holds no images"):
        make_catalogue(checkpoint, empty)
    (empty / "a.png").write_bytes(b"x")
    with pytest.raises(ImagesError, match=r"None of the 1 images could be read. The first: .*a\.png"):
        make_catalogue(checkpoint, empty)
    with pytest.raises(ImagesError, match="give image files"):
        make_catalogue(checkpoint, input_tensor(VIT_DATA, 2))  # type: ignore[arg-type]
    with pytest.raises(LayerError, match="no split layer 'blocks.9'"):
        make_catalogue(checkpoint, pictures, layers=["blocks.9"])
    (checkpoint / "labels.csv").write_text("feature,label\nblocks.0/P0,x\n")
    with pytest.raises(FeatureError, match=r"labels.csv, line 2: there is no feature 'blocks.0/P0'"):
        make_catalogue(checkpoint, pictures)
    assert not (checkpoint / EXEMPLARS).exists() and not resume_folder(checkpoint / EXEMPLARS).exists()


def test_a_layer_that_never_varied(vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    shutil.copytree(vit.path, out)
    table = pq.read_table(out / "features.parquet")
    still = np.zeros(len(table), dtype=np.float32)
    pq.write_table(table.set_column(table.column_names.index("std"), "std", [still]), out / "features.parquet")
    with pytest.raises(CheckpointError, match="ever varied"):
        make_catalogue(out, pictures, FEW)


def test_values_that_are_not_finite(vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
    def break_it(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.0.norm1.weight"][0] = float("nan")

    out = tamper(vit.path, tmp_path / "ckpt", break_it)
    with pytest.raises(ImagesError, match=r"not finite on .*000\.png"):
        make_catalogue(out, pictures, FEW)


def test_a_damaged_catalogue_is_replaced(checkpoint: Path, pictures: Path) -> None:
    (checkpoint / EXEMPLARS).mkdir()
    (checkpoint / EXEMPLARS / "thing").write_text("x")
    make_catalogue(checkpoint, pictures, FEW)
    assert read_exemplars(checkpoint).read == 24 and not (checkpoint / EXEMPLARS / "thing").exists()


def test_a_full_disk_leaves_the_old_catalogue(
    checkpoint: Path, pictures: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_catalogue(checkpoint, pictures, FEW, batch_size=5)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StorageError, match="disk is full"):
        make_catalogue(checkpoint, pictures, CatalogueOptions(effect_images=0, seed=5))
    assert contents(checkpoint) == undisturbed


def test_what_is_kept_does_not_grow_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "_SPARE", 20)
    best, answers, sizes = BestImages(6, 4), Answers(), set()
    g = torch.Generator().manual_seed(1)
    every, lots = torch.randn(4000, 5, generator=g), torch.rand(4000, generator=g)
    for number in range(400):
        places = torch.arange(10) + 10 * number
        keys = torch.rand(10, 6, generator=g)
        best.add(places, keys, torch.zeros(10, 6, dtype=torch.int64), lambda i, f: torch.zeros(len(i), 0))
        answers.add(places, bytes(160), every[places], lots[places])
        if answers.crowded:
            answers.keep([best.places])
        assert torch.isin(best.places, answers.places).all() and len(answers.places) <= 2 * 24 + 20 + 10
        sizes.add(sum(t.numel() for t in best.state().values()))
    assert len(sizes) == 1 and answers.count == 4000
    centred = (every - every.mean(1, keepdim=True)).double()
    drawn = lots.argsort()[:500].sort().values
    torch.testing.assert_close(answers.sample.double(), centred[drawn], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(answers.mean, centred.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(answers.std, centred.std(0, correction=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(answers.logits.double(), centred[answers.places], atol=2e-3, rtol=1e-3)


def test_best_images_are_those_of_one_sort() -> None:
    g = torch.Generator().manual_seed(2)
    values = torch.randn(120, 7, 9, generator=g).mul(4).round()  # many equal peaks
    keys, tokens = values.max(2)
    for size in (1, 7, 120):
        best = BestImages(7, 5, heats=2, tokens=9)
        for places in torch.arange(120).split(size):
            own = values[places]
            best.add(places, keys[places], tokens[places], lambda i, f, own=own: own[i, f])
        for feature in range(7):
            order = keys[:, feature].sort(descending=True, stable=True).indices[:5]
            assert best.places[:, feature].tolist() == order.tolist()
            assert best.tokens[:, feature].tolist() == tokens[order, feature].tolist()
            for rank in range(2):
                scale = values[order[rank], feature].abs().max()
                expected = (values[order[rank], feature] / scale * 127).round()
                assert (
                    best.heat[rank, feature].tolist() == expected.tolist() and best.heat_scales[rank, feature] == scale
                )
    few = BestImages(2, 3)
    few.add(torch.tensor([4]), torch.tensor([[0.5, -1.0]]), torch.tensor([[2, 3]]), lambda i, f: torch.zeros(len(i), 0))
    assert few.places.tolist() == [[4, NOWHERE], [NOWHERE, NOWHERE], [NOWHERE, NOWHERE]]


def test_a_label_given_meanwhile_is_kept(checkpoint: Path, pictures: Path) -> None:
    name = read_table(checkpoint)["feature"].to_pylist()[0]

    def named(stage: str, *_: Any) -> None:
        if stage == "classes":
            (checkpoint / "labels.csv").write_text(f"feature,label\n{name},mine\n")

    make_catalogue(checkpoint, pictures, CatalogueOptions(effect_images=1), progress=named)
    assert {r["feature"]: r["label"] for r in read_table(checkpoint).to_pylist()}[name] == "mine"


def test_a_token_type_that_never_varies_has_nothing_to_show(vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
    """Calibrated on one image, class tokens have no spread, and patches have."""
    out = tmp_path / "ckpt"
    elude.rewrite(
        vit.base, pictures, out=out, layers=[FIRST], subunits=4, concepts=4, tokens=24, max_images=1,
        data_config=VIT_DATA, model_args=VIT_ARGS,
    )  # fmt: skip
    result = make_catalogue(out, pictures)
    found, rows = read_exemplars(out), read_table(out).to_pylist()
    assert sum(result.dead.values()) >= sum(r["token_type"] == "cls" for r in rows) > 0
    assert not any(found.of(r["feature"]) for r in rows if r["token_type"] == "cls")
    assert any(found.of(r["feature"]) for r in rows if r["token_type"] == "patches")
