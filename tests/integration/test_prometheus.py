"""A real Prometheus with the shipped configuration and rules scrapes a running server."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
import yaml
from drift_reference import index, null

pytest.importorskip("ts", reason="TorchServe is not installed (pip install '.[dev]')")
import elude_runtime as elude
from elude_runtime.checkpoint.manifest import read_manifest
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.server_process import require_programs
from elude_runtime.cli.server_settings import free_ports
from elude_runtime.cli.torchserve import Server
from elude_runtime.demo.images import make_set, make_twins, write_folder
from elude_runtime.demo.model import load_demo_model
from elude_runtime.demo.rewrite import rewrite_demo
from elude_runtime.errors import EludeError
from elude_runtime.offline.catalogue.run import make_catalogue

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
LAYER = "blocks.1.mlp.fc2"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"
    ),
]


@dataclass(frozen=True)
class Watched:
    """A server, the images it may be sent, and the Prometheus that scrapes it."""

    server: Server
    images: list[Path]
    prometheus: str
    checkpoint: Path

    @property
    def sha256(self) -> str:
        return read_manifest(self.checkpoint).checkpoint_sha256

    def send(self, verb: str, content: bytes, **headers: str) -> httpx.Response:
        own = {"content-type": "application/octet-stream", **self.server.headers(), **headers}
        return httpx.post(f"{self.server.url}/{verb}/demo", content=content, headers=own, timeout=60)

    def form(self, image: Path, request: dict[str, Any]) -> httpx.Response:
        files = {"image": image.read_bytes(), "request": (None, json.dumps(request), "application/json")}
        return httpx.post(f"{self.server.url}/predictions/demo", files=files, headers=self.server.headers(), timeout=60)

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """The values of an instant query, by those of the labels, in alphabetical order of their names."""
        reply = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}).json()
        assert reply["status"] == "success", reply
        return {
            tuple(v for k, v in sorted(one["metric"].items()) if k != "__name__"): float(one["value"][1])
            for one in reply["data"]["result"]
        }

    def tells(self, expression: str, expected: dict[tuple[str, ...], float]) -> None:
        """Soon."""
        self.until(expression, lambda found: found == expected)

    def until(self, expression: str, holds: Callable[[dict[tuple[str, ...], float]], bool], seconds: float = 20) -> Any:
        """The first answer that holds. Fails with the last one."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.query(expression)
            if holds(found):
                return found
            assert time.monotonic() < deadline, (expression, found)
            time.sleep(0.3)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    try:
        require_programs()
    except EludeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("prometheus")
    model, config = load_demo_model()
    write_folder(folder / "images", make_set(240, seed=1, split="train"))
    rewrite_demo(model, config, folder / "images", folder / "ckpt")
    make_catalogue(folder / "ckpt", folder / "images", workers=0)
    build_archive(folder / "ckpt", folder / "store", name="demo")
    environment = {"ELUDE_THREADS": "1", "OMP_NUM_THREADS": "1", "ELUDE_DRIFT_SAMPLE": "1"}
    with Server(folder / "store", environment=environment) as server:
        (port,) = free_ports(1)
        settings = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(DEPLOY / "rules.yml")]
        urls = {"elude-torchserve": server.metrics_url, "elude-exporter": server.exporter_url}
        for job in settings["scrape_configs"]:
            job["static_configs"][0]["targets"] = [str(urls[job["job_name"]]).removeprefix("http://")]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            server.wait_ready(180)
            made = Watched(
                server, sorted((folder / "images").rglob("*.png")), f"http://127.0.0.1:{port}",
                folder / "ckpt",
            )  # fmt: skip
            deadline = time.monotonic() + 30
            while True:
                try:
                    made.until("up", lambda found: list(found.values()) == [1, 1])
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()
                    time.sleep(0.2)
            # counters are seen at 0 once before there is traffic
            made.until("elude_drift_bucket_total", lambda found: len(found) > 10)
            yield made
        finally:
            process.terminate()
            process.wait(20)


def total(name: str, *labels: str) -> str:
    return f"sum by ({','.join(labels)}) ({name})" if labels else f"sum({name})"


def test_what_happened_is_what_prometheus_says(watched: Watched) -> None:
    for image in watched.images[:6]:
        assert watched.send("predictions", image.read_bytes()).status_code == 200
    explained = watched.send("explanations", watched.images[0].read_bytes()).json()
    edit = {"feature": f"{LAYER}/P0", "mode": "ablate"}
    steered = watched.form(watched.images[0], {"id": "mine", "steer": {"edits": [edit]}})
    assert steered.status_code == 200
    bad = watched.send("predictions", b"no image", traceparent=f"00-{TRACE}-00f067aa0ba902b7-01")
    assert bad.status_code == 422

    # the two ports are scraped one after the other
    watched.tells(
        total("elude_rows_total", "kind", "status"),
        {("predict", "200"): 6, ("explain", "200"): 1, ("steer", "200"): 1, ("rejected", "422"): 1},
    )
    watched.tells(
        total("elude_request_seconds_count", "kind"),
        {("predict",): 6, ("explain",): 1, ("steer",): 1, ("rejected",): 1},
    )
    seconds = watched.query(total("elude_request_seconds_sum", "kind"))
    assert min(seconds.values()) > 0
    watched.tells(total("elude_problems_total", "type"), {("invalid-image",): 1})
    watched.tells(total("elude_edits_total"), {(): 1})
    watched.tells(total("elude_batch_rows_sum"), {(): 9})
    (layer,) = explained["explanations"][0]["layers"]
    (errors,) = watched.query("elude_completeness_error_sum").values()
    assert errors == pytest.approx(layer["completeness_error"], rel=1e-5)
    assert watched.query(total("elude_stage_seconds_count", "stage"))["explain",] == 1
    watched.tells("max by (checkpoint_sha256, model, version) (elude_model_info)", {(watched.sha256, "demo", "1.0"): 1})
    received = watched.query(total("elude_received_bytes_total"))[()]
    assert received > sum(len(image.read_bytes()) for image in watched.images[:6])

    lines = [json.loads(line) for line in (watched.server.run_dir / "logs" / "worker.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["logger"] == "elude_runtime.requests"]
    assert [line["kind"] for line in told] == ["predict"] * 6 + ["explain", "steer", "rejected"]
    assert told[-1]["trace_id"] == TRACE and told[-1]["problems"] == ["invalid-image"]
    assert told[-2]["id"] == "mine" and "no image" not in json.dumps(told)
    assert len({line["request_id"] for line in told}) == 9


def test_drift_is_seen_and_by_name(watched: Watched) -> None:
    """Every picture wears the demo's watermark: the concept that drifts most is the one that the watermark changes
    most, and no other comes near it."""
    twins = make_twins(40, seed=5)
    model = elude.load(watched.checkpoint)
    transform = model.data_config.transform()
    without, marked = (torch.stack([transform(pair[n].image) for pair in twins]) for n in range(2))
    changed = (model.concepts(marked, LAYER) - model.concepts(without, LAYER)).abs().amax(1).mean(0)
    guilty = model.concept_names(LAYER)[int(changed.argmax())]

    time.sleep(4.5)  # what was sampled before is counted and scraped
    before = watched.query(f'sum(elude_drift_bucket_total{{feature="{LAYER}/P0"}})')[()]
    for _, pair in twins:
        picture = io.BytesIO()
        pair.image.save(picture, "PNG")
        assert watched.send("predictions", picture.getvalue()).status_code == 200
    watched.until(
        total("elude_drift_bucket_total", "feature"),
        lambda found: all(count == before + 40 for count in found.values()),
    )

    def stands_out(found: dict[tuple[str, ...], float]) -> bool:
        first, *others = sorted(found.values(), reverse=True) or [0.0]
        return first > 2 and bool(others) and first > 2 * others[0] and first > 5 * others[len(others) // 2]

    found = watched.until("elude:drift_psi_excess:1h", stands_out)  # the rules follow the counts by seconds
    ranked = sorted(found, key=lambda labels: -found[labels])
    assert ranked[0][1] == guilty
    assert {checkpoint for checkpoint, _, _ in ranked} == {watched.sha256[:12]}

    worst = ranked[0][1]

    def buckets() -> np.ndarray:
        counts = watched.query(f'sum by (bucket) (increase(elude_drift_bucket_total{{feature="{worst}"}}[1h]))')
        return np.array([counts[f"{bucket:02d}",] for bucket in range(12)])

    # a rule's value is up to a second older than the counts
    watched.until(
        f'elude:drift_psi:1h{{feature="{worst}"}}',
        lambda found: next(iter(found.values())) == pytest.approx(index(buckets()), rel=0.02),
    )
    (chance,) = watched.query(f'elude:drift_psi_null:1h{{feature="{worst}"}}').values()
    assert chance == pytest.approx(null(buckets().sum(), 240), rel=0.15)  # increase() extrapolates
    assert len(watched.query(f'elude_feature_info{{feature="{worst}"}}')) == 1


def test_a_lost_worker_and_a_lost_exporter(watched: Watched) -> None:
    """The worker is killed: its successor counts on from its totals. The exporter is killed: an alert is pending."""
    assert watched.send("predictions", watched.images[0].read_bytes()).status_code == 200
    time.sleep(2.5)  # two scrapes
    before = watched.query(total("elude_batch_rows_sum"))[()]
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("model_service_worker" in part for part in process.info["cmdline"] or [])
        and str(watched.server.run_dir) in " ".join(process.info["cmdline"])
    ]
    assert len(workers) == 1
    workers[0].send_signal(signal.SIGKILL)
    watched.until(total("elude_worker_starts_total"), lambda found: found == {(): 2}, 60)
    assert watched.query(total("elude_workers")) == {(): 1}
    assert watched.send("predictions", watched.images[0].read_bytes()).status_code == 200
    watched.until(total("elude_batch_rows_sum"), lambda found: found == {(): before + 1})

    pid = json.loads((watched.server.run_dir / "run.json").read_text())["exporter_pid"]
    psutil.Process(pid).kill()
    watched.until('ALERTS{alertname="EludeExporterDown"}', lambda found: len(found) == 1)
    assert watched.send("predictions", watched.images[0].read_bytes()).status_code == 200
