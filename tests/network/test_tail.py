"""The tail re-run against full forward passes in which a hook replaces the layer's output."""

from __future__ import annotations

from functools import lru_cache

import pytest
import timm
import torch
from support import TorchEncoder, forward_with, hook_count, tiny_mobilenet, tiny_vit
from torch import Tensor, nn

from elude_runtime.errors import LayerError
from elude_runtime.network.tail import FULL, REPLAY, Recording, TailPlan, TailRunner, record_layers

# network: (layer, a later layer, input size, how its tails run)
CASES = {
    "vit": ("blocks.0.attn.proj", "blocks.1.mlp.fc2", 32, REPLAY),
    "registers": ("blocks.0.mlp.fc2", "blocks.2.mlp.fc2", 32, REPLAY),
    "mobilenet": ("blocks.5.0.conv_pwl", "blocks.6.0.conv_pwl", 64, REPLAY),
    "resnet": ("layer4.0.conv2", "fc", 64, None),
    "resnet, downsampling": ("layer4.0.downsample.1", "fc", 64, None),
    "glue": ("layer", "head", 4, FULL),
}


class Glue(nn.Module):
    """Glue code that tells replayed outputs from true ones: its tails need full re-runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(48, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        scale = 1.0 if "forward" not in self.stem.__dict__ else 2.0
        return self.head(h * scale + self.layer(h))


@lru_cache
def network(kind: str) -> tuple[nn.Module, TailRunner, Tensor]:
    torch.manual_seed(3)
    layer, later, size, _ = CASES[kind]
    if kind == "vit":
        model = tiny_vit()
    elif kind == "registers":
        model = tiny_vit(reg_tokens=2)
    elif kind == "mobilenet":
        model = tiny_mobilenet()
    elif kind == "glue":
        model = Glue().eval()
    else:
        model = timm.create_model("resnet10t", num_classes=7, zero_init_last=False).eval()
    model.requires_grad_(False)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(4))
    return model, TailRunner(model, [layer, later], (3, size, size)), images


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[str, str, nn.Module, TailRunner, Tensor, Recording]:
    layer, later, _, _ = CASES[request.param]
    model, runner, images = network(request.param)
    return layer, later, model, runner, images, runner.record(images, [layer, later])


@pytest.mark.parametrize("kind", list(CASES))
def test_how_tails_run(kind: str) -> None:
    layer, _, _, mode = CASES[kind]
    plan = network(kind)[1].plans[layer]
    if mode is not None:
        assert plan.mode == mode
    assert bool(plan.modules) == (plan.mode == REPLAY)


def test_a_recording_is_the_untouched_models_pass(case: tuple) -> None:
    layer, _, model, _, images, recording = case
    seen: list[Tensor] = []
    logits = forward_with(model, images, {layer: lambda x, y: seen.extend([x.clone(), y.clone()]) or y})
    assert torch.equal(recording.logits, logits) and torch.equal(recording.logits, model(images))
    assert torch.equal(recording.x[layer], seen[0]) and torch.equal(recording.y[layer], seen[1])


def test_a_null_tail_is_the_recorded_pass_bit_for_bit(case: tuple) -> None:
    layer, later, _, runner, images, recording = case
    for name in (layer, later):
        again = runner.run(recording, name, recording.y[name].clone(), torch.arange(len(images)))
        assert torch.equal(again, recording.logits)


def test_a_changed_output_reaches_the_end_as_in_a_full_pass(case: tuple) -> None:
    layer, _, model, runner, images, recording = case
    changed = recording.y[layer] + torch.randn(recording.y[layer].shape, generator=torch.Generator().manual_seed(5))
    found = runner.run(recording, layer, changed, torch.arange(len(images)))
    expected = forward_with(model, images, {layer: lambda x, y: changed})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, recording.logits, atol=1e-3)


def test_chosen_rows_in_any_order_and_number(case: tuple) -> None:
    layer, _, model, runner, images, recording = case
    rows = torch.tensor([2, 0, 2, 3, 1, 2])
    noise = torch.randn(6, *recording.y[layer].shape[1:], generator=torch.Generator().manual_seed(6))
    changed = recording.y[layer][rows] + noise
    found = runner.run(recording, layer, changed, rows)
    expected = forward_with(model, images[rows], {layer: lambda x, y: changed})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_two_layers(case: tuple) -> None:
    layer, later, model, runner, images, recording = case
    changed = 1.5 * recording.y[layer]

    def change(x: Tensor, y: Tensor) -> Tensor:
        return y - 0.3 * x.mean() * y.tanh()

    found = runner.run(recording, layer, changed, torch.arange(len(images)), {later: change})
    expected = forward_with(model, images, {layer: lambda x, y: changed, later: change})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_full_pass(case: tuple) -> None:
    layer, _, model, runner, images, recording = case
    found = []
    for run in (
        lambda y: runner.run(recording, layer, y, torch.arange(len(images))),
        lambda y: forward_with(model, images, {layer: lambda *_: y}),
    ):
        y = recording.y[layer].clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(run(y)[:, 1].sum(), y)
        found.append(gradient)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert bool((found[0] != 0).any())


def test_the_model_is_as_before(case: tuple) -> None:
    layer, later, model, runner, images, recording = case
    before = hook_count(model)
    runner.run(recording, layer, recording.y[layer] + 1, torch.arange(len(images)), {later: lambda x, y: y + 1})
    assert hook_count(model) == before == 0
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(model(images), recording.logits)


def test_the_model_is_as_before_after_an_exception(case: tuple) -> None:
    layer, later, model, runner, images, recording = case

    def fail(x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        runner.run(recording, layer, recording.y[layer], torch.arange(len(images)), {later: fail})
    with pytest.raises((RuntimeError, IndexError, AssertionError, ValueError)):
        runner.run(recording, layer, torch.zeros(1, 2), torch.arange(len(images)))
    with pytest.raises((RuntimeError, IndexError, AssertionError)):
        runner.record(torch.zeros(2, 1, 3, 3), [layer])
    assert hook_count(model) == 0
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(model(images), recording.logits)


def test_a_users_own_forward_is_put_back() -> None:
    model, runner, images = network("vit")
    layer = CASES["vit"][0]
    recording = runner.record(images, [layer])
    original = type(model.blocks[0].attn.proj).forward.__get__(model.blocks[0].attn.proj)
    model.blocks[0].attn.proj.forward = original
    try:
        runner.run(recording, layer, recording.y[layer], torch.arange(4))
        assert model.blocks[0].attn.proj.__dict__["forward"] is original
    finally:
        del model.blocks[0].attn.proj.forward


def test_replayed_outputs_are_never_changed_in_place() -> None:
    _model, runner, images = network("resnet")
    layer = CASES["resnet"][0]
    recording = runner.record(images, [layer])
    kept = {n: [[t.clone() for t in call] for call in calls] for n, calls in recording.outputs.items()}
    runner.run(recording, layer, recording.y[layer] * 2, torch.arange(4))
    assert kept
    for name, calls in recording.outputs.items():
        for call, before in zip(calls, kept[name], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(call, before, strict=True)), name


class Chain(nn.Module):
    """A stem, `depth` blocks, a split layer beside a shortcut, and a head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.stem = nn.Linear(48, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h)
        return self.head(h + self.layer(h).tanh())


def runner_of(model: nn.Module, layer: str = "layer", size: int = 4) -> tuple[TailRunner, Tensor]:
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(9))
    return TailRunner(model.eval().requires_grad_(False), [layer], (3, size, size)), images


def check_tails(runner: TailRunner, model: nn.Module, images: Tensor, layer: str = "layer") -> None:
    """A changed output of all rows, and of some in another order, against full passes."""
    recording = runner.record(images, [layer])
    y = recording.y[layer]
    changed = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(10))

    def full(rows: Tensor) -> Tensor:
        return forward_with(model, images[rows], {layer: lambda x, out: changed[rows].reshape(out.shape)})

    every, some = torch.arange(4), torch.tensor([3, 1, 3])
    assert torch.equal(runner.run(recording, layer, changed, every), full(every))
    torch.testing.assert_close(runner.run(recording, layer, changed[some], some), full(some), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(full(every), recording.logits, atol=1e-3)


def test_only_what_is_read_is_recorded() -> None:
    """Of a chain of replayed modules the tail reads the last one's output only; the others stand there for nothing."""
    model = Chain(depth=4)
    runner, images = runner_of(model)
    plan = runner.plans["layer"]
    assert set(plan.modules) == {"stem", *(f"blocks.{i}" for i in range(4))}
    assert plan.read == {"blocks.3"}
    recording = runner.record(images, ["layer"])
    assert list(recording.outputs) == ["blocks.3"]
    check_tails(runner, model, images)


@pytest.mark.parametrize("reads", [False, True])
def test_images_are_gathered_only_where_something_reads_them(reads: bool) -> None:
    class Brighter(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Flatten(), self.stem)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = block(h)
            y = self.head(h + self.layer(h).tanh())
            return y * x.mean((1, 2, 3))[:, None] if reads else y

    model = Brighter()
    runner, images = runner_of(model)
    assert runner.plans["layer"].mode == REPLAY and runner.plans["layer"].images == reads
    assert runner.plans["layer"].read == {"blocks.2"}
    check_tails(runner, model, images)


def test_tails_of_any_number_of_rows_one_after_the_other() -> None:
    """What nobody reads is kept from tail to tail, for each number of rows."""
    model = Chain()
    runner, images = runner_of(model)
    recording = runner.record(images, ["layer"])
    for count in (1, 3, 1, 4, *range(1, 90)):
        rows = torch.arange(count) % 4
        changed = recording.y["layer"][rows] + 1
        expected = forward_with(model, images[rows], {"layer": lambda x, y, changed=changed: changed})
        torch.testing.assert_close(runner.run(recording, "layer", changed, rows), expected, rtol=1e-4, atol=1e-5)
    assert len(runner._blanks) <= 64


def test_a_pass_recorded_with_changes(case: tuple) -> None:
    """Changed outputs reach later layers and what is recorded of them; its own null tails are that pass."""
    layer, later, model, runner, images, recording = case

    def change(x: Tensor, y: Tensor) -> Tensor:
        return 1.5 * y - 0.3 * x.mean().abs() - 0.3

    with torch.no_grad():
        changed = runner.record(images, [layer, later], {layer: change})
        expected = forward_with(model, images, {layer: change})
        assert torch.equal(changed.logits, expected) and not torch.allclose(expected, recording.logits, atol=1e-3)
        assert torch.equal(changed.x[layer], recording.x[layer])
        assert torch.equal(changed.y[layer], change(recording.x[layer], recording.y[layer]))
        for name in (layer, later):
            mode = {} if name == layer or runner.plans[name].mode == REPLAY else {layer: change}
            again = runner.run(changed, name, changed.y[name].clone(), torch.arange(len(images)), mode)
            assert torch.equal(again, changed.logits)
    assert hook_count(model) == 0


def test_an_output_that_is_changed_in_place_later_is_copied() -> None:
    class InPlace(Chain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x.flatten(1))
            y = self.layer(h.tanh())
            h += y  # the recorded output of the stem, were it not copied
            return self.head(h.tanh())

    model = InPlace()
    runner, images = runner_of(model)
    assert runner.plans["layer"].mode == REPLAY and runner.plans["layer"].copied == {"stem"}
    check_tails(runner, model, images)


@pytest.mark.parametrize("changed", ["input", "output", "neither"])
def test_a_layers_own_input_and_output_are_copied_where_they_are_changed_later(changed: str) -> None:
    class InPlace(Chain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x.flatten(1)).tanh()
            y = self.layer(h)
            z = h if changed == "input" else y if changed == "output" else y.clone()
            z += 1
            return self.head((h * y).tanh())

    model = InPlace()
    runner, images = runner_of(model)
    assert runner.plans["layer"].in_place == (changed != "neither")
    seen: list[Tensor] = []
    forward_with(model, images, {"layer": lambda x, y: seen.extend([x.clone(), y.clone()]) or y})
    recording = runner.record(images, ["layer"])
    assert torch.equal(recording.x["layer"], seen[0]) and torch.equal(recording.y["layer"], seen[1])
    check_tails(runner, model, images)
    assert torch.equal(recording.y["layer"], seen[1])


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 3, 2, 1)], ids=["channels last", "transposed too"])
def test_elements_stay_in_their_order_in_memory(order: tuple[int, ...]) -> None:
    """An operation may round differently for the same values in another order: replayed and given outputs keep it."""

    class Strided(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
            self.strides: list[tuple[int, ...]] = []

        def forward(self, x: Tensor) -> Tensor:
            back = [order.index(axis) for axis in range(4)]
            h = self.stem(x.permute(order).contiguous().permute(back))
            y = self.layer(h.contiguous(memory_format=torch.channels_last))
            self.strides += [h.stride(), y.stride()]
            return self.head((h + y).tanh().mean((2, 3)))

    model = Strided()
    runner, images = runner_of(model)
    assert runner.plans["layer"].mode == REPLAY
    recording = runner.record(images, ["layer"])
    model.strides.clear()
    model(images)
    runner.run(recording, "layer", recording.y["layer"].contiguous(), torch.arange(4))
    assert model.strides[:2] == model.strides[2:]
    check_tails(runner, model, images)


class Windows(nn.Module):
    """Four windows of four tokens an image, folded into the batch: images outermost, or innermost at the stem."""

    def __init__(self, outermost: bool = True) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.stem, self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.outermost = outermost

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        tokens = x.flatten(2).transpose(1, 2).unflatten(1, (4, 4))  # [B, W, T, C]
        if self.outermost:
            h = self.stem(tokens.flatten(0, 1))
        else:
            h = self.stem(tokens.transpose(0, 1).flatten(0, 1)).unflatten(0, (4, batch)).transpose(0, 1).flatten(0, 1)
        h = h + self.layer(h.tanh())
        return self.head(h.tanh().unflatten(0, (batch, 4)).mean((1, 2)))


def test_windows_stand_image_by_image() -> None:
    model = Windows()
    runner, images = runner_of(model)
    assert runner.plans["layer"].mode == REPLAY
    recording = runner.record(images, ["layer"])
    assert recording.x["layer"].shape == recording.y["layer"].shape == (4, 4, 4, 6)
    check_tails(runner, model, images)


def test_a_later_layer_of_windows_sees_them_image_by_image() -> None:
    class Two(Windows):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x.flatten(2).transpose(1, 2).unflatten(1, (4, 4)).flatten(0, 1))
            h = h + self.first(h.tanh())
            h = h + self.layer(h.tanh())
            return self.head(h.tanh().unflatten(0, (-1, 4)).mean((1, 2)))

    model = Two()
    runner, images = runner_of(model, "first")
    recording = runner.record(images, ["first"])
    rows, seen = torch.tensor([2, 0]), []

    def change(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.shape, y.shape))
        return y * torch.tensor([1.0, -2.0])[:, None, None, None]

    found = runner.run(recording, "first", recording.y["first"][rows], rows, {"layer": change})
    assert seen == [((2, 4, 4, 6), (2, 4, 4, 6))]
    factor = torch.tensor([1.0, -2.0]).repeat_interleave(4)[:, None, None]
    expected = forward_with(model, images[rows], {"layer": lambda x, y: y * factor})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_lie_otherwise_are_not_replayed() -> None:
    """A null tail would hold: only other rows in another order show whose they are."""
    model = Windows(outermost=False)
    runner, images = runner_of(model)
    assert runner.plans["layer"] == TailPlan("layer", FULL)
    check_tails(runner, model, images)


class Stateful(Chain):
    """Glue code that remembers the batch of a module that does not run in a tail."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Remembering(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        return self.head(h + self.stem.seen * self.layer(h).tanh())


class Remembering(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        self.seen = input.mean(1, keepdim=True)
        return super().forward(input)


def test_side_effects_of_replayed_modules_lead_to_full_passes() -> None:
    model = Stateful()
    runner, images = runner_of(model)
    assert runner.plans["layer"] == TailPlan("layer", FULL)
    check_tails(runner, model, images)


def test_planning_works_in_inference_mode() -> None:
    model = Chain()
    with torch.inference_mode():
        runner, images = runner_of(model)
        recording = runner.record(images, ["layer"])
    y = recording.y["layer"].clone().requires_grad_()
    out = runner.run(recording, "layer", y, torch.arange(4))
    assert torch.autograd.grad(out.sum(), y)[0].abs().sum() > 0


def test_replayed_outputs_of_inference_mode_enter_a_graph() -> None:
    class Product(Chain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x.flatten(1))
            return self.head(h * self.layer(h))

    model = Product()
    runner, images = runner_of(model)
    with torch.inference_mode():
        recording = runner.record(images, ["layer"])
    y = recording.y["layer"].clone().requires_grad_()
    out = runner.run(recording, "layer", y, torch.arange(4))
    (gradient,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(gradient, model.stem(images.flatten(1)) * model.head.weight.sum(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_networks_are_replayed_too(dtype: torch.dtype) -> None:
    model = tiny_vit().to(dtype)
    layer = "blocks.1.mlp.fc2"
    runner = TailRunner(model, [layer], (3, 32, 32))
    assert runner.plans[layer].mode == REPLAY
    images = torch.randn(3, 3, 32, 32).to(dtype)
    with torch.no_grad():
        recording = runner.record(images, [layer])
        changed = recording.y[layer] * 2
        found = runner.run(recording, layer, changed, torch.arange(3))
        assert torch.equal(found, forward_with(model, images, {layer: lambda x, y: changed}))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layer", ["encoder.layers.0.linear2", "encoder.layers.2.linear2"])
def test_pytorchs_encoder_takes_the_given_output(layer: str, norm_first: bool) -> None:
    """Its fused path, which it takes where there are no hooks, never calls the layer."""
    model = TorchEncoder(norm_first)
    runner, images = runner_of(model, layer)
    assert runner.plans[layer].mode == REPLAY
    check_tails(runner, model, images, layer)


def test_tails_of_one_layer_run_the_other_recorded_ones_as_recorded() -> None:
    model, layers = TorchEncoder(True), [f"encoder.layers.{i}.linear2" for i in range(3)]
    runner = TailRunner(model, layers, (3, 4, 4))
    recording = runner.record(torch.randn(4, 3, 4, 4), layers)
    for layer in layers:
        again = runner.run(recording, layer, recording.y[layer].clone(), torch.arange(4))
        assert torch.equal(again, recording.logits)


def test_a_layer_whose_given_output_is_ignored_is_refused() -> None:
    """A tail that gives back the layer's own output would not show it."""

    class Bypass(Chain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x.flatten(1))
            own = "forward" in self.layer.__dict__
            y = nn.functional.linear(h, self.layer.weight, self.layer.bias) if own else self.layer(h)
            return self.head(h + y.tanh())

    with pytest.raises(LayerError, match="layer cannot be split: given another output .* choose another layer"):
        runner_of(Bypass())


def test_a_layer_that_puts_out_nothing_is_tried_with_something() -> None:
    class Ignored(Chain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x.flatten(1))
            y = self.layer(h)
            return self.head(h if "forward" in self.layer.__dict__ else h + y)

    model = Ignored()
    torch.nn.init.zeros_(model.layer.weight)
    torch.nn.init.zeros_(model.layer.bias)
    with pytest.raises(LayerError, match="cannot be split"):
        runner_of(model)


@pytest.mark.parametrize("layers", [["layer"], ["blocks.0", "blocks.2", "layer"]])
def test_what_planning_costs(layers: list[str]) -> None:
    model, images, counted = Chain().eval().requires_grad_(False), torch.randn(4, 3, 4, 4), []
    hook = model.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    runner = TailRunner(model, layers, (3, 4, 4))
    hook.remove()
    assert sum(counted) == 7 + 3 * len(layers)
    for layer in layers:
        assert runner.plans[layer].mode == REPLAY
        check_tails(runner, model, images, layer)


def test_a_recording_without_tails(case: tuple) -> None:
    layer, _, model, _, images, recording = case
    found = record_layers(model, images, {layer: model.get_submodule(layer)})
    assert torch.equal(found.x[layer], recording.x[layer]) and torch.equal(found.y[layer], recording.y[layer])
    assert torch.equal(found.logits, recording.logits) and not found.outputs and hook_count(model) == 0
