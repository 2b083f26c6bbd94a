"""Closest names in messages."""

from __future__ import annotations

from elude_runtime.errors import closest, did_you_mean


def test_suggestions() -> None:
    known = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"]
    assert closest("blocks.0.mlp.fc3", known)[:2] == ["blocks.0.mlp.fc2", "blocks.0.mlp.fc1"]
    assert did_you_mean("heat", known) == " Did you mean head?"
    assert did_you_mean("blocks.0.mlp.fc3", known).endswith(" or blocks.0.mlp.fc1?")
    assert did_you_mean("", known) == did_you_mean("zzzz", known) == ""
