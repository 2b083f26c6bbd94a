"""A typed HTTP client of the serving API: `Client`, `AsyncClient`, and the one family of errors, `ProblemError`."""

try:
    import httpx  # noqa: F401
except ImportError as error:  # pragma: no cover - the tests' environment has it
    raise ImportError("The client needs httpx; install elude-serving[client].") from error

from elude_runtime.client.client import AsyncClient, Client
from elude_runtime.client.problems import ProblemError

__all__ = ["AsyncClient", "Client", "ProblemError"]
