"""What a few forward passes over chosen pictures tell of the layers: whether each row belongs to one image, which
tokens are prefix and which form a grid, whether the layer is the linear map that it looks like, and which of its
tokens can change the model's output at all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elude_runtime.errors import LayerError
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.tokens import TokenLayout, by_image

_SAMPLED = 4096  # elements of a row that are compared
# Changes by opposite corners lie apart by one less their cosine: 1 for tokens that see little but their own place, .2
# where each sees nearly everything. Of that, at least .55 shows on each axis of a true grid (timm's networks, random
# weights), and at most .33 on one of another order.
_ORDERED = 0.45
_LOCAL, _MIXED = 0.3, 0.1  # from here on tokens are local enough to be caught in another order; less tells nothing
_ASPECT = 1.5  # how far from square a token's piece of the picture may be
_CHANNELS = 8  # in fewer, tokens may be the same by rounding alone
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
    """One layer as it runs. refusal: why the layer cannot be split whatever follows it, None if it can."""

    layout: TokenLayout
    refusal: str | None


class TokenOrder:
    """Which tokens stand where, learned from the outputs of all modules in two passes. A token that is the same for
    every picture where it first comes up is a prefix token. Tokens form a grid if what changes with a corner of the
    picture lies in that corner of the grid; where a later module has mixed all tokens, the order is what it was."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        self._aspect = size[0] / size[1]
        named = getattr(model, "num_prefix_tokens", 0)
        self._expected = {named} if isinstance(named, int) else set()
        self._constant: dict[int, int] = defaultdict(int)  # number of tokens -> how many of the first are constant
        self._found: dict[tuple[int, ...], TokenLayout] = {}  # by token axes

    def find_constant(self, out: Tensor) -> None:
        """out [3, T, C] of a pass over `Pictures.exchanged`."""
        if out.shape[2] < _CHANNELS:
            return
        same = (out[0] == out[1]).all(-1)
        leading = int(same.long().cumprod(0).sum())
        if 0 < leading < len(same):
            self._constant[len(same)] = max(self._constant[len(same)], leading)

    def find_grid(self, out: Tensor) -> None:
        """out [3, T, C] or [3, H, W, C] of a later pass over `Pictures.corners`."""
        axes = tuple(out.shape[1:-1])
        if math.prod(axes) > 1:
            first = out.float()
            changes = (first[1:] - first[:1]).abs().sum(-1).flatten(1)
            before = self._found.get(axes)
            if before is not None and before.grid is not None:
                apart = _apart(before, changes)
                if apart <= _LOCAL or _shown(before, changes) >= _ORDERED * apart:
                    return
            self._found[axes] = self._order(axes, changes, before)

    def layout(self, axes: tuple[int, ...]) -> TokenLayout:
        """The tokens of a layer that has just run, by its token axes."""
        total = math.prod(axes)
        prefix = self._constant.get(total, 0) if len(axes) == 1 else 0
        return self._found.get(axes) or TokenLayout(total, prefix, (1, 1) if total - prefix == 1 < total else None)

    def _order(self, axes: tuple[int, ...], changes: Tensor, before: TokenLayout | None) -> TokenLayout:
        total = changes.shape[1]
        known = self._constant.get(total, 0) if len(axes) == 1 else 0
        if len(axes) == 1:
            prefixes = sorted({known} if known else {0, *self._expected, *self._constant.values()})
            grids = [(p, (n, (total - p) // n)) for p in prefixes for n in range(2, total - p) if (total - p) % n == 0]
        else:
            grids = [(0, (axes[0], axes[1]))] if len(axes) == 2 else []
        best, most = TokenLayout(total, known), _ORDERED
        for prefix, (rows, columns) in grids:
            layout = TokenLayout(total, prefix, (rows, columns))
            apart = _apart(layout, changes)
            if min(rows, columns) < 2 or apart < _MIXED or not self._fits(rows, columns):
                continue
            shown = _shown(layout, changes) / apart
            if shown > most:
                best, most = layout, shown
        if best.grid is not None:
            return best
        if before is not None:
            return TokenLayout(total, before.prefix)
        for prefix in sorted(self._expected):  # mixed from the start, but as many as the model's patches and its prefix
            patches = self._found.get((total - prefix,))
            if len(axes) == 1 and patches is not None and patches.grid is not None and not known:
                return TokenLayout(total, prefix, patches.grid)
        return best

    def _fits(self, rows: int, columns: int) -> bool:
        """Whether the pieces of a picture cut into such a grid are about square."""
        return 1 / _ASPECT <= rows / columns / self._aspect <= _ASPECT


def _apart(layout: TokenLayout, changes: Tensor) -> float:
    """How little of the two corners' changes [2, T] falls on the same tokens: one less their cosine."""
    first, second = changes[:, layout.prefix :].double()
    return 1 - float(torch.cosine_similarity(first, second, dim=0))


def _shown(layout: TokenLayout, changes: Tensor) -> float:
    """How much more of the first corner's changes than of the second's, of [2, T], lies in the upper and in the right
    half of the layout's grid, on the axis where that is less: 1 for all, 0 for no more."""
    rows, columns = layout.grid or (1, 1)
    grid = changes[:, layout.prefix :].unflatten(1, (rows, columns)).double()
    grid = grid / grid.sum((1, 2), keepdim=True)
    upper, left = ((n / 2 - torch.arange(n, device=grid.device)).clamp(0, 1) for n in (rows, columns))
    above, before = (grid.sum(2) * upper).sum(1), (grid.sum(1) * left).sum(1)
    return float(torch.minimum(above[0] - above[1], before[1] - before[0]).nan_to_num(-1.0))


def observe(model: nn.Module, candidates: Mapping[str, nn.Module], pictures: Pictures) -> dict[str, Seen]:
    """What each candidate layer looks like when it runs, from two passes."""
    order = TokenOrder(model, (pictures.corners.shape[2], pictures.corners.shape[3]))
    names = {id(module): name for name, module in candidates.items()}
    samples: dict[str, Tensor] = {}
    seen: dict[str, Seen] = {}

    def first(module: nn.Module, _: Any, out: Any) -> None:
        if _is_tokens(out) and out.dim() == 3:
            order.find_constant(out)
        if id(module) in names:
            samples[names[id(module)]] = _sample(out)

    def second(module: nn.Module, args: Any, out: Any) -> None:
        if _is_tokens(out) and not isinstance(module, nn.Identity | nn.Conv2d):
            order.find_grid(out)
        name = names.get(id(module))
        if name is not None:
            rows = _rows_of_an_image(samples.pop(name), _sample(out))
            refusal = _refusal(name, module, args, out, rows)
            seen[name] = Seen(_layout(module, out, rows or 1, order), refusal)

    with torch.no_grad():
        with _hooks(model.modules(), first):
            model(pictures.exchanged)
        with _hooks(model.modules(), second):
            model(pictures.corners)
    return seen


def _layout(module: nn.Module, y: Tensor, rows: int, order: TokenOrder) -> TokenLayout:
    """The tokens of one image at a layer that has just run with output y."""
    axes = tuple(y.shape[2:] if isinstance(module, nn.Conv2d) else y.shape[1:-1])
    if rows == 1 and isinstance(module, nn.Conv2d):
        return TokenLayout(math.prod(axes), 0, (axes[0], axes[1]))
    if rows > 1:  # windows: no order over the whole picture
        return TokenLayout(rows * math.prod(axes))
    return order.layout(axes) if axes else TokenLayout(1)


def live_types(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, TokenLayout]], pictures: Pictures
) -> dict[str, tuple[bool, ...]]:
    """For every layer and token type, whether any of its tokens has a gradient that is not exactly zero."""
    found = {name: (False,) * layout.types for name, (_, layout) in layers.items()}
    images = torch.cat([pictures.corners[:1], pictures.other]).requires_grad_()

    def note(name: str, layout: TokenLayout, grad: Tensor) -> None:
        if layout.types == 1:
            found[name] = (bool((grad != 0).any()),)
        else:
            found[name] = tuple(bool((grad[:, tokens] != 0).any()) for tokens in layout.slices)

    def watch(module: nn.Module, _: Any, out: Tensor) -> None:
        name = names[id(module)]
        if out.requires_grad:  # the gradient is looked at as it passes, and not kept
            out.register_hook(lambda grad: note(name, layers[name][1], grad))

    names = {id(module): name for name, (module, _) in layers.items()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        with torch.enable_grad(), _hooks([module for module, _ in layers.values()], watch):
            out = model(images)
            direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
            torch.autograd.grad((out * direction).sum(), images)
    finally:
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)
    return found


@contextmanager
def _hooks(modules: Any, hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_tokens(out: Any) -> bool:
    """Whether a module's output can be [3, T, C] or [3, H, W, C]."""
    return isinstance(out, Tensor) and out.dim() in (3, 4) and len(out) == 3 and out.is_floating_point()


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
    if rows is None or y.dim() < 2 or not args or len(args[0]) != len(y):
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
