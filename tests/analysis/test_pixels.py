"""Pixels against finite differences in float64, full backward passes and naive sums."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Rewritten
from support import FIRST, SECOND, hook_count, naive_sums
from torch import Tensor, nn

from elude_runtime.analysis.attribution import ExplainOptions, ExplainRequest, FeatureAttribution
from elude_runtime.analysis.explain_batch import explain_batch
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.pixels import GRID, PixelRequest, patch_sums, pixel_maps
from elude_runtime.analysis.targets import Target
from elude_runtime.network.tokens import TokenLayout
from elude_runtime.partition import Partition


def listed(r: Rewritten, row: int, layer: str, **options: object) -> list[FeatureAttribution]:
    asked = ExplainRequest(row, [Target(1)], [layer], ExplainOptions(pixels=True, method="gradient", **options))  # type: ignore[arg-type]
    return explain_batch(r.model, r.model.record(r.images), [asked])[0][0].layers[0].features


def exact_activation(r: Rewritten, layer: str, changes: dict[str, Tensor] | None = None) -> Callable[..., Tensor]:
    """(images, feature, token) -> the activation in float64, from a full pass of the base model and one run of the
    layer a sub-unit."""
    base, state, p = copy.deepcopy(r.base).double(), r.model.state(layer), r.model.state(layer).partition
    modules = dict(base.named_modules())
    wide = Partition(p.edges, p.counts, p.mean.double(), p.std.double(), p.concept, p.sign)

    def activation(images: Tensor, feature: Feature, token: int) -> Tensor:
        kept: list[Tensor] = []
        hooks = [modules[layer].register_forward_hook(lambda _, args, __: kept.append(args[0]))]
        hooks += [
            modules[n].register_forward_hook(lambda _, __, y, c=c: y + c.double()) for n, c in (changes or {}).items()
        ]
        try:
            with torch.no_grad():
                base(images)
        finally:
            for hook in hooks:
                hook.remove()
        t, slot = feature.token_type, state.slot(feature)
        centred = naive_sums(modules[layer], state.layout, wide, kept[0])[:, token] - wide.mean[t]  # [B, d, M + 1]
        if feature.neuron is not None:
            return centred[:, feature.neuron, slot]
        members = (wide.concept_slots(t) == slot) & (wide.std[t] > 0)
        return (centred / wide.std[t] * wide.sign[t])[:, members].mean(-1)

    return activation


def by_finite_differences(activation: Callable[[Tensor], Tensor], image: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Each patch made slightly larger and smaller in value: the derivative along the patch itself."""
    image, step = image.double(), 1e-9
    rows, columns = grid
    row_of = torch.arange(image.shape[1]) * rows // image.shape[1]
    column_of = torch.arange(image.shape[2]) * columns // image.shape[2]
    out = np.zeros(grid)
    for i in range(rows):
        for j in range(columns):
            inside = ((row_of == i)[:, None] & (column_of == j)).double()
            ends = torch.stack([image * (1 + step * inside), image * (1 - step * inside)])
            up, down = activation(ends).tolist()
            out[i, j] = (up - down) / (2 * step)
    return out


@pytest.mark.parametrize("level", ["concepts", "subunits"])
def test_pixels_are_finite_differences_in_float64(rewritten: Rewritten, level: str) -> None:
    """Of a copy of the model in float64, since the convolutional one makes a thousandfold of every rounding."""
    r, double = rewritten, copy.deepcopy(rewritten.model).double()
    image = r.images[1].double()
    for layer in r.model.layers:
        grid, activation = r.model.state(layer).layout.grid, exact_activation(r, layer)
        assert grid is not None
        features = listed(r, 1, layer, level=level, top_features=6)
        for f in [features[0], *[f for f in features if f.feature.token_type == 1][:1]]:
            found = pixel_maps(double, [PixelRequest(image, {f.feature: f.token})])[0][f.feature]
            expected = by_finite_differences(
                lambda images, f=f: activation(images, f.feature, f.token),  # type: ignore[misc] # noqa: B023
                image,
                grid,
            )
            assert np.abs(expected).max() > 1e-3
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["vit", "registers"])
def test_pixels_of_listed_features_are_those_in_float64(name: str, request: pytest.FixtureRequest) -> None:
    r: Rewritten = request.getfixturevalue(name)
    double = copy.deepcopy(r.model).double()
    for layer in r.model.layers:
        features = listed(r, 2, layer)
        exact = pixel_maps(double, [PixelRequest(r.images[2].double(), {f.feature: f.token for f in features})])[0]
        for f in features:
            assert f.pixels is not None and f.pixels.dtype == np.float32
            np.testing.assert_allclose(f.pixels, exact[f.feature], rtol=1e-3, atol=1e-4 * np.abs(f.pixels).max())


def test_pixels_of_a_steered_pass_hold_earlier_edits(vit: Rewritten) -> None:
    generator = torch.Generator().manual_seed(8)
    change = torch.randn(vit.model.record(vit.images).y[FIRST].shape[1:], generator=generator)
    feature, image = Feature(SECOND, 0, 1), vit.images[0]
    found = pixel_maps(
        vit.model, [PixelRequest(image, {feature: 7}, {FIRST: change}), PixelRequest(image, {feature: 7})]
    )
    grid = vit.model.state(SECOND).layout.grid
    assert grid is not None
    for own, changes in zip(found, ({FIRST: change}, {}), strict=True):
        activation = exact_activation(vit, SECOND, changes)
        expected = by_finite_differences(lambda x: activation(x, feature, 7), image, grid)  # noqa: B023
        np.testing.assert_allclose(own[feature], expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
    assert np.abs(found[0][feature] - found[1][feature]).max() > 1e-2


def test_an_edit_of_the_layer_itself_changes_nothing(vit: Rewritten) -> None:
    """The activation is read from the layer's input."""
    change = torch.ones(vit.model.record(vit.images).y[SECOND].shape[1:])
    feature, image = Feature(SECOND, 0, 1), vit.images[0]
    found = [pixel_maps(vit.model, [PixelRequest(image, {feature: 7}, c)])[0] for c in ({SECOND: change}, {})]
    assert np.array_equal(found[0][feature], found[1][feature])


def test_the_patches_add_up_to_gradient_times_input(rewritten: Rewritten) -> None:
    r, layer = rewritten, rewritten.layer
    module = dict(r.base.named_modules())[layer]
    state = r.model.state(layer)
    for f in listed(r, 0, layer):
        images = r.images[:1].clone().requires_grad_()
        kept: list[Tensor] = []
        hook = module.register_forward_hook(lambda _, args, __: kept.append(args[0]))  # noqa: B023
        r.base(images)
        hook.remove()
        activations = state.concept_activations(kept[0], f.feature.token_type)
        at = f.token - state.layout.slices[f.feature.token_type].start
        (gradient,) = torch.autograd.grad(activations[0, at, state.slot(f.feature)], images)
        whole = float((gradient * images).sum().detach())
        assert f.pixels is not None
        scale = float((gradient * images).abs().sum().detach())
        assert float(f.pixels.sum()) == pytest.approx(whole, rel=1e-4, abs=1e-5 * scale)


def test_only_where_asked_for_and_once_a_feature(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two targets of an image that list the same feature share its backward pass."""
    recording = vit.model.record(vit.images)
    with_pixels = ExplainOptions("gradient", pixels=True, top_features=4)
    asked = [
        ExplainRequest(0, [Target(0), Target(0, versus=1)], [FIRST, SECOND], with_pixels),
        ExplainRequest(1, [Target(2)], [SECOND], ExplainOptions("gradient")),
    ]
    found = explain_batch(vit.model, recording, asked)
    maps: dict[Feature, np.ndarray] = {}
    for f in (f for e in found[0] for layer in e.layers for f in layer.features):
        assert f.pixels is not None and f.pixels.shape == (4, 4)
        assert f.pixels is maps.setdefault(f.feature, f.pixels)
    assert len(maps) > 4
    assert all(f.pixels is None for layer in found[1][0].layers for f in layer.features)

    calls: list[Tensor] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a[1]) or grad(*a, **k))
    pixel_maps(vit.model, [PixelRequest(vit.images[0], {f: 0 if f.token_type == 1 else 3 for f in maps})])
    assert len(calls) == len(maps)


def test_together_as_alone(vit: Rewritten) -> None:
    """More images than go at once, each with features and layers of its own."""
    features = [Feature(SECOND, 0, 1), Feature(FIRST, 0, 0), Feature(SECOND, 1, 0), Feature(SECOND, 0, 1, 3)]
    requests = [
        PixelRequest(vit.images[i % 3], {f: 0 if f.token_type == 1 else 5 + i for f in features[i % 4 :]})
        for i in range(7)
    ]
    together = pixel_maps(vit.model, [*requests, PixelRequest(vit.images[0], {})])
    assert together[-1] == {}
    for found, request in zip(together, requests, strict=False):
        assert list(found) and set(found) == set(request.peaks)
        for feature, alone in pixel_maps(vit.model, [request])[0].items():
            np.testing.assert_allclose(found[feature], alone, rtol=1e-3, atol=1e-5 * np.abs(alone).max())
    assert pixel_maps(vit.model, []) == []


def test_the_pass_stops_at_the_last_layer_asked_about(vit: Rewritten) -> None:
    ran: list[str] = []
    modules = dict(vit.model.base.named_modules())
    hooks = [modules[n].register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n in (FIRST, SECOND, "head")]
    try:
        for feature in (Feature(FIRST, 0, 0), Feature(SECOND, 0, 0)):
            pixel_maps(vit.model, [PixelRequest(vit.images[0], {feature: 3})])
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [FIRST, FIRST, SECOND]


def test_nothing_is_left_behind(rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rewritten
    expected, hooks = r.base(r.images), hook_count(r.model.base)
    request = PixelRequest(r.images[0], {Feature(r.layer, 0, 0): r.model.state(r.layer).layout.prefix})
    pixel_maps(r.model, [request])
    assert torch.equal(r.model(r.images), expected) and hook_count(r.model.base) == hooks
    assert all(p.grad is None for p in r.model.base.parameters()) and not r.images.requires_grad

    def fail(self: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("no")

    first = next(m for m in r.model.base.modules() if isinstance(m, nn.Conv2d))
    monkeypatch.setattr(type(first), "forward", fail)
    with pytest.raises(RuntimeError, match="no"):
        pixel_maps(r.model, [request])
    monkeypatch.undo()
    assert hook_count(r.model.base) == hooks and torch.equal(r.model(r.images), expected)


def test_a_layer_without_a_grid(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    state, request = vit.model.state(SECOND), PixelRequest(vit.images[0], {Feature(SECOND, 0, 0): 3})
    on_grid = pixel_maps(vit.model, [request])[0][Feature(SECOND, 0, 0)]
    monkeypatch.setattr(state, "layout", TokenLayout(state.layout.total, state.layout.prefix, None))
    found = pixel_maps(vit.model, [request])[0][Feature(SECOND, 0, 0)]
    assert found.shape == GRID
    assert float(found.sum()) == pytest.approx(float(on_grid.sum()), rel=1e-3, abs=1e-5 * float(np.abs(found).sum()))


@pytest.mark.parametrize(("size", "grid"), [((6, 4), (3, 2)), ((7, 5), (3, 2)), ((5, 3), (14, 14)), ((1, 1), (7, 7))])
def test_patch_sums_count_every_pixel_once(size: tuple[int, int], grid: tuple[int, int]) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    rows, columns = min(size[0], grid[0]), min(size[1], grid[1])
    expected = torch.zeros(rows, columns)
    for i in range(size[0]):
        for j in range(size[1]):
            expected[i * rows // size[0], j * columns // size[1]] += values[i, j]
    found = patch_sums(values, grid)
    torch.testing.assert_close(found, expected)
