"""Edits and vectors as a command line writes them: FEATURE:MODE[=VALUE][@SCOPE] and NAME[=STRENGTH]."""

from __future__ import annotations

import math
import re
from typing import Any

from elude_runtime.errors import EludeError, did_you_mean

EDIT_HELP = "FEATURE:MODE[=VALUE][@cls|@patches|@box=x0,y0,x1,y1], such as blocks.10.mlp.fc2/P17:ablate; repeated."
VECTOR_HELP = "NAME[=STRENGTH] of a stored vector (elude vector --save); repeated."
WITH_VALUE = ("scale", "set", "cap", "floor", "add")
WITHOUT_VALUE = ("ablate", "zero")
_EDIT = re.compile(r"(?P<feature>.+):(?P<mode>[^:=@]+)(?:=(?P<value>[^=@]*))?(?:@(?P<scope>[^@]*))?")


def parse_edit(text: str) -> dict[str, Any]:
    """The edit document {feature, mode, value?, apply?} of the API that the text stands for.

    EludeError, in one sentence, for what is none. Whether the feature exists is the checkpoint's to say.
    """
    found = _EDIT.fullmatch(text.strip())
    if not found:
        raise EludeError(f"{text[:80]!r} is no edit; write FEATURE:MODE[=VALUE], such as blocks.10.mlp.fc2/P17:ablate.")
    mode, value = found["mode"], found["value"]
    if mode not in (*WITH_VALUE, *WITHOUT_VALUE):
        raise EludeError(
            f"There is no edit mode {mode[:40]!r}; use one of {', '.join((*WITH_VALUE, *WITHOUT_VALUE))}."
            f"{did_you_mean(mode, (*WITH_VALUE, *WITHOUT_VALUE))}"
        )
    document: dict[str, Any] = {"feature": found["feature"], "mode": mode}
    if mode in WITH_VALUE:
        if value is None:
            raise EludeError(f"An edit with mode {mode!r} needs a value: {found['feature']}:{mode}=0.5.")
        document["value"] = _number(value, text)
    elif value is not None:
        raise EludeError(f"An edit with mode {mode!r} takes no value: {found['feature']}:{mode}.")
    if found["scope"] is not None:
        document["apply"] = _scope(found["scope"], text)
    return document


def parse_vector(text: str) -> dict[str, Any]:
    """The vector document {name, strength} that the text stands for. EludeError for what is none."""
    name, equals, strength = text.strip().partition("=")
    if not name:
        raise EludeError(f"{text[:80]!r} is no vector; write NAME or NAME=STRENGTH.")
    return {"name": name, "strength": _number(strength, text) if equals else 1.0}


def _scope(scope: str, text: str) -> dict[str, Any]:
    if scope in ("all", "cls", "patches"):
        return {"tokens": scope}
    kind, equals, corners = scope.partition("=")
    if kind != "box" or not equals:
        raise EludeError(f"{text[:80]!r} acts nowhere that is known; end it in @cls, @patches or @box=x0,y0,x1,y1.")
    box = [_number(corner, text) for corner in corners.split(",")]
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise EludeError(
            f"{corners[:80]!r} is no box; give left, top, right, bottom as fractions of the upright image, such as "
            "@box=0,0.5,1,1."
        )
    return {"box": box}


def _number(value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise EludeError(f"{value[:40]!r} in {text[:80]!r} is not a number; write one such as 0.5 or -2.")
    return number
