"""TorchServe's adapter: turns a batch of its requests into the engine's rows, and the replies back; decides nothing.

TorchServe imports this file by its bare name and wants exactly one class in it. At import time it needs the standard
library only, because TorchServe reports an ImportError here as a missing `ts.torch_handler` module.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from http import HTTPStatus
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# `elude serve` looks for this mark in the worker's log, to say why a model did not load.
LOAD_ERROR_MARK = "ELUDE_LOAD_ERROR"
# TorchServe kills the worker, and with it the other rows of the batch, over one reply above max_response_size
# (6,553,500 bytes by default). The engine bounds its documents below this; here is the last line of defence.
LARGEST_REPLY_BYTES = 6_500_000


class EludeHandler:
    """One checkpoint in one TorchServe worker."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._monitor: Any = None
        self._row: Any = None
        self._busy: int | None = None

    def initialize(self, context: Any) -> None:
        """Opens the checkpoint that the archive carries, with the package it carries; raises if it cannot serve it."""
        model_dir = Path(context.system_properties["model_dir"])
        # The archive's own package goes before an installed one: the code and the checkpoint were made for each other.
        sys.path.insert(0, str(model_dir))
        # By default TorchServe parses JSON bodies itself, forgiving duplicate keys and NaN. It asks this variable for
        # every request, and this process serves one model only.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        # Pillow warns of odd bytes in words that quote them, and Python remembers each warning that it has not met yet.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            with _no_collection():
                from elude_runtime.api.config import ServingConfig
                from elude_runtime.api.engine import Engine, Row
                from elude_runtime.metrics.logs import JSONLines
                from elude_runtime.metrics.monitor import Monitor

            # TorchServe takes lines of this output that begin with `[METRICS]` for metrics: no text may begin one.
            for output in logging.getLogger().handlers:
                output.setFormatter(JSONLines())
            config = ServingConfig.resolve((context.model_yaml_config or {}).get("elude"))
            gpu = context.system_properties.get("gpu_id")
            if gpu is not None and config.device == "auto":
                config = config.model_copy(update={"device": f"cuda:{gpu}"})
            model = (context.manifest or {}).get("model", {})
            self._engine = Engine.open(
                model_dir / "checkpoint",
                config,
                name=context.model_name or model.get("modelName", ""),
                version=str(model.get("modelVersion", "1.0")),
            )
            self._row, self._monitor = Row, Monitor(self._engine)
            self._busy = _open_mark()
            # What is loaded stays: the collector need not look through it in the middle of a request ever again.
            gc.collect()
            gc.freeze()
        except Exception as error:
            # The package's own errors are sentences for people; others need their name to be understood.
            ours = any(kind.__name__ == "EludeError" for kind in type(error).__mro__)
            reason = str(error) if ours else f"{type(error).__name__}: {error}"
            logger.error("%s %s", LOAD_ERROR_MARK, " ".join(reason.split()))
            raise

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """One reply text for every request of the batch; status and headers of each row are set on `context`."""
        self._mark_busy(b"1")
        try:
            return self._reply(data, context)
        finally:
            self._mark_busy(b"0")

    def _reply(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        if not data:
            return []
        if data == [{}] and context.get_request_header(0, "describe") == "True":
            return [json.dumps(self.describe_handle())]
        rows = [self._read(index, item, context) for index, item in enumerate(data)]
        replies = self._answer(rows)
        bodies = [self._write(index, reply, context) for index, reply in enumerate(replies)]
        try:
            self._measure(self._monitor.saw(rows, replies), context)
        except Exception:  # the answers are there, and go out
            logger.exception("metrics of a batch failed")
        return bodies

    def describe_handle(self) -> dict[str, Any]:
        """What the management port shows as `customizedMetadata`."""
        try:
            return dict(self._engine.describe())
        except Exception:
            logger.exception("the engine failed to describe itself")
            return {"error": "The description failed; the server's log says why."}

    def _mark_busy(self, mark: bytes) -> None:
        if self._busy is not None:
            with suppress(OSError):  # a full disk: a stop may wait too short or too long
                os.pwrite(self._busy, mark, 0)

    def _answer(self, rows: list[Any]) -> list[Any]:
        """The engine's replies, None for a row over which it failed.

        The engine answers for bad rows itself. Should it raise all the same, each row is tried alone, so that the
        guilty one does not take its neighbours with it.
        """
        try:
            replies = list(self._engine.answer(rows))
            if len(replies) != len(rows):
                raise RuntimeError(f"the engine gave {len(replies)} replies for {len(rows)} rows")
            return replies
        except Exception:
            logger.exception("the engine failed on %d row(s), requests %s", len(rows), [row.request_id for row in rows])
        return [None] if len(rows) == 1 else [reply for row in rows for reply in self._answer([row])]

    def _read(self, index: int, item: dict[str, Any], context: Any) -> Any:
        """One request as the engine's `Row`, from nothing but this row's own parts and headers."""
        headers = context.get_all_request_header(index) or {}
        # A part of a form leaves a dictionary under its own name among the headers; those are no headers.
        by_name = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
        return self._row(
            parts={name: _as_bytes(value) for name, value in item.items()},
            content_type=by_name.get("content-type", "").partition(";")[0].strip().lower(),
            # These two are TorchServe's own, always in lower case: a client's `Explain: True` is not asked.
            explain=headers.get("explain") == "True",
            route=headers["url_path"].strip("/") if isinstance(headers.get("url_path"), str) else "",
            request_id=context.get_request_id(index) or "",
            traceparent=by_name.get("traceparent", ""),
        )

    @staticmethod
    def _measure(samples: list[tuple[str, float, list[str]]], context: Any) -> None:
        """Hands samples to TorchServe's metrics, those that the server's metrics.yaml declares."""
        declared = {name: metric for kind in context.metrics.cache.values() for name, metric in kind.items()}
        for name, amount, labels in samples:
            if name in declared:
                # TorchServe takes plain decimals only, never 1e-05, and wants its own two dimensions last.
                value = Decimal(f"{amount:.6f}")
                declared[name].add_or_update(value, [*labels, context.model_name, "Model"])

    def _write(self, index: int, reply: Any, context: Any) -> str:
        """Puts the reply's status and headers on the row, and gives its body."""
        if reply is None:
            request = context.get_request_id(index) or "unknown"
            detail = f"An unexpected error; the server's log has the reason (request {request})."
            return _problem(index, context, 500, "internal-error", "Internal error", detail)
        size = len(reply.body) if reply.body.isascii() else len(reply.body.encode("utf-8", "replace"))
        if size > LARGEST_REPLY_BYTES:
            detail = f"The reply has {size} bytes, more than the {LARGEST_REPLY_BYTES} that the server can send."
            return _problem(index, context, 422, "response-too-large", "The response would be too large", detail)
        _set_status(index, reply.status, reply.content_type, context)
        for name, value in reply.headers.items():
            if _is_plain(name) and _is_plain(value):
                context.set_response_header(index, name, value)
        # A lone surrogate cannot be written as UTF-8, and TorchServe's worker would die of it.
        return str(reply.body.encode("utf-8", "replace").decode("utf-8"))


@contextmanager
def _no_collection() -> Iterator[None]:
    """No collector's runs while modules are imported, and none over them later. Imports leave next to no garbage, and
    looking for it takes a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _problem(index: int, context: Any, status: int, kind: str, title: str, detail: str) -> str:
    """A problem document (RFC 9457) of the adapter's own, with the engine's names."""
    _set_status(index, status, "application/problem+json", context)
    return json.dumps({"type": kind, "title": title, "status": status, "detail": detail})


def _set_status(index: int, status: int, content_type: str, context: Any) -> None:
    """Sets a row's status, content type and a constant reason (TorchServe counts its characters and sends bytes)."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Status"
    context.set_response_status(status, phrase, index)
    context.set_response_content_type(index, content_type if _is_plain(content_type) else "application/json")


def _open_mark() -> int | None:
    """This worker's file in ELUDE_BUSY_DIR: `elude serve` waits for a 0 in each before it ends TorchServe."""
    folder = os.environ.get("ELUDE_BUSY_DIR")
    if not folder:
        return None
    try:
        mark = os.open(Path(folder) / f"{os.getpid()}.busy", os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(mark, b"0", 0)
    except OSError as error:  # a stop may wait too short; the model is served all the same
        logger.error("%s cannot be written (%s): a stop does not wait for this worker", folder, error.strerror)
        return None
    return mark


def _as_bytes(value: Any) -> bytes:
    """The part's bytes, also where a TorchServe that was not told otherwise has decoded it already."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def _is_plain(text: str) -> bool:
    """Whether a header can carry the text: printable ASCII."""
    return text.isascii() and text.isprintable()
