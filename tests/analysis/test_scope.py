"""Scopes as tokens: named ones, boxes and masks over the image, on the part of it that the grid covers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steering_reference import in_scope

from elude_runtime.analysis.edits import EditError, Scope
from elude_runtime.analysis.scope import scope_mask
from elude_runtime.network.tokens import TokenLayout

LAYOUT = TokenLayout(1 + 2 * 4, 1, (2, 4))


def chosen(scope: Scope, layout: TokenLayout = LAYOUT, window: tuple[float, float, float, float] = (0, 0, 1, 1)) -> str:
    """The tokens as a text: prefix tokens, then a row of the grid after the other."""
    mask = ["#" if t else "." for t in scope_mask(scope, layout, window).tolist()]
    rows, columns = layout.grid or (1, layout.total - layout.prefix)
    grid = mask[layout.prefix :]
    parts = ["".join(mask[: layout.prefix]), *("".join(grid[i * columns : (i + 1) * columns]) for i in range(rows))]
    return " ".join(parts)


@pytest.mark.parametrize(
    ("scope", "tokens"),
    [
        (Scope(), "# #### ####"),
        (Scope("cls"), "# .... ...."),
        (Scope("patches"), ". #### ####"),
        (Scope(box=(0, 0, 1, 1)), ". #### ####"),
        (Scope(box=(0, 0, 0.25, 0.5)), ". #... ...."),
        (Scope(box=(0.25, 0.5, 0.75, 1)), ". .... .##."),
        (Scope(box=(0.24, 0.49, 0.26, 0.51)), ". ##.. ##.."),
        (Scope("patches", box=(0.5, 0, 1, 0.5)), ". ..## ...."),
        (Scope(mask=((0,),)), ". .... ...."),
        (Scope(mask=((1, 0), (0, 0))), ". ##.. ...."),
        (Scope(mask=((0, 1, 0), (0, 0, 0))), ". .##. ...."),
        (Scope(mask=((0, 0), (0, 0), (0, 1))), ". .... ..##"),
    ],
    ids=str,
)
def test_tokens_in_scope(scope: Scope, tokens: str) -> None:
    assert chosen(scope) == tokens


@pytest.mark.parametrize(
    ("window", "tokens"),
    [
        ((0.0, 0.0, 1.0, 1.0), ". ##.. ##.."),  # the grid covers the image
        ((0.5, 0.0, 1.0, 1.0), ". .... ...."),  # its right half: the box is not seen
        ((0.0, 0.0, 0.5, 1.0), ". #### ####"),  # its left half: all of it is the box
        ((0.25, 0.25, 0.75, 0.75), ". ##.. ##.."),  # the middle
        ((-0.5, 0.0, 1.5, 1.0), ". .#.. .#.."),  # padded at both sides
    ],
    ids=str,
)
def test_the_window_places_the_grid_in_the_image(window: tuple[float, float, float, float], tokens: str) -> None:
    assert chosen(Scope(box=(0, 0, 0.5, 1)), window=window) == tokens


def test_cells_that_only_touch_are_out_whatever_the_rounding() -> None:
    layout = TokenLayout(14 * 14, 0, (14, 14))
    for cell in range(14):
        mask = scope_mask(Scope(box=(cell / 14, cell / 14, (cell + 1) / 14, (cell + 1) / 14)), layout).view(14, 14)
        assert mask.nonzero().tolist() == [[cell, cell]]


def test_scopes_that_a_layer_does_not_have() -> None:
    with pytest.raises(EditError, match="no class token; leave out the scope 'cls'"):
        scope_mask(Scope("cls"), TokenLayout(4, 0, (2, 2)))
    for scope in (Scope(box=(0, 0, 1, 1)), Scope(mask=((1,),))):
        with pytest.raises(EditError, match="no place in the image; leave out the box or mask"):
            scope_mask(scope, TokenLayout(5, 1, None))


fractions = st.integers(0, 12).map(lambda n: n / 12)
intervals = st.tuples(fractions, fractions).filter(lambda v: v[0] < v[1])
boxes = st.tuples(intervals, intervals).map(lambda v: Scope(box=(v[0][0], v[1][0], v[0][1], v[1][1])))
masks = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(0, 1), min_size=size[1], max_size=size[1]).map(tuple), min_size=size[0], max_size=size[0]
    ).map(lambda rows: Scope(mask=tuple(rows)))
)
windows = st.tuples(*[st.integers(-6, 8).map(lambda n: n / 10)] * 2, *[st.integers(1, 16).map(lambda n: n / 10)] * 2)


@given(st.one_of(boxes, masks), windows, st.integers(0, 2), st.integers(1, 7), st.integers(1, 7))
def test_a_token_is_in_when_its_cell_shares_area(
    scope: Scope, window: tuple[float, float, float, float], prefix: int, rows: int, columns: int
) -> None:
    layout = TokenLayout(prefix + rows * columns, prefix, (rows, columns))
    left, top, width, height = window
    window = (left, top, left + width, top + height)
    found = scope_mask(scope, layout, window)
    assert found.dtype == torch.bool and found.tolist() == in_scope(scope, layout, window)
