"""ELUDe serving: a timm model's inner features made visible and steerable, and every prediction unchanged."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elude_runtime.analysis.edits import Condition, DenseVector, Edit, Scope, Steering
    from elude_runtime.analysis.model import EludeModel, load
    from elude_runtime.offline.rewrite import rewrite

__version__ = "0.1.0"
__all__ = [
    "Condition",
    "DenseVector",
    "Edit",
    "EludeModel",
    "Scope",
    "Steering",
    "__version__",
    "load",
    "rewrite",
]

# Imported on first use, so that `import elude_runtime` loads neither torch nor timm.
_HOME = {
    "Condition": "elude_runtime.analysis.edits",
    "DenseVector": "elude_runtime.analysis.edits",
    "Edit": "elude_runtime.analysis.edits",
    "EludeModel": "elude_runtime.analysis.model",
    "Scope": "elude_runtime.analysis.edits",
    "Steering": "elude_runtime.analysis.edits",
    "load": "elude_runtime.analysis.model",
    "rewrite": "elude_runtime.offline.rewrite",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
