"""Strict JSON: UTF-8, no duplicate keys, no NaN or infinities, bounded nesting."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from elude_runtime.errors import EludeError

# Of a document of 16 MB, millions of empty objects take the worker longer than the server waits for it. Images, pixels
# and directions are few parts: 32 images of 500 x 500 pixels as nested lists are 50,000.
MOST_PARTS = 100_000


class JSONError(EludeError):
    """A body that is not JSON, or JSON that the API does not take (duplicate keys, NaN, too deep)."""


def parse_json(body: bytes, max_depth: int) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinities (1e400 is one), nested at most `max_depth` deep, of
    at most `MOST_PARTS` strings, lists and objects."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise JSONError(f"The key {twice[:60]!r} stands twice in one object.")
        return made

    def constant(name: str) -> Any:
        raise JSONError(f"{name} is not a number in JSON.")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise JSONError(f"The number {text[:40]} is too large.")
        return value

    _check_structure(body, max_depth)
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_float=finite)
    except UnicodeDecodeError as error:
        raise JSONError("The document is not UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise JSONError(f"The body is not JSON: {error}.") from error


# Strings are skipped whole, so that an image in base64 costs one step and not millions.
# An unterminated string runs to the end in one step too: to try again at its every quote would take quadratic time.
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


def _check_structure(body: bytes, max_depth: int) -> None:
    """JSONError for too deep a nesting of brackets outside strings, and for too many parts; ends at the first."""
    depth = 0
    for count, token in enumerate(_STRUCTURE.finditer(body)):
        if count > 2 * MOST_PARTS:  # a list or an object has two brackets
            raise JSONError(f"The document has over {MOST_PARTS} strings, lists and objects; send less at once.")
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            if depth > max_depth:
                raise JSONError(f"The document is nested deeper than {max_depth} levels.")
        elif first in b"]}":
            depth -= 1
