"""Degenerate inputs: whatever the images and weights, a checkpoint that holds, or one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import CONV_DATA, VIT, VIT_ARGS, VIT_DATA, input_tensor, tiny_mobilenet, tiny_vit
from torch import Tensor, nn

import elude_runtime as elude
from elude_runtime.analysis.attribution import METHODS
from elude_runtime.analysis.model import EludeModel
from elude_runtime.checkpoint.manifest import ModelSource
from elude_runtime.errors import EludeError, ImagesError
from elude_runtime.network.build import Factory
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.feature_table import read_table
from elude_runtime.offline.rewrite import BaseModel, rewrite_checkpoint
from elude_runtime.offline.verify import verify
from elude_runtime.partition import REST_CONCEPT, REST_EDGE, SplitConfig
from elude_runtime.partition.sign_split import sign_split

FC2 = "blocks.1.mlp.fc2"
NUMBERS = ("mean", "std", "q01", "q50", "q99", "density", "share")
REGISTERS: dict[str, Any] = {**VIT_ARGS, "reg_tokens": 2}
QUICK: dict[str, Any] = {"subunits": 4, "concepts": 6, "tokens": 24, "batch_size": 8}

NETS = '''
import timm
import torch
from torch import nn


class Mixed(nn.Module):
    """A grouped convolution, a 3 x 3 one with a stride, and a linear head."""

    num_classes = 7

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.skip = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        h = self.stem(x).relu()
        h = (h + self.grouped(h)).relu()
        return self.head((self.skip(h) + self.wide(h)).relu().mean((2, 3)))


def mixed():
    torch.manual_seed(2)
    return Mixed()


class Artefacts(nn.Module):
    """A few tokens, at places that depend on the image, get a norm `factor` times what it was."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        first = 1 + (x[:, 0].abs().sum(1) * 1000).long() % 16
        places = torch.stack([first, 1 + first % 16], 1)
        scale = torch.ones_like(x[..., 0]).scatter(1, places, self.factor)
        return x * scale[..., None]


def artefacts(factor=1.0, **args):
    model = timm.create_model("vit_tiny_patch16_224", **args)
    model.blocks[1].mlp.norm = Artefacts(factor)
    return model
'''


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the networks above."""
    file = tmp_path_factory.mktemp("nets") / "nets.py"
    file.write_text(NETS)
    return file


def sound(base: nn.Module, images: Tensor, out: Path, data: DataConfig = VIT_DATA, **options: Any) -> EludeModel:
    """Rewrite through the public interface, then all that must hold of a checkpoint whatever it was made of: it loads,
    is lossless, has a table of numbers, explains and steers in numbers."""
    options = {**QUICK, "data_config": data, **options}
    made = elude.rewrite(base, images, out=out, **options)
    trusted = "factory" in options
    model = elude.load(out, trust_factory=trusted)
    probe = input_tensor(data, 2, 500)
    assert torch.equal(model(probe), base(probe))
    certificate = verify(out, base, data, images, batch_sizes=(1, 3), few=2, write=False, trust_factory=trusted)
    assert certificate.holds, [c for c in certificate.checks if c.holds is False]
    (means,) = [c for c in certificate.checks if c.name == "means"]
    assert means.holds is True
    json.dumps(made.manifest.model_dump(mode="json"), allow_nan=False)
    rows = read_table(out).to_pylist()
    assert len({r["feature"] for r in rows}) == len(rows)
    for r in rows:
        assert np.isfinite([r[n] for n in NUMBERS]).all() and np.isfinite(r["drift_edges"]).all(), r
    for layer in model.layers:
        state, p = model.state(layer), model.state(layer).partition
        assert p.problems() == []
        for t in state.live_types:
            assert p.concepts(t) <= options["concepts"]
            assert bool((p.std[t][p.concept[t] != REST_CONCEPT] > 0).all())
            here = [r for r in rows if r["layer"] == layer and r["token_type"] == TYPE_NAMES[t]]
            names = [r["feature"] for r in here if r["kind"] == "concept"]
            assert names == [f.name for f in state.concept_features(t)]
            for kind in ("concept", "subunit"):
                total = sum(r["share"] for r in here if r["kind"] == kind)
                assert total == pytest.approx(1 if bool((p.std[t] > 0).any()) else 0, abs=1e-3)
            for r in here:
                if r["kind"] == "subunit":
                    slot = p.subunits if r["subunit"] is None else r["subunit"]
                    assert r["std"] == pytest.approx(float(p.std[t, r["neuron"], slot]), rel=1e-4)
        assert bool(torch.isfinite(model.concepts(probe, layer)).all())
        assert bool(torch.isfinite(model.subunits(probe, layer)).all())
        for feature in (model.concept_names(layer)[0], model.concept_names(layer)[-1]):
            for edit in (elude.Edit(feature), elude.Edit(feature, "scale", 3.0)):
                steered = model.steer(probe, [edit])
                assert bool(torch.isfinite(steered.steered).all()) and bool(torch.isfinite(steered.change).all())
            assert torch.equal(model.steer(probe, [elude.Edit(feature, "scale", 1.0)]).steered, base(probe))
    for method in METHODS:
        for level in ("concepts", "subunits"):
            for row in model.explain(probe, [0, 3], method=method, level=level, top_features=4, heatmaps=True):
                for explanation in row:
                    for found in explanation.layers:
                        numbers = [explanation.value, found.baseline, found.completeness_error or 0.0]
                        numbers += [v for f in found.features for v in (f.activation, f.attribution, f.effect or 0.0)]
                        assert np.isfinite(numbers).all()
    return model


def class_token(model: EludeModel, layer: str = FC2) -> tuple[Tensor, Tensor, int]:
    """(counts [d], std [d, M + 1], number of concepts) of the prefix tokens."""
    p = model.state(layer).partition
    return p.counts[1], p.std[1], p.concepts(1)


class TestFewTokens:
    def test_one_image(self, tmp_path: Path) -> None:
        """One class token: an end of one token is one cluster, and nothing varies."""
        model = sound(tiny_vit(), input_tensor(VIT_DATA, 1, 0), tmp_path / "c", model_args=VIT_ARGS)
        counts, std, concepts = class_token(model)
        assert int(counts.max()) <= 2 and not std.any() and concepts == 0
        assert model.state(FC2).partition.concepts(0) == 6  # the patches of one image are sixteen tokens

    def test_two_images(self, tmp_path: Path) -> None:
        """Two class tokens, one at each end: as many sub-units as ends, both vary, and all along one line."""
        images = input_tensor(VIT_DATA, 2, 0)
        model = sound(tiny_vit(), images, tmp_path / "c", model_args=VIT_ARGS)
        counts, std, concepts = class_token(model)
        assert counts.tolist() == [2] * 32 and bool((std[:, :2] > 0).all())
        assert concepts == 1
        acts = model.concepts(images, FC2)[:, 0, -concepts - 1 : -1]  # the class token's, `rest` left out
        torch.testing.assert_close(acts.abs(), torch.ones_like(acts), rtol=1e-3, atol=0)  # half the difference, in std

    def test_class_and_register_tokens_of_two_images(self, tmp_path: Path) -> None:
        model = sound(
            tiny_vit(reg_tokens=2), input_tensor(VIT_DATA, 2, 0), tmp_path / "c", model_args=REGISTERS, layers=[FC2]
        )
        assert [t.tokens for t in model.manifest.layers[0].token_types] == [32, 6]
        assert int(class_token(model)[0].max()) <= 4

    @pytest.mark.parametrize("layer", ["blocks.6.0.conv_pwl", "classifier"])
    def test_a_convolutional_network_on_one_image(self, tmp_path: Path, layer: str) -> None:
        model = sound(tiny_mobilenet(), input_tensor(CONV_DATA, 1, 0), tmp_path / "c", CONV_DATA, layers=[layer])
        p = model.state(layer).partition
        if layer == "classifier":  # one token in all
            assert int(p.counts.max()) <= 2 and not p.std.any() and p.concepts(0) == 0
        else:
            assert p.concepts(0) > 0

    def test_two_tokens_at_each_end(self, tmp_path: Path) -> None:
        model = sound(tiny_vit(), input_tensor(VIT_DATA, 8, 0), tmp_path / "c", model_args=VIT_ARGS, tokens=2)
        assert int(model.state(FC2).partition.counts.max()) == 4

    def test_more_subunits_than_tokens(self, tmp_path: Path) -> None:
        """254 sub-units asked for, 12 class tokens there: six clusters at each end at most."""
        model = sound(
            tiny_vit(), input_tensor(VIT_DATA, 12, 0), tmp_path / "c", model_args=VIT_ARGS, subunits=254, tokens=400
        )
        p = model.state(FC2).partition
        assert p.subunits == 254 and p.std.shape[-1] == 255
        assert 0 < int(p.counts[1].max()) <= 12 and int(p.counts[0].max()) > 12

    def test_one_concept(self, tmp_path: Path) -> None:
        model = sound(tiny_vit(), input_tensor(VIT_DATA, 8, 0), tmp_path / "c", model_args=VIT_ARGS, concepts=1)
        p = model.state(FC2).partition
        for t in range(2):
            named = torch.arange(5) < p.counts[t].long()[:, None]
            assert torch.equal(p.concept[t] == 0, named & (p.std[t] > 0)) and p.concepts(t) == 1

    def test_more_concepts_than_subunits(self, tmp_path: Path) -> None:
        """Every sub-unit that varies is in a concept, and no concept is without one."""
        model = sound(tiny_vit(), input_tensor(VIT_DATA, 8, 0), tmp_path / "c", model_args=VIT_ARGS, concepts=60000)
        p = model.state(FC2).partition
        alive = (torch.arange(5) < p.counts[0].long()[:, None]) & (p.std[0] > 0)
        numbers = sorted(set(p.concept[0][alive].tolist()))
        assert numbers == list(range(p.concepts(0))) and 6 < len(numbers) <= int(alive.sum())


class TestNothingVaries:
    def test_the_same_image_again_and_again(self, tmp_path: Path) -> None:
        """The class token is a constant; patches differ by their place."""
        images = input_tensor(VIT_DATA, 1, 0).expand(13, -1, -1, -1).contiguous()
        model = sound(tiny_vit(), images, tmp_path / "c", model_args=VIT_ARGS, batch_size=5)
        _, std, concepts = class_token(model)
        assert not std.any() and concepts == 0 and model.state(FC2).partition.concepts(0) == 6

    def test_every_token_is_the_same(self, tmp_path: Path) -> None:
        """One colour and no positions: no concept at all, and a checkpoint that holds."""
        base = tiny_vit()
        with torch.no_grad():
            base.pos_embed.zero_()
        images = torch.full((6, 3, 32, 32), 0.3)
        model = sound(base, images, tmp_path / "c", model_args=VIT_ARGS)
        p = model.state(FC2).partition
        assert not p.std.any() and p.concepts(0) == p.concepts(1) == 0
        assert model.concept_names(FC2) == [f"{FC2}/Prest", f"{FC2}/Crest"]
        assert not model.concepts(input_tensor(VIT_DATA, 2), FC2).any()  # nothing to be in standard deviations of
        (found,) = model.explain(images[:1], [0], method="gradient")[0][0].layers
        assert all(abs(f.attribution) < 1e-4 for f in found.features)  # what it was calibrated on is its baseline
        rows = read_table(tmp_path / "c").to_pylist()
        assert all(r["std"] == 0 and r["share"] == 0 and r["density"] == 0 for r in rows)

    @pytest.mark.parametrize("value", [0.0, 0.7])
    def test_a_convolutional_network_on_one_colour(self, tmp_path: Path, value: float) -> None:
        images = torch.full((5, 3, 64, 64), value)
        model = sound(tiny_mobilenet(), images, tmp_path / "c", CONV_DATA, layers=["classifier"])
        p = model.state("classifier").partition
        assert not p.std.any() and p.concepts(0) == 0


def changed(change: Callable[[nn.Module], Any], base: nn.Module | None = None) -> nn.Module:
    """The tiny ViT with some of its weights changed."""
    base = base or tiny_vit()
    with torch.no_grad():
        change(base)
    return base


class TestDeadChannels:
    def test_inputs_that_never_change(self, tmp_path: Path) -> None:
        """Hidden units at a constant, zero or not: no end needs them, so their edges are background."""
        constants = torch.tensor([-50.0, 0.0, 0.5, 2.0, 8.0])

        def change(b: Any) -> None:
            b.blocks[1].mlp.fc1.weight[:5] = 0
            b.blocks[1].mlp.fc1.bias[:5] = constants

        model = sound(changed(change), input_tensor(VIT_DATA, 12, 0), tmp_path / "c", model_args=VIT_ARGS)
        edges = model.state(FC2).partition.edges
        assert bool((edges[..., :5] == REST_EDGE).all()) and float((edges[..., 5:] == REST_EDGE).float().mean()) < 0.05

    def test_a_neuron_of_constant_inputs(self, tmp_path: Path) -> None:
        """All of a neuron is background that never varies: std 0, the background concept, attribution 0."""

        def change(b: Any) -> None:
            b.blocks[1].mlp.fc1.weight[:5] = 0
            b.blocks[1].mlp.fc1.bias[:5] = 1.0
            b.blocks[1].mlp.fc2.weight[7, 5:] = 0

        model = sound(changed(change), input_tensor(VIT_DATA, 12, 0), tmp_path / "c", model_args=VIT_ARGS)
        p = model.state(FC2).partition
        assert not p.counts[:, 7].any() and bool((p.edges[:, 7] == REST_EDGE).all())
        assert not p.std[:, 7].any() and bool(p.mean[:, 7, -1].all()) and bool((p.concept[:, 7] == REST_CONCEPT).all())
        self.no_attribution(model, 7, 1e-5)

    def test_a_neuron_without_weights(self, tmp_path: Path) -> None:
        def change(b: Any) -> None:
            b.blocks[1].mlp.fc2.weight[3:5] = 0

        model = sound(changed(change), input_tensor(VIT_DATA, 12, 0), tmp_path / "c", model_args=VIT_ARGS)
        p = model.state(FC2).partition
        assert not p.counts[:, 3:5].any() and not p.std[:, 3:5].any() and not p.mean[:, 3:5].any()
        self.no_attribution(model, 3, 0.0)

    def test_a_neuron_that_decayed_to_almost_nothing(self, tmp_path: Path) -> None:
        """Weight decay drives dead channels below what a float32 has a reciprocal for."""

        def change(b: Any) -> None:
            for neuron, factor in ((2, 1e-41), (3, 1e-38), (4, 1e-36), (5, 1e-20)):
                b.blocks[1].mlp.fc2.weight[neuron] *= factor

        model = sound(changed(change), input_tensor(VIT_DATA, 12, 0), tmp_path / "c", model_args=VIT_ARGS)
        p = model.state(FC2).partition
        acts = model.concepts(input_tensor(VIT_DATA, 12, 0), FC2)
        assert float(acts.abs().max()) < 100  # in standard deviations
        assert bool((p.std[:, 6:, :4] > 0).any()) and p.concepts(0) == 6

    def test_a_layer_without_weights(self, tmp_path: Path) -> None:
        for name, parts in (("weight", ["weight"]), ("all", ["weight", "bias"])):

            def change(b: Any, parts: list[str] = parts) -> None:
                for part in parts:
                    getattr(b.blocks[1].mlp.fc2, part).zero_()

            model = sound(
                changed(change), input_tensor(VIT_DATA, 6, 0), tmp_path / name, model_args=VIT_ARGS, layers=[FC2]
            )
            p = model.state(FC2).partition
            assert not p.counts.any() and bool((p.edges == REST_EDGE).all()) and not p.std.any()
            (found,) = model.explain(input_tensor(VIT_DATA, 1), [0], method="gradient")[0][0].layers
            assert found.features == [] and found.completeness_error == pytest.approx(0, abs=1e-6)
            steered = model.steer(input_tensor(VIT_DATA, 2), [elude.Edit(f"{FC2}/Prest")])
            assert torch.equal(steered.steered, steered.default) and not steered.change.any()

    def test_a_layer_that_hardly_reaches_the_output(self, tmp_path: Path) -> None:
        """What is left of its effect is rounding; an attribution of it is not wrong by that."""
        model = sound(
            changed(lambda b: b.blocks[1].mlp.fc2.weight.mul_(1e-7)), input_tensor(VIT_DATA, 6, 0), tmp_path / "c",
            model_args=VIT_ARGS, layers=[FC2],
        )  # fmt: skip
        assert set(model.manifest.layers[0].attribution.completeness.values()) == {0.0}

    def test_an_embedding_of_zeros(self, tmp_path: Path) -> None:
        """It has no direction of its own."""
        base = tiny_vit(num_classes=0)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.zero_()
        options = {**QUICK, "data_config": VIT_DATA, "model_args": {**VIT_ARGS, "num_classes": 0}}
        model = elude.rewrite(base, input_tensor(VIT_DATA, 6, 0), out=tmp_path / "c", layers=[FC2], **options)
        assert not model(input_tensor(VIT_DATA, 2)).any()
        assert set(model.manifest.layers[0].attribution.completeness.values()) == {0.0}

    def test_weights_of_one_sign(self, tmp_path: Path) -> None:
        """Nothing pushes to the negative end, so no sub-unit stands there."""
        model = sound(
            changed(lambda b: b.blocks[1].mlp.fc2.weight.abs_()),
            input_tensor(VIT_DATA, 8, 0),
            tmp_path / "c",
            model_args=VIT_ARGS,
        )
        assert int(model.state(FC2).partition.counts.max()) <= 2

    def test_channels_that_a_norm_switches_off(self, tmp_path: Path) -> None:
        """A BatchNorm of weight 0 after the split layer: its channels have features, and these no effect."""
        base = tiny_mobilenet()
        with torch.no_grad():
            base.get_submodule("blocks.6.0.bn3").weight[:10] = 0
        model = sound(base, input_tensor(CONV_DATA, 6, 0), tmp_path / "c", CONV_DATA, layers=["blocks.6.0.conv_pwl"])
        for neuron in range(0, 10, 3):
            self.no_attribution(model, neuron, 0.0)
        probe = input_tensor(CONV_DATA, 2)
        steered = model.steer(probe, [elude.Edit("blocks.6.0.conv_pwl/4/p0", "scale", 5.0)])
        assert not steered.change.any()

    def no_attribution(self, model: EludeModel, neuron: int, at_most: float) -> None:
        layer = model.layers[0]
        x = input_tensor(model.data_config, 1, 700)
        (found,) = model.explain(x, [1], method="gradient", level="subunits", top_features=100_000)[0][0].layers
        largest = max(abs(f.attribution) for f in found.features)
        own = [abs(f.attribution) for f in found.features if f.feature.neuron == neuron and f.feature.layer == layer]
        assert max(own, default=0.0) <= at_most * largest


class TestArtefacts:
    """A few patch tokens of every image with twenty times the norm of the others, as DINOv2 has them."""

    def vit(self, nets: Path, factor: float) -> nn.Module:
        model = Factory.parse(f"{nets}:artefacts").build({**VIT_ARGS, "factor": factor})[0]
        model.load_state_dict(tiny_vit().state_dict())
        return model

    def inputs(self, model: Any, images: Tensor) -> Tensor:
        """fc2's inputs at the patches [B, 16, n]."""
        seen: list[Tensor] = []
        hook = model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, a: seen.append(a[0][:, 1:].clone()))
        try:
            with torch.no_grad():
                model(images)
        finally:
            hook.remove()
        return seen[0]

    def naive_edges(self, model: Any, x: Tensor, allowed: Tensor, tokens: int) -> Tensor:
        """The partition from the N best allowed tokens at each end of a neuron, at most four an image."""
        layer = model.blocks[1].mlp.fc2
        y = (x @ layer.weight.T).detach()
        ends = []
        for sign in (1, -1):
            chosen = []
            for neuron in range(y.shape[-1]):
                order = (sign * y[..., neuron]).flatten().argsort(descending=True, stable=True).tolist()
                kept: list[int] = []
                for i in order:
                    if allowed.flatten()[i] and sum(k // 16 == i // 16 for k in kept) < 4 and len(kept) < tokens:
                        kept.append(i)
                chosen.append(kept)
            ends.append(torch.tensor(chosen))
        flat = x.flatten(0, 1)[..., None]
        config = SplitConfig(4, tokens)
        return sign_split(layer.weight.detach()[..., None], lambda _, ids: flat[ids], *ends, config)[0]

    def test_they_are_not_clustered(self, nets: Path, tmp_path: Path) -> None:
        images = input_tensor(VIT_DATA, 12, 0)
        base, clean = self.vit(nets, 20.0), self.vit(nets, 1.0)
        x, without = self.inputs(base, images), self.inputs(clean, images)
        artefact = (x - without).abs().sum(-1) > 0
        assert artefact.sum() == 24
        assert float((x.norm(dim=-1) / without.norm(dim=-1))[artefact].min()) > 19
        model = sound(
            base,
            images,
            tmp_path / "c",
            layers=[FC2],
            batch_size=12,
            factory=f"{nets}:artefacts",
            model_args={**VIT_ARGS, "factor": 20.0},
        )
        edges = model.state(FC2).partition.edges[0]
        assert torch.equal(edges, self.naive_edges(clean, without, ~artefact, 24))
        taken_in = self.naive_edges(base, x, torch.ones_like(artefact), 24)
        assert float((edges == taken_in).float().mean()) < 0.9  # they would have made another partition


class TestManyLayers:
    """Layers rewritten together are what each is alone, bit for bit."""

    def compare(self, base: nn.Module, images: Tensor, layers: list[str], tmp_path: Path, **options: Any) -> None:
        together = sound(base, images, tmp_path / "all", layers=layers, **options)
        assert together.layers == layers
        for number, layer in enumerate(layers):
            alone = sound(base, images, tmp_path / str(number), layers=[layer], **options).state(layer).partition
            p = together.state(layer).partition
            for part in ("edges", "counts", "mean", "std", "concept", "sign"):
                assert torch.equal(getattr(p, part), getattr(alone, part)), (layer, part)
        rows = [r for n in range(len(layers)) for r in read_table(tmp_path / str(n)).to_pylist()]
        assert read_table(tmp_path / "all").to_pylist() == rows

    def test_a_vit_with_registers(self, tmp_path: Path) -> None:
        layers = ["blocks.0.attn.proj", FC2, "blocks.2.mlp.fc2", "head"]
        images = input_tensor(VIT_DATA, 10, 0)
        self.compare(tiny_vit(reg_tokens=2), images, layers, tmp_path, model_args=REGISTERS)

    def test_a_convolutional_network(self, tmp_path: Path) -> None:
        layers = ["blocks.5.2.conv_pwl", "blocks.6.0.conv_pwl", "classifier"]
        self.compare(tiny_mobilenet(), input_tensor(CONV_DATA, 6, 0), layers, tmp_path, data=CONV_DATA)

    def test_grouped_and_wide_convolutions(self, nets: Path, tmp_path: Path) -> None:
        base = Factory.parse(f"{nets}:mixed").build()[0]
        data = replace(CONV_DATA, input_size=(3, 32, 32))
        factory = f"{nets}:mixed"
        images = input_tensor(data, 8, 0)
        self.compare(base, images, ["grouped", "wide", "head"], tmp_path, data=data, factory=factory)


class TestGroupedConvolution:
    def test_a_dead_group(self, nets: Path, tmp_path: Path) -> None:
        """One of two groups reads nothing but zeros."""
        base = Factory.parse(f"{nets}:mixed").build()[0]
        with torch.no_grad():
            base.stem.weight[4:] = 0
            base.stem.bias[4:] = -1
        data = replace(CONV_DATA, input_size=(3, 32, 32))
        images = input_tensor(data, 8, 0)
        model = sound(base, images, tmp_path / "c", data, layers=["grouped"], factory=f"{nets}:mixed")
        p = model.state("grouped").partition
        assert not p.counts[0, 4:].any() and not p.std[0, 4:].any() and not p.mean[0, 4:].any()
        assert bool(p.counts[0, :4].all())


def refuse(tmp_path: Path, base: nn.Module, images: Any, layers: list[str], said: str) -> None:
    """The public function and the one behind the command line both refuse in one sentence, and leave nothing."""
    described = BaseModel(base, ModelSource(kind="timm", name=VIT, args=VIT_ARGS))
    for run in (
        lambda: elude.rewrite(
            base, images, out=tmp_path / "c", layers=layers, data_config=VIT_DATA, model_args=VIT_ARGS, **QUICK
        ),
        lambda: rewrite_checkpoint(
            described, images, tmp_path / "c", SplitConfig(4, 24), layers=layers, concepts=6, data_config=VIT_DATA
        ),
    ):
        with pytest.raises(EludeError, match=said) as caught:
            run()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        assert list(tmp_path.iterdir()) == []


NOT_FINITE = r"(?i)not finite|NaN|infinit"


@pytest.mark.parametrize("value", [float("nan"), -float("inf")], ids=str)
class TestNotNumbers:
    @pytest.mark.parametrize(
        "place",
        ["blocks.0.mlp.fc1.weight", f"{FC2}.weight", f"{FC2}.bias", "blocks.2.mlp.fc1.weight", "head.bias"],
        ids=["before", "weight", "bias", "after", "head"],
    )
    def test_weights(self, tmp_path: Path, place: str, value: float) -> None:
        def change(b: nn.Module) -> None:
            b.get_parameter(place).view(-1)[3] = value

        refuse(tmp_path, changed(change), input_tensor(VIT_DATA, 6, 0), [FC2], NOT_FINITE)

    @pytest.mark.parametrize("layer", [FC2, "head"])
    def test_images(self, tmp_path: Path, value: float, layer: str) -> None:
        images = input_tensor(VIT_DATA, 6, 0)
        images[2, 1, 9, 9] = value
        refuse(tmp_path, tiny_vit(), images, [layer], NOT_FINITE)


class TestOverflow:
    def test_weights_that_overflow(self, tmp_path: Path) -> None:
        """Finite weights whose outputs are not."""
        base = changed(lambda b: b.blocks[1].mlp.fc2.weight.mul_(1e30))
        refuse(tmp_path, base, input_tensor(VIT_DATA, 6, 0), [FC2], NOT_FINITE)

    def test_no_images_at_all(self, tmp_path: Path) -> None:
        for images in (torch.zeros(0, 3, 32, 32), []):
            with pytest.raises(ImagesError) as caught:
                elude.rewrite(
                    tiny_vit(), images, out=tmp_path / "c", data_config=VIT_DATA, model_args=VIT_ARGS, **QUICK
                )
            assert "\n" not in str(caught.value)
            assert list(tmp_path.iterdir()) == []
