"""One family of errors for all that can go wrong with a request: the service, TorchServe, the network."""

from __future__ import annotations

import json
import re

import httpx
from pydantic import ValidationError

from elude_runtime.api.problems import invalid_document
from elude_runtime.api.schema.reply import ProblemDocument
from elude_runtime.client.lenient import read_reply
from elude_runtime.errors import EludeError

# type: (status where there is none, title). Everything that is not the service's own begins with "server-".
SERVER_PROBLEMS: dict[str, tuple[int, str]] = {
    "server-unauthorized": (401, "The server refused the token"),
    "server-unknown-model": (404, "The server does not serve this model"),
    "server-unknown-route": (404, "The server does not know this address"),
    "server-too-large": (413, "The request is too large for the server"),
    "server-error": (500, "The server failed"),
    "server-reply": (502, "The reply is not the service's"),
    "server-unavailable": (503, "The server cannot take the request now"),
    "server-unreachable": (503, "No connection to the server"),
    "server-timeout": (504, "The server did not answer in time"),
    "server-out-of-memory": (507, "The server ran out of memory"),
}
_BY_EXCEPTION = {
    "InvalidKeyException": "server-unauthorized",
    "ModelNotFoundException": "server-unknown-model",
    "ModelVersionNotFoundException": "server-unknown-model",
    "ResourceNotFoundException": "server-unknown-route",
    "ServiceUnavailableException": "server-unavailable",
}
_BY_STATUS = {
    401: "server-unauthorized", 403: "server-unauthorized", 404: "server-unknown-route", 408: "server-timeout",
    413: "server-too-large", 429: "server-unavailable", 503: "server-unavailable", 504: "server-timeout",
    507: "server-out-of-memory",
}  # fmt: skip
_ADVICE = {
    "server-unauthorized": "The server refused the token; give the inference key of its key_file.json as `token`.",
    "server-unknown-model": "The server does not serve this model or version; check `model` and `version`.",
    "server-unknown-route": "The server does not know this address; `url` is the inference address, without a path.",
    "server-too-large": "The request is larger than the server takes; send smaller or fewer images.",
    "server-error": "The server failed on this request; its log has the reason.",
    "server-reply": "The reply is not this service's; check that `url` leads to it and not to another server.",
    "server-unavailable": "The server cannot take the request now; ask again later.",
    "server-unreachable": "There is no connection to the server; check `url` and that it runs.",
    "server-timeout": "The server did not answer in time; ask for less, or raise `timeout`.",
    "server-out-of-memory": "The server ran out of memory on this request; send smaller or fewer images.",
}
_QUOTED = 200


class ProblemError(EludeError):
    """A request that was not answered. problem: what is wrong, whose `type` one may switch on; status: of the reply,
    None where none came (no connection, no answer in time, a document refused before it was sent)."""

    def __init__(self, problem: ProblemDocument, status: int | None) -> None:
        super().__init__(problem, status)
        self.problem, self.status = problem, status

    @property
    def type(self) -> str:
        return self.problem.type

    def __str__(self) -> str:
        near = [name for error in self.problem.errors or [] for name in error.suggestions or []]
        said = "Did you mean" in self.problem.detail
        hint = f" Close to it: {', '.join(near[:3])}." if near and not said else ""
        return f"{self.problem.detail}{hint} ({self.problem.type})"


def problem_of(response: httpx.Response) -> ProblemError:
    """What a response that is no answer says, whoever wrote it: the service, TorchServe, or a proxy before it."""
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        try:
            return ProblemError(read_reply(ProblemDocument, response.content), response.status_code)
        except ValidationError:
            pass
    said, exception = _words(response)
    fallback = "server-error" if response.status_code >= 300 else "server-reply"
    kind = _BY_EXCEPTION.get(exception) or _BY_STATUS.get(response.status_code, fallback)
    return _server_problem(kind, said, response.status_code)


def is_torchserves(response: httpx.Response) -> bool:
    """Whether TorchServe itself says that it failed, in its own form: its worker died or was ended."""
    return _words(response)[1] == "InternalServerException"


def problem_of_failure(error: httpx.HTTPError) -> ProblemError:
    """No response at all."""
    kind = "server-timeout" if isinstance(error, httpx.TimeoutException) else "server-unreachable"
    return _server_problem(kind, str(error) or type(error).__name__, None)


def problem_of_document(error: ValidationError, document: object) -> ProblemError:
    """A document that the service would refuse, refused before it is sent."""
    return ProblemError(invalid_document(error, document).document(), None)


def problem_of_reply(response: httpx.Response, error: ValidationError) -> ProblemError:
    """A 200 that does not hold the document asked for."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "the body"
    return _server_problem("server-reply", f"{where}: {first['msg']}", response.status_code)


def _server_problem(kind: str, said: str, status: int | None) -> ProblemError:
    usual, title = SERVER_PROBLEMS[kind]
    detail = _ADVICE[kind] + (f" It said: {said}" if said else "")
    return ProblemError(ProblemDocument(type=kind, title=title, status=status or usual, detail=detail), status)


def _words(response: httpx.Response) -> tuple[str, str]:
    """(what the response says to a person, TorchServe's name of the error or ""), short and on one line."""
    text = response.text[:20_000]
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if isinstance(values, dict):
        for key in ("message", "detail", "error"):  # TorchServe's own, and two that proxies use
            if isinstance(values.get(key), str):
                return _one_line(values[key]), str(values.get("type", ""))
    if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return _one_line(title.group(1) if title else ""), ""
    return _one_line(text), ""


def _one_line(text: str) -> str:
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= _QUOTED else words[: _QUOTED - 2] + " …"
