"""What a few forward passes over chosen pictures tell of the layers: whether each row belongs to one image, whether the
layer is the linear map that it looks like, and which of its tokens can change the model's output at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from elude_runtime.errors import LayerError
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.token_order import TokenOrder, is_tokens, token_axes
from elude_runtime.network.tokens import TokenLayout, by_image

_SAMPLED = 4096  # elements of a row that are compared
_LARGE = 2**16  # elements from which on a tensor is kept in half its size
_TOLERANCE = 2e-3  # of the largest output, for an operation that may run in TF32


@dataclass(frozen=True)
class Pictures:
    """Three random pictures, the second and third the first with its upper right and its lower left quarter changed;
    and a fourth that has nothing to do with them."""

    corners: Tensor  # [3, C, H, W]
    other: Tensor  # [1, C, H, W]

    @classmethod
    def draw(cls, size: tuple[int, int, int], like: Tensor) -> Pictures:
        noise = torch.randn(4, *size, generator=torch.Generator().manual_seed(0)).to(like)
        corners = noise[:1].repeat(3, 1, 1, 1)
        rows, columns = size[1] // 2, size[2] // 2
        corners[1, :, :rows, columns:] = noise[1, :, :rows, columns:]
        corners[2, :, rows:, :columns] = noise[2, :, rows:, :columns]
        return cls(corners, noise[3:])

    @property
    def exchanged(self) -> Tensor:
        """The three, with the second one replaced by the fourth."""
        return torch.cat([self.corners[:1], self.other, self.corners[2:]])


@dataclass(frozen=True)
class Seen:
    """One layer as it runs. refusal: why the layer cannot be split whatever follows it, None if it can. folded: an
    image has several rows of the batch (windows)."""

    layout: TokenLayout
    refusal: str | None
    folded: bool = False


def observe(model: nn.Module, candidates: Mapping[str, nn.Module], pictures: Pictures) -> dict[str, Seen]:
    """What each candidate layer looks like when it runs, from two passes."""
    order = TokenOrder(model, (pictures.corners.shape[2], pictures.corners.shape[3]))
    names = {module: name for name, module in candidates.items()}
    samples: dict[str, Tensor] = {}
    unclear: dict[str, Tensor] = {}
    seen: dict[str, Seen] = {}

    def first(module: nn.Module, _: Any, out: Any) -> None:
        if is_tokens(out):
            order.find_constant(out)
        if module in names:
            samples[names[module]] = _sample(out)

    def second(module: nn.Module, args: Any, out: Any) -> None:
        order.find_map(args[0] if args else None)
        if is_tokens(out) and out.dim() == 4:
            order.keep_map(out)
        if is_tokens(out) and not isinstance(module, nn.Identity | nn.Conv2d):
            order.find_grid(out)
        name = names.get(module)
        if name is not None:
            sample = _sample(out)
            rows = _rows_of_an_image(samples.pop(name), sample)
            if rows is None:
                unclear[name] = sample
            layout = _layout(module, out, rows or 1, order)
            refusal = _refusal(name, module, args, out, rows) or order.refusal(layout, out)
            seen[name] = Seen(layout, refusal, (rows or 1) > 1)

    def third(module: nn.Module, _: Any, out: Any) -> None:
        name = names[module]
        if not torch.equal(unclear[name], _sample(out)):
            refusal = "its output differs from pass to pass over the same images (is dropout on?)"
            seen[name] = replace(seen[name], refusal=refusal)

    with torch.no_grad():
        with _hooks(model.modules(), first):
            model(pictures.exchanged)
        with _hooks(model.modules(), second):
            model(pictures.corners)
        if unclear:
            with _hooks([candidates[name] for name in unclear], third):
                model(pictures.corners)
    return seen


def _layout(module: nn.Module, y: Tensor, rows: int, order: TokenOrder) -> TokenLayout:
    """The tokens of one image at a layer that has just run with output y."""
    axes = tuple(y.shape[2:]) if isinstance(module, nn.Conv2d) else token_axes(y)
    if rows == 1 and isinstance(module, nn.Conv2d):
        return TokenLayout(math.prod(axes), 0, (axes[0], axes[1]))
    if rows > 1:  # windows: no order over the whole picture
        return TokenLayout(rows * math.prod(axes))
    return order.layout(axes) if axes else TokenLayout(1)


def live_types(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, TokenLayout]], pictures: Pictures
) -> dict[str, tuple[bool, ...]]:
    """For every layer and token type, whether any of its tokens has a gradient that is not exactly zero.

    The model is as `borrowed` lends it. The gradient starts at the first of the layers. What it needs of the pass is
    kept in bfloat16, which has the zeros of float32 and is half as large. Raises what torch does where the model does
    not run with gradients.
    """
    found = {name: (False,) * layout.types for name, (_, layout) in layers.items()}
    names = {module: name for name, (module, _) in layers.items()}
    starts: list[Tensor] = []

    def note(name: str, layout: TokenLayout, grad: Tensor) -> None:
        if layout.types == 1:
            found[name] = (bool((grad != 0).any()),)
        else:
            found[name] = tuple(bool((grad[:, tokens] != 0).any()) for tokens in layout.slices)

    def watch(module: nn.Module, _: Any, out: Tensor) -> Tensor:
        name = names[module]
        if not out.requires_grad:
            starts.append(out.detach().requires_grad_())
            out = starts[-1].clone()  # which the model may change in place
        out.register_hook(lambda grad: note(name, layers[name][1], grad))  # looked at as it passes, and not kept
        return out

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(saved: Tensor) -> tuple[Tensor, torch.dtype]:
        large = saved.dtype == torch.float32 and saved.numel() >= _LARGE
        return saved.bfloat16() if large and saved.untyped_storage().data_ptr() not in own else saved, saved.dtype

    narrow = torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0].to(packed[1]))
    with torch.enable_grad(), _hooks(names, watch), narrow:
        out = model(pictures.corners[:1])
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        if starts:
            torch.autograd.grad((out * direction).sum(), starts, allow_unused=True)
    return found


@contextmanager
def _hooks(modules: Any, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sample(out: Tensor) -> Tensor:
    """Some elements of every row, [R, ≤ 4096]."""
    flat = out.flatten(1) if out.dim() > 1 else out[:, None]
    return flat[:, :: max(1, flat.shape[1] // _SAMPLED)].nan_to_num()


def _rows_of_an_image(before: Tensor, after: Tensor) -> int | None:
    """How many rows belong to one image, from two passes over three images of which the second was exchanged: its rows
    change, and no others. None where they do not lie together, or are of more images than one."""
    if before.shape != after.shape or len(before) % 3:
        return None
    changed = (before != after).any(1)
    rows = len(before) // 3
    own = torch.zeros_like(changed)
    own[rows : 2 * rows] = True
    apart = bool((changed <= own).all()) and (bool(changed.any()) or rows == 1)  # a dead layer changes with nothing
    return rows if apart else None


def _refusal(name: str, module: Any, args: Any, y: Tensor, rows: int | None) -> str | None:
    """Why a layer cannot be split whatever follows it; None if it can."""
    if not args:
        return "it is called with its input as a keyword argument"
    if rows is None and y.dim() > 2 and y.shape[1] == 3:
        return "its tokens come before the images ([T, B, C], not [B, T, C])"
    if rows is None or y.dim() < 2 or len(args[0]) != len(y):
        return "its tokens are not laid out image by image"
    try:
        linear = LinearMap(module, name)
    except LayerError as error:
        return str(error).split("; ")[0].removeprefix(f"{name} cannot be split: ").rstrip(".")
    if linear.groups > 1 and linear.inputs == 1:
        return "depthwise: one edge a neuron, nothing to split"
    if linear.inputs == 1:
        return "it has one input: nothing to split"
    x, dtype = by_image(args[0], len(y) // rows)[:1], torch.promote_types(y.dtype, torch.float32)
    expected = linear.tokens(by_image(y, len(y) // rows)[:1]).to(dtype)
    found = linear.apply(x, linear.weight(dtype)) + linear.bias(dtype)
    if found.shape != expected.shape:
        return "its output is not that of one linear map"
    bound = max(4 * torch.finfo(y.dtype).eps, _TOLERANCE) * float(expected.abs().max())
    off = float((found - expected).abs().max())
    return None if off <= bound or not bool(expected.isfinite().all()) else "its output is not that of one linear map"
