"""The worker's log as JSON lines: one for each request, with the ids to find it by and nothing of what it holds."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elude_runtime.api.seen import Seen

requests = logging.getLogger("elude_runtime.requests")
# version, trace id, parent id, flags (W3C Trace Context, section 3.2.2)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_METRICS = "ts.metrics"  # TorchServe reads these lines, and wants them as they are


class JSONLines(logging.Formatter):
    """A record as one JSON object on one line: time, level, logger, message, the `fields` that it carries, traceback.

    No text in it can break the line, so that none can forge a metric or another record.
    """

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit the message
            message = str(record.msg)
        if record.name.startswith(_METRICS):
            return " ".join(message.split())
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_request(seen: Seen, request_id: str, traceparent: str, model: Mapping[str, str]) -> None:
    """A line for one row. request_id: the server's own; seen.identity: the client's id, of safe characters."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "id": seen.identity or None,
        **trace_of(traceparent),
        **model,
        "kind": seen.kind,
        "status": seen.status,
        "seconds": round(seen.seconds, 5),
        "images": seen.images,
        "problems": list(seen.problems) or None,
        "policies": list(seen.policies) or None,
        "edits": seen.edits or None,
        "received_bytes": seen.received,
        "sent_bytes": seen.sent,
    }
    requests.info("request", extra={"fields": {key: value for key, value in fields.items() if value is not None}})


def trace_of(traceparent: str) -> dict[str, str]:
    """trace_id and span_id of a valid header; nothing of any other."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or traceparent.startswith("ff") or not int(found[1], 16) or not int(found[2], 16):
        return {}
    return {"trace_id": found[1], "span_id": found[2]}
