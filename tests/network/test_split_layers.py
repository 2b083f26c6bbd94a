"""Which layers are offered, which one is the default, and why others are refused: read off the network as it runs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from support import VIT_DATA, tiny_vit
from torch import Tensor, nn

from elude_runtime.errors import LayerError, ModelError
from elude_runtime.network.split_layers import SplitLayer, _mark_default, choose_layers, find_split_layers
from elude_runtime.network.tokens import TokenLayout

NARROW_SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2), "window_size": 4, "num_classes": 5}
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "deit_tiny_patch16_224": (224, {}),
    "mobilenetv2_100": (64, {}),
    "mobilenetv3_small_050": (64, {"num_classes": 5}),
    "swinv2_tiny_window8_256": (64, {**NARROW_SWIN, "img_size": 64}),
    "resnetv2_50": (64, {"layers": (1, 1, 1, 1), "num_classes": 5}),
    "nf_resnet26": (64, {"num_classes": 5}),
    "resnet10t": (64, {"num_classes": 5}),
}


@lru_cache
def layers_of(name: str) -> dict[str, SplitLayer]:
    size, args = NETWORKS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith(("gain", "norm3.weight", "skipinit_gain")) and not p.any():
                p.fill_(0.5)
    return {layer.name: layer for layer in find_split_layers(model, (3, size, size))}


def default_of(name: str) -> str:
    return next(layer.name for layer in layers_of(name).values() if layer.default)


def test_the_default_of_a_vit_is_the_last_block_that_all_tokens_matter_to() -> None:
    found = layers_of("deit_tiny_patch16_224")
    assert default_of("deit_tiny_patch16_224") == "blocks.10.mlp.fc2"
    last = found["blocks.11.mlp.fc2"]
    assert last.offered and last.live == (False, True) and not last.default
    assert found["blocks.10.mlp.fc2"].live == (True, True)
    assert found["blocks.10.mlp.fc2"].layout.prefix == 1 and found["blocks.10.mlp.fc2"].layout.grid == (14, 14)


def test_the_default_of_mobilenetv2_is_its_last_bottleneck() -> None:
    assert default_of("mobilenetv2_100") == "blocks.6.0.conv_pwl"
    layer = layers_of("mobilenetv2_100")["blocks.6.0.conv_pwl"]
    assert (layer.kind, layer.neurons, layer.inputs, layer.kernel, layer.layout.grid) == (
        "conv",
        320,
        960,
        (1, 1),
        (2, 2),
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "default", "grid"),
    [
        ("levit_128s", "stages.2.blocks.3.mlp.ln2.linear", None),  # 16 tokens that have all seen everything
        ("tiny_vit_5m_224", "stages.3.blocks.1.mlp.fc2", (7, 7)),
        ("pvt_v2_b0", "stages.3.blocks.1.mlp.fc2", (7, 7)),
    ],
)
def test_the_default_at_native_size_is_deep_whatever_the_weights(
    name: str, default: str, grid: tuple[int, int] | None, seed: int
) -> None:
    torch.manual_seed(seed)
    found = {layer.name: layer for layer in find_split_layers(timm.create_model(name).eval(), (3, 224, 224))}
    assert [layer.name for layer in found.values() if layer.default] == [default]
    assert found[default].layout.grid == grid


@pytest.mark.parametrize(
    ("network", "layer", "reason"),
    [
        ("deit_tiny_patch16_224", "blocks.4.attn.qkv", "attention"),
        ("deit_tiny_patch16_224", "blocks.4.mlp.fc1", "nonlinearity (gelu)"),
        ("mobilenetv2_100", "blocks.3.0.conv_dw", "nonlinearity"),
        ("mobilenetv2_100", "blocks.3.0.conv_pw", "nonlinearity"),
        ("mobilenetv3_small_050", "blocks.0.0.se.conv_expand", "nonlinearity"),
        ("swinv2_tiny_window8_256", "layers.3.blocks.1.mlp.fc2", "norm"),
        ("swinv2_tiny_window8_256", "layers.3.blocks.1.attn.proj", "norm"),
        ("nf_resnet26", "stages.3.1.conv2", "nonlinearity (relu)"),
    ],
)
def test_refused_each_with_its_reason(network: str, layer: str, reason: str) -> None:
    found = layers_of(network)[layer]
    assert not found.offered and not found.default
    assert reason in found.reason


@pytest.mark.parametrize("network", list(NETWORKS))
def test_what_is_offered_is_what_a_stream_or_a_linear_layer_takes(network: str) -> None:
    found = layers_of(network)
    assert [layer.order for layer in found.values()] == list(range(len(found)))
    assert sum(layer.default for layer in found.values()) <= 1
    for layer in found.values():
        if layer.offered:
            assert set(layer.reason.split(" and ")) <= {
                "added to the stream", "passed on to a linear layer", "is the model's output"
            }  # fmt: skip
        assert not (layer.default and (layer.classifier or not layer.offered or not all(layer.live)))


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        ("deit_tiny_patch16_224", "blocks.4.attn.proj"),
        ("deit_tiny_patch16_224", "head"),
        ("mobilenetv2_100", "classifier"),
        ("resnet10t", "layer4.0.conv2"),
        ("resnetv2_50", "stages.3.blocks.0.conv3"),
        ("nf_resnet26", "stages.3.1.conv3"),
    ],
)
def test_offered(network: str, layer: str) -> None:
    assert layers_of(network)[layer].offered, layers_of(network)[layer].reason


def test_depthwise_has_nothing_to_split() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv2d(3, 3, 1, groups=3), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.layer(x)).flatten(1))

    layer = find_split_layers(Depthwise().eval(), (3, 2, 2))[0]
    assert not layer.offered and "depthwise" in layer.reason


def test_finding_layers_leaves_no_trace() -> None:
    model = tiny_vit()
    model.blocks[0].requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    find_split_layers(model, VIT_DATA.input_size)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_register_tokens_are_prefix_tokens() -> None:
    found = {layer.name: layer for layer in find_split_layers(tiny_vit(reg_tokens=2), VIT_DATA.input_size)}
    layout = found["blocks.1.mlp.fc2"].layout
    assert (layout.prefix, layout.total, layout.grid) == (3, 19, (4, 4))
    assert layout.slices == [slice(3, 19), slice(0, 3)]


def test_a_layer_that_is_not_called_is_refused() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(12, 4), nn.Linear(3, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.nn.functional.linear(x.flatten(1), self.used.weight, self.used.bias))

    found = {layer.name: layer for layer in find_split_layers(Weights().eval(), (3, 2, 2))}
    assert list(found) == ["head", "used", "unused"]
    for name in ("used", "unused"):
        assert not found[name].offered and "does not run as a module" in found[name].reason


class Doubled(nn.Linear):
    """Two linear operations in one forward: no one weight is its effective one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + super().forward(input.flip(-1))


def test_a_layer_that_is_more_than_one_linear_map_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), Doubled(12, 4), nn.Linear(4, 2)).eval()
    layer = find_split_layers(model, (3, 2, 2))[0]
    assert not layer.offered and layer.reason == "its output is not that of one linear map"


def test_a_model_that_does_not_return_one_tensor() -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    with pytest.raises(ModelError, match=r"returns a tuple instead of one tensor.*--model-factory"):
        find_split_layers(Two(nn.Flatten(), nn.Linear(12, 4)).eval(), (3, 2, 2))


def test_an_input_size_that_does_not_fit() -> None:
    with pytest.raises(ModelError, match=r"images of size \(3, 40, 40\).*--input-size"):
        find_split_layers(tiny_vit(), (3, 40, 40))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)))


class WithoutGradients(Head):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class IntoABuffer(Head):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1))
        return self.second(torch.add(y, 1, out=torch.empty_like(y)))


class NotRecorded(Head):
    """Fails only while operations are recorded."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.utils._python_dispatch._len_torch_dispatch_stack():
            raise RuntimeError("no such operation")
        return super().forward(x)


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Head()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (WithoutGradients, r"runs, but not with gradients \(.*no_grad"),
        (IntoABuffer, r"runs, but not with gradients \(.*out=.*\); keep"),
        (made_in_inference_mode, "made in inference mode"),
        (NotRecorded, r"runs, but its operations cannot be recorded \(no such operation\)"),
        (lambda: nn.Sequential(nn.Flatten(), torch.jit.script(nn.Linear(12, 4))), "compiled or scripted"),
    ],
)
def test_what_is_wrong_is_not_put_on_the_input_size(make: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said) as refused:
        find_split_layers(make().eval(), (3, 2, 2))
    assert "--input-size" not in str(refused.value) and "\n" not in str(refused.value)


def test_memory_that_is_out_is_said_as_it_is() -> None:
    class Huge(Head):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        find_split_layers(Huge(), (3, 2, 2))


def test_images_of_another_number_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(ModelError, match=r"takes images of 1 channels; .* of 3"):
        find_split_layers(model, (3, 2, 2))


def test_recomputing_activations_changes_nothing() -> None:
    """timm's gradient checkpointing, which is on in eval mode too."""
    model = tiny_vit()
    expected = find_split_layers(model, VIT_DATA.input_size)
    model.set_grad_checkpointing(True)
    assert find_split_layers(model, VIT_DATA.input_size) == expected
    assert model.grad_checkpointing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_other_dtypes_the_same_is_found(dtype: torch.dtype) -> None:
    assert find_split_layers(tiny_vit(reg_tokens=2).to(dtype), VIT_DATA.input_size) == find_split_layers(
        tiny_vit(reg_tokens=2), VIT_DATA.input_size
    )


class TestDefault:
    """The deepest offered layer that all token types matter to; better ones are preferred where there are any."""

    @staticmethod
    def layer(name: str, order: int, **changes: Any) -> SplitLayer:
        values: dict[str, Any] = {
            "name": name, "kind": "linear", "neurons": 4, "inputs": 4, "kernel": (), "groups": 1,
            "layout": TokenLayout(4, 0, (2, 2)), "offered": True, "reason": "", "live": (True,), "order": order,
        }  # fmt: skip
        return SplitLayer(**{**values, **changes})

    @pytest.mark.parametrize(
        "worse",
        [
            {"offered": False},
            {"classifier": True},
            {"live": (True, False)},
            {"weighted": True},
            {"layout": TokenLayout(1)},
            {"folded": True},
        ],
        ids=str,
    )
    def test_a_deeper_but_worse_layer_is_not_taken(self, worse: dict[str, Any]) -> None:
        layers = [self.layer("first", 0), self.layer("second", 1), self.layer("third", 2, **worse)]
        assert [layer.name for layer in _mark_default(layers) if layer.default] == ["second"]

    def test_a_grid_that_was_not_seen_does_not_count(self) -> None:
        layers = [self.layer("first", 0), self.layer("second", 1, layout=TokenLayout(4))]
        assert [layer.name for layer in _mark_default(layers) if layer.default] == ["second"]

    @pytest.mark.parametrize("poor", [{"weighted": True}, {"layout": TokenLayout(1)}, {"live": (True, False)}], ids=str)
    def test_unless_there_is_no_better_one(self, poor: dict[str, Any]) -> None:
        layers = [
            self.layer("first", 0, **poor),
            self.layer("second", 1, **poor),
            self.layer("head", 2, classifier=True),
        ]
        assert [layer.name for layer in _mark_default(layers) if layer.default] == ["second"]

    @pytest.mark.parametrize("useless", [{"offered": False}, {"classifier": True}, {"live": (False, True)}], ids=str)
    def test_none_where_none_will_do(self, useless: dict[str, Any]) -> None:
        assert not any(layer.default for layer in _mark_default([self.layer("only", 0, **useless)]))


class TestChoosing:
    found = find_split_layers(tiny_vit(), VIT_DATA.input_size)

    def test_an_unknown_layer_gets_the_closest_names(self) -> None:
        with pytest.raises(LayerError, match=r"blocks\.1\.mlp\.fc3.*Did you mean blocks\.1\.mlp\.fc[12]"):
            choose_layers(self.found, ["blocks.1.mlp.fc3"])

    def test_a_name_like_no_other(self) -> None:
        with pytest.raises(LayerError, match="elude layers"):
            choose_layers(self.found, ["zzzzzzzz"])

    def test_a_refused_layer_gets_its_reason(self) -> None:
        with pytest.raises(LayerError, match="attn.qkv is not offered for splitting: followed by attention"):
            choose_layers(self.found, ["blocks.1.attn.qkv"])

    def test_chosen_once_each_in_network_order(self) -> None:
        chosen = choose_layers(self.found, ["blocks.1.mlp.fc2", "blocks.0.attn.proj", "blocks.1.mlp.fc2"])
        assert [layer.name for layer in chosen] == ["blocks.0.attn.proj", "blocks.1.mlp.fc2"]

    def test_the_default_is_one_layer(self) -> None:
        assert [layer.name for layer in choose_layers(self.found, None)] == ["blocks.1.mlp.fc2"]

    def test_nothing_to_choose(self) -> None:
        with pytest.raises(LayerError, match=r"name one with --layers \(.*blocks\.2\.mlp\.fc2"):
            choose_layers([layer for layer in self.found if not layer.default], None)

    def test_nothing_at_all_to_choose(self) -> None:
        with pytest.raises(LayerError, match="--all` says why"):
            choose_layers([layer for layer in self.found if not layer.offered], None)
