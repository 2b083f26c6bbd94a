"""Where the service is, how it is asked and which checkpoint it is to serve; what both clients share."""

from __future__ import annotations

import re
from urllib.parse import quote

import elude_runtime
from elude_runtime.api.schema.request import Expect
from elude_runtime.errors import SettingsError


class Address:
    """The arguments of `Client` and `AsyncClient`, checked. Raises SettingsError."""

    def __init__(
        self, url: str, model: str, token: str | None, version: str | None, retries: int, checkpoint_sha256: str | None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise SettingsError(f"The address {url!r} is no http:// or https:// address; give the inference address.")
        if retries < 0:
            raise SettingsError(f"{retries} retries cannot be made; give 0 or more.")
        if checkpoint_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", checkpoint_sha256):
            raise SettingsError(
                f"{checkpoint_sha256!r} is no digest of 64 hexadecimal digits; `describe` shows the checkpoint's."
            )
        of_version = f"/{quote(version, safe='')}" if version is not None else ""
        self._path = f"{url.rstrip('/')}/predictions/{quote(model, safe='')}{of_version}"
        self._headers = {"User-Agent": f"elude-client/{elude_runtime.__version__}", "Accept": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._retries = retries
        self._expect = None if checkpoint_sha256 is None else Expect(checkpoint_sha256=checkpoint_sha256)
