"""Token layouts."""

from __future__ import annotations

from elude_runtime.network.tokens import POSITION, PREFIX, TokenLayout


def test_prefix_tokens_are_the_second_type_and_stand_first() -> None:
    layout = TokenLayout(19, 3, (4, 4))
    assert layout.types == 2
    assert layout.slices[POSITION] == slice(3, 19) and layout.slices[PREFIX] == slice(0, 3)
    assert [layout.type_of(t) for t in (0, 2, 3, 18)] == [PREFIX, PREFIX, POSITION, POSITION]


def test_without_prefix_there_is_one_type() -> None:
    layout = TokenLayout(16, 0, (4, 4))
    assert layout.types == 1 and layout.slices == [slice(0, 16)] and layout.type_of(0) == POSITION
