"""Problems: what went wrong with one request, as an RFC 9457 document that says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from elude_runtime.api.schema.reply import ProblemDocument, ProblemError

# type: (status, title). The type is a stable name that clients may switch on.
PROBLEMS: dict[str, tuple[int, str]] = {
    "not-json": (400, "The body is not JSON"),
    "unknown-route": (404, "Unknown sub-route"),
    "other-checkpoint": (412, "Another checkpoint is served"),
    "image-too-large": (413, "The image is too large"),
    "unsupported-content-type": (415, "Unsupported content type"),
    "invalid-document": (422, "The document does not validate"),
    "invalid-image": (422, "The image cannot be decoded"),
    "unknown-feature": (422, "Unknown feature"),
    "unknown-layer": (422, "Unknown layer"),
    "unknown-label": (422, "Unknown label"),
    "unknown-vector": (422, "Unknown vector"),
    "unknown-policy": (422, "Unknown policy"),
    "invalid-target": (422, "The target does not fit the model"),
    "invalid-edit": (422, "The edits cannot be carried out"),
    "limit-exceeded": (422, "A limit is exceeded"),
    "response-too-large": (422, "The response would be too large"),
    "internal-error": (500, "Internal error"),
    "non-finite-output": (500, "The model's output is not finite"),
    "overloaded": (503, "Too much work at once"),
}


class Problem(Exception):
    """Ends the work on one request; the other rows of its batch go on. headers: of the reply."""

    def __init__(
        self, kind: str, detail: str, errors: list[ProblemError] | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.errors, self.headers = kind, detail, errors, dict(headers or {})
        self.identity = ""  # the client's, where the document could be read

    @property
    def status(self) -> int:
        return PROBLEMS[self.kind][0]

    def within(self, place: Sequence[str | int]) -> Problem:
        """The same, its errors at their places in the document around the one that it is about."""
        for error in self.errors or []:
            error.loc[:0] = place
        return self

    def document(self) -> ProblemDocument:
        status, title = PROBLEMS[self.kind]
        return ProblemDocument(type=self.kind, title=title, status=status, detail=self.detail, errors=self.errors)


def at(loc: Sequence[str | int], msg: str, suggestions: list[str] | None = None) -> list[ProblemError]:
    """One entry of `errors`: where in the document, what, and the closest known names."""
    return [ProblemError(loc=list(loc), msg=msg, suggestions=suggestions or None)]


def invalid_document(error: ValidationError, document: Any) -> Problem:
    """A failed validation. Values of the client are not echoed; at most 20 places are named."""
    errors = [
        ProblemError(loc=_place(e["loc"], document), msg=_short(e["msg"].removeprefix("Value error, ")))
        for e in islice(error.errors(include_input=False, include_url=False), 20)
    ]
    first = errors[0]
    where = ".".join(map(str, first.loc)) or "the document"
    return Problem("invalid-document", f"{where}: {first.msg}.", errors)


def _short(message: str) -> str:
    """A message that quotes the client, cut in the middle."""
    return message if len(message) <= 300 else f"{message[:150]} … {message[-100:]}"


def _leads_on(value: Any, part: Any) -> bool:
    """Whether a place can go on from this value. A union's branch may be called like a key that stands beside it."""
    return isinstance(value, list) if isinstance(part, int) else isinstance(value, dict)


def _place(loc: tuple[Any, ...], document: Any) -> list[str | int]:
    """A place as a client knows it: pydantic also names the branches of a union that it tried."""
    found: list[str | int] = []
    for number, part in enumerate(loc):
        if isinstance(document, dict) and isinstance(part, str):
            if number < len(loc) - 1 and not _leads_on(document.get(part), loc[number + 1]):
                continue
            document = document.get(part)
        elif isinstance(document, list) and isinstance(part, int) and 0 <= part < len(document):
            document = document[part]
        elif number < len(loc) - 1 or not isinstance(document, dict):
            continue
        found.append(part if isinstance(part, int) else str(part)[:80])
    return found
