"""Activations of whole layers: against masked layers run one by one, streamed, and whole or not at all on the disk."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Rewritten
from support import (
    FIRST,
    SECOND,
    VIT_ARGS,
    VIT_DATA,
    as_tokens,
    hook_count,
    input_tensor,
    naive_sums,
    random_partition,
    state_of,
    tamper,
    tiny_vit,
    write_pictures,
)
from torch import Tensor, nn

import elude_runtime as elude
from elude_runtime.analysis import activations as analysis
from elude_runtime.errors import ImagesError, StorageError
from elude_runtime.network.tokens import TokenLayout
from elude_runtime.offline import activations as module
from elude_runtime.offline.activations import ActivationsFile, write_activations

Contents = dict[str, np.ndarray]
LINEAR, CONV = nn.Linear(10, 6), nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2)
LAYERS = [
    pytest.param(LINEAR, (4, 9, 10), TokenLayout(9, 2), 10, id="linear with a prefix"),
    pytest.param(LINEAR, (4, 9, 10), TokenLayout(9), 10, id="linear"),
    pytest.param(LINEAR, (4, 10), TokenLayout(1), 10, id="one token"),
    pytest.param(CONV, (4, 8, 7, 5), TokenLayout(12, 0, (4, 3)), 4, id="grouped convolution"),
]


def read(path: Path) -> Contents:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def write(rewritten: Rewritten, out: Path, **options: Any) -> ActivationsFile:
    return write_activations(rewritten.path, rewritten.images, rewritten.layer, out, **options)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("layer", "shape", "layout", "inputs"), LAYERS)
def test_subunits_are_masked_layers(
    layer: nn.Module,
    shape: tuple[int, ...],
    layout: TokenLayout,
    inputs: int,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small:  # a few neurons and a few images at a time
        monkeypatch.setattr(analysis, "_WEIGHT_FLOATS", 150)
        monkeypatch.setattr(analysis, "_SUM_FLOATS", 150)
    partition = random_partition(3, 6, inputs, layout.types)
    state = state_of(layer, layout, partition)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    sums = naive_sums(layer, layout, partition, x)
    means = torch.stack([partition.mean[layout.type_of(token)] for token in range(layout.total)])
    expected = sums - means
    found = analysis.subunit_tokens(state, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.sum(-1) + state.baseline(), as_tokens(layer(x).detach(), state.linear.is_conv), atol=1e-5, rtol=1e-5
    )
    peaks = analysis.subunit_peaks(state, x)
    assert peaks.shape == (4, layout.types, 6, 5)
    for token_type, tokens in enumerate(layout.slices):
        own = expected[:, tokens].numpy()
        where = np.abs(own).argmax(1)[:, None]
        np.testing.assert_allclose(
            peaks[:, token_type].numpy(), np.take_along_axis(own, where, 1)[:, 0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("level", ["concepts", "subunits"])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_tensor_of_images(rewritten: Rewritten, tmp_path: Path, level: str, per_token: bool) -> None:
    """What the model itself gives of the same batches, and nothing of the model changed."""
    options: dict[str, Any] = {"level": level, "per_token": per_token}
    hooks = hook_count(rewritten.model.base)
    result = write(rewritten, tmp_path / "a.npz", **options, batch_size=2)
    found = read(result.path)
    model, layer = rewritten.model, rewritten.layer
    state = model.state(layer)
    if level == "concepts":
        tokens = torch.cat([model.concepts(batch, layer) for batch in rewritten.images.split(2)])
        expected = torch.stack(
            [
                tokens[:, state.layout.slices[model.feature(name).token_type], column]
                .abs()
                .max(1)
                .values  # the peak's size; its sign is the command's test
                for column, name in enumerate(model.concept_names(layer))
            ],
            1,
        )
        assert found["names"].tolist() == model.concept_names(layer)
    else:
        tokens = torch.cat([model.subunits(batch, layer) for batch in rewritten.images.split(2)])
        for token_type, part in enumerate(state.layout.slices):
            tokens[:, part] -= state.partition.mean[token_type]
        expected = torch.stack([tokens[:, part].abs().max(1).values for part in state.layout.slices], 1)
        assert "names" not in found
    made = found["activations"] if per_token else np.abs(found["activations"])
    assert made.dtype == (np.float32 if level == "concepts" else np.float16) == np.dtype(result.dtype)
    assert made.shape == result.shape
    precision = 1e-5 if level == "concepts" else 2e-3
    scale = float(tokens.abs().max())
    np.testing.assert_allclose(made, (tokens if per_token else expected).numpy(), atol=precision * scale, rtol=0)
    assert found["files"].tolist() == ["0", "1", "2"] and result.size == result.path.stat().st_size
    assert hook_count(rewritten.model.base) == hooks and result.warnings == result.skipped == []


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"level": "subunits"}], ids=str)
def test_small_pieces_come_to_the_same(
    vit: Rewritten, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vit.folder is not None
    whole = write_activations(vit.path, vit.folder, SECOND, tmp_path / "whole.npz", **options)
    for name, value in (("_FLOATS", 1000), ("_COPIED", 100), ("_NAMES", 7)):
        monkeypatch.setattr(module, name, value)
    parts = write_activations(vit.path, vit.folder, SECOND, tmp_path / "parts.npz", **options)
    a, b = read(whole.path), read(parts.path)
    assert a.keys() == b.keys() and len(a["files"]) == 24
    for name in a:
        if name == "activations":
            np.testing.assert_allclose(a[name].astype(float), b[name].astype(float), rtol=2e-3, atol=1e-4)
        else:
            assert a[name].tolist() == b[name].tolist()


def test_the_same_bytes_on_any_day(vit: Rewritten, tmp_path: Path) -> None:
    files = [write(vit, tmp_path / f"{n}.npz").path.read_bytes() for n in range(2)]
    assert files[0] == files[1]


def test_activations_leave_memory_batch_by_batch(vit: Rewritten, tmp_path: Path) -> None:
    """The numbers of the images that are done lie on the disk, and nowhere else."""
    images = input_tensor(VIT_DATA, 12)
    each = 17 * 32 * 5 * 2
    seen = []

    def watch(stage: str, done: int, total: int | None) -> None:
        if stage == "activations":
            (work,) = tmp_path.glob(".a.npz.*.part")
            seen.append((done, total, (work / "activations").stat().st_size))

    write_activations(
        vit.path, images, SECOND, tmp_path / "a.npz", level="subunits", per_token=True, batch_size=4, progress=watch
    )
    assert [s[:2] for s in seen] == [(4, 12)] * 3
    buffered = 2**17
    assert all(0 <= 4 * n * each - size <= buffered for n, (_, _, size) in enumerate(seen, 1))
    assert seen[-1][2] > 4 * each


def test_half_precision_weights(tmp_path: Path) -> None:
    base = tiny_vit(depth=2).bfloat16()
    args = {**VIT_ARGS, "depth": 2}
    model = elude.rewrite(
        base, input_tensor(VIT_DATA, 8, 0), out=tmp_path / "c", layers=[FIRST], subunits=2, concepts=3, tokens=10,
        data_config=VIT_DATA, model_args=args,
    )  # fmt: skip
    images = input_tensor(VIT_DATA, 3)
    found = read(write_activations(tmp_path / "c", images, FIRST, tmp_path / "a.npz", per_token=True).path)
    np.testing.assert_allclose(
        found["activations"], model.concepts(images.bfloat16(), FIRST).numpy(), rtol=1e-4, atol=1e-4
    )


class TestFloat16:
    @pytest.fixture
    def scaled(self, vit: Rewritten, tmp_path: Path) -> Callable[[float], Path]:
        """The tiny ViT with a layer's output, and all that is known of it, times a factor."""

        def make(factor: float) -> Path:
            def scale(tensors: dict[str, Tensor]) -> None:
                for name in (f"{SECOND}.weight", f"{SECOND}.bias", f"elude.{SECOND}.mean", f"elude.{SECOND}.std"):
                    tensors[name] *= factor

            return tamper(vit.path, tmp_path / f"times {factor}", scale)

        return make

    def test_numbers_beyond_it_are_cut_and_counted(
        self, vit: Rewritten, scaled: Callable[[float], Path], tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {"level": "subunits", "per_token": True}
        expected = vit.model.subunits(vit.images, SECOND)
        state = vit.model.state(SECOND)
        for token_type, tokens in enumerate(state.layout.slices):
            expected[:, tokens] -= state.partition.mean[token_type]
        factor = 65504 / float(expected.abs().quantile(0.9))
        result = write_activations(scaled(factor), vit.images, SECOND, tmp_path / "a.npz", **options)
        found = read(result.path)["activations"].astype(np.float32)
        large = (expected * factor).numpy()
        assert np.isfinite(found).all() and np.abs(found).max() == 65504
        np.testing.assert_allclose(found, large.clip(-65504, 65504), rtol=1e-3, atol=1)
        (warning,) = result.warnings
        assert "float16" in warning and "concepts" in warning
        assert abs(int(warning.split()[0]) - int((np.abs(large) > 65504).sum())) <= 2
        assert f"{np.abs(large).max():.4g}" in warning
        assert not write_activations(scaled(1.0), vit.images, SECOND, tmp_path / "b.npz", **options).warnings

    def test_numbers_too_small_for_it(self, vit: Rewritten, scaled: Callable[[float], Path], tmp_path: Path) -> None:
        small = scaled(1e-6)
        (warning,) = write_activations(small, vit.images, SECOND, tmp_path / "a.npz", level="subunits").warnings
        assert "few digits" in warning and "concepts" in warning
        result = write_activations(small, vit.images, SECOND, tmp_path / "b.npz")
        assert not result.warnings  # in units of their standard deviations
        expected = read(write(vit, tmp_path / "c.npz").path)["activations"]
        np.testing.assert_allclose(read(result.path)["activations"], expected, rtol=1e-3, atol=1e-3)


class TestNothingIsLeftBehind:
    """Of a run that does not end well: no file, no folder, and what was there before stays."""

    @pytest.fixture(autouse=True)
    def before(self, tmp_path: Path) -> Path:
        out = tmp_path / "out"
        out.mkdir()
        (out / "a.npz").write_bytes(b"precious")
        return out

    def check(self, out: Path) -> None:
        assert [p.name for p in out.iterdir()] == ["a.npz"] and (out / "a.npz").read_bytes() == b"precious"

    @pytest.mark.parametrize("stage", ["activations", "file"])
    def test_interrupted(self, vit: Rewritten, before: Path, stage: str) -> None:
        def interrupt(name: str, done: int, total: int | None) -> None:
            if name.startswith(stage):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(vit, before / "a.npz", force=True, progress=interrupt)
        self.check(before)

    @pytest.mark.parametrize("broken", ["_packed", "_add"])
    def test_a_disk_that_runs_full(
        self, vit: Rewritten, before: Path, broken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, broken, full)
        with pytest.raises(StorageError, match="disk is full"):
            write(vit, before / "a.npz", force=True)
        self.check(before)

    def test_activations_that_are_no_numbers(self, vit: Rewritten, tmp_path: Path, before: Path) -> None:
        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors["blocks.0.mlp.fc2.bias"][0] = torch.nan

        bad = tamper(vit.path, tmp_path / "bad", spoil)
        for options in ({}, {"level": "subunits"}, {"per_token": True}):
            with pytest.raises(ImagesError, match=f"{SECOND} are not finite on .*000.png"):
                write_activations(bad, vit.folder or "", SECOND, before / "a.npz", force=True, **options)
        self.check(before)

    def test_the_image_whose_activations_are_no_numbers(
        self, vit: Rewritten, before: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = vit.images.clone()
        images[2] = torch.nan
        for floats in (module._FLOATS, 1):
            monkeypatch.setattr(module, "_FLOATS", floats)
            with pytest.raises(ImagesError, match="not finite on 2;"):
                write_activations(vit.path, images, SECOND, before / "a.npz", force=True)
        self.check(before)

    def test_a_file_that_appears_meanwhile(self, vit: Rewritten, before: Path) -> None:
        def appear(*_: Any) -> None:
            (before / "b.npz").write_bytes(b"another")

        with pytest.raises(StorageError, match="appeared"):
            write(vit, before / "b.npz", progress=appear)
        assert (before / "b.npz").read_bytes() == b"another"
        (before / "b.npz").unlink()
        self.check(before)

    def test_a_complete_file_takes_its_place(self, vit: Rewritten, before: Path) -> None:
        result = write(vit, before / "a.npz", force=True)
        assert [p.name for p in before.iterdir()] == ["a.npz"] and len(read(result.path)["files"]) == 3
        assert (before / "a.npz").stat().st_mode & 0o777 == 0o644


def test_the_room_that_is_asked_for(vit: Rewritten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the numbers; one byte less is too little."""
    folder = write_pictures(tmp_path / "pictures", 5)
    each = 17 * 32 * 5 * 2
    free = 2 * 5 * each

    def usage(path: Any) -> Any:
        return type("Usage", (), {"free": free})

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    options: dict[str, Any] = {"level": "subunits", "per_token": True}
    assert write_activations(vit.path, folder, SECOND, tmp_path / "a.npz", **options).shape[0] == 5
    free -= 1
    with pytest.raises(StorageError) as refused:
        write_activations(vit.path, folder, SECOND, tmp_path / "b.npz", **options)
    message = str(refused.value)
    assert "27.2 kB" in message and "5.4 kB an image" in message and f"{tmp_path} has 54.4 kB free" in message
    assert "at most 4" in message and "--per-token" in message and "--level concepts" in message
    assert write_activations(vit.path, folder, SECOND, tmp_path / "b.npz", **options, limit=4).shape[0] == 4
    free = 10
    with pytest.raises(StorageError) as refused:
        write_activations(vit.path, folder, SECOND, tmp_path / "c.npz")
    assert "choose another disk" in str(refused.value) and "ask for" not in str(refused.value)
