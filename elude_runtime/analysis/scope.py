"""Which tokens a scope means: boxes and masks over the upright image, on the part of it that the token grid covers."""

from __future__ import annotations

import torch
from torch import Tensor

from elude_runtime.analysis.edits import EditError, Scope
from elude_runtime.network.tokens import TokenLayout

Window = tuple[float, float, float, float]
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)
_ROUNDING = 1e-12  # of the image: edges that only touch may seem to overlap by this much


def scope_mask(scope: Scope, layout: TokenLayout, window: Window = WHOLE) -> Tensor:
    """bool [T]: the tokens of a layer that the scope means.

    window: x0, y0, x1, y1 of what the grid covers, in fractions of the upright image; it may reach outside 0..1, where
    the crop pads. EditError for class tokens, or for a place in the image, where the layer has none.
    """
    mask = torch.zeros(layout.total, dtype=torch.bool)
    if scope.limited:
        mask[layout.prefix :] = _cells(scope, layout, window).flatten()
    elif scope.tokens == "cls":
        if not layout.prefix:
            raise EditError("The layer has no class token; leave out the scope 'cls'.")
        mask[: layout.prefix] = True
    else:
        mask[layout.prefix if scope.tokens == "patches" else 0 :] = True
    return mask


def _cells(scope: Scope, layout: TokenLayout, window: Window) -> Tensor:
    """bool [rows, columns]: the cells of the grid that meet the box, or a set cell of the mask."""
    if layout.grid is None:
        raise EditError("The layer's tokens have no place in the image; leave out the box or mask.")
    x0, y0, x1, y1 = window
    rows, columns = (_edges(y0, y1, layout.grid[0]), _edges(x0, x1, layout.grid[1]))
    if scope.box is not None:
        left, top, right, bottom = scope.box
        chosen = torch.ones(1, 1, dtype=torch.bool)
        over, across = _edges(top, bottom, 1), _edges(left, right, 1)
    else:
        chosen = torch.tensor(scope.mask, dtype=torch.bool)
        over, across = _edges(0, 1, len(chosen)), _edges(0, 1, chosen.shape[1])
    meets = _overlaps(rows, over).double() @ chosen.double() @ _overlaps(columns, across).double().T
    return meets > 0


def _edges(start: float, end: float, cells: int) -> Tensor:
    """float64 [cells + 1]: the edges of equally wide cells from start to end."""
    steps = torch.arange(cells + 1, dtype=torch.float64)
    return (start * (cells - steps) + end * steps) / cells


def _overlaps(edges: Tensor, others: Tensor) -> Tensor:
    """bool [cells, other cells]: whether two intervals share more than a point."""
    low = torch.maximum(edges[:-1, None], others[None, :-1])
    high = torch.minimum(edges[1:, None], others[None, 1:])
    return high - low > _ROUNDING
