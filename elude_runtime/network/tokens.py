"""Which tokens a layer sees: prefix (class and register) tokens and patch or position tokens, in types of their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

POSITION, PREFIX = 0, 1  # indices on the axis P of a partition
LETTERS = ("p", "c")  # of sub-unit names; upper case for concepts
TYPE_NAMES = ("patches", "cls")


@dataclass(frozen=True)
class TokenLayout:
    """Tokens of one layer: `prefix` class and register tokens first, then a grid (rows, columns) of the rest.

    total: T. grid is None where positions have no two-dimensional order.
    """

    total: int
    prefix: int = 0
    grid: tuple[int, int] | None = None

    @property
    def types(self) -> int:
        """P, the number of token types."""
        return 2 if self.prefix else 1

    @property
    def slices(self) -> list[slice]:
        """The tokens of each type, position tokens first: `slices[p]` along the axis T."""
        position = slice(self.prefix, self.total)
        return [position, slice(0, self.prefix)] if self.prefix else [position]

    def type_of(self, token: int) -> int:
        return PREFIX if token < self.prefix else POSITION


def by_image(rows: Tensor, images: int) -> Tensor:
    """A layer's rows as [images, ...]: windows that were folded into the batch, [images * W, T, C], become
    [images, W, T, C]; anything else is as it was."""
    return rows if len(rows) == images else rows.unflatten(0, (images, -1))
