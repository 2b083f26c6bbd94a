"""`elude activations`: numbers against float64 arithmetic on the checkpoint's own tensors, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Rewritten
from PIL import Image
from safetensors.numpy import load_file
from support import FIRST, SECOND, VIT_ARGS, VIT_DATA, Run, refused, tamper, tiny_vit, write_pictures
from torch import nn

import elude_runtime as elude
from elude_runtime.network.preprocessing import DataConfig

LAST = "blocks.2.mlp.fc2"  # of a ViT that reads the class token only
Array = np.ndarray


@pytest.fixture
def run(run: Run) -> Run:
    """`elude activations ARGUMENTS`, in this process."""
    return lambda *arguments: run("activations", *arguments)


@pytest.fixture(scope="module")
def class_only(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Rewritten:
    """A ViT split in its last block, where nothing but the class token reaches the output."""
    out = tmp_path_factory.mktemp("last") / "ckpt"
    base = tiny_vit()
    model = elude.rewrite(
        base, pictures, out=out, layers=[LAST], subunits=4, concepts=5, tokens=24, data_config=VIT_DATA,
        model_args=VIT_ARGS,
    )  # fmt: skip
    return Rewritten(out, base, VIT_DATA, model, torch.empty(0), pictures)


@dataclass(frozen=True)
class Expected:
    """What a layer's activations are by their definitions, in float64. output [N, T, d]: of the layer itself; centre
    [T, d]: bias and means; tokens [N, T, d, M + 1]; types: the tokens of each type; concepts: by name [N, T]."""

    output: Array
    centre: Array
    tokens: Array
    types: list[slice]
    concepts: dict[str, Array]


def expected(network: Rewritten, layer: str, files: list[Path], batch: int) -> Expected:
    """From the pictures themselves: the layer's input, caught by a hook, times the stored weights of each sub-unit."""
    x, y = caught(network.base, layer, files, network.data, batch)
    stored = load_file(network.path / "model.safetensors")
    part = {k: stored[f"elude.{layer}.{k}"] for k in ("partition", "mean", "std", "concept", "sign")}
    weight = stored[f"{layer}.weight"].astype(np.float64)
    bias = stored.get(f"{layer}.bias", np.zeros(len(weight)))
    if x.ndim == 4:  # a convolution over single pixels: each is a token
        assert weight.shape[2:] == (1, 1) and y.shape[2:] == x.shape[2:]
        x, y = (v.reshape(*v.shape[:2], -1).swapaxes(1, 2) for v in (x, y))
        weight = weight[..., 0, 0]
    total, width = x.shape[1], part["mean"].shape[-1]
    types = [slice(0, total)]
    if len(part["mean"]) == 2:
        prefix = network.base.num_prefix_tokens
        types = [slice(prefix, total), slice(0, prefix)]
    tokens, centre = np.empty((*y.shape, width)), np.empty(y.shape[1:])
    concepts = {}
    for t, (own, letter) in enumerate(zip(types, "PC", strict=False)):
        slots = np.where(part["partition"][t] == 255, width - 1, part["partition"][t])
        mean, std, concept = (part[k][t].astype(np.float64) for k in ("mean", "std", "concept"))
        signed = std * part["sign"][t]
        for slot in range(width):
            tokens[:, own, :, slot] = x[:, own] @ np.where(slots == slot, weight, 0).T - mean[:, slot]
        centre[own] = bias + mean.sum(-1)
        numbered = [str(int(c)) for c in np.unique(concept) if c != 65535]
        for name in [*numbered, "rest"] if (std > 0).any() else []:
            members = (concept == (65535 if name == "rest" else int(name))) & (std > 0)
            found = np.zeros(y.shape[:2])
            if members.any():
                found[:, own] = (tokens[:, own][:, :, members] / signed[members]).mean(-1)
            concepts[f"{layer}/{letter}{name}"] = found
    return Expected(y, centre, tokens, types, concepts)


def caught(base: nn.Module, layer: str, files: list[Path], data: DataConfig, batch: int) -> tuple[Array, Array]:
    """Input and output of the layer in a plain forward pass, in batches of the same size."""
    seen: list[tuple[Array, Array]] = []
    module, transform = base.get_submodule(layer), data.transform()
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0].numpy(), out.numpy())))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        for some in images.split(batch):
            base(some)
    handle.remove()
    x, y = (np.concatenate(parts).astype(np.float64) for parts in zip(*seen, strict=True))
    return x, y


def peaks(tokens: Array) -> Array:
    """[N, T, …] -> the number of largest absolute value over the tokens."""
    where = np.abs(tokens).argmax(1)[:, None]
    return np.take_along_axis(tokens, where, 1)[:, 0]


def written(run: Run, network: Rewritten, out: Path, *options: object) -> tuple[dict[str, Array], dict[str, Any]]:
    """What numpy reads of the file, and what the command says of it."""
    ran = run(network.path, "--images", network.folder, "--out", out, "--batch-size", 10, "--json", *options)
    assert ran.code == 0, ran.err
    with np.load(out, allow_pickle=False) as file:
        return dict(file), ran.document


@pytest.fixture(params=["vit", "vit first", "mobilenet", "registers", "class_only"])
def network(request: pytest.FixtureRequest, pictures: Path) -> tuple[Rewritten, str]:
    """Each of the tiny networks with a layer, and pictures to run it on."""
    name, _, first = request.param.partition(" ")
    found: Rewritten = request.getfixturevalue(name)
    layer = FIRST if first else found.layer
    return Rewritten(found.path, found.base, found.data, found.model, found.images, pictures), layer


def close(found: Array, reference: Array, relative: float) -> None:
    """Within so much of the number, and of what float32 leaves of the largest."""
    np.testing.assert_allclose(found, reference, rtol=relative, atol=2e-5 * np.abs(reference).max())


def test_concepts(run: Run, network: tuple[Rewritten, str], pictures: Path, tmp_path: Path) -> None:
    checkpoint, layer = network
    files = sorted(pictures.iterdir())
    reference = expected(checkpoint, layer, files, 10).concepts
    found, said = written(run, checkpoint, tmp_path / "a.npz", "--layer", layer)
    tokens, _ = written(run, checkpoint, tmp_path / "b.npz", "--layer", layer, "--per-token")
    for made in (found, tokens):
        assert set(made) == {"activations", "names", "files"} and made["activations"].dtype == np.float32
        assert made["files"].tolist() == list(map(str, files))
        assert made["names"].tolist() == checkpoint.model.concept_names(layer) == list(reference)
    by_token = np.stack(list(reference.values()), -1)
    close(tokens["activations"], by_token, 1e-4)
    close(found["activations"], peaks(by_token), 1e-4)
    assert said["shape"] == [24, len(reference)] == list(found["activations"].shape)


def test_subunits(run: Run, network: tuple[Rewritten, str], pictures: Path, tmp_path: Path) -> None:
    checkpoint, layer = network
    reference = expected(checkpoint, layer, sorted(pictures.iterdir()), 10)
    options = ("--layer", layer, "--level", "subunits")
    found, said = written(run, checkpoint, tmp_path / "a.npz", *options)
    tokens, _ = written(run, checkpoint, tmp_path / "b.npz", *options, "--per-token")
    for made in (found, tokens):
        assert set(made) == {"activations", "files"} and made["activations"].dtype == np.float16
        assert made["files"].tolist() == list(map(str, sorted(pictures.iterdir())))
    close(tokens["activations"], reference.tokens, 2**-11)
    close(found["activations"], np.stack([peaks(reference.tokens[:, own]) for own in reference.types], 1), 2**-11)
    assert said["shape"] == list(found["activations"].shape) and said["dtype"] == "float16" and not said["warnings"]
    # they add up to the layer's output, each rounded to float16
    rounding = np.abs(reference.tokens).sum(-1) * 2**-11 + 2e-5 * np.abs(reference.output).max()
    sums = tokens["activations"].astype(np.float64).sum(-1)
    assert (np.abs(sums - (reference.output - reference.centre)) <= rounding).all()


def test_only_the_class_token_has_effect(run: Run, class_only: Rewritten, tmp_path: Path) -> None:
    found, _ = written(run, class_only, tmp_path / "a.npz", "--per-token")
    assert found["names"].tolist() == [*(f"{LAST}/C{i}" for i in range(5)), f"{LAST}/Crest"]
    assert found["activations"].shape == (24, 17, 6)
    assert (found["activations"][:, 1:] == 0).all() and (found["activations"][:, 0, :5] != 0).all()
    units, _ = written(run, class_only, tmp_path / "b.npz", "--level", "subunits")
    assert units["activations"].shape == (24, 2, 32, 5)
    assert (units["activations"][:, 0, :, :4] == 0).all()  # without effect, all in `rest`
    assert (units["activations"][:, 0, :, 4] != 0).any() and (units["activations"][:, 1, :, :4] != 0).any()


def test_what_is_printed(run: Run, class_only: Rewritten, mobilenet: Rewritten, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    ran = run(class_only.path, "--images", class_only.folder, "--out", out)  # the only layer
    assert ran.code == 0 and f"{out}: {LAST}, concepts, peaks" in ran.out
    assert "float32 [24, 6]" in ran.out and "names        [6]" in ran.out and "files        [24]" in ran.out
    out = tmp_path / "b.npz"
    options = ("--images", class_only.folder, "--out", out, "--level", "subunits", "--per-token")
    ran = run(mobilenet.path, *options)
    assert ran.code == 0 and f"{out}: {mobilenet.layer}, subunits, on every token" in ran.out
    assert "float16 [24, 4, 112, 5]" in ran.out and "names" not in ran.out
    document = run(mobilenet.path, *options, "--force", "--json").document
    assert document == {
        "file": str(out), "checkpoint_sha256": mobilenet.model.manifest.checkpoint_sha256, "layer": mobilenet.layer,
        "level": "subunits", "per_token": True, "shape": [24, 4, 112, 5], "dtype": "float16",
        "bytes": out.stat().st_size, "skipped": [], "warnings": [],
    }  # fmt: skip


def test_some_of_the_images_by_several_processes(run: Run, vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
    whole, _ = written(run, vit, tmp_path / "a.npz", "--layer", SECOND)
    some, _ = written(run, vit, tmp_path / "b.npz", "--layer", SECOND, "--max-images", 8, "--workers", 2)
    chosen = [list(whole["files"]).index(file) for file in some["files"]]
    assert chosen == list(range(0, 24, 3))
    np.testing.assert_allclose(some["activations"], whole["activations"][chosen], rtol=1e-3, atol=1e-3)


def test_images_that_cannot_be_read_are_skipped_and_named(run: Run, vit: Rewritten, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 5)
    (folder / "001 [b].png").write_bytes(b"not an image")
    good = sorted(set(folder.iterdir()) - {folder / "001 [b].png"})
    options = (vit.path, "--images", folder, "--layer", SECOND, "--batch-size", 2)
    ran = run(*options, "--out", tmp_path / "a.npz")
    assert ran.code == 0 and "skipped" in ran.err and "001 [b].png" in ran.err and "float32 [5, 14]" in ran.out
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        found = dict(file)
    assert found["files"].tolist() == list(map(str, good)) and len(found["activations"]) == 5
    close(found["activations"], reference_peaks(vit, good), 1e-4)
    (skipped,) = run(*options, "--out", tmp_path / "b.npz", "--json").document["skipped"]
    assert skipped["file"] == str(folder / "001 [b].png") and skipped["reason"]
    for number in range(10, 17):
        (folder / f"{number}.png").write_bytes(b"")
    ran = run(*options, "--out", tmp_path / "a.npz", "--force")
    assert ran.code == 0 and "8 images in all" in ran.err
    for file in good:
        file.write_bytes(b"")
    refused(run(*options, "--out", tmp_path / "c.npz"), "None of the 13 images could be read", "000.png")
    assert not list(tmp_path.glob("*c.npz*"))


def reference_peaks(vit: Rewritten, files: list[Path]) -> Array:
    return peaks(np.stack(list(expected(vit, SECOND, files, 2).concepts.values()), -1))


def test_a_warning(run: Run, vit: Rewritten, tmp_path: Path) -> None:
    def scale(tensors: dict[str, Any]) -> None:
        for name in (f"{SECOND}.weight", f"elude.{SECOND}.mean", f"elude.{SECOND}.std"):
            tensors[name] *= 1e6

    large = tamper(vit.path, tmp_path / "large", scale)
    options = ("--images", vit.folder, "--layer", SECOND, "--level", "subunits", "--out", tmp_path / "a.npz")
    ran = run(large, *options)
    assert ran.code == 0 and "note:" in ran.err and "beyond float16" in ran.err
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.isfinite(file["activations"]).all() and np.abs(file["activations"]).max() == 65504


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path: Path) -> Any:
        yield
        assert not [p for p in tmp_path.rglob("*.npz*") if p.name != "there.npz"]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--layer", "blocks.1.mlp.fc3"], ["no split layer", "Did you mean", SECOND]),
            (["--layer", "\U0001f41f"], ["no split layer", FIRST]),
            ([], ["--layer", FIRST, SECOND]),
            (["--layer", SECOND, "--level", "neurons"], ["neurons", "concepts or subunits"]),
            (["--layer", SECOND, "--images", "/nowhere/at/all"], ["is not there"]),
            (["--layer", SECOND, "--device", "warp"], ["warp"]),
            (["--layer", SECOND, "--out", "/nowhere/at/all.npz"], ["There is no folder /nowhere/at"]),
            (["--layer", SECOND, "--out", "activations.csv"], [".npz"]),
        ],
        ids=str,
    )
    def test_bad_options(
        self, run: Run, vit: Rewritten, pictures: Path, tmp_path: Path, options: list[str], said: list[str]
    ) -> None:
        refused(run(vit.path, "--images", pictures, "--out", tmp_path / "a.npz", *options), *said)

    def test_a_file_that_is_there(self, run: Run, vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
        out = tmp_path / "there.npz"
        out.write_bytes(b"precious")
        options = (vit.path, "--images", pictures, "--layer", SECOND, "--out", out)
        refused(run(*options), "already there", "--force")
        assert out.read_bytes() == b"precious"
        assert run(*options, "--force").code == 0 and out.read_bytes() != b"precious"
        out.unlink()
        out.mkdir()
        refused(run(*options, "--force"), "is a folder")
        out.rmdir()
        out.symlink_to(tmp_path / "gone")
        refused(run(*options), "already there")

    def test_before_the_work(self, run: Run, tmp_path: Path) -> None:
        """No checkpoint and no images are there: nothing else was looked at."""
        options = (tmp_path / "ckpt", "--images", tmp_path / "images", "--layer", SECOND)
        refused(run(*options, "--out", tmp_path / "no" / "a.npz"), "There is no folder")
        refused(run(*options, "--out", tmp_path / "a.npz", "--level", "all"), "all")
        refused(run(*options, "--out", tmp_path / "a.npz"), "is not a directory")

    def test_an_empty_folder(self, run: Run, vit: Rewritten, tmp_path: Path) -> None:
        (tmp_path / "none").mkdir()
        refused(run(vit.path, "--images", tmp_path / "none", "--layer", SECOND, "--out", tmp_path / "a.npz"), "none")

    def test_too_small_a_disk(
        self, run: Run, vit: Rewritten, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 50_000}))
        options = (vit.path, "--images", pictures, "--layer", SECOND, "--out", tmp_path / "a.npz")
        refused(
            run(*options, "--level", "subunits", "--per-token"), "24 images", "130.6 kB", "50.0 kB free", "at most 4"
        )

    def test_code_that_is_not_trusted(self, run: Run, vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
        (tmp_path / "build.py").write_text(
            "import timm\ndef build(**args):\n    return timm.create_model('vit_tiny_patch16_224', **args)\n"
        )
        elude.rewrite(
            vit.base, pictures, out=tmp_path / "c", layers=[SECOND], subunits=4, concepts=4, tokens=12, max_images=6,
            data_config=VIT_DATA, factory=f"{tmp_path / 'build.py'}:build", model_args=VIT_ARGS,
        )  # fmt: skip
        options = (tmp_path / "c", "--images", pictures)
        refused(run(*options, "--out", tmp_path / "a.npz"), "--trust-factory")
        assert run(*options, "--out", tmp_path / "there.npz", "--trust-factory").code == 0
