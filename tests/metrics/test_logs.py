"""The request log: one JSON line each, with ids, and nothing of what a request holds."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from elude_runtime.api.seen import Seen
from elude_runtime.metrics.logs import JSONLines, log_request, trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def lines() -> Any:
    output = logging.StreamHandler(io.StringIO())
    output.setFormatter(JSONLines())
    root, before = logging.getLogger(), logging.getLogger().level
    root.addHandler(output)
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in output.stream.getvalue().splitlines()]
    root.removeHandler(output)
    root.setLevel(before)


def test_a_request_in_one_line(lines: Any) -> None:
    seen = Seen("steer", 200, 0.0123456, "my-id", images=1, policies=("quiet",), edits=1, received=10, sent=20)
    log_request(seen, "server-id", f"00-{TRACE}-{SPAN}-01", {"model": "m", "version": "1.0"})
    (line,) = lines()
    time = line.pop("time")
    assert time.endswith("+00:00") and line == {
        "level": "INFO", "logger": "elude_runtime.requests", "message": "request", "request_id": "server-id",
        "id": "my-id", "trace_id": TRACE, "span_id": SPAN, "model": "m", "version": "1.0", "kind": "steer",
        "status": 200, "seconds": 0.01235, "images": 1, "policies": ["quiet"], "edits": 1, "received_bytes": 10,
        "sent_bytes": 20,
    }  # fmt: skip


@pytest.mark.parametrize(
    "header",
    ["", "x", f"00-{TRACE}-{SPAN}", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
     f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01\n", f"00-{TRACE}-{SPAN}-01-more"],
)  # fmt: skip
def test_a_traceparent_that_is_none_is_left_out(header: str) -> None:
    assert trace_of(header) == {}


def test_records_of_others_with_their_traceback(lines: Any) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("other").exception("failed")
    (line,) = lines()
    assert line["message"] == "failed" and line["traceback"].endswith("ValueError: two\nlines")


def test_arguments_that_do_not_fit_their_message() -> None:
    record = logging.LogRecord("other", logging.INFO, "", 0, "%d things", ("no",), None)
    assert json.loads(JSONLines().format(record))["message"] == "%d things"
