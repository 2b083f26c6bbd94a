"""Targets, the scalars that explanations are about."""

from __future__ import annotations

import pytest
import torch

from elude_runtime.analysis.targets import Target, TargetError, chosen_targets

LOGITS = torch.tensor([[1.0, 2.0, 6.0], [0.0, -3.0, 3.0]])


def test_values() -> None:
    assert Target(2).value(LOGITS).tolist() == [3.0, 3.0]
    assert Target(2, versus=1).value(LOGITS).tolist() == [4.0, 6.0]
    assert Target(direction=(1.0, 0.0, -2.0)).value(LOGITS).tolist() == [-11.0, -6.0]


def test_a_common_shift_changes_nothing() -> None:
    torch.testing.assert_close(Target(1).value(LOGITS + 100), Target(1).value(LOGITS))


def test_half_precision_is_read_in_float32() -> None:
    assert Target(0).value(LOGITS.half()).dtype == torch.float32


@pytest.mark.parametrize(
    "target", [Target(3), Target(-1), Target(0, versus=3), Target(direction=(1.0,)), Target()], ids=str
)
def test_what_the_model_does_not_have(target: Target) -> None:
    with pytest.raises(TargetError):
        target.value(LOGITS)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"index": 0, "direction": (1.0, 0.0, 0.0)}, "not both"),
        ({"versus": 0, "direction": (1.0, 0.0, 0.0)}, "not both"),
        ({"direction": (1.0, float("nan"), 0.0)}, "must be finite"),
        ({"direction": (1.0, float("inf"), 0.0)}, "must be finite"),
    ],
    ids=str,
)
def test_what_is_no_target(values: dict, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        Target(**values)


def test_the_targets_of_a_model_with_classes() -> None:
    assert chosen_targets(None, LOGITS[0], embedding=False) == [Target(2)]
    asked = [1, Target(0, versus=2), Target(direction=(1.0, 0.0, 0.0))]
    assert chosen_targets(asked, LOGITS[0], embedding=False) == [Target(1), *asked[1:]]
    assert chosen_targets([], LOGITS[0], embedding=False) == []


def test_the_targets_of_an_embedding() -> None:
    direction = Target(direction=(1.0, 0.0, 0.0))
    assert chosen_targets([direction], LOGITS[0], embedding=True) == [direction]
    for asked in (None, [1], [Target(1)], [direction, Target(1)]):
        with pytest.raises(TargetError, match=r"no classes, .* targets=\[Target\(direction=…\)\] of 3 numbers"):
            chosen_targets(asked, LOGITS[0], embedding=True)
