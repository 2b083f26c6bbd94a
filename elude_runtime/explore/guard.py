"""Who may speak to the explorer: this run's user, from this run's pages, and nobody through them.

It holds the server's key and may write policies beside the checkpoint, and other users of the host and web pages that
the user has open can reach a loopback address too. So:

- Every request needs the run's secret, as a cookie (`HttpOnly`, `SameSite=Lax`), which the printed address sets:
  without it, TorchServe's token authorization would end at this port for every user of the host.
- `Host` must be a loopback name, so that a foreign name that resolves here (DNS rebinding) gets nothing. Its port may
  be another one, as through an SSH tunnel.
- What changes something, or costs work, is a POST with a header of our own, which no foreign page can send without a
  preflight, and there is none; and `Origin` must be the address itself.
- Every reply carries a content security policy without inline scripts and without any other host.
"""

from __future__ import annotations

import hmac
import sys
import traceback
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-elude-explore"
START_PAGE = "/explore.html"
_HOSTS = {"127.0.0.1", "localhost", "[::1]"}
_READING = {"GET", "HEAD"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_LOCKED = (
    "This explorer was started by another run. Open the whole address, with its key, that `elude explore` printed in "
    "the terminal.\n"
)


class Guard:
    """Lets through what may pass, and puts the security headers on every reply."""

    def __init__(self, app: ASGIApp, secret: str, cookie: str) -> None:
        """cookie: its name, which has to be this run's own, for all ports of a host share their cookies."""
        self._app, self._secret, self._cookie = app, secret, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        try:
            refused = self._refusal(scope)
            await (refused or self._app)(scope, receive, sending)
        except ClientDisconnect:
            return  # the page asked for something newer
        except Exception as error:
            # Where it happened, and not what it says: messages hold what users sent.
            place = traceback.extract_tb(error.__traceback__)[-1]
            print(f"explorer: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}", file=sys.stderr)
            if not started:
                await PlainTextResponse("Internal error", 500)(scope, receive, sending)

    def _refusal(self, scope: Scope) -> Response | None:
        """The reply to what may not pass; None for what may."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in _HOSTS and host not in _HOSTS:
            return PlainTextResponse("The explorer answers on loopback names only.\n", 421)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        if path == "/" and scope["method"] == "GET" and self._is_secret(given):
            answer = RedirectResponse(START_PAGE, 303, headers={"Cache-Control": "no-store"})
            answer.set_cookie(self._cookie, self._secret, httponly=True, samesite="lax")
            return answer
        if not self._is_secret(_cookie(headers.get("cookie", ""), self._cookie)):
            return PlainTextResponse(_LOCKED, 403)
        if headers.get("sec-fetch-site", "none") not in {"same-origin", "none"} and path.startswith("/api/"):
            return PlainTextResponse("Requests of other sites are not answered.\n", 403)
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return PlainTextResponse("Requests of other origins are not answered.\n", 403)
        if scope["method"] not in _READING and HEADER not in headers:
            return PlainTextResponse(f"A request of the explorer's pages has the header {HEADER}.\n", 403)
        return None

    def _is_secret(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._secret.encode())


def _cookie(text: str, name: str) -> str:
    """The value of a cookie. All ports of a host share their cookies, and a strict parser would lose ours over another
    program's malformed one."""
    pairs = (part.strip().partition("=") for part in text.split(";"))
    return next((value for own, _, value in pairs if own == name), "")
