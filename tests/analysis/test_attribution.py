"""Attributions against Captum on the explicit form, full passes with hooks, and their own definitions."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradientXActivation
from conftest import Rewritten
from support import as_tokens, forward_with
from torch import Tensor, nn

from elude_runtime.analysis.attribution import ExplainOptions, LayerExplanation
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.targets import Target
from elude_runtime.errors import EludeError, LayerError

ALL = 10**6
TARGETS = [Target(2), Target(4, versus=1)]


def value_of(target: Target, logits: Tensor) -> Tensor:
    """The target written out: a logit minus the mean logit, or minus another's."""
    other = logits.mean(1) if target.versus is None else logits[:, target.versus]
    return logits[:, target.index] - other


def tokens_of(state: object, y: Tensor) -> Tensor:
    return as_tokens(y, state.linear.is_conv)  # type: ignore[attr-defined]


def explained(r: Rewritten, layer: str, target: Target, **options: object) -> LayerExplanation:
    """One layer's explanation of the first image."""
    found = r.model.explain(r.images[:1], [target], layers=[layer], **{"top_features": ALL, **options})
    return found[0][0].layers[0]


def subunit_array(r: Rewritten, layer: str, listed: LayerExplanation) -> list[Tensor]:
    """Listed attributions of sub-units as [d, M + 1] a token type; what is not listed is exactly zero."""
    partition = r.model.state(layer).partition
    out = [torch.zeros(partition.neurons, partition.subunits + 1) for _ in range(partition.types)]
    for f in listed.features:
        slot = partition.subunits if f.feature.index is None else f.feature.index
        out[f.feature.token_type][f.feature.neuron, slot] = f.attribution
    return out


def gradient_at(r: Rewritten, layer: str, target: Target) -> tuple[Tensor, Tensor]:
    """(layer output, d target / d output) as tokens [T, d], by a hook in a full pass of the base model."""
    kept: list[Tensor] = []

    def keep(_: Tensor, y: Tensor) -> Tensor:
        kept.append(y.detach().requires_grad_())
        return kept[0]

    logits = forward_with(r.base, r.images[:1], {layer: keep})
    (gradient,) = torch.autograd.grad(value_of(target, logits).sum(), kept[0])
    state = r.model.state(layer)
    return tokens_of(state, kept[0].detach())[0], tokens_of(state, gradient)[0]


@pytest.mark.parametrize("target", TARGETS, ids=["mean", "versus"])
def test_gradient_attributions_are_captums_on_the_explicit_layer(rewritten: Rewritten, target: Target) -> None:
    r = rewritten
    for layer in r.model.layers:
        state = r.model.state(layer)
        wide = r.model.explicit()
        captum = LayerGradientXActivation(lambda x: value_of(target, wide(x)), wide.get_submodule(f"{layer}.subunits"))  # noqa: B023
        per_token = (
            captum.attribute(r.images[:1])[0].detach().unflatten(-1, (state.linear.neurons, -1))
        )  # [T, d, M + 1]
        _, gradient = gradient_at(r, layer, target)
        found = subunit_array(r, layer, explained(r, layer, target, method="gradient", level="subunits"))
        for t in state.live_types:
            tokens = state.layout.slices[t]
            # Captum's activations are the uncentred sums s, ours are t = s - mean
            centre = gradient[tokens].sum(0)[:, None] * state.partition.mean[t]
            expected = per_token[tokens].sum(0)
            torch.testing.assert_close(found[t] + centre, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("target", TARGETS, ids=["mean", "versus"])
def test_their_sum_and_the_bias_are_captums_on_the_original_layer(rewritten: Rewritten, target: Target) -> None:
    r = rewritten
    for layer in r.model.layers:
        state = r.model.state(layer)
        module = dict(r.base.named_modules())[layer]
        captum = LayerGradientXActivation(lambda x: value_of(target, r.base(x)), module)
        expected = float(captum.attribute(r.images[:1]).detach().sum())
        _, gradient = gradient_at(r, layer, target)
        found = subunit_array(r, layer, explained(r, layer, target, method="gradient", level="subunits"))
        total = sum(float(f.sum()) for f in found)
        for t in state.live_types:
            over_tokens = gradient[state.layout.slices[t]].sum(0)
            total += float((over_tokens[:, None] * state.partition.mean[t]).sum())
            if module.bias is not None:
                total += float((over_tokens * module.bias.detach()).sum())
        dead = [t for t in range(state.layout.types) if t not in state.live_types]
        assert all(bool((gradient[state.layout.slices[t]] == 0).all()) for t in dead)
        assert total == pytest.approx(expected, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
def test_a_concepts_attribution_is_the_sum_of_its_members(rewritten: Rewritten, method: str) -> None:
    r, layer = rewritten, rewritten.layer
    state = r.model.state(layer)
    subunits = subunit_array(r, layer, explained(r, layer, TARGETS[0], method=method, level="subunits"))
    for f in explained(r, layer, TARGETS[0], method=method).features:
        t = f.feature.token_type
        members = state.partition.concept_slots(t) == state.slot(f.feature)
        assert f.attribution == pytest.approx(float(subunits[t][members].sum()), rel=1e-3, abs=1e-5)


def tail_function(model: nn.Module, layer: str, x: Tensor, target: Target) -> Callable[[Tensor], Tensor]:
    """Layer outputs [R, ...] -> target values [R], by full passes."""
    return lambda y: value_of(target, forward_with(model, x.expand(len(y), -1, -1, -1), {layer: lambda *_: y}))


def endpoints(r: Rewritten, layer: str) -> tuple[Tensor, Tensor]:
    """(y, c) of the first image in the module's layout; c from the stored means and the bias."""
    kept: list[Tensor] = []
    with torch.no_grad():
        forward_with(r.base, r.images[:1], {layer: lambda _, y: kept.append(y) or y})
    state, y = r.model.state(layer), kept[0]
    module = dict(r.base.named_modules())[layer]
    c = tokens_of(state, y).clone()
    for t, tokens in enumerate(state.layout.slices):
        c[:, tokens] = state.partition.mean[t].sum(-1) + (0 if module.bias is None else module.bias)
    shaped = c.transpose(1, 2).reshape(y.shape) if state.linear.is_conv else c.reshape(y.shape)
    return y, shaped


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_integrated_gradients_are_captums_between_c_and_y(rewritten: Rewritten, steps: int) -> None:
    """Summed over a neuron's sub-units; Captum integrates the same path with the same Gauss-Legendre nodes."""
    r = rewritten
    for layer in r.model.layers:
        state = r.model.state(layer)
        y, c = endpoints(r, layer)
        captum = IntegratedGradients(tail_function(r.base, layer, r.images[:1], TARGETS[0]))
        expected = tokens_of(state, captum.attribute(y, c, n_steps=steps, method="gausslegendre"))[0]
        found = subunit_array(
            r, layer, explained(r, layer, TARGETS[0], method="integrated_gradients", steps=steps, level="subunits")
        )
        for t in state.live_types:
            per_neuron = expected[state.layout.slices[t]].sum(0).float()
            bound = 1e-3 * float(per_neuron.abs().max())
            torch.testing.assert_close(found[t].sum(-1), per_neuron, rtol=1e-3, atol=bound)


def test_many_nodes_reach_the_path_integral_in_float64(vit: Rewritten) -> None:
    layer, state = vit.layer, vit.model.state(vit.layer)
    exact = copy.deepcopy(vit.base).double()
    y, c = (part.double() for part in endpoints(vit, layer))
    run = tail_function(exact, layer, vit.images[:1].double(), TARGETS[0])
    points = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    path = (c + points.view(-1, 1, 1) * (y - c)).requires_grad_()
    (gradient,) = torch.autograd.grad(run(path).sum(), path)
    mean_gradient = gradient.mean(0)
    sums = vit.model.subunits(vit.images[:1], layer)[0].double()
    found = subunit_array(
        vit, layer, explained(vit, layer, TARGETS[0], method="integrated_gradients", steps=64, level="subunits")
    )
    for t in state.live_types:
        tokens = state.layout.slices[t]
        centred = sums[tokens] - state.partition.mean[t]
        expected = (mean_gradient[tokens][..., None] * centred).sum(0).float()
        torch.testing.assert_close(found[t], expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
@pytest.mark.parametrize("level", ["concepts", "subunits"])
def test_value_baseline_and_completeness(rewritten: Rewritten, method: str, level: str) -> None:
    r = rewritten
    for layer in r.model.layers:
        full = r.model.explain(r.images[:1], TARGETS, layers=[layer], method=method, level=level, top_features=ALL)[0]
        for target, explanation in zip(TARGETS, full, strict=True):
            assert explanation.value == pytest.approx(float(value_of(target, r.base(r.images[:1])).detach()), abs=1e-6)
            found = explanation.layers[0]
            with torch.no_grad():
                baseline = float(tail_function(r.base, layer, r.images[:1], target)(endpoints(r, layer)[1]))
            assert found.baseline == pytest.approx(baseline, rel=1e-4, abs=1e-5)
            total = math.fsum(f.attribution for f in found.features)
            error = total - (explanation.value - baseline)
            assert found.completeness_error == pytest.approx(error, rel=1e-3, abs=2e-4)
            few = r.model.explain(r.images[:1], [target], layers=[layer], method=method, level=level, top_features=1)[
                0
            ][0]
            assert few.layers[0].completeness_error == pytest.approx(found.completeness_error, abs=1e-6)


def test_integrated_gradients_add_up(rewritten: Rewritten) -> None:
    found = rewritten.model.explain(rewritten.images[:1], [2], method="integrated_gradients", steps=48, top_features=1)[
        0
    ][0]
    for layer in found.layers:
        assert layer.completeness_error is not None
        assert abs(layer.completeness_error) < 0.01 * max(0.1, abs(found.value - layer.baseline))


@pytest.mark.parametrize("level", ["concepts", "subunits"])
def test_ablation_is_the_true_effect(rewritten: Rewritten, level: str) -> None:
    r, layer = rewritten, rewritten.layer
    state = r.model.state(layer)
    found = explained(r, layer, TARGETS[0], method="ablation", level=level, top_features=20)
    assert found.completeness_error is None and 0 < len(found.features) <= 20
    for f in found.features:

        def ablated(x: Tensor, y: Tensor, feature: Feature = f.feature) -> Tensor:
            changed = tokens_of(state, y) - state.write(x, feature)
            return changed.transpose(1, 2).reshape(y.shape) if state.linear.is_conv else changed.reshape(y.shape)

        with torch.no_grad():
            z = value_of(TARGETS[0], r.base(r.images[:1]))
            without = value_of(TARGETS[0], forward_with(r.base, r.images[:1], {layer: ablated}))
        assert f.attribution == pytest.approx(float(z - without), rel=1e-3, abs=5e-6)
        assert f.effect == -f.attribution and f.ablation_error == 0
    sizes = [abs(f.attribution) for f in found.features]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
@pytest.mark.parametrize("level", ["concepts", "subunits"])
def test_effects_stand_beside_attributions(rewritten: Rewritten, method: str, level: str) -> None:
    """The explanation is the one without them, and the effects are those that ablation measures."""
    options = {"method": method, "level": level, "top_features": 6}
    plain = explained(rewritten, rewritten.layer, TARGETS[0], **options)
    found = explained(rewritten, rewritten.layer, TARGETS[0], effects=True, **options)
    every = {**options, "method": "ablation", "top_features": 10_000}
    true = {f.feature: f.effect for f in explained(rewritten, rewritten.layer, TARGETS[0], **every).features}
    assert [(f.feature, f.attribution) for f in found.features] == [(f.feature, f.attribution) for f in plain.features]
    assert found.completeness_error == plain.completeness_error
    for f in found.features:
        assert f.effect == pytest.approx(true[f.feature], rel=1e-3, abs=1e-5)
        assert f.ablation_error == f.attribution + f.effect
    assert any(f.ablation_error for f in found.features)


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "ablation"])
def test_sign_chooses_what_is_listed(vit: Rewritten, method: str) -> None:
    options = {"method": method, "level": "subunits", "top_features": 200}
    positive = explained(vit, vit.layer, TARGETS[0], sign="positive", **options).features
    negative = explained(vit, vit.layer, TARGETS[0], sign="negative", **options).features
    assert positive and all(f.attribution > 0 for f in positive)
    assert negative and all(f.attribution < 0 for f in negative)


def test_the_largest_are_listed(vit: Rewritten) -> None:
    everything = explained(vit, vit.layer, TARGETS[0], method="gradient", level="subunits").features
    sizes = [abs(f.attribution) for f in everything]
    assert sizes == sorted(sizes, reverse=True) and len({f.feature for f in everything}) == len(everything)
    top = explained(vit, vit.layer, TARGETS[0], method="gradient", level="subunits", top_features=7).features
    assert [f.feature for f in top] == [f.feature for f in everything[:7]]
    downwards = explained(
        vit, vit.layer, TARGETS[0], method="gradient", level="subunits", sign="negative", top_features=5
    ).features
    assert [f.attribution for f in downwards] == sorted(f.attribution for f in everything)[:5]


def test_activation_and_token_are_the_peak(rewritten: Rewritten) -> None:
    r, layer = rewritten, rewritten.layer
    acts, names = r.model.concepts(r.images[:1], layer)[0], r.model.concept_names(layer)
    state = r.model.state(layer)
    for f in explained(r, layer, TARGETS[0], method="gradient").features:
        column = acts[:, names.index(f.feature.name)]
        token = int(column.abs().argmax())
        assert f.token == token and f.activation == pytest.approx(float(column[token]), rel=1e-4, abs=1e-5)
        assert state.layout.type_of(f.token) == f.feature.token_type


def test_heatmaps_are_the_activations_on_the_grid(rewritten: Rewritten) -> None:
    r, layer = rewritten, rewritten.layer
    acts, names = r.model.concepts(r.images[:1], layer)[0], r.model.concept_names(layer)
    layout = r.model.state(layer).layout
    assert layout.grid is not None
    for f in explained(r, layer, TARGETS[0], method="gradient", heatmaps=True).features:
        if f.feature.token_type == 1:
            assert f.heatmap is None
            continue
        assert f.heatmap is not None and f.heatmap.shape == layout.grid
        expected = acts[layout.prefix :, names.index(f.feature.name)].reshape(layout.grid)
        np.testing.assert_allclose(f.heatmap, expected, rtol=1e-3, atol=1e-4)
    plain = explained(r, layer, TARGETS[0], method="gradient")
    assert all(f.heatmap is None and f.pixels is None for f in plain.features) and plain.edit_attribution is None


def test_default_target_and_method(vit: Rewritten) -> None:
    found = vit.model.explain(vit.images)
    assert [e[0].target.index for e in found] == vit.base(vit.images).argmax(1).tolist()
    for entry, layer in zip(vit.model.manifest.layers, found[0][0].layers, strict=True):
        assert (layer.layer, layer.method) == (entry.name, entry.attribution.auto)
        assert len(layer.features) <= 10


def test_a_row_is_explained_the_same_beside_others(vit: Rewritten) -> None:
    alone = vit.model.explain(vit.images[1:2], [3], method="gradient", top_features=5)[0][0]
    beside = vit.model.explain(vit.images, [3], method="gradient", top_features=5)[1][0]
    for a, b in zip(alone.layers, beside.layers, strict=True):
        assert [f.feature for f in a.features] == [f.feature for f in b.features]
        assert [f.attribution for f in a.features] == pytest.approx([f.attribution for f in b.features], rel=1e-3)


def test_a_model_without_a_head(headless: Rewritten) -> None:
    direction = tuple(torch.randn(32, generator=torch.Generator().manual_seed(1)).tolist())
    found = headless.model.explain(
        headless.images[:1], [Target(direction=direction)], method="integrated_gradients", steps=32
    )[0][0]
    expected = float(headless.base(headless.images[:1])[0].detach() @ torch.tensor(direction))
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert abs(found.layers[0].completeness_error or 0) < 0.02 * max(0.1, abs(found.value - found.layers[0].baseline))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "ablation"])
def test_models_of_half_precision(vit: Rewritten, dtype: torch.dtype, method: str) -> None:
    half = copy.deepcopy(vit.model)
    half.base.to(dtype)
    found = half.explain(vit.images[:1].to(dtype), [TARGETS[0]], method=method, top_features=ALL, pixels=True)[0][0]
    full = vit.model.explain(vit.images[:1], [TARGETS[0]], method=method, top_features=ALL, pixels=True)[0][0]
    for layer, expected in zip(found.layers, full.layers, strict=True):
        ours, theirs = ({f.feature: f for f in e.features} for e in (layer, expected))
        largest = expected.features[0]
        assert ours[largest.feature].attribution == pytest.approx(largest.attribution, rel=0.15)
        assert ours[largest.feature].activation == pytest.approx(largest.activation, rel=0.15)
        spread = sum((ours[f].attribution - theirs[f].attribution) ** 2 for f in ours.keys() & theirs.keys())
        assert spread < 0.15**2 * sum(f.attribution**2 for f in theirs.values())


def test_no_graph_is_kept(vit: Rewritten) -> None:
    for method in ("gradient", "integrated_gradients", "ablation"):
        vit.model.explain(vit.images[:1], [1], method=method)
    recording = vit.model.record(vit.images)
    assert not recording.logits.requires_grad
    assert all(p.grad is None for p in vit.model.base.parameters())
    gc.collect()
    attached = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.grad_fn is not None]
    assert attached == []


@pytest.mark.parametrize(
    "options", [{"method": "lime"}, {"level": "neurons"}, {"sign": "up"}, {"steps": 0}, {"top_features": 0}], ids=str
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(EludeError):
        ExplainOptions(**options)  # type: ignore[arg-type]


def test_unknown_layers_and_classes(vit: Rewritten) -> None:
    with pytest.raises(LayerError, match=r"Did you mean blocks\.1\.mlp\.fc2"):
        vit.model.explain(vit.images[:1], [0], layers=["blocks.1.mlp.fc1"])
    with pytest.raises(EludeError, match="classes 0 to 6"):
        vit.model.explain(vit.images[:1], [7])
