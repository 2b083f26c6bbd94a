"""Finds the files that ship beside the code: the TorchServe handler and the server's configuration."""

from __future__ import annotations

from pathlib import Path

from elude_runtime.errors import StorageError

_PACKAGE = Path(__file__).resolve().parent


def shipped_file(name: str) -> Path:
    """The path of `handler/elude_handler.py`, `deploy/config.properties`, ….

    A wheel carries them in `elude_runtime/shipped/`; a checkout has them at its top level.
    Raises `StorageError` if neither has the file.
    """
    for root in (_PACKAGE / "shipped", _PACKAGE.parent):
        if (root / name).is_file():
            return root / name
    raise StorageError(f"The installation lacks {name}: install the package again.")


def package_directory() -> Path:
    """The folder of the package that is running."""
    return _PACKAGE
