"""Building base models: timm names, weights that fit or do not, factories and the files that travel with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import VIT, VIT_ARGS, tiny_vit
from torch import nn

from elude_runtime.errors import ModelError
from elude_runtime.network.build import Factory, build_timm, carry_files, json_args, load_weights
from elude_runtime.network.conditions import output_size

FACTORY = """
import json
from pathlib import Path
from torch import nn
import {sibling}

def build(width=4):
    data = json.loads((Path(__file__).parent / "data" / "sizes.json").read_text())
    return {sibling}.make(data["inputs"], width)

def wrong():
    return "a model"

def broken():
    raise KeyError("planted")
"""


@pytest.fixture
def factory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A factory that imports a module beside it and opens a data file."""
    sibling = f"sibling_{abs(hash(request.node.name)) % 10**8}"
    folder = tmp_path / "code"
    (folder / "data").mkdir(parents=True)
    (folder / "build.py").write_text(FACTORY.format(sibling=sibling))
    (folder / f"{sibling}.py").write_text("from torch import nn\n\ndef make(a, b):\n    return nn.Linear(a, b)\n")
    (folder / "data" / "sizes.json").write_text('{"inputs": 3}')
    (folder / "unused.bin").write_bytes(b"x")
    return folder / "build.py"


def test_a_timm_model_is_built_for_evaluation() -> None:
    model = build_timm(VIT, VIT_ARGS)
    assert not model.training and model.num_classes == 7


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("vit_tiny_patch16_225", {}, "Did you mean .*vit_tiny_patch16_224"),
        ("zzzzzz", {}, "timm has no model 'zzzzzz'.*list_models"),
        (VIT, {"colour": "red"}, "could not be built"),
        (VIT, {"depth": "three"}, "could not be built"),
        (VIT, {"pretrained_cfg": {}}, "pretrained_cfg cannot be an argument.*--weights"),
        (f"{VIT}.augreg_in22k", {}, "no weights 'augreg_in22k' of .*Did you mean .*augreg_in21k"),
        ("org/name", {}, "named hf-hub:org/name"),
    ],
)
def test_what_timm_cannot_build(name: str, args: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        build_timm(name, args)
    assert "\n" not in str(caught.value)


def test_a_factorys_files_are_found_by_watching_what_it_opens(factory: Path) -> None:
    model, files = Factory.parse(f"{factory}:build").build({"width": 6})
    assert isinstance(model, nn.Linear) and (model.in_features, model.out_features) == (3, 6) and not model.training
    assert files[0] == factory
    assert {f.name for f in files} == {"build.py", "sizes.json", next(factory.parent.glob("sibling_*.py")).name}


def test_a_second_build_finds_the_same_files(factory: Path) -> None:
    """A module that was imported before is not opened again, but travels all the same."""
    one = Factory.parse(f"{factory}:build")
    assert one.build()[1] == one.build()[1]


def test_carried_files_build_the_same_elsewhere(factory: Path, tmp_path: Path) -> None:
    _, files = Factory.parse(f"{factory}:build").build()
    names = carry_files(files, factory.parent, tmp_path / "carried")
    assert sorted(names) == sorted(f.relative_to(factory.parent).as_posix() for f in files)
    code = (
        "from elude_runtime.network.build import Factory; "
        f"print(Factory.parse({str(tmp_path / 'carried' / 'build.py')!r} + ':build').build()[0])"
    )
    factory.rename(factory.with_suffix(".gone"))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in_features=3" in ran.stdout, ran.stderr


def test_two_factories_with_a_module_of_the_same_name(tmp_path: Path) -> None:
    built = []
    for width in (2, 5):
        folder = tmp_path / str(width)
        folder.mkdir()
        (folder / "parts_of_it.py").write_text(f"WIDTH = {width}\n")
        (folder / "build.py").write_text(
            "from torch import nn\nimport parts_of_it\ndef build():\n    return nn.Linear(1, parts_of_it.WIDTH)\n"
        )
        built.append(Factory.parse(f"{folder / 'build.py'}:build").build()[0].out_features)
    assert built == [2, 5]


def test_building_leaves_the_import_path_as_it_was(factory: Path) -> None:
    before = list(sys.path)
    Factory.parse(f"{factory}:build").build()
    with pytest.raises(ModelError):
        Factory.parse(f"{factory}:broken").build()
    assert sys.path == before


@pytest.mark.parametrize(
    ("function", "said"),
    [("wrong", "returned a str"), ("broken", "failed: KeyError"), ("bild", "no function 'bild'.*Did you mean build")],
)
def test_factories_that_fail(factory: Path, function: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Factory.parse(f"{factory}:{function}").build()


@pytest.mark.parametrize("text", ["build.py", "nothing.py:build", ":build", "build.txt:build", "x.py:not a name"])
def test_what_is_no_factory(text: str) -> None:
    with pytest.raises(ModelError):
        Factory.parse(text)


def test_a_factory_that_does_not_parse(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text("def build(:\n")
    with pytest.raises(ModelError, match="SyntaxError"):
        Factory.parse(f"{tmp_path / 'build.py'}:build").build()


def test_files_too_large_to_carry(factory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elude_runtime.network.build.CARRIED_LIMIT", 10)
    with pytest.raises(ModelError, match="--weights"):
        carry_files([factory], factory.parent, tmp_path / "carried")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("head.weight"), "1 missing \\(head.weight\\)"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unknown \\(extra\\)"),
        (lambda t: t.update({"head.bias": torch.zeros(9)}), "1 of another shape \\(head.bias\\)"),
        (lambda t: t.update({"head.bias": torch.zeros(7, dtype=torch.int64)}), "1 of another type \\(head.bias\\)"),
        (lambda t: t.update({"head.bias": torch.zeros(7).to(torch.float8_e4m3fn)}), "1 of another type"),
    ],
)
def test_weights_that_do_not_fit(change: object, said: str) -> None:
    tensors = dict(tiny_vit().state_dict())
    change(tensors)  # type: ignore[operator]
    with pytest.raises(ModelError, match=said):
        load_weights(tiny_vit(), tensors, "weights.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_type_and_bits(dtype: torch.dtype) -> None:
    tensors = {n: t.to(dtype) for n, t in tiny_vit().state_dict().items()}
    model = build_timm(VIT, VIT_ARGS)
    load_weights(model, tensors, "weights.safetensors")
    found = model.state_dict()
    assert all(found[n].dtype == dtype and torch.equal(found[n], t) for n, t in tensors.items())


def test_each_tensor_keeps_its_own_type() -> None:
    """Norms in float32, the rest in bfloat16: as mixed-precision training saves them, and as torch runs them."""
    source = tiny_vit().to(torch.bfloat16)
    for module in source.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    model = build_timm(VIT, VIT_ARGS)
    load_weights(model, source.state_dict(), "weights.safetensors")
    assert {n: t.dtype for n, t in model.state_dict().items()} == {n: t.dtype for n, t in source.state_dict().items()}
    assert isinstance(model.norm.weight, nn.Parameter) and model.norm.weight.dtype == torch.float32
    x = torch.randn(2, 3, 32, 32).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))
    assert output_size(model, (3, 32, 32)) == 7


def test_a_factory_that_compiles(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(
        "import torch\ndef build():\n    return torch.compile(torch.nn.Linear(3, 2), backend='eager')\n"
    )
    with pytest.raises(ModelError, match="^The model is compiled or scripted; "):
        Factory.parse(f"{tmp_path / 'build.py'}:build").build()


def test_arguments() -> None:
    assert json_args(["depth=3", "name=abc", "size=[1, 2]", "on=true", "text=a=b", "none="]) == {
        "depth": 3, "name": "abc", "size": [1, 2], "on": True, "text": "a=b", "none": "",
    }  # fmt: skip
    for bad in ("depth", "=3", "a b=3"):
        with pytest.raises(ModelError, match="NAME=VALUE"):
            json_args([bad])
