"""The compose files: valid, on loopback only, and in agreement with the image and the monitoring beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY, check_call, exec_form, load, settings_of

compose_spec = pytest.importorskip("compose_spec")

FILES = ("compose.yaml", "compose.explain-pool.yaml", "compose.gpu.yaml")


def filled(name: str) -> str:
    """The file with its variables' defaults in their place, as `docker compose` fills them in."""
    text = (DEPLOY / name).read_text(encoding="utf-8")
    filled_in = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    assert "${" not in filled_in, "a variable has no default"
    return filled_in


def services(name: str = "compose.yaml") -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load(filled(name))["services"])


@pytest.mark.parametrize("name", FILES)
def test_the_compose_specification_accepts_it(name: str) -> None:
    """Strictly, with anchors and `<<` resolved: a key that does not exist is an error."""
    content = yaml.safe_load(filled(name))
    for each in content["services"].values():
        if "cpus" in each:  # the library refuses a whole number, which the specification allows
            each["cpus"] = float(each["cpus"])
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(content))
    content["services"]["elude"]["memlimit"] = "3g"
    with pytest.raises(ValueError, match="memlimit"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(content))


def test_what_is_added_to_a_service_names_one() -> None:
    for name in FILES[1:]:
        assert set(services(name)) <= set(services())


def test_everything_is_published_on_loopback_only() -> None:
    published = [str(port) for each in services().values() for port in each.get("ports", [])]
    assert len(published) == 3 and all(port.startswith("127.0.0.1:") for port in published)
    # and never the management port, nor metrics, which Prometheus reaches on the inside
    assert {port.rpartition(":")[2] for port in published} == {"8080", "9090", "3000"}


def test_our_containers_are_without_rights() -> None:
    for name in ("elude", "exporter"):
        each = services()[name]
        assert each["read_only"] is True and each["cap_drop"] == ["ALL"]
        assert each["security_opt"] == ["no-new-privileges:true"]
        assert each["build"]["dockerfile"] == "deploy/Dockerfile" and (DEPLOY / each["build"]["context"]).is_dir()


def test_commands_and_variables_are_ours() -> None:
    elude, pooled = services()["elude"], services("compose.explain-pool.yaml")["elude"]
    assert "command" not in elude and "healthcheck" not in elude, "the image's own are used"
    called = check_call(pooled["command"])
    assert pooled["command"][: len(exec_form("serving", "CMD"))] == exec_form("serving", "CMD")
    assert called["models"] == ["demo.mar", "demo-explain=demo.mar"]
    assert "threads" in list(settings_of([*elude["environment"]]))
    # threads and cores are one number; two workers share them
    assert elude["environment"]["ELUDE_THREADS"] == elude["environment"]["OMP_NUM_THREADS"] == elude["cpus"] == 2
    assert pooled["environment"]["ELUDE_THREADS"] * len(called["models"]) == elude["cpus"]


def test_the_exporters_command_is_ours() -> None:
    exporter = services()["exporter"]
    called = check_call(exporter["command"])
    folder = str(called["directory"])
    assert services()["elude"]["environment"]["ELUDE_METRICS_DIR"] == folder
    assert f"metrics:{folder}" in services()["elude"]["volumes"] and f"metrics:{folder}" in exporter["volumes"]
    assert f"127.0.0.1:{called['port']}/metrics" in " ".join(exporter["healthcheck"]["test"])


def test_the_server_may_finish_its_longest_batch() -> None:
    longest = load(DEPLOY / "model-config.yaml")["responseTimeout"]
    grace = check_call(exec_form("serving", "CMD"))["grace"]
    assert grace >= longest and int(services()["elude"]["stop_grace_period"].removesuffix("s")) >= grace + 18


def test_prometheus_asks_the_containers() -> None:
    scraped = load(DEPLOY / "compose" / "prometheus.yml")
    targets = {t for job in scraped["scrape_configs"] for each in job["static_configs"] for t in each["targets"]}
    assert targets == {"elude:8082", "exporter:9464"}
    assert {target.partition(":")[0] for target in targets} <= set(services())


def test_what_is_mounted_exists() -> None:
    for each in services().values():
        for volume in each.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{source} does not exist"


def test_prometheus_differs_from_a_hosts_by_its_addresses_only() -> None:
    host = DEPLOY / "prometheus" / "prometheus.yml"

    def without_addresses(file: Path) -> Any:
        content = load(file)
        for job in content["scrape_configs"]:
            for each in job["static_configs"]:
                each["targets"] = len(each["targets"])
        return content

    assert without_addresses(DEPLOY / "compose" / "prometheus.yml") == without_addresses(host)


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = load(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert services()[host]["ports"][0].endswith(f":{port}")
    (provider,) = load(provisioning / "dashboards" / "elude.yaml")["providers"]
    mounted = [volume.split(":")[1] for volume in services()["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/elude.json" in mounted and "/etc/grafana/provisioning" in mounted
    dashboard = DEPLOY / "grafana" / "elude.json"
    if dashboard.exists():  # panels name their source by its uid, or by a variable
        named = set(re.findall(r'"uid": "([^"]+)"', json.dumps(json.loads(dashboard.read_text())["panels"])))
        assert named <= {source["uid"], "${datasource}", "${DS_PROMETHEUS}", "-- Grafana --"}
