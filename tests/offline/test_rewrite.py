"""The offline step: what it writes, that it is repeatable, and that nothing is lost when it is cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Rewritten
from safetensors.torch import load_file, save_file
from support import CLASSES, LABELS, SECOND, VIT, VIT_ARGS, VIT_DATA, input_tensor, tamper, tiny_vit, write_pictures
from torch import Tensor, nn

import elude_runtime as elude
from elude_runtime.analysis.completeness import measure_completeness
from elude_runtime.errors import CheckpointError, EludeError, ImagesError, LayerError, ModelError, StorageError
from elude_runtime.offline import input_cache
from elude_runtime.offline.images import ImageSource
from elude_runtime.partition import REST_CONCEPT, REST_EDGE

SMALL: dict[str, Any] = {
    "layers": [SECOND], "subunits": 4, "concepts": 4, "tokens": 10, "data_config": VIT_DATA, "model_args": VIT_ARGS,
}  # fmt: skip
PARTS = ("partition", "subunits", "mean", "std", "concept")


def own_tensors(path: Path) -> dict[str, Tensor]:
    return {n: t for n, t in load_file(path / "model.safetensors").items() if n.startswith("elude.")}


class TestContent:
    def test_every_subunit_and_edge_has_its_place(self, rewritten: Rewritten) -> None:
        for layer in rewritten.model.layers:
            state = rewritten.model.state(layer)
            p = state.partition
            assert p.problems() == []
            for t in state.live_types:
                named = torch.arange(p.subunits + 1) < p.counts[t].long()[:, None]
                varies = p.std[t] > 0
                assert bool((p.concept[t][named & varies] != REST_CONCEPT).all())
                assert bool((p.concept[t][~named] == REST_CONCEPT).all())
                for k in range(p.neurons):
                    assert set(p.edges[t, k].tolist()) - {REST_EDGE} == set(range(int(p.counts[t, k])))

    def test_edges_of_a_subunit_have_one_sign(self, rewritten: Rewritten) -> None:
        for layer in rewritten.model.layers:
            state = rewritten.model.state(layer)
            sign = state.linear.weight().sum(-1).sign()
            for t in state.live_types:
                for k in range(0, state.linear.neurons, 5):
                    for m in range(int(state.partition.counts[t, k])):
                        assert sign[k][state.partition.edges[t, k] == m].unique().numel() == 1

    def test_means_and_deviations_are_those_of_the_calibration_images(self, vit: Rewritten) -> None:
        images = torch.cat(list(ImageSource(vit.folder, vit.data).batches()))  # type: ignore[arg-type]
        for layer in vit.model.layers:
            sums, p = vit.model.subunits(images, layer), vit.model.state(layer).partition
            for t, tokens in enumerate(vit.model.state(layer).layout.slices):
                of_type = sums[:, tokens].flatten(0, 1).double()
                torch.testing.assert_close(p.mean[t].double(), of_type.mean(0), rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(p.std[t].double(), of_type.std(0, correction=0), rtol=1e-3, atol=1e-5)

    def test_the_manifest(self, vit: Rewritten) -> None:
        m = vit.model.manifest
        assert (m.format_version, m.output, m.labels, m.seed) == (1, "logits", LABELS, 0)
        assert m.model.kind == "timm" and m.model.name == VIT and m.model.args == VIT_ARGS
        assert m.calibration.images == 24 and m.calibration.skipped == 0
        assert len(load_file(vit.path / "model.safetensors")["elude.calibration_images"]) == 24
        assert m.data_config == VIT_DATA.as_dict()
        assert {"torch", "timm"} <= set(m.versions) and m.method["subunits"] == 4
        assert [(t.name, t.tokens, t.live) for t in m.layers[1].token_types] == [
            ("patches", 24 * 16, True),
            ("cls", 24, True),
        ]
        for entry in m.layers:
            errors = entry.attribution.completeness
            assert set(errors) == {"gradient", "integrated_gradients"} and min(errors.values()) >= 0
            cheap = errors["gradient"] < 0.1 or errors["gradient"] <= errors["integrated_gradients"]
            assert entry.attribution.auto == ("gradient" if cheap else "integrated_gradients")

    def test_the_feature_table(self, rewritten: Rewritten) -> None:
        rows = pq.read_table(rewritten.path / "features.parquet").to_pylist()
        by_name = {r["feature"]: r for r in rows}
        assert len(by_name) == len(rows)
        for layer in rewritten.model.layers:
            state = rewritten.model.state(layer)
            p = state.partition
            concepts = [r for r in rows if r["layer"] == layer and r["kind"] == "concept"]
            assert [r["feature"] for r in concepts] == rewritten.model.concept_names(layer)
            for t in state.live_types:
                kind = ("patches", "cls")[t]
                subunits = [
                    r for r in rows if r["layer"] == layer and r["kind"] == "subunit" and r["token_type"] == kind
                ]
                assert sum(r["size"] for r in subunits) == p.edges[t].numel()
                for group in (subunits, [r for r in concepts if r["token_type"] == kind]):
                    assert sum(r["share"] for r in group) == pytest.approx(1, abs=1e-3)
                for r in concepts:
                    if r["token_type"] == kind:
                        assert r["size"] == sum(s["concept"] == r["feature"] for s in subunits)
                for r in subunits[::7]:
                    slot = p.subunits if r["subunit"] is None else r["subunit"]
                    assert r["std"] == pytest.approx(float(p.std[t, r["neuron"], slot]), rel=1e-5)
        for r in rows:
            assert rewritten.model.feature(r["feature"]).name == r["feature"]
            assert r["q01"] <= r["q05"] <= r["q25"] <= r["q50"] <= r["q75"] <= r["q95"] <= r["q99"]
            assert (
                0 <= r["density"] <= 1 and r["drift_edges"] == sorted(r["drift_edges"]) and len(r["drift_edges"]) == 9
            )

    def test_only_what_the_format_names_is_there(self, vit: Rewritten) -> None:
        assert sorted(p.name for p in vit.path.iterdir()) == ["elude.json", "features.parquet", "model.safetensors"]
        assert all((p.stat().st_mode & 0o444) == 0o444 for p in vit.path.iterdir())


class TestRepeatable:
    def test_same_seed_same_bytes(self, tmp_path: Path) -> None:
        images = input_tensor(VIT_DATA, 10)
        digests = set()
        for name in "ab":
            model = elude.rewrite(tiny_vit(), images, out=tmp_path / name, seed=3, **SMALL)
            digests.add(model.manifest.checkpoint_sha256)
        first, again = own_tensors(tmp_path / "a"), own_tensors(tmp_path / "b")
        assert all(torch.equal(first[n].view(torch.uint8), again[n].view(torch.uint8)) for n in first)
        assert len(digests) == 1
        assert (tmp_path / "a" / "features.parquet").read_bytes() == (tmp_path / "b" / "features.parquet").read_bytes()

    def test_another_seed_another_partition(self, tmp_path: Path) -> None:
        images = input_tensor(VIT_DATA, 10)
        for seed in (0, 1):
            elude.rewrite(tiny_vit(), images, out=tmp_path / str(seed), seed=seed, **SMALL)
        name = f"elude.{SECOND}.partition"
        assert not torch.equal(own_tensors(tmp_path / "0")[name], own_tensors(tmp_path / "1")[name])

    def test_the_batch_size_changes_last_bits_at_most(self, tmp_path: Path) -> None:
        images = input_tensor(VIT_DATA, 10)
        for size in (3, 10):
            elude.rewrite(tiny_vit(), images, out=tmp_path / str(size), batch_size=size, **SMALL)
        a, b = own_tensors(tmp_path / "3"), own_tensors(tmp_path / "10")
        same = (a[f"elude.{SECOND}.partition"] == b[f"elude.{SECOND}.partition"]).float().mean()
        assert float(same) > 0.97

    def test_the_model_is_left_as_it_was(self, tmp_path: Path) -> None:
        base = tiny_vit()
        before = {n: t.clone() for n, t in base.state_dict().items()}
        elude.rewrite(base, input_tensor(VIT_DATA, 6), out=tmp_path / "c", **SMALL)
        assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
        assert not any(m._forward_hooks or "forward" in m.__dict__ for m in base.modules())


class TestImagesThatChange:
    """Between the passes, for sets that are larger than what pass one keeps of them."""

    @pytest.mark.parametrize("stage", ["chosen tokens", "attribution accuracy"])
    @pytest.mark.parametrize("change", ["gone", "damaged", "swapped", "folder"])
    def test_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, change: str) -> None:
        monkeypatch.setattr(input_cache, "BUDGET", 0 if stage == "chosen tokens" else 2**30)
        folder = write_pictures(tmp_path / "set", 12)
        (folder / "000b.png").write_bytes(b"no picture")  # skipped by both passes
        files = sorted(folder.iterdir())

        def progress(at: str, done: int, total: int | None) -> None:
            if at == ("chosen tokens" if stage == "chosen tokens" else f"concepts of {SECOND}") and folder.is_dir():
                if change == "folder":
                    folder.rename(tmp_path / "unmounted")
                elif change == "gone":
                    files[7].unlink(missing_ok=True)
                else:
                    files[7].write_bytes(b"" if change == "damaged" else files[3].read_bytes())

        with pytest.raises(ImagesError, match="have to stay as they are") as caught:
            elude.rewrite(tiny_vit(), folder, out=tmp_path / "c", batch_size=4, progress=progress, **SMALL)
        assert str(folder / ("000.png" if change == "folder" else files[7].name)) in str(caught.value)
        assert not (tmp_path / "c").exists()

    @pytest.mark.parametrize("change", ["order", "fewer", "more"])
    def test_a_loader_that_gives_others_the_second_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        monkeypatch.setattr(input_cache, "BUDGET", 0)

        batches = list(input_tensor(VIT_DATA, 12).split(4))
        others = {"order": batches[::-1], "fewer": batches[:2], "more": batches * 2}[change]

        class Loader:
            """As DataLoader(shuffle=True)."""

            second = False

            def __iter__(self) -> Iterator[Tensor]:
                return iter(others if self.second else batches)

        loader = Loader()

        def progress(stage: str, done: int, total: int | None) -> None:
            loader.second |= stage == "chosen tokens"

        said = "4 images did not come again" if change == "fewer" else "in their order"
        with pytest.raises(ImagesError, match=said):
            elude.rewrite(tiny_vit(), loader, out=tmp_path / "c", progress=progress, **SMALL)
        assert list(tmp_path.iterdir()) == []


class TestAttributionAccuracy:
    @pytest.mark.parametrize("kind", ["files", "tensor", "list"])
    def test_is_measured_on_images_from_everywhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """In a set sorted by class the first sixteen are of one. Batches cannot be reached by place."""
        folder = write_pictures(tmp_path / "set", 40)
        (folder / "000.png").write_bytes(b"no picture")
        every = torch.cat(list(ImageSource(folder, VIT_DATA).batches()))
        given: dict[str, Any] = {"files": folder, "tensor": every, "list": list(every.split(10))}
        taken: list[Tensor] = []

        def measure(model: Any, images: Tensor, progress: Any) -> Any:
            taken.append(images)
            return measure_completeness(model, images, progress)

        monkeypatch.setattr("elude_runtime.offline.rewrite.measure_completeness", measure)
        elude.rewrite(tiny_vit(), given[kind], out=tmp_path / "c", batch_size=5, **SMALL)
        places = list(range(16)) if kind == "list" else [i * 39 // 16 for i in range(16)]
        assert torch.equal(taken[0], every[places])


class TestRefusals:
    """What cannot be rewritten is refused in one sentence, and nothing is left behind."""

    @pytest.mark.parametrize(
        ("error", "said", "changes"),
        [
            (LayerError, "Did you mean", {"layers": ["blocks.1.mlp.fc3"]}),
            (LayerError, "not offered", {"layers": ["blocks.1.mlp.fc1"]}),
            (EludeError, "images", {"images": torch.zeros(4, 3, 16, 16)}),
            (EludeError, "", {"images": "/nowhere/at/all"}),
            (ModelError, "built again is another network", {"model_args": {"depth": 2}}),
            (ModelError, "cannot hold model_args", {"model_args": {**VIT_ARGS, "act_layer": nn.GELU}}),
            (EludeError, "concepts", {"concepts": 0}),
            (EludeError, "sub-units", {"subunits": 3}),
            (EludeError, "", {"seed": 2**70}),
            (EludeError, "device", {"device": "warp"}),
            (EludeError, "2 labels were given and the model has 7 classes", {"labels": ["a", "b"]}),
        ],
        ids=lambda v: str(v)[:40] if isinstance(v, str | dict) else "",
    )
    def test_in_one_sentence(self, tmp_path: Path, error: type[Exception], said: str, changes: dict[str, Any]) -> None:
        options = {**SMALL, "images": input_tensor(VIT_DATA, 4), **changes}
        with pytest.raises(error, match=said or r"\.$") as caught:
            elude.rewrite(tiny_vit(), out=tmp_path / "ckpt", **options)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_timm_does_not_know(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 3))
        with pytest.raises(ModelError, match="factory"):
            elude.rewrite(model, torch.zeros(3, 3, 2, 2), out=tmp_path / "c", data_config=VIT_DATA)

    def test_a_model_that_mixes_types(self, tmp_path: Path) -> None:
        model = tiny_vit().half()
        model.head.float()
        with pytest.raises(ModelError, match="mixes float16 and float32"):
            elude.rewrite(model, input_tensor(VIT_DATA, 4), out=tmp_path / "c", **SMALL)

    def test_an_existing_checkpoint_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "precious").write_text("x")
        with pytest.raises(StorageError, match="--force"):
            elude.rewrite(tiny_vit(), input_tensor(VIT_DATA, 4), out=tmp_path / "c", **SMALL)
        with pytest.raises(LayerError):
            elude.rewrite(
                tiny_vit(), input_tensor(VIT_DATA, 4), out=tmp_path / "c", force=True, **{**SMALL, "layers": ["x"]}
            )
        assert (tmp_path / "c" / "precious").exists()
        (tmp_path / "c" / "elude.json").write_text("{}")
        elude.rewrite(tiny_vit(), input_tensor(VIT_DATA, 4), out=tmp_path / "c", force=True, **SMALL)
        assert not (tmp_path / "c" / "precious").exists() and (tmp_path / "c" / "elude.json").exists()


RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from support import VIT_DATA, input_tensor, tiny_vit, VIT_ARGS
import elude_runtime as elude
from elude_runtime.errors import EludeError

{prepare}
def progress(stage, done, total):
    print(stage, flush=True)
    {wait}
try:
    elude.rewrite(
        tiny_vit(), input_tensor(VIT_DATA, 12), out={out!r}, layers=["blocks.1.mlp.fc2"], subunits=4, concepts=4,
        tokens=40, data_config=VIT_DATA, model_args=VIT_ARGS, batch_size=4, force=True, progress=progress,
    )
except EludeError as error:
    print("refused:", error, flush=True)
    sys.exit(2)
"""


def script(out: Path, prepare: str = "", wait: str = "pass") -> list[str]:
    code = RUN.format(
        tests=str(Path(__file__).parent.parent), out=str(out), prepare=textwrap.dedent(prepare), wait=wait
    )
    return [sys.executable, "-c", code]


class TestCutShort:
    @pytest.mark.parametrize(
        ("stage", "existing"), [("partition of blocks.1.mlp.fc2", False), ("attribution accuracy", True)]
    )
    def test_a_killed_run_leaves_no_half_checkpoint(self, tmp_path: Path, stage: str, existing: bool) -> None:
        out = tmp_path / "ckpt"
        if existing:
            out.mkdir()
            (out / "precious").write_text("x")
            (out / "elude.json").write_text("{}")
        wait = f"import time; time.sleep(60 if stage == {stage!r} else 0)"
        process = subprocess.Popen(script(out, wait=wait), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        try:
            assert any(line.strip() == stage for line in process.stdout)
            time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        if existing:
            assert {p.name for p in out.iterdir()} == {"precious", "elude.json"}
        assert all(p.name.endswith((".part", ".resume")) for p in tmp_path.iterdir() if p != out)
        assert existing or not out.exists()
        assert subprocess.run(script(out), stdout=subprocess.DEVNULL, check=False).returncode == 0
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]  # the next run clears away what a killed one left

    @pytest.mark.parametrize("kibibytes", [60, 160])
    def test_a_file_size_limit(self, tmp_path: Path, kibibytes: int) -> None:
        """The disk refuses the token file (60 KiB) or the tensors (160 KiB): one sentence, exit 2, nothing left."""
        prepare = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({kibibytes * 1024},) * 2)"
        ran = subprocess.run(script(tmp_path / "ckpt", prepare), capture_output=True, text=True, check=False)
        assert ran.returncode == 2, ran.stdout + ran.stderr
        assert "refused:" in ran.stdout and "Traceback" not in ran.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kibibytes", [48, 150])
    def test_a_full_disk(self, tmp_path: Path, kibibytes: int) -> None:
        """A tiny file system that runs full while the tokens (48 KiB) or the tensors (150 KiB) are written."""
        if os.geteuid() != 0 or not shutil.which("unshare"):
            pytest.skip("a tiny file system needs root and unshare")
        disk = tmp_path / "disk"
        disk.mkdir()
        command = (
            f'mount -t tmpfs -o size={kibibytes}k tmpfs {disk} || exit 77; "$@"; code=$?; ls -A {disk}; exit $code'
        )
        ran = subprocess.run(
            ["unshare", "-m", "sh", "-c", command, "sh", *script(disk / "ckpt")],
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode == 77 or "unshare" in ran.stderr:
            pytest.skip(f"no tiny file system here: {ran.stderr.strip()}")
        assert ran.returncode == 2, (ran.returncode, ran.stdout, ran.stderr[-500:])
        assert "disk is full" in ran.stdout and ran.stdout.strip().splitlines()[-1].startswith("refused:")


FACTORY = """
import json
from pathlib import Path

import timm

def build(**changes):
    args = json.loads((Path(__file__).parent / "args.json").read_text())
    return timm.create_model("vit_tiny_patch16_224", **{**args, **changes})
"""


@pytest.fixture(scope="module")
def factory_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("factory")
    (folder / "build.py").write_text(FACTORY)
    (folder / "args.json").write_text(json.dumps({**VIT_ARGS, "depth": 2}))
    base = tiny_vit(depth=2)
    options = {k: v for k, v in SMALL.items() if k not in ("model_args", "layers")}
    elude.rewrite(
        base, input_tensor(VIT_DATA, 8), out=folder / "ckpt", factory=f"{folder / 'build.py'}:build", **options
    )
    (folder / "args.json").unlink()  # from here on the carried copies have to do
    (folder / "build.py").unlink()
    return folder / "ckpt", base


class TestFactories:
    def test_untrusted_code_is_not_run(self, factory_checkpoint: tuple[Path, nn.Module]) -> None:
        with pytest.raises(CheckpointError, match="carries code.*trust_factory"):
            elude.load(factory_checkpoint[0])

    def test_trusted_code_builds_the_model_with_its_data(self, factory_checkpoint: tuple[Path, nn.Module]) -> None:
        path, base = factory_checkpoint
        assert sorted(p.name for p in (path / "factory").iterdir() if p.is_file()) == ["args.json", "build.py"]
        images = input_tensor(VIT_DATA, 2)
        assert torch.equal(elude.load(path, trust_factory=True)(images), base(images))

    @pytest.mark.parametrize("file", ["build.py", "args.json"])
    @pytest.mark.parametrize("gone", [False, True])
    def test_a_changed_or_missing_file_is_refused(
        self, factory_checkpoint: tuple[Path, nn.Module], tmp_path: Path, file: str, gone: bool
    ) -> None:
        shutil.copytree(factory_checkpoint[0], tmp_path / "c")
        target = tmp_path / "c" / "factory" / file
        target.unlink() if gone else target.write_text(target.read_text() + "\n")
        with pytest.raises(CheckpointError, match=rf"{file} is missing or was changed"):
            elude.load(tmp_path / "c", trust_factory=True)

    @pytest.mark.parametrize("name", ["../outside.py", "/etc/hostname", "a/../../outside.py"])
    def test_files_outside_are_refused(
        self, factory_checkpoint: tuple[Path, nn.Module], tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "outside.py").write_text("raise SystemExit('ran')")
        path = tamper(
            factory_checkpoint[0],
            tmp_path / "c",
            manifest=lambda m: m["model"].update(files={name: "0" * 64}, file=name),
        )
        with pytest.raises(CheckpointError, match="outside itself"):
            elude.load(path, trust_factory=True)

    def test_a_manifest_that_does_not_say_which_file(
        self, factory_checkpoint: tuple[Path, nn.Module], tmp_path: Path
    ) -> None:
        path = tamper(factory_checkpoint[0], tmp_path / "c", manifest=lambda m: m["model"].update(file="other.py"))
        with pytest.raises(CheckpointError, match="does not say which"):
            elude.load(path, trust_factory=True)

    def test_a_factory_that_builds_another_network(self, tmp_path: Path) -> None:
        (tmp_path / "build.py").write_text(FACTORY)
        (tmp_path / "args.json").write_text('{"num_classes": 3}')
        with pytest.raises(ModelError, match="another network"):
            elude.rewrite(
                tiny_vit(),
                input_tensor(VIT_DATA, 4),
                out=tmp_path / "c",
                factory=f"{tmp_path / 'build.py'}:build",
                data_config=VIT_DATA,
            )


def test_half_precision_weights_stay_half_precision(tmp_path: Path) -> None:
    base = tiny_vit(depth=2).to(torch.bfloat16)
    model = elude.rewrite(
        base,
        input_tensor(VIT_DATA, 6),
        out=tmp_path / "c",
        **{**SMALL, "layers": None, "model_args": {**VIT_ARGS, "depth": 2}},
    )
    images = input_tensor(VIT_DATA, 2).to(torch.bfloat16)
    assert torch.equal(model(images), base(images)) and model(images).dtype == torch.bfloat16
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert stored["head.weight"].dtype == torch.bfloat16
    found = model.steer(images, [elude.Edit(f"{model.layers[0]}/P0", "scale", 1.0)])
    assert torch.equal(found.steered, base(images))
    model.explain(images, [0], method="integrated_gradients")


def test_iterables_of_batches_and_folders_agree(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 8)
    whole = elude.rewrite(tiny_vit(), folder, out=tmp_path / "a", batch_size=4, **SMALL)
    batches = list(ImageSource(folder, VIT_DATA, batch_size=4).batches())
    again = elude.rewrite(tiny_vit(), batches, out=tmp_path / "b", batch_size=4, **SMALL)
    for part in PARTS[:2]:
        name = f"elude.{SECOND}.{part}"
        assert torch.equal(own_tensors(tmp_path / "a")[name], own_tensors(tmp_path / "b")[name])
    assert whole.manifest.partition_sha256 == again.manifest.partition_sha256


def test_the_arguments_that_timm_remembers_need_not_be_given(tmp_path: Path) -> None:
    options = {k: v for k, v in SMALL.items() if k != "model_args"}
    model = elude.rewrite(tiny_vit(), input_tensor(VIT_DATA, 4), out=tmp_path / "c", **options)
    assert model.manifest.model.args == VIT_ARGS


def test_unreadable_images_are_counted_in_the_manifest(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 6)
    (folder / "bad.png").write_bytes(b"x")
    model = elude.rewrite(tiny_vit(), folder, out=tmp_path / "c", **SMALL)
    assert (model.manifest.calibration.images, model.manifest.calibration.skipped) == (6, 1)


def test_one_image_is_enough(tmp_path: Path) -> None:
    model = elude.rewrite(tiny_vit(), input_tensor(VIT_DATA, 1), out=tmp_path / "c", **SMALL)
    images = input_tensor(VIT_DATA, 2)
    assert bool(torch.isfinite(model.concepts(images, SECOND)).all())
    assert all(len(e) == 1 for e in model.explain(images))


def test_weights_with_dead_neurons_and_constant_images(tmp_path: Path) -> None:
    base = tiny_vit()
    with torch.no_grad():
        base.blocks[1].mlp.fc2.weight[3:6] = 0
    model = elude.rewrite(base, torch.zeros(4, 3, 32, 32), out=tmp_path / "c", **SMALL)
    assert model.state(SECOND).partition.counts[:, 3:6].sum() == 0
    found = model.explain(input_tensor(VIT_DATA, 1), [0])[0][0].layers[0]
    assert all(torch.isfinite(torch.tensor(f.attribution)) for f in found.features)


def test_a_checkpoint_of_weights_in_a_file(tmp_path: Path) -> None:
    """Tensors in the checkpoint are those of the weights file, under their own names, byte for byte."""
    base = tiny_vit()
    save_file(base.state_dict(), tmp_path / "w.safetensors")
    elude.rewrite(base, input_tensor(VIT_DATA, 4), out=tmp_path / "c", **SMALL)
    stored = load_file(tmp_path / "c" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "w.safetensors").items():
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
    assert base.num_classes == CLASSES
