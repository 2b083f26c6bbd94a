"""Targets, the scalars that explanations are about."""

from __future__ import annotations

import pytest
import torch

from elude_runtime.analysis.targets import Target, TargetError

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
