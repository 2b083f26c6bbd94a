"""Where a network's tokens stand, learned from what its modules read and give: class and register tokens first, then a
grid of the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elude_runtime.network.tokens import TokenLayout

# Changes by opposite corners lie apart by one less their cosine: 1 for tokens that see little but their own place, .2
# where each sees nearly everything. Of that, at least .55 shows on each axis of a true grid (timm's networks, random
# weights), and at most .33 on one of another order.
_ORDERED = 0.45
_LOCAL, _MIXED = 0.3, 0.1  # from here on tokens are local enough to be caught in another order; less tells nothing
_ASPECT = 1.5  # how far from square a token's piece of the picture may be
_CHANNELS = 8  # in fewer, tokens may be the same by rounding alone


class TokenOrder:
    """Which tokens stand where, learned from what all modules read and give in two passes. A token that is the same for
    every picture where it first comes up is a class or register token. Tokens form a grid if they are, row by row, the
    map that a module gave before, or if what changes with a corner of the picture lies in that corner of the grid;
    where a later module has mixed all tokens, the order is what it was. What the model says itself
    (`num_prefix_tokens`) counts where as many more tokens than places come up and none of them is always the same."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        self._aspect = size[0] / size[1]
        named = getattr(model, "num_prefix_tokens", 0)
        self._declared = named if isinstance(named, int) else 0
        self._constant: dict[int, int] = defaultdict(int)  # number of tokens -> how many of the first are constant
        self._scattered: set[int] = set()  # numbers of tokens of which others than the first are constant
        self._totals: set[int] = set()  # numbers of tokens or places that came up
        self._map: Tensor | None = None  # the last [3, C, H, W]
        self._found: dict[tuple[int, ...], TokenLayout] = {}  # by token axes

    def find_constant(self, out: Tensor) -> None:
        """out [3, T, C] or [3, C, H, W] of a pass over `Pictures.exchanged`."""
        self._totals.add(out.shape[1] if out.dim() == 3 else out.shape[2] * out.shape[3])
        if out.dim() != 3 or out.shape[2] < _CHANNELS:
            return
        same = (out[0] == out[1]).all(-1)
        leading = int(same.long().cumprod(0).sum())
        if leading == len(same):
            return
        if leading:
            self._constant[len(same)] = max(self._constant[len(same)], leading)
        others = out[0, leading:][same[leading:]]
        padding = len(others) > 1 and bool((others == others[0]).all())
        if bool(others.any()) and not padding:  # tokens of zeros may be dead
            self._scattered.add(len(same))

    def find_map(self, given: Any) -> None:
        """What a module is given [3, T, C] or [3, H, W, C] in a later pass over `Pictures.corners`: are its tokens, row
        by row, the last map?"""
        if self._map is None or not is_tokens(given):
            return
        rows = self._map.movedim(1, -1)
        flat = given.flatten(1, -2)
        same = flat.shape[1:] == (rows.shape[1] * rows.shape[2], rows.shape[3]) and torch.equal(
            flat, rows.flatten(1, 2)
        )
        if same and bool((flat != flat[:, :1]).any()):
            self._found[token_axes(given)] = TokenLayout(flat.shape[1], 0, (rows.shape[1], rows.shape[2]))

    def find_grid(self, out: Tensor) -> None:
        """out [3, T, C] or [3, H, W, C] of that pass."""
        axes = token_axes(out)
        if math.prod(axes) > 1:
            first = out.float()
            changes = (first[1:] - first[:1]).abs().sum(-1).flatten(1)
            before = self._found.get(axes)
            if before is None or before.grid is None or not _agrees(before, changes):
                self._found[axes] = self._order(axes, changes, before)

    def keep_map(self, out: Tensor) -> None:
        """out [3, C, H, W] of that pass."""
        self._map = out

    def refusal(self, layout: TokenLayout, out: Tensor) -> str | None:
        """Why a layer with output `out` cannot be split for its tokens; None if it can."""
        if out.dim() == 3 and layout.total in self._scattered:
            return "class or register tokens stand behind or among its other tokens; they must come first"
        return None

    def layout(self, axes: tuple[int, ...]) -> TokenLayout:
        """The tokens of a layer that has just run, by its token axes."""
        total = math.prod(axes)
        prefix = self._constant.get(total, 0) if len(axes) == 1 else 0
        return self._found.get(axes) or TokenLayout(total, prefix, (1, 1) if total - prefix == 1 < total else None)

    def _order(self, axes: tuple[int, ...], changes: Tensor, before: TokenLayout | None) -> TokenLayout:
        total = changes.shape[1]
        known = self._constant.get(total, 0) if len(axes) == 1 else 0
        grids = [(0, (axes[0], axes[1]))] if len(axes) == 2 else []
        if len(axes) == 1 and not self._scattered:
            prefixes = sorted({known} if known else {0, self._declared, *self._constant.values()})
            grids = [(p, (n, (total - p) // n)) for p in prefixes for n in range(2, total - p) if (total - p) % n == 0]
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
        places = total - (known or self._declared)
        if len(axes) == 1 and 0 < places < total and places in self._totals and total not in self._scattered:
            patches = self._found.get((places,), best)  # as they were before the others joined them
            layout = TokenLayout(total, total - places, patches.grid)
            return layout if patches.grid is None or _agrees(layout, changes) else replace(layout, grid=None)
        return best

    def _fits(self, rows: int, columns: int) -> bool:
        """Whether the pieces of a picture cut into such a grid are about square."""
        return 1 / _ASPECT <= rows / columns / self._aspect <= _ASPECT


def token_axes(tokens: Tensor) -> tuple[int, ...]:
    """The axes T or H, W of [B, T, C] or [B, H, W, C]; all tokens in one window, [B, 1, T, C], are T."""
    axes = tuple(tokens.shape[1:-1])
    return axes[1:] if len(axes) == 2 and axes[0] == 1 else axes


def _agrees(layout: TokenLayout, changes: Tensor) -> bool:
    """Whether the changes [2, T] lie in the layout's grid as they should, or tell nothing, being everywhere."""
    apart = _apart(layout, changes)
    return apart <= _LOCAL or _shown(layout, changes) >= _ORDERED * apart


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


def is_tokens(out: Any) -> bool:
    """Whether a module's output can be [3, T, C] or [3, H, W, C]."""
    return isinstance(out, Tensor) and out.dim() in (3, 4) and len(out) == 3 and out.is_floating_point()
