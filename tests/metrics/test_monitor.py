"""The monitor on a real engine: what it samples for the server's port, files for the exporter, and never an answer."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Rewritten
from support import encoded, picture

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.metrics.monitor import Monitor

PNG = encoded(picture(200))
Opened = Callable[..., tuple[Engine, Monitor]]


def row(document: dict | None = None, body: bytes = PNG, kind: str = "image/png") -> Row:
    if document is None:
        return Row({"body": body}, kind, False, "", "server-id")
    parts = {"image": PNG, "request": json.dumps(document).encode()}
    return Row(parts, "multipart/form-data", False, "", "server-id")


@pytest.fixture
def opened(vit: Rewritten) -> Opened:
    def make(**settings: object) -> tuple[Engine, Monitor]:
        engine = Engine.open(vit.path, ServingConfig.model_validate(settings), name="tiny", version="1.0")
        return engine, Monitor(engine)

    return make


def test_kinds_statuses_problems_and_bytes(opened: Opened) -> None:
    engine, monitor = opened()
    layer = engine.model.layers[0]
    edit = {"feature": f"{layer}/P0", "mode": "ablate"}
    rows = [
        row(), row(), row({"explain": {}}), row({"steer": {"edits": [edit]}}),
        row({"explain": {}, "steer": {"edits": [edit]}}), row({"activations": {"features": [f"{layer}/P0"]}}),
        row(body=b'{"op": "features"}', kind="application/json"),
        row(body=b'{"op": "describe"}', kind="application/json"),
        row(body=b"junk"), row({"steer": {"edits": [{"feature": "nonsense", "mode": "ablate"}]}}),
    ]  # fmt: skip
    replies = engine.answer(rows)
    samples = monitor.saw(rows, replies)
    counts = {tuple(labels): amount for name, amount, labels in samples if name == "elude_rows_total"}
    assert counts == {
        ("predict", "200"): 2, ("explain", "200"): 1, ("steer", "200"): 1, ("explain_steer", "200"): 1,
        ("activations", "200"): 1, ("features", "200"): 1, ("describe", "200"): 1, ("rejected", "422"): 2,
    }  # fmt: skip
    problems = {tuple(labels): amount for name, amount, labels in samples if name == "elude_problems_total"}
    assert problems == {("invalid-image",): 1, ("unknown-feature",): 1}
    received = [reply.seen.received for reply in replies if reply.seen]
    assert received == [sum(map(len, one.parts.values())) for one in rows]
    assert [reply.seen.sent for reply in replies if reply.seen] == [len(reply.body) for reply in replies]
    seconds = [amount for name, amount, _ in samples if name == "elude_request_seconds"]
    assert len(seconds) == len(rows) and min(seconds) > 0
    seen = replies[4].seen
    assert seen is not None and seen.edits == 1 and seen.work > 1 and seen.completeness
    assert {"decode", "forward", "steer", "explain", "explain_steered"} <= seen.stages.keys()


def test_the_log_has_the_clients_id_of_what_was_refused_too(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    engine, monitor = opened()
    documents: list[dict] = [
        {"id": "unread", "steer": {"edits": [{"feature": "nonsense", "mode": "ablate"}]}},
        {"id": "wrong", "nonsense": 1}, {"id": "not safe\n", "nonsense": 1}, {"id": 7},
    ]  # fmt: skip
    rows = [row(document) for document in documents]
    rows += [row(body=b'{"op": "features", "id": "looked"}', kind="application/json")]
    rows += [row(body=b'{"op": "features", "id": "astray", "layer": "x"}', kind="application/json")]
    with caplog.at_level(logging.INFO, "elude_runtime.requests"):
        monitor.saw(rows, engine.answer(rows))
    told = [(r.fields.get("id"), r.fields["status"]) for r in caplog.records if r.name.endswith("requests")]
    assert told == [("unread", 422), ("wrong", 422), (None, 422), (None, 422), ("looked", 200), ("astray", 422)]


def test_all_rows_of_a_batch_wait_for_its_last(opened: Opened) -> None:
    """TorchServe sends a batch's replies together."""
    engine, _ = opened()
    replies = engine.answer([row(), row(body=b'{"op": "describe"}', kind="application/json"), row(body=b"junk")])
    assert len({reply.seen.seconds for reply in replies if reply.seen}) == 1


def test_an_answer_that_was_not_given_counts_no_edits(opened: Opened) -> None:
    engine, _ = opened(max_response_bytes=10_000)
    layer = engine.model.layers[0]
    wish = {"top_features": 20, "heatmaps": "values", "level": "subunits"}
    (reply,) = engine.answer(
        [row({"explain": wish, "steer": {"edits": [{"feature": f"{layer}/P0", "mode": "ablate"}]}})]
    )
    assert reply.problem == "response-too-large" and reply.seen is not None
    assert (reply.seen.kind, reply.seen.edits, reply.seen.completeness) == ("explain_steer", 0, ())


def test_problems_inside_a_kserve_reply_are_counted(opened: Opened) -> None:
    engine, monitor = opened()
    document = {"instances": [{"image": {"b64": "AAAA"}}, {"image": {"b64": "%"}}]}
    one = row(body=json.dumps(document).encode(), kind="application/json")
    samples = monitor.saw([one], engine.answer([one]))
    assert ("elude_rows_total", 1, ["rejected", "200"]) in samples
    assert ("elude_problems_total", 2, ["invalid-image"]) in samples


def test_a_row_over_which_the_engine_failed(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    engine, monitor = opened()
    good = row()
    with caplog.at_level(logging.INFO, "elude_runtime.requests"):
        samples = monitor.saw([good, row()], [engine.answer([good])[0], None])
    assert ("elude_rows_total", 1, ["failed", "500"]) in samples
    assert [record.fields["status"] for record in caplog.records if record.name.endswith("requests")] == [200, 500]


def test_the_request_log_can_be_switched_off(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    engine, monitor = opened(log_requests=False)
    with caplog.at_level(logging.INFO, "elude_runtime.requests"):
        assert monitor.saw([row()], engine.answer([row()]))
    assert not [record for record in caplog.records if record.name.endswith("requests")]


def test_a_folder_that_cannot_be_used_costs_the_metrics_only(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    engine, monitor = opened(metrics_dir=tmp_path / "file")
    assert monitor.metrics is None and "The worker goes on" in caplog.text
    assert engine.answer([row()])[0].status == 200


def test_a_checkpoint_without_catalogue_says_why_no_drift_is_watched(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, monitor = opened(metrics_dir=tmp_path)
    try:
        assert monitor.drift is None and engine.watch is None and "elude catalogue" in caplog.text
        assert monitor.saw([row()], engine.answer([row()]))
        assert list(tmp_path.glob("histogram_*.db"))
    finally:
        monitor.close()


def test_metrics_that_fail_cost_no_answer(opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, monitor = opened(metrics_dir=tmp_path)
    try:
        assert monitor.metrics is not None
        monitor.metrics.saw = lambda batch: 1 / 0  # type: ignore[method-assign, assignment]
        assert monitor.saw([row()], engine.answer([row()])) == [] and "metrics of a batch failed" in caplog.text
    finally:
        monitor.close()


def test_a_row_that_finds_no_room_keeps_its_kind(opened: Opened) -> None:
    one = row({"explain": {}})
    (alone,) = opened()[0].answer([one])
    assert alone.seen is not None and alone.seen.work > 1
    room = math.ceil(alone.seen.work)
    engine, monitor = opened(max_work=room, max_vector_images=1, max_batch_work=room)
    samples = monitor.saw([one, one], engine.answer([one, one]))
    assert ("elude_rows_total", 1, ["explain", "200"]) in samples
    assert ("elude_rows_total", 1, ["explain", "503"]) in samples
    assert ("elude_problems_total", 1, ["overloaded"]) in samples
