"""Names of what an evaluation leaves beside a checkpoint; without torch, for those who only read it."""

from __future__ import annotations

import re

FILE, FOLDER = "evaluation.json", "evaluation"


def plot_stem(layer: str, tokens: str) -> str:
    """What the names of a layer's and token type's plots begin with, up to a dot."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{layer}.{tokens}")
