"""Models from wherever users have them, through the whole offline step and back: the hub's cache, half precision,
other sizes and crops, embeddings, and factories of models that timm does not know."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support import (
    CONV_DATA,
    VIT,
    VIT_ARGS,
    VIT_DATA,
    encoded,
    input_tensor,
    manifest_of,
    picture,
    tiny_mobilenet,
    tiny_vit,
)
from timm.data import create_transform
from timm.models import save_for_hf
from torch import Tensor, nn

import elude_runtime as elude
from elude_runtime.analysis.targets import Target, TargetError
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import Row
from elude_runtime.cli import main
from elude_runtime.network.preprocessing import DataConfig

QUICK = ["--subunits", 4, "--concepts", 4, "--tokens", 10, "--batch-size", 4, "--max-images", 8]
SHRUNK = {k: v for k, v in VIT_ARGS.items() if k not in ("num_classes", "img_size")}


def model_args(args: dict[str, Any]) -> list[str]:
    return [part for k, v in args.items() for part in ("--model-arg", f"{k}={json.dumps(v)}")]


def command(*arguments: object) -> int:
    """`elude ARGUMENTS` in this process: its exit code."""
    before = sys.argv
    sys.argv = ["elude", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def rewritten(out: Path, pictures: Path, base: list[object], *options: object) -> elude.EludeModel:
    """`elude rewrite` and then `elude verify` with the same options, which must hold; the checkpoint, loaded.

    base: what names the model (MODEL, or --model-factory and its file).
    """
    trust = ["--trust-factory"] if base[0] == "--model-factory" else []
    named = base if trust else ["--base", *base]
    assert command("rewrite", *base, *options, "--images", pictures, "--out", out, *QUICK) == 0
    assert command("verify", out, *named, *options, "--images", pictures, "--max-images", 8, *trust) == 0
    document = json.loads((out / "verification.json").read_text())
    assert document["holds"] is True and document["images"] == 8
    assert {c["name"] for c in document["checks"] if c["holds"]} >= {"tensors", "logits", "additivity", "preprocessing"}
    return elude.load(out, trust_factory=bool(trust))


def saved(model: nn.Module, file: Path) -> Path:
    save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()}, file)
    return file


def check_features(model: elude.EludeModel, x: Tensor, targets: list[Target] | None = None) -> None:
    """Explanations by every method and a steered answer, all finite, and steering that changes something."""
    for method in ("gradient", "integrated_gradients", "ablation"):
        for (found,) in model.explain(x, targets, method=method, top_features=3):
            values = [f.attribution for layer in found.layers for f in layer.features]
            assert values and torch.isfinite(torch.tensor([found.value, *values])).all()
    for (found,) in model.explain(x, targets, method="integrated_gradients", steps=16, top_features=1):
        (layer,) = found.layers
        # attributions of both signs cancel, so that what is rounded is more than their sum
        largest = max(abs(found.value), *(abs(f.attribution) for f in layer.features))
        bound = 0.1 * abs(found.value - layer.baseline) + 0.1 + 8 * torch.finfo(x.dtype).eps * largest
        assert abs(layer.completeness_error or 0) < bound
        edits = [elude.Edit(layer.features[0].feature.name)]
    out = model.steer(x, edits)
    with torch.no_grad():
        assert torch.equal(out.default, model.base(x)) and out.steered.dtype == out.default.dtype
    assert torch.isfinite(out.steered).all() and (out.change != 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# The hub: its own client on a cache in its own layout. The environment is read at import, so in a process of its own.

COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from elude_runtime.cli import main
answers = {}
for name, arguments in json.load(sys.stdin).items():
    sys.argv, code, out, err = ["elude", *arguments], 0, io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    answers[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(answers))
"""

LOAD = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("a checkpoint must not need a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
import elude_runtime as elude
torch.set_num_threads(1)
expected = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(elude.load(sys.argv[1])(expected["images"]), expected["logits"])
print("equal")
"""


def put_in_cache(home: Path, repository: str, folder: Path) -> None:
    """The files of `folder` as huggingface_hub keeps a repository: blobs by hash, a snapshot of links, a ref."""
    root, revision = home / "hub" / f"models--{repository.replace('/', '--')}", "0123456789" * 4
    snapshot = root / "snapshots" / revision
    for part in (root / "refs", root / "blobs", snapshot):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    for file in folder.iterdir():
        data = file.read_bytes()
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))


def published() -> nn.Module:
    """A small architecture of timm's registry whose weights would be on the hub as test_vit.r160_in1k."""
    torch.manual_seed(1)
    model = timm.create_model("test_vit").eval()
    nn.init.normal_(model.head.weight, 0, 0.5)
    return model


def birds() -> nn.Module:
    """Somebody's fine-tuned model: its own classes, size and preprocessing."""
    return tiny_vit(num_classes=3, img_size=(48, 32), global_pool="avg")


BIRDS_DATA = DataConfig((3, 48, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.8, "border")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> tuple[Path, dict[str, tuple[int, str, str]]]:
    """(folder of checkpoints, {name: exit code, output, errors}) of all commands, run once without a network."""
    root = tmp_path_factory.mktemp("hub")
    home = root / "home"
    save_for_hf(published(), str(root / "source" / "vit"), safe_serialization=True)
    put_in_cache(home, "timm/test_vit.r160_in1k", root / "source" / "vit")
    data = {k: v for k, v in BIRDS_DATA.as_dict().items() if k != "input_size"}
    names = {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "auk", "n2": "emu", "n3": "owl"}}
    save_for_hf(birds(), str(root / "source" / "birds"), {**names, "pretrained_cfg": data}, safe_serialization=True)
    put_in_cache(home, "somebody/birds", root / "source" / "birds")
    torch.save({"weight": torch.eye(5, 32)}, root / "probe.pt")
    (root / "labels.txt").write_text("x\ny\nz\n")
    (root / "two.txt").write_text("x\ny\n")

    def rewrite(model: str, out: str, *options: object) -> list[str]:
        return [
            str(a)
            for a in ("rewrite", model, "--pretrained", "--images", pictures, "--out", root / out, *QUICK, *options)
        ]

    def check(out: str, model: str, *options: object) -> list[str]:
        common = ("--pretrained", "--images", pictures, "--max-images", 8, "--json")
        return [str(a) for a in ("verify", root / out, "--base", model, *common, *options)]

    commands = {
        "registry": rewrite("test_vit", "registry"),
        "registry checked": check("registry", "timm/test_vit.r160_in1k"),
        "tag": rewrite("timm/test_vit.r160_in1k", "tag"),
        "birds": rewrite("hf-hub:somebody/birds", "birds"),
        "birds checked": check("birds", "hf-hub:somebody/birds"),
        "labels": rewrite("hf-hub:somebody/birds", "labels", "--labels", root / "labels.txt"),
        "two labels": rewrite("hf-hub:somebody/birds", "none", "--labels", root / "two.txt"),
        "probe": rewrite("hf-hub:somebody/birds", "probe", "--head", root / "probe.pt"),
        "larger": rewrite("hf-hub:somebody/birds", "larger", "--input-size", "3,96,64"),
        "ten classes": rewrite("hf-hub:somebody/birds", "none", "--model-arg", "num_classes=10"),
        "not cached": rewrite("vit_tiny_patch16_224", "none"),
        "no repository": rewrite("hf-hub:nobody/nothing", "none"),
        "no tag": rewrite("timm/test_vit.r161_in1k", "none"),
        "no prefix": rewrite("somebody/birds", "none"),
    }
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    ran = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=json.dumps(commands), capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return root, {k: tuple(v) for k, v in json.loads(ran.stdout).items()}  # type: ignore[misc]


class TestHub:
    @pytest.mark.parametrize("name", ["registry", "tag"])
    def test_timms_published_weights(self, hub: tuple[Path, Any], name: str) -> None:
        root, ran = hub
        assert ran[name][0] == 0, ran[name][2]
        model = elude.load(root / name)
        assert all(torch.equal(t, model.base.state_dict()[n]) for n, t in published().state_dict().items())
        assert model.manifest.model.name == {"registry": "test_vit", "tag": "test_vit.r160_in1k"}[name]
        assert model.manifest.labels[281] == "tabby" and len(model.manifest.labels) == 1000  # the tag says ImageNet-1k
        assert model.data_config.input_size == (3, 160, 160) and model.data_config.crop_pct == 0.95

    @pytest.mark.parametrize("name", ["registry checked", "birds checked"])
    def test_the_certificate_holds(self, hub: tuple[Path, Any], name: str) -> None:
        code, out, err = hub[1][name]
        assert code == 0 and json.loads(out)["holds"] is True, err

    def test_a_fine_tuned_models_own_configuration_comes_through(self, hub: tuple[Path, Any]) -> None:
        root, ran = hub
        assert ran["birds"][0] == 0, ran["birds"][2]
        model = elude.load(root / "birds")
        assert model.manifest.labels == ["auk", "emu", "owl"] and model.data_config == BIRDS_DATA
        transform = create_transform(
            (48, 32),
            mean=(0.1, 0.2, 0.3),
            std=(0.4, 0.5, 0.6),
            interpolation="bilinear",
            crop_pct=0.8,
            crop_mode="border",
        )
        x = torch.stack([transform(picture(70 + i)) for i in range(3)])
        with torch.no_grad():
            assert torch.equal(model(x), birds()(x))

    @pytest.mark.parametrize(("name", "made", "size"), [("tag", published, (160, 160)), ("birds", birds, (48, 32))])
    def test_the_checkpoint_needs_neither_hub_nor_cache(
        self, hub: tuple[Path, Any], tmp_path: Path, name: str, made: Any, size: tuple[int, int]
    ) -> None:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.save({"images": images, "logits": made()(images)}, tmp_path / "expected.pt")
        environment = {**os.environ, "HF_HOME": str(tmp_path / "empty"), "OMP_NUM_THREADS": "1"}
        loaded = [sys.executable, "-c", LOAD, str(hub[0] / name), str(tmp_path / "expected.pt")]
        ran = subprocess.run(loaded, capture_output=True, text=True, env=environment, check=False)
        assert ran.stdout == "equal\n", ran.stderr

    def test_labels_from_a_file_come_first(self, hub: tuple[Path, Any]) -> None:
        assert hub[1]["labels"][0] == 0 and manifest_of(hub[0] / "labels").labels == ["x", "y", "z"]

    def test_a_probe_brings_its_own_classes(self, hub: tuple[Path, Any]) -> None:
        root, ran = hub
        assert ran["probe"][0] == 0, ran["probe"][2]
        manifest = manifest_of(root / "probe")
        assert manifest.labels == [] and manifest.model.args["num_classes"] == 5 and manifest.output == "logits"

    def test_resampling_is_told(self, hub: tuple[Path, Any]) -> None:
        root, ran = hub
        code, _, err = ran["larger"]
        assert code == 0 and "resampled the position embeddings" in err.replace("\n", " ")
        assert "resampled" not in ran["birds"][2]
        assert elude.load(root / "larger")(torch.randn(1, 3, 96, 64)).shape == (1, 3)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("two labels", "names 2 classes, the model has 3"),
            ("ten classes", "comes with 3 classes, so a head for num_classes=10 would be random"),
            ("not cached", "vit_tiny_patch16_224 is not in the local hub cache"),
            ("no repository", "nobody/nothing is not in the local hub cache"),
            ("no tag", "timm has no weights 'r161_in1k' of test_vit"),
            ("no prefix", "named hf-hub:somebody/birds"),
        ],
    )
    def test_one_sentence(self, hub: tuple[Path, Any], name: str, said: str) -> None:
        code, out, err = hub[1][name]
        assert code == 2 and out == "" and not (hub[0] / "none").exists()
        assert "Traceback" not in err and err.startswith("elude: ") and len(err.strip().splitlines()) == 1
        assert said in err


# ---------------------------------------------------------------------------------------------------------------------
# Floating-point types


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("kind", ["vit", "conv"])
    def test_from_the_file_to_the_answer(self, tmp_path: Path, pictures: Path, dtype: torch.dtype, kind: str) -> None:
        base = (tiny_vit() if kind == "vit" else tiny_mobilenet()).to(dtype)
        file = saved(base, tmp_path / "weights.safetensors")
        name = [VIT] if kind == "vit" else ["mobilenetv2_035"]
        args = model_args(SHRUNK) if kind == "vit" else []
        data = VIT_DATA if kind == "vit" else CONV_DATA
        model = rewritten(tmp_path / "c", pictures, name, *args, "--weights", file, "--input-size", data.input_size[1])
        assert {t.dtype for t in model.base.state_dict().values() if t.is_floating_point()} == {dtype}
        x = input_tensor(data, 2).to(dtype)
        with torch.no_grad():
            assert model(x).dtype == dtype and torch.equal(model(x), base(x))
        check_features(model, x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_norms_in_float32(self, tmp_path: Path, pictures: Path, dtype: torch.dtype) -> None:
        """As mixed-precision training saves them: every tensor keeps its type, because torch runs them together."""
        base = tiny_vit().to(dtype)
        for module in base.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
        file = saved(base, tmp_path / "weights.safetensors")
        source = [*model_args(SHRUNK), "--weights", file, "--input-size", 32]
        model = rewritten(tmp_path / "c", pictures, [VIT], *source)
        assert {n: t.dtype for n, t in model.base.state_dict().items()} == {
            n: t.dtype for n, t in base.state_dict().items()
        }
        x = input_tensor(VIT_DATA, 2).to(dtype)
        with torch.no_grad():
            assert torch.equal(model(x), base(x))
        check_features(model, x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_the_engine_serves_it(self, tmp_path: Path, pictures: Path, dtype: torch.dtype) -> None:
        base = tiny_vit().to(dtype)
        elude.rewrite(base, pictures, out=tmp_path / "c", subunits=2, concepts=3, tokens=10, data_config=VIT_DATA,
                      model_args=VIT_ARGS)  # fmt: skip
        engine = Engine.open(tmp_path / "c", ServingConfig(), name="half", version="1")
        data = encoded(picture(7))
        (answer,) = engine.answer([Row({"body": data}, "image/png", False, "", "r")])
        found = json.loads(answer.body)
        with torch.no_grad():
            expected = base(VIT_DATA.transform()(picture(7))[None].to(dtype))[0].float().topk(5)
        assert [p["index"] for p in found["predictions"]] == expected.indices.tolist()
        assert torch.equal(torch.tensor([p["logit"] for p in found["predictions"]]), expected.values)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and crops


def framed(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Grey inside of the box, bright red outside of it."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((100, 100, 100), box)
    return image


class TestSizes:
    @pytest.mark.parametrize("mode", ["center", "squash", "border"])
    @pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 64)])
    def test_crop_modes_through_the_whole_chain(
        self, tmp_path: Path, pictures: Path, mode: str, size: tuple[int, int]
    ) -> None:
        base = tiny_vit(img_size=size)
        file = saved(base, tmp_path / "weights.safetensors")
        source = [
            *model_args(SHRUNK), "--weights", file, "--input-size", f"3,{size[0]},{size[1]}", "--crop-mode", mode,
            "--crop-pct", 0.8, "--interpolation", "nearest",
        ]  # fmt: skip
        model = rewritten(tmp_path / "c", pictures, [VIT], *source)
        assert model.data_config.input_size == (3, *size) and model.data_config.crop_mode == mode
        assert model.manifest.layers[0].grid == [size[0] // 8, size[1] // 8]
        engine = Engine(model, ServingConfig(), name="m", version="1")
        transform = create_transform(
            size, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.8, crop_mode=mode, interpolation="nearest"
        )
        for width, height in ((90, 60), (60, 100)):
            (answer,) = engine.answer([Row({"body": encoded(picture(3, width, height))}, "image/png", False, "", "r")])
            found = json.loads(answer.body)
            with torch.no_grad():
                expected = base(transform(picture(3, width, height))[None])[0].topk(5)
            assert torch.equal(torch.tensor([p["logit"] for p in found["predictions"]]), expected.values)
            x0, y0, x1, y1 = found["input"]["crop"]
            red = transform(framed((width, height), (x0 - 1, y0 - 1, x1 + 1, y1 + 1)))[0].max()
            assert red < 0.5  # nothing outside of it is seen
            for inner in ((x0 + 4, y0, x1, y1), (x0, y0 + 4, x1, y1), (x0, y0, x1 - 4, y1), (x0, y0, x1, y1 - 4)):
                assert transform(framed((width, height), inner))[0].max() == 1  # and all of it is

    @pytest.mark.parametrize("classes", [0, 4])
    def test_dinov2_at_518_pixels(self, tmp_path: Path, pictures: Path, classes: int) -> None:
        """timm's own size for it; a narrow one. Without a head its output is an embedding."""
        args = {"embed_dim": 16, "depth": 2, "num_heads": 1}
        torch.manual_seed(0)
        base = timm.create_model("vit_small_patch14_dinov2", **args, num_classes=classes, init_values=0.5).eval()
        file = saved(base, tmp_path / "weights.safetensors")
        source = [*model_args({**args, "init_values": 0.5}), "--weights", file, "--input-size", 518]
        model = rewritten(tmp_path / "c", pictures, ["vit_small_patch14_dinov2"], *source)
        assert model.manifest.output == ("logits" if classes else "embedding")
        assert model.manifest.layers[0].grid == [37, 37] and model.data_config.input_size == (3, 518, 518)
        assert "img_size" not in model.manifest.model.args
        x = torch.randn(1, 3, 518, 518)
        with torch.no_grad():
            assert torch.equal(model(x), base(x))

    def test_dinov2_at_another_size(self, tmp_path: Path, pictures: Path) -> None:
        args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5}
        torch.manual_seed(0)
        base = timm.create_model("vit_small_patch14_dinov2", **args, img_size=(56, 70)).eval()
        file = saved(base, tmp_path / "weights.safetensors")
        source = [*model_args(args), "--weights", file, "--input-size", "3,56,70"]
        model = rewritten(tmp_path / "c", pictures, ["vit_small_patch14_dinov2"], *source)
        assert model.manifest.model.args["img_size"] == [56, 70] and model.manifest.layers[0].grid == [4, 5]
        x = torch.randn(2, 3, 56, 70)
        with torch.no_grad():
            assert torch.equal(model(x), base(x))
        direction = Target(direction=tuple(torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist()))
        check_features(model, x, [direction])

    def test_a_model_of_dynamic_size(self, tmp_path: Path, pictures: Path) -> None:
        base = tiny_vit(dynamic_img_size=True)
        file = saved(base, tmp_path / "weights.safetensors")
        args = {**SHRUNK, "img_size": 32, "dynamic_img_size": True}
        model = rewritten(
            tmp_path / "c", pictures, [VIT], *model_args(args), "--weights", file, "--input-size", "3,48,64"
        )
        x = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            assert torch.equal(model(x), base(x))
        assert model.manifest.layers[0].total == 49 and model.manifest.layers[0].grid == [6, 8]
        check_features(model, x)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


class TestEmbedding:
    def test_the_manifest_and_targets(self, tmp_path: Path, pictures: Path) -> None:
        base = tiny_vit(num_classes=0)
        file = saved(base, tmp_path / "body.safetensors")
        source = [*model_args(SHRUNK), "--weights", file, "--input-size", 32]
        model = rewritten(tmp_path / "c", pictures, [VIT], *source)
        assert model.manifest.output == "embedding" and model.manifest.model.args["num_classes"] == 0
        x = input_tensor(VIT_DATA, 2)
        direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
        target = Target(direction=tuple(direction.tolist()))
        check_features(model, x, [target])
        with torch.no_grad():
            expected = base(x) @ direction
        found = [e.value for (e,) in model.explain(x, [target], top_features=1)]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "targets",
        [None, [3], [Target(3)], [Target(3, versus=1)], [Target(direction=(1.0,) * 32), Target(3)]],
        ids=["top class", "index", "class", "two classes", "mixed"],
    )
    def test_there_are_no_classes(self, headless: Any, targets: Any) -> None:
        with pytest.raises(TargetError, match=r"no classes, .* targets=\[Target\(direction=…\)\] of 32 numbers"):
            headless.model.explain(headless.images, targets)

    def test_a_direction_of_another_length(self, headless: Any) -> None:
        with pytest.raises(TargetError, match="needs 32 numbers, this one has 3"):
            headless.model.explain(headless.images, [Target(direction=(1.0, 0.0, 0.0))])


# ---------------------------------------------------------------------------------------------------------------------
# Factories of models that timm does not know

TORCHVISION = """
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer


def resnet(num_classes=5, width=None):
    torch.manual_seed(0)
    model = resnet18(num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.3)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def vit(image_size=64, num_classes=5):
    '''vit_b_16 in small, with what timm's models say about themselves.'''
    torch.manual_seed(0)
    model = VisionTransformer(image_size, 16, 3, 2, 32, 64, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 1.2 / module.in_features**0.5)
    model.num_prefix_tokens = 1
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear"}
    return model


def several():
    class Several(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x.mean((2, 3)))}

    return Several(3, 5)
"""


class TestFactories:
    @pytest.fixture
    def factory(self, tmp_path: Path) -> Path:
        (tmp_path / "code").mkdir()
        (tmp_path / "code" / "build.py").write_text(TORCHVISION)
        return tmp_path / "code" / "build.py"

    def test_torchvisions_resnet(
        self, tmp_path: Path, pictures: Path, factory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It says nothing of its preprocessing: what is assumed is told, and what is given counts."""
        (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
        options = ["--model-arg", "num_classes=4", "--input-size", 64, "--interpolation", "bilinear"]
        out = tmp_path / "c"
        base = ["--model-factory", f"{factory}:resnet"]
        assert command("rewrite", *base, *options, "--images", pictures, "--out", out, *QUICK, "--labels",
                       tmp_path / "labels.txt") == 0  # fmt: skip
        told = capsys.readouterr().err
        assert "assumed: mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225), crop_pct 0.875" in told
        assert "input_size" not in told and "interpolation" not in told
        assert command("verify", out, *base, *options, "--images", pictures, "--trust-factory") == 0
        model = elude.load(out, trust_factory=True)
        assert model.manifest.model.args == {"num_classes": 4} and model.manifest.labels == ["a", "b", "c", "d"]
        assert model.manifest.output == "logits" and model.layers == ["layer4.1.conv2"]
        x = input_tensor(model.data_config, 2)
        with torch.no_grad():
            assert model(x).shape == (2, 4) and torch.equal(model(x), model.base(x))
        check_features(model, x)

    def test_torchvisions_transformer(self, tmp_path: Path, pictures: Path, factory: Path) -> None:
        base: list[object] = ["--model-factory", f"{factory}:vit"]
        model = rewritten(tmp_path / "c", pictures, base, "--model-arg", "image_size=48")
        assert model.data_config.input_size == (3, 48, 48) and model.data_config.std == (0.25,) * 3
        (layer,) = model.manifest.layers
        assert layer.prefix == 1 and layer.grid == [3, 3] and layer.name == "encoder.layers.encoder_layer_1.mlp.3"
        check_features(model, input_tensor(model.data_config, 2))

    def test_a_model_that_returns_a_dictionary(
        self, tmp_path: Path, pictures: Path, factory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = ["--model-factory", f"{factory}:several"]
        assert command("rewrite", *base, "--images", pictures, "--out", tmp_path / "c") == 2
        assert "returns a dict" in capsys.readouterr().err and not (tmp_path / "c").exists()
