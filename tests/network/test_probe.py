"""Rows, token layouts and live tokens, as a few passes show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import tiny_vit
from timm.layers import ScaledStdConv2dSame
from torch import Tensor, nn

from elude_runtime.network.probe import Pictures, Seen, live_types, observe
from elude_runtime.network.tokens import TokenLayout

SIZE = (3, 16, 24)  # rows and columns must not be mixed up


def pictures(size: tuple[int, int, int] = SIZE) -> Pictures:
    return Pictures.draw(size, torch.empty(0))


def seen(model: nn.Module, size: tuple[int, int, int] = SIZE, only: str = "") -> dict[str, Seen]:
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers = {n: m for n, m in linear.items() if n == only or not only}
    return observe(model.eval(), layers, pictures(size))


class Patches(nn.Module):
    """4 x 6 patches of an image, arranged by `arrange` before `layer` sees them; `back` undoes it."""

    def __init__(self, arrange: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 2)
        self.arrange, self.back = arrange, back

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.back(self.layer(self.norm(self.arrange(self.embed(x)))))
        return self.head(tokens.reshape(len(x), -1, 16).mean(1))


def line(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def folded(x: Tensor, images_outermost: bool) -> Tensor:
    """Windows of 2 x 2 patches, [B * 6, 4, C] or, window by window, [6 * B, 4, C]."""
    batch, channels = x.shape[:2]
    windows = x.reshape(batch, channels, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1)
    if images_outermost:
        return windows.reshape(-1, 4, channels)
    return windows.permute(1, 2, 0, 3, 4, 5).reshape(-1, 4, channels)


def with_tokens(count: int) -> Callable[[Tensor], Tensor]:
    """So many tokens that are the same for every image, before the patches."""
    prefix = torch.randn(1, count, 16, generator=torch.Generator().manual_seed(1))
    return lambda x: torch.cat([prefix.expand(len(x), -1, -1), line(x)], 1)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], TokenLayout]] = {
    "one row": (line, TokenLayout(24, 0, (4, 6))),
    "channels last": (lambda x: x.movedim(1, -1), TokenLayout(24, 0, (4, 6))),
    "columns first": (lambda x: line(x.transpose(2, 3)), TokenLayout(24)),
    "columns first, channels last": (lambda x: x.movedim(1, -1).transpose(1, 2), TokenLayout(24)),
    "window by window": (lambda x: folded(x, True).reshape(len(x), 24, 16), TokenLayout(24)),
    "blocks of tokens": (lambda x: folded(x, True).reshape(len(x), 6, 4, 16), TokenLayout(24)),
    "folded windows": (lambda x: folded(x, True), TokenLayout(24)),
    "a class token": (with_tokens(1), TokenLayout(25, 1, (4, 6))),
    "class and register tokens": (with_tokens(5), TokenLayout(29, 5, (4, 6))),
    "pooled": (lambda x: line(x).mean(1), TokenLayout(1)),
    "one token": (lambda x: line(x).mean(1, True), TokenLayout(1)),
    "in any order": (
        lambda x: line(x)[:, torch.randperm(24, generator=torch.Generator().manual_seed(2))], TokenLayout(24)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_layout_of_tokens_is_seen(case: str) -> None:
    arrange, expected = LAYOUTS[case]
    found = seen(Patches(arrange, lambda t: t if len(t) < 18 else t.unflatten(0, (-1, 6))))["layer"]
    assert found == Seen(expected, None, folded=case == "folded windows")


def test_a_convolutions_positions_are_its_grid() -> None:
    found = seen(Patches(line))["embed"]
    assert found == Seen(TokenLayout(24, 0, (4, 6)), None)


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (lambda x: folded(x, False), "not laid out image by image"),
        (lambda x: line(x).transpose(0, 1), "come before the images"),
        (lambda x: line(x) + line(x).mean(0, True), "not laid out image by image"),
        (lambda x: F.dropout(line(x), 0.5, training=True), "differs from pass to pass"),
    ],
    ids=["windows, images innermost", "tokens first", "images mixed", "dropout"],
)
def test_rows_that_are_not_of_one_image_are_refused(arrange: Any, said: str) -> None:
    found = seen(Patches(arrange, lambda t: t.reshape(3, -1, 16)))["layer"]
    assert found.refusal is not None and said in found.refusal


def test_a_layer_called_by_keyword() -> None:
    class Named(Patches):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(input=self.norm(line(self.embed(x)))).mean(1))

    assert "keyword argument" in (seen(Named(line))["layer"].refusal or "")


def beside(front: int, behind: int) -> Callable[[Tensor], Tensor]:
    """Patches after so many learned tokens and before so many more."""
    learned = torch.randn(1, front + behind, 16, generator=torch.Generator().manual_seed(3))

    def arrange(x: Tensor) -> Tensor:
        tokens = learned.expand(len(x), -1, -1)
        return torch.cat([tokens[:, :front], line(x), tokens[:, front:]], 1)

    return arrange


@pytest.mark.parametrize(
    "arrange",
    [
        beside(0, 1),
        beside(0, 6),  # 30 tokens, which fill a grid of 5 x 6
        beside(1, 4),
        lambda x: torch.cat([beside(0, 1)(x)[:, :12], beside(0, 1)(x)[:, 24:], line(x)[:, 12:]], 1),
    ],
    ids=["one behind", "a row behind", "before and behind", "in the middle"],
)
def test_learned_tokens_that_do_not_come_first_are_refused(arrange: Any) -> None:
    found = seen(Patches(arrange))["layer"]
    assert found.layout.grid is None and "must come first" in (found.refusal or "")


def test_padding_is_no_learned_token() -> None:
    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 1)).flatten(2).transpose(1, 2)

    model = Patches(padded)
    nn.init.normal_(model.norm.bias)
    assert seen(model)["layer"].refusal is None


@pytest.mark.parametrize(
    ("arrange", "grid"),
    [(line, (4, 6)), (lambda x: line(x.transpose(2, 3)), None), (lambda x: line(x).flip(1), None)],
    ids=["row by row", "column by column", "backwards"],
)
def test_the_declared_prefix_counts_where_nothing_contradicts_it(arrange: Any, grid: tuple[int, int] | None) -> None:
    """A class token that is not learned, but made of the image, is never the same."""

    def with_mean(x: Tensor) -> Tensor:
        return torch.cat([line(x).mean(1, True), arrange(x)], 1)

    model = Patches(with_mean)
    model.num_prefix_tokens = 1  # type: ignore[assignment]
    assert seen(model)["layer"].layout == TokenLayout(25, 1, grid)
    model = Patches(with_tokens(2))
    model.num_prefix_tokens = 1  # type: ignore[assignment]
    assert seen(model)["layer"].layout == TokenLayout(26, 2, (4, 6))
    model = Patches(arrange)
    model.num_prefix_tokens = 1  # type: ignore[assignment]
    assert seen(model)["layer"].layout == TokenLayout(24, 0, grid)


def test_the_places_of_a_map_are_kept_where_no_change_can_show_them() -> None:
    """Tokens that are, row by row, the map before them: even where every place has seen the whole picture."""

    class Mixed(Patches):
        def forward(self, x: Tensor) -> Tensor:
            places = self.embed(x)
            everywhere = places + 50 * places.mean((2, 3), keepdim=True)
            return self.head(self.layer(self.norm(self.arrange(self.keep(everywhere)))).mean(1))

    for arrange, grid in ((line, (4, 6)), (lambda x: line(x.transpose(2, 3)), None)):
        model = Mixed(arrange)
        model.keep = nn.Identity()
        assert seen(model)["layer"].layout == TokenLayout(24, 0, grid)


def test_a_token_order_that_changes_on_the_way() -> None:
    """The same number of tokens before and after they are put into another order (Hiera's unrolling)."""

    class Unrolled(Patches):
        def forward(self, x: Tensor) -> Tensor:
            first = self.norm(line(self.embed(x)))
            second = self.layer(self.norm(folded(self.embed(x), True).reshape(len(x), 24, 16)))
            return self.head((second + first).mean(1))

    class Rolled(Unrolled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.head(self.norm(self.layer2(line(self.embed(x)))).mean(1))

    assert seen(Unrolled(line), only="layer")["layer"].layout.grid is None
    model = Rolled(line)
    model.layer2 = nn.Linear(16, 16)
    assert seen(model, only="layer2")["layer2"].layout.grid == (4, 6)


def test_tokens_that_have_seen_everything_keep_their_place() -> None:
    """After global attention no token tells where it is; its place is that of the same tokens before."""

    class Global(Patches):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.norm(line(self.embed(x)))
            mixed = self.layer(tokens.mean(1, True).expand_as(tokens))
            return self.head((tokens + mixed).mean(1))

    assert seen(Global(line))["layer"].layout == TokenLayout(24, 0, (4, 6))


def test_prefix_tokens_that_are_never_constant() -> None:
    """Stages after the first carry the class token on (PiT): as many as were constant where they first came up."""

    class Stages(Patches):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.norm(with_tokens(1)(self.embed(x)))
            tokens = tokens + tokens.mean(1, True)
            pooled = tokens[:, 1:].unflatten(1, (4, 6)).unflatten(1, (2, 2)).unflatten(3, (3, 2)).mean((2, 4))
            return self.head(self.layer(self.norm(torch.cat([tokens[:, :1], pooled.flatten(1, 2)], 1))).mean(1))

    assert seen(Stages(line))["layer"].layout == TokenLayout(7, 1, (2, 3))


@pytest.mark.parametrize(
    ("name", "args", "layer", "expected"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "blocks.0.mlp.fc2", TokenLayout(18, 2, (4, 4))),
        ("cait_xxs24_224", {}, "blocks.0.mlp.fc2", TokenLayout(16, 0, (4, 4))),
        ("cait_xxs24_224", {}, "blocks_token_only.0.attn.v", TokenLayout(17, 1, (4, 4))),
        ("cait_xxs24_224", {}, "blocks_token_only.1.mlp.fc2", TokenLayout(1)),
        ("vit_tiny_patch16_224", {"img_size": (32, 48)}, "blocks.0.mlp.fc2", TokenLayout(25, 1, (4, 6))),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, "blocks.0.mlp.fc2",
         TokenLayout(16, 0, (4, 4))),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "patch_size": 14}, "blocks.0.mlp.fc2",
         TokenLayout(21, 5, (4, 4))),
    ],
)  # fmt: skip
def test_prefix_tokens_of_timms_models(name: str, args: dict[str, Any], layer: str, expected: TokenLayout) -> None:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, **args}
    model = timm.create_model(name, **shape)
    size = shape["img_size"] if isinstance(shape["img_size"], tuple) else (shape["img_size"],) * 2
    assert seen(model, (3, *size))[layer].layout == expected


def test_the_effective_weight_must_give_the_layers_output() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 1.01 * super().forward(input)

    model = Patches(line)
    model.layer = Scaled(16, 16)
    assert seen(model)["layer"].refusal == "its output is not that of one linear map"
    model.embed = ScaledStdConv2dSame(3, 16, 4, stride=4)
    assert seen(model)["embed"].refusal is None


def test_nothing_to_split() -> None:
    model = Patches(line)
    model.embed = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 16, 4, 4))
    assert seen(model)["embed.0"].refusal == "depthwise: one edge a neuron, nothing to split"
    model.embed = nn.Conv2d(1, 16, 4, 4)
    assert seen(model, (1, 16, 24))["embed"].refusal == "it has one input: nothing to split"


class TestLiveTypes:
    def test_in_the_last_block_of_a_vit_only_the_class_token_matters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("elude_runtime.network.probe._LARGE", 1)  # all that is kept for the gradient is narrowed
        model = tiny_vit(reg_tokens=2).requires_grad_(False)
        layouts = {n: o.layout for n, o in seen(model, (3, 32, 32)).items()}
        wanted = ["blocks.1.mlp.fc2", "blocks.2.mlp.fc2", "head"]
        layers = {n: (model.get_submodule(n), layouts[n]) for n in wanted}
        found = live_types(model, layers, pictures((3, 32, 32)))
        assert found == {"blocks.1.mlp.fc2": (True, True), "blocks.2.mlp.fc2": (False, True), "head": (True,)}

    def test_a_layer_that_is_changed_in_place(self) -> None:
        class Added(Patches):
            def forward(self, x: Tensor) -> Tensor:
                tokens = line(self.embed(x))
                return self.head(self.layer(tokens).add_(tokens).relu_().mean(1))

        model = Added(line).requires_grad_(False)
        found = live_types(
            model, {"layer": (model.layer, TokenLayout(24)), "head": (model.head, TokenLayout(1))}, pictures()
        )
        assert found == {"layer": (True,), "head": (True,)}

    def test_the_gradient_starts_at_the_first_layer_and_is_of_one_picture(self) -> None:
        model = tiny_vit(depth=4).requires_grad_(False)
        met: list[tuple[int, bool]] = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, args: met.append((len(args[0]), args[0].requires_grad)))
        live_types(model, {"second": (model.blocks[1].mlp.fc2, TokenLayout(17))}, pictures((3, 32, 32)))
        assert met == [(1, False), (1, False), (1, True), (1, True)]

    def test_weights_are_not_narrowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is kept for the gradient is copied in half its size; of weights there is a copy already."""
        monkeypatch.setattr("elude_runtime.network.probe._LARGE", 1)
        narrowed: list[int] = []
        narrow = Tensor.bfloat16
        monkeypatch.setattr(Tensor, "bfloat16", lambda t: (narrowed.append(t.data_ptr()), narrow(t))[1])
        model = tiny_vit().requires_grad_(False)
        live_types(model, {"first": (model.blocks[0].mlp.fc2, TokenLayout(17))}, pictures((3, 32, 32)))
        assert narrowed and not {p.data_ptr() for p in model.parameters()} & set(narrowed)

    def test_it_leaves_no_trace(self) -> None:
        model = tiny_vit().requires_grad_(False)
        live_types(model, {"head": (model.head, TokenLayout(1))}, pictures((3, 32, 32)))
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())


def test_pictures_differ_in_opposite_corners() -> None:
    drawn = pictures()
    base, right, left = drawn.corners
    changed = [(base != other).any(0) for other in (right, left)]
    assert bool(changed[0][:8, 12:].all()) and int(changed[0].sum()) == 8 * 12
    assert bool(changed[1][8:, :12].all()) and int(changed[1].sum()) == 8 * 12
    assert torch.equal(drawn.exchanged[0], base) and torch.equal(drawn.exchanged[2], left)
    assert bool((drawn.exchanged[1] != right).any(0).all())
