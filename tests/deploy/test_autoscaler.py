"""The autoscaler's metric: the adapter's rule makes it, from TorchServe's series, and it is what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY, KUBERNETES, kustomize, load, of_kind


def adapter_rule() -> dict[str, Any]:
    (rule,) = load(KUBERNETES / "prometheus-adapter-values.yaml")["rules"]["custom"]
    return dict(rule)


def test_the_autoscalers_metric_is_the_adapters_and_its_series_are_torchserves() -> None:
    (scaler,) = of_kind(kustomize(KUBERNETES / "base"), "HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    rule = adapter_rule()
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    used = set(re.findall(r"\bts_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    assert used == {"ts_queue_latency_microseconds", "ts_inference_requests_total"}
    assert used <= {counter["name"] for counter in load(DEPLOY / "metrics.yaml")["ts_metrics"]["counter"]}


def test_the_adapters_query_is_the_mean_time_in_the_queue(tmp_path: Path) -> None:
    """Filled in as the adapter does, for a busy pod with two models and an idle one, by Prometheus' own engine."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here, which evaluates Prometheus' expressions")
    query = adapter_rule()["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="elude",pod=~"busy|idle"')
    rule = {"record": "queue", "expr": query.replace("<<.GroupBy>>", "pod")}
    series = [
        # 10 requests in 15 s that waited 30 ms each, 30 that waited 70 ms each: 60 ms in the mean
        ("ts_inference_requests_total", "busy", "demo", "0+10x20"),
        ("ts_queue_latency_microseconds", "busy", "demo", "0+300000x20"),
        ("ts_inference_requests_total", "busy", "demo-explain", "0+30x20"),
        ("ts_queue_latency_microseconds", "busy", "demo-explain", "0+2100000x20"),
        ("ts_inference_requests_total", "idle", "demo", "7+0x20"),
        ("ts_queue_latency_microseconds", "idle", "demo", "900000+0x20"),
    ]
    test = {
        "interval": "15s",
        "input_series": [
            {"series": f'{name}{{namespace="elude",pod="{pod}",model_name="{model}"}}', "values": values}
            for name, pod, model, values in series
        ],
        "promql_expr_test": [
            {"expr": "queue", "eval_time": "5m", "exp_samples": [
                {"labels": 'queue{pod="busy"}', "value": 60}, {"labels": 'queue{pod="idle"}', "value": 0},
            ]}
        ],
    }  # fmt: skip
    rules = {"groups": [{"name": "adapter", "interval": "15s", "rules": [rule]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))
    said = subprocess.run(["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
