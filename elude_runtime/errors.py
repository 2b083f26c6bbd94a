"""Errors that a user can meet: one family, each message one sentence that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EludeError(Exception):
    """Base of everything a user can put right; the command line prints it as one sentence and exits with 2. where: the
    place in a structured input that it is about, outermost first, where there is one."""

    where: tuple[str | int, ...] = ()


class ModelError(EludeError):
    """A model that cannot be built, or weights that do not fit it."""


class SettingsError(EludeError, ValueError):
    """A number or choice of the offline step that cannot be used."""


class LayerError(EludeError):
    """A layer that does not exist or cannot be split."""


class FeatureError(EludeError):
    """A feature name that does not exist in the checkpoint. name: what was asked for."""

    name: str = ""


class ImagesError(EludeError):
    """A folder, file or byte string that holds no usable image."""


class ImageTooLargeError(ImagesError):
    """An image with more pixels than are decoded."""


class CheckpointError(EludeError):
    """A checkpoint that is damaged, foreign, newer than this software, or carries code nobody trusted."""


class StorageError(EludeError):
    """The disk refused: full, read-only, or a file that is already there."""


class ServerError(EludeError):
    """A TorchServe process that cannot be started or does not become ready."""


def closest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first; at most `count`."""
    return difflib.get_close_matches(name[:200], list(known), n=count, cutoff=0.4)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean a, b or c?` for the end of a message, or nothing when no known name is close."""
    names = closest(name, known)
    if not names:
        return ""
    head, last = ", ".join(names[:-1]), names[-1]
    return f" Did you mean {head + ' or ' if head else ''}{last}?"
