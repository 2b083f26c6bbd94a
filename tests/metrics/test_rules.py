"""Rules, alerts, dashboard and runbook against promtool, and against the metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from elude_runtime.metrics.declared import DECLARED, of_port

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
_METRIC = re.compile(r"\b(?:elude|ts|Requests|Worker|Queue)[A-Za-z_0-9]*(?::[a-z0-9_]+)*")
_OWN = {"elude-torchserve", "elude-exporter"}  # job names

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian or Ubuntu: sudo apt-get install prometheus)",
)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def known() -> dict[str, set[str] | None]:
    """Every name that a query may use, with the labels that it may ask for; None where the rule decides."""
    found: dict[str, set[str] | None] = {rule["record"]: None for rule in rules() if "record" in rule}
    declared = yaml.safe_load((DEPLOY / "metrics.yaml").read_text())
    for section in ("ts_metrics", "model_metrics"):
        for kind, metrics in declared[section].items():
            for metric in metrics:
                for suffix in ("_bucket", "_count", "_sum") if kind == "histogram" else ("",):
                    found[metric["name"] + suffix] = {*metric["dimensions"], "le"}
    for metric in of_port("exporter"):
        for suffix in ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",):
            found[metric.name + suffix] = {"model", "pid", "le", *metric.labels}
    return found


def queries() -> list[str]:
    board = json.loads((DEPLOY / "grafana" / "elude.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    variables = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    return [*found, *variables, *(rule["expr"] for rule in rules())]


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [["check", "rules", "rules.yml"], ["check", "config", "prometheus.yml"], ["test", "rules", "rules.test.yml"]],
    ids=" ".join,
)
def test_promtool_agrees(command: list[str]) -> None:
    ran = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "FAILED" not in ran.stdout, ran.stdout + ran.stderr


def test_every_alert_is_made_to_fire() -> None:
    cases = [
        c for t in yaml.safe_load((RULES.parent / "rules.test.yml").read_text())["tests"] for c in t["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts().keys()


def test_every_alert_has_its_paragraph_in_the_runbook() -> None:
    text = (DEPLOY / "runbook.md").read_text()
    paragraphs = dict(re.findall(r"^## (\w+)\n\n(.+?)(?=\n\n## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(paragraphs) == list(alerts()) and all(len(said) > 80 for said in paragraphs.values())
    for name, alert in alerts().items():
        assert alert["annotations"]["runbook"] == f"deploy/runbook.md#{name.lower()}"
        assert alert["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("query", queries())
def test_queries_use_metrics_and_labels_that_there_are(query: str) -> None:
    names = known()
    bare = re.sub(r'"[^"]*"', '""', query)  # texts of labels are no names
    used = set(_METRIC.findall(bare))
    assert used - names.keys() == set(), "unknown metrics"
    for name, selector in re.findall(r"([A-Za-z_:0-9]+)\{([^}]*)\}", bare):
        labels = names.get(name)
        asked = set(re.findall(r"(\w+)\s*(?:=|!)", selector))
        assert labels is None or asked <= labels | {"job", "instance"}, (name, asked)


def test_what_torchserves_port_carries_is_declared_to_it() -> None:
    """metrics.yaml has the handler's metrics with their labels, in order, and TorchServe's own two after them."""
    section = yaml.safe_load((DEPLOY / "metrics.yaml").read_text())["model_metrics"]
    theirs = {m["name"]: (kind, m["dimensions"]) for kind, metrics in section.items() for m in metrics}
    assert theirs.pop("PredictionTime")
    ours = {m.name: (m.kind, [*m.labels, "ModelName", "Level"]) for m in of_port("torchserve")}
    assert theirs == ours


def test_every_metric_is_looked_at() -> None:
    """A metric that neither a rule nor the dashboard uses is one too many."""
    text = " ".join(queries())
    unused = [m.name for m in DECLARED.values() if m.name not in text]
    assert unused == []


def test_the_dashboards_panels_do_not_overlap() -> None:
    board = json.loads((DEPLOY / "grafana" / "elude.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not own & cells, panel["title"]
        cells |= own
