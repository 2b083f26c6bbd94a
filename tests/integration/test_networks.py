"""The real networks and images, rewritten and verified by the command line; two large ones with random weights.

ELUDE_ALL_IMAGES=1 takes all 500 images instead of a few.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from support import picture, write_pictures

import elude_runtime as elude
from elude_runtime.analysis.targets import Target
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import Row
from elude_runtime.cli import main
from elude_runtime.network.preprocessing import DataConfig, decode_image, to_input
from elude_runtime.offline.verify import verify

ALL = os.environ.get("ELUDE_ALL_IMAGES") == "1"
IMAGES = 500 if ALL else 32
LAYERS = {"deit_tiny_3bit": "blocks.10.mlp.fc2", "mobilenetv2_100": "blocks.6.0.conv_pwl"}


def elude_command(arguments: list[object]) -> int:
    before = sys.argv
    sys.argv = ["elude", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def model_options(name: str, shared: Path) -> list[object]:
    """The options that say which model, as a user would give them; the data configuration is not timm's default."""
    config = json.loads((shared / "weights" / "data_configs.json").read_text())[name]
    options: list[object] = ["--weights", shared / "weights" / f"{name}.safetensors"]
    if name == "deit_tiny_3bit":
        options += ["--model-factory", f"{shared / 'weights' / 'reference_models.py'}:{name}"]
    for key in ("input_size", "mean", "std"):
        options += ["--" + key.replace("_", "-"), ",".join(map(str, config[key]))]
    for key in ("interpolation", "crop_pct", "crop_mode"):
        options += ["--" + key.replace("_", "-"), config[key]]
    return options


@pytest.fixture(scope="module", params=list(LAYERS))
def network(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(name, checkpoint), rewritten as a user would."""
    name = request.param
    out = tmp_path_factory.mktemp(name) / "ckpt"
    model = [] if name == "deit_tiny_3bit" else [name]
    labels = ["--labels", shared / "data" / "imagenet-labels.json"]
    code = elude_command(
        [
            "rewrite",
            *model,
            *model_options(name, shared),
            "--images",
            shared / "data" / "imagenet",
            "--out",
            out,
            "--max-images",
            IMAGES,
            "--concepts",
            32,
            "--tokens",
            100,
            *labels,
        ]
    )
    assert code == 0
    return name, out


@pytest.mark.networks
def test_the_certificate_holds(network: tuple[str, Path], shared: Path) -> None:
    name, checkpoint = network
    base = ["--trust-factory"] if name == "deit_tiny_3bit" else ["--base", name]
    code = elude_command(
        [
            "verify",
            checkpoint,
            *base,
            *model_options(name, shared),
            "--images",
            shared / "data" / "imagenet",
            "--max-images",
            IMAGES,
        ]
    )
    document = json.loads((checkpoint / "verification.json").read_text())
    assert code == 0 and document["holds"] is True and document["images"] == IMAGES
    checks = {c["name"]: c for c in document["checks"]}
    assert set(checks) == {
        "tensors",
        "partition",
        "logits",
        "additivity",
        "means",
        "explicit",
        "preprocessing",
        "top1_agreement",
    }
    assert checks["means"]["figures"]["recomputed"] is True
    assert not any(checks["logits"]["figures"]["unequal_rows"].values())


@pytest.mark.networks
def test_the_default_layer_and_all_its_token_types(network: tuple[str, Path]) -> None:
    name, checkpoint = network
    model = elude.load(checkpoint, trust_factory=True)
    assert model.layers == [LAYERS[name]]
    assert [t.live for t in model.manifest.layers[0].token_types] == [True] * (2 if name == "deit_tiny_3bit" else 1)
    assert len(model.manifest.labels) == 1000
    assert model.tails.plans[model.layers[0]].mode == "replay"


@pytest.mark.networks
def test_predictions_of_the_engine_are_the_reference_loaders(network: tuple[str, Path], shared: Path) -> None:
    """The base model is built and preprocessed by the reference code alone, and by timm's transform."""
    name, checkpoint = network
    sys.path.insert(0, str(shared / "weights"))
    try:
        import reference_models  # type: ignore[import-not-found]

        base = reference_models.load(name)
    finally:
        sys.path.remove(str(shared / "weights"))
    config = json.loads((shared / "weights" / "data_configs.json").read_text())[name]
    transform = timm.data.create_transform(**{**config, "input_size": tuple(config["input_size"])}, is_training=False)
    files = sorted((shared / "data" / "imagenet").iterdir())[::70][:6]
    with torch.no_grad():
        expected = base(torch.stack([transform(Image.open(f).convert("RGB")) for f in files]))
    engine = Engine.open(checkpoint, ServingConfig(trust_factory=True), name=name, version="1")
    replies = [
        json.loads(a.body)
        for a in engine.answer([Row({"body": f.read_bytes()}, "image/jpeg", False, "", "r") for f in files])
    ]
    for reply, logits in zip(replies, expected, strict=True):
        top = logits.topk(5)
        assert [p["index"] for p in reply["predictions"]] == top.indices.tolist()
        assert torch.equal(torch.tensor([p["logit"] for p in reply["predictions"]]), top.values)


@pytest.mark.networks
def test_explanations_and_steering(network: tuple[str, Path], shared: Path) -> None:
    _, checkpoint = network
    model = elude.load(checkpoint, trust_factory=True)
    file = sorted((shared / "data" / "imagenet").iterdir())[3]
    x = to_input(decode_image(file.read_bytes()), model.data_config.transform())[None]
    found = model.explain(x, method="integrated_gradients", steps=32, top_features=5)[0][0]
    layer = found.layers[0]
    assert abs(layer.completeness_error or 0) < 0.1 * abs(found.value - layer.baseline) + 0.05
    steered = model.steer(x, [elude.Edit(layer.features[0].feature.name)])
    assert not torch.equal(steered.steered, steered.default)
    assert torch.equal(
        model.steer(x, [elude.Edit(layer.features[0].feature.name, "scale", 1.0)]).steered, model.base(x)
    )


def random_weights(name: str, args: dict[str, Any], size: int, out: Path, count: int = 4) -> None:
    torch.manual_seed(0)
    base = timm.create_model(name, **args).eval()
    data = DataConfig.of_model(base, input_size=(3, size, size))
    folder = write_pictures(out / "pictures", count)
    model = elude.rewrite(
        base,
        folder,
        out=out / "ckpt",
        subunits=4,
        concepts=8,
        tokens=8,
        data_config=data,
        model_args=args,
        batch_size=2,
    )
    result = verify(out / "ckpt", base, data, folder, batch_sizes=(1, 2), few=1)
    assert result.holds, [c for c in result.checks if not c.holds]
    x = torch.stack([data.transform()(picture(50))])
    assert torch.equal(model(x), base(x))
    target = (
        Target(3) if model.manifest.output == "logits" else Target(direction=(1.0, *[0.0] * (base.num_features - 1)))
    )
    (explanation,) = model.explain(x, [target], method="integrated_gradients", top_features=2)[0]
    assert len(explanation.layers[0].features) == 2


@pytest.mark.networks
def test_vit_base_with_random_weights(tmp_path: Path) -> None:
    random_weights("vit_base_patch16_224", {"num_classes": 1000}, 224, tmp_path, 2)


@pytest.mark.networks
def test_dinov2_with_random_weights(tmp_path: Path) -> None:
    """An embedding model with a patch size of 14 and LayerScale."""
    random_weights("vit_small_patch14_dinov2", {"img_size": 98, "num_classes": 0}, 98, tmp_path, 6)
