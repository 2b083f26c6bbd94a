"""Every family of timm's architectures, in a small shape: what is offered keeps its promises, what is not has a reason.

The checks are those of `tests/families.py`, which also writes the table of the README.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from families import README, check, figures, line, listed, some_of_every_kind, stable
from family_list import CLASSES, FAMILIES, Family, build
from support import forward_with

import elude_runtime as elude
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.split_layers import find_split_layers
from elude_runtime.network.tail import TailRunner
from elude_runtime.offline.verify import verify

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_family(name: str) -> None:
    family = BY_NAME[name]
    if not family.available:
        pytest.skip(f"the installed timm has no {family.model}")
    found = check(family)
    assert not found.problems, found.problems
    assert 0 < found.offered <= found.layers and (found.refusals or found.offered == found.layers)
    published = figures(README.read_text(encoding="utf-8"), timm.__version__)
    if published is not None:
        assert published[f"{family.name} ({family.model})"] == stable(line(found)), "python tests/families.py --write"


def test_there_are_enough_families() -> None:
    assert len(BY_NAME) == len(FAMILIES) >= 40
    assert sum(family.available for family in FAMILIES) >= 40


def test_the_readme_lists_exactly_these_families() -> None:
    """`python tests/families.py --write` puts them there."""
    assert listed(README.read_text(encoding="utf-8")) == [f"{f.name} ({f.model})" for f in FAMILIES]


@pytest.mark.parametrize(
    "name",
    ["Swin", "MobileViT", "EfficientViT (MSRA)", "NF-ResNet, standardised", "EfficientNet (TF, padded)", "CoaT-Lite"],
)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    """Rewritten, verified against the base model, loaded, explained: windows, computed weights, padding in a forward,
    a layer one of whose token types has no effect."""
    family = BY_NAME[name]
    base, size = build(family), (3, family.size, family.size)
    data = DataConfig(size, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.9, "center")
    offered = [layer for layer in find_split_layers(base, size) if layer.offered]
    chosen = [layer.name for layer in some_of_every_kind(offered) if layer.default or layer.layout.grid is None]
    images = torch.randn(6, *size, generator=torch.Generator().manual_seed(1))
    arguments = json.loads(json.dumps({"num_classes": CLASSES, **family.args}))
    model = elude.rewrite(
        base, images, out=tmp_path / "ckpt", layers=chosen, subunits=4, concepts=4, tokens=12, data_config=data,
        model_args=arguments,
    )  # fmt: skip
    result = verify(tmp_path / "ckpt", base, data, images, batch_sizes=(1, 3), write=False)
    assert result.holds, [c for c in result.checks if c.holds is False]
    assert next(c for c in result.checks if c.name == "means").figures["recomputed"] is True
    for explanation in model.explain(images[:1], [1])[0]:
        assert [layer.layer for layer in explanation.layers] == chosen
        assert all(layer.features for layer in explanation.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ViT", "Swin", "ConvNeXt V2", "ResNetV2, standardised (BiT)", "MobileNet V3"])
def test_narrow_networks(name: str, dtype: torch.dtype) -> None:
    """The same layers are offered in half precision, and their tails hold, of another output than the layer's too."""
    family: Family = BY_NAME[name]
    base, size = build(family), (3, family.size, family.size)
    expected = find_split_layers(base, size)
    found = find_split_layers(base.to(dtype), size)
    assert [(x.name, x.offered, x.layout, x.live) for x in found] == [
        (x.name, x.offered, x.layout, x.live) for x in expected
    ]
    layer = next(x.name for x in found if x.default)
    runner = TailRunner(base, [layer], size)
    images = torch.randn(3, *size).to(dtype)
    recording = runner.record(images, [layer])
    y = recording.y[layer]
    changed = y + y.std() * torch.randn(y.shape).to(dtype)
    with torch.no_grad():
        again = runner.run(recording, layer, y, torch.arange(3))
        found = runner.run(recording, layer, changed, torch.arange(3))
        expected = forward_with(base, images, {layer: lambda _, out: changed.reshape(out.shape)})
    assert torch.equal(again, recording.logits)
    assert torch.equal(found, expected) and not torch.equal(found, again)
