"""Kubernetes and KServe objects: valid, complete, and in agreement with the image, the server and the metrics."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from deploy_files import (
    DEPLOY,
    KUBERNETES,
    check_call,
    container,
    dockerfile,
    exec_form,
    kustomize,
    load,
    of_kind,
    pod_of,
    settings_of,
)  # fmt: skip

from elude_runtime.cli.server_settings import read_properties

kubernetes_validate = pytest.importorskip("kubernetes_validate")

SCHEMAS = Path(__file__).parent / "schemas"
COMPONENTS = ("explain-pool", "gpu", "model-volume")
# The oldest release that has all that is used, and the newest known.
RELEASES = ("1.29", "1.37")
CONFIG = read_properties(DEPLOY / "container" / "config.properties")
KSERVE = load(DEPLOY / "kserve" / "inferenceservice.yaml")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The objects of the base, and of the site as it is and with each of the components that it offers."""
    found = {"base": kustomize(KUBERNETES / "base"), "site": kustomize(KUBERNETES / "site")}
    copy = tmp_path_factory.mktemp("kubernetes") / "copy"
    shutil.copytree(KUBERNETES, copy)
    text = (copy / "site" / "kustomization.yaml").read_text(encoding="utf-8")
    for name in COMPONENTS:
        chosen = text.replace("# components:", "components:").replace(f"#   - ../{name}", f"  - ../{name}")
        assert chosen.count("\n  - ../") == 2, "the site does not offer the component"
        (copy / "site" / "kustomization.yaml").write_text(chosen, encoding="utf-8")
        found[name] = kustomize(copy / "site")
    return found


@pytest.fixture(scope="module")
def base(built: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return built["base"]


def pods(built: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Every pod that the files describe: the Deployment of each build, and KServe's predictor."""
    return {**{name: pod_of(objects)["spec"] for name, objects in built.items()}, "kserve": kserve_pod()}


def kserve_pod() -> dict[str, Any]:
    """The part of the predictor that is a PodSpec."""
    own = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout"}
    return {key: value for key, value in KSERVE["spec"]["predictor"].items() if key not in own}


def schema(name: str) -> dict[str, Any]:
    return dict(json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8")))


# --- valid


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_accepts_every_object(built: dict[str, list[dict[str, Any]]], release: str) -> None:
    """Strictly: an unknown key is an error. What Kubernetes itself would drop silently is found here."""
    checked = set()
    for each in [*built["base"], *(each for name in COMPONENTS for each in built[name])]:
        if each["kind"] != "ServiceMonitor":
            kubernetes_validate.validate(each, release, strict=True)
            checked.add(each["kind"])
    assert checked >= {
        "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler",
        "PersistentVolumeClaim",
    }  # fmt: skip
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": kserve_pod()}
    kubernetes_validate.validate(pod, release, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**pod, "spec": {**kserve_pod(), "enableServiceLink": False}}, release, strict=True
        )


def test_the_operators_accept_their_objects(base: list[dict[str, Any]]) -> None:
    (monitor,) = of_kind(base, "ServiceMonitor")
    for each, name, key in ((monitor, "servicemonitor", "endpoints"), (KSERVE, "inferenceservice", "predictor")):
        jsonschema.validate(each, schema(name))
        spoiled = json.loads(json.dumps(each).replace(f'"{key}"', f'"{key}s"'))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoiled, schema(name))


def test_each_kustomization_lists_exactly_the_files_beside_it() -> None:
    folders = [file.parent for file in KUBERNETES.rglob("kustomization.yaml")]
    assert len(folders) == 2 + len(COMPONENTS)
    for folder in folders:
        listed = load(folder / "kustomization.yaml")
        named = [*listed.get("resources", []), *(patch["path"] for patch in listed.get("patches", []))]
        files = {file.name for file in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert {name for name in named if not name.startswith("..")} == files, folder.name


# --- in agreement with the server


def test_every_command_is_one_of_ours(built: dict[str, list[dict[str, Any]]]) -> None:
    """Arguments and exec probes, by our own command line; those of the plain pod are the image's."""
    for name, pod in pods(built).items():
        main = pod["containers"][0]
        called = check_call(main["args"])
        assert called["foreground"] is True and called["token_auth"] is False
        assert str(called["config"]) == "/etc/elude/config.properties"
        models = {argument.rpartition("=")[0] or argument.removesuffix(".mar") for argument in called["models"] or []}
        for probe in ("startupProbe", "readinessProbe"):
            words = main[probe]["exec"]["command"]
            asked = check_call(words[1:])
            assert words[0] == "elude" and asked["ready"] is True
            assert asked["run_dir"] == called["run_dir"], f"the probe of {name} looks at another server"
            assert set(asked["model"] or []) <= models, f"{name} asks for a model that it does not serve"
    assert container(pods(built)["base"], "elude")["args"] == exec_form("serving", "CMD")


def test_the_exporters_command_is_one_of_ours(built: dict[str, list[dict[str, Any]]]) -> None:
    for pod in pods(built).values():
        exporter = container(pod, "exporter")
        called = check_call(exporter["args"])
        assert called["port"] == exporter["ports"][0]["containerPort"] and called["address"] == "0.0.0.0"
        variables = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
        assert variables["ELUDE_METRICS_DIR"] == str(called["directory"])
        mounts = [[m["name"] for m in c["volumeMounts"] if m["mountPath"] == "/metrics"] for c in pod["containers"]]
        assert mounts == [["metrics"], ["metrics"]]


def test_every_variable_is_a_setting(built: dict[str, list[dict[str, Any]]]) -> None:
    for pod in pods(built).values():
        main = pod["containers"][0]
        assert "threads" in list(settings_of([each["name"] for each in main["env"]]))
        for each in main["env"]:
            if field := each.get("valueFrom", {}).get("resourceFieldRef"):
                assert field == {"containerName": main["name"], "resource": "limits.cpu"}
                # a fraction of a core would be rounded up to more threads than cores
                assert str(main["resources"]["limits"]["cpu"]).isdigit()


def test_two_pools_share_the_cores(built: dict[str, list[dict[str, Any]]]) -> None:
    main = container(pods(built)["explain-pool"], "elude")
    called = check_call(main["args"])
    assert called["models"] == ["demo.mar", "demo-explain=demo.mar"]
    threads = {each["name"]: each["value"] for each in main["env"] if "THREADS" in each["name"]}
    assert set(threads) == {"ELUDE_THREADS", "OMP_NUM_THREADS"}
    assert {int(value) * len(called["models"]) for value in threads.values()} == {
        int(main["resources"]["limits"]["cpu"])
    }


def test_ports_are_those_that_the_server_listens_on(built: dict[str, list[dict[str, Any]]]) -> None:
    listens = {key: int(CONFIG[f"{key}_address"].rpartition(":")[2]) for key in ("inference", "metrics")}
    for name in ("base", *COMPONENTS):
        ports = {p["name"]: p["containerPort"] for p in container(pods(built)[name], "elude")["ports"]}
        assert ports == {"http": listens["inference"], "metrics": listens["metrics"]}
    assert [p["containerPort"] for p in KSERVE["spec"]["predictor"]["containers"][0]["ports"]] == [listens["inference"]]
    assert KSERVE["spec"]["predictor"]["containers"][0]["livenessProbe"]["httpGet"]["port"] == listens["inference"]


def test_the_end_waits_long_enough(built: dict[str, list[dict[str, Any]]]) -> None:
    """The pause, the longest batch, and what `elude serve` takes to stop, kill included."""
    longest = load(DEPLOY / "model-config.yaml")["responseTimeout"]
    for pod in pods(built).values():
        main = pod["containers"][0]
        pause = main["lifecycle"]["preStop"]["exec"]["command"]
        called = check_call(main["args"])
        assert pause[0] == "sleep" and called["grace"] >= longest
        assert pod["terminationGracePeriodSeconds"] >= int(pause[1]) + called["grace"] + 18
        # the reason for which a model does not load is heard before the probe loses patience
        startup = main["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] > called["timeout"]


# --- safe


def test_every_container_is_without_rights(built: dict[str, list[dict[str, Any]]]) -> None:
    """Pod security level `restricted`, a read-only root, and the image's user."""
    for pod in pods(built).values():
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
        whole = pod["securityContext"]
        assert whole["runAsNonRoot"] is True and whole["seccompProfile"] == {"type": "RuntimeDefault"}
        (user,) = [rest for word, rest in dockerfile()["serving"] if word == "USER"]
        assert f"{whole['runAsUser']}:{whole['runAsGroup']}" == user
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for each in pod["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            assert each["resources"]["limits"]["memory"] == each["resources"]["requests"]["memory"]
            # the one folder that programs write to without being told
            assert "/tmp" in [mount["mountPath"] for mount in each["volumeMounts"]]
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_namespace_enforces_it(base: list[dict[str, Any]]) -> None:
    (namespace,) = of_kind(base, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"].get("namespace", namespace["metadata"]["name"]) for each in base} == {"elude"}


def reachable(policy: dict[str, Any], namespace: dict[str, str], pod: dict[str, str]) -> set[str]:
    """The ports that a NetworkPolicy opens to a pod of these labels in a namespace of those."""
    open_ports = set()
    for rule in policy["spec"]["ingress"]:
        for peer in rule["from"]:
            wanted = peer["namespaceSelector"]["matchLabels"].items() <= namespace.items()
            if wanted and peer.get("podSelector", {}).get("matchLabels", {}).items() <= pod.items():
                open_ports |= {port["port"] for port in rule["ports"]}
    return open_ports


def test_the_network_hides_metrics_and_management(base: list[dict[str, Any]]) -> None:
    (policy,) = of_kind(base, "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod_of(base)["metadata"]["labels"].items()
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"} and policy["spec"]["egress"] == []
    client, monitoring = {"elude.serving/client": "true"}, {"kubernetes.io/metadata.name": "monitoring"}
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    assert reachable(policy, client, {}) == {"http"}
    assert reachable(policy, monitoring, prometheus) == {"metrics", "exporter"}
    assert reachable(policy, monitoring, {}) == reachable(policy, {}, prometheus) == set()
    # names of the pod's ports, none of which is the management's
    named = {p["name"]: p["containerPort"] for c in pod_of(base)["spec"]["containers"] for p in c["ports"]}
    assert set(named) == {"http", "metrics", "exporter"} and 8081 not in named.values()


# --- connected


def test_selectors_find_the_pods(base: list[dict[str, Any]]) -> None:
    labels = pod_of(base)["metadata"]["labels"].items()
    (deployment,), services = of_kind(base, "Deployment"), of_kind(base, "Service")
    (budget,), (scaler,), (monitor,) = (
        of_kind(base, kind) for kind in ("PodDisruptionBudget", "HorizontalPodAutoscaler", "ServiceMonitor")
    )
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    for spread in pod_of(base)["spec"]["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= labels
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"], "the autoscaler owns the number"
    named = {p["name"] for c in pod_of(base)["spec"]["containers"] for p in c["ports"]}
    for service in services:
        assert service["spec"]["selector"].items() <= labels
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    found = [
        s for s in services if monitor["spec"]["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
    ]
    (metrics,) = found
    assert {e["port"] for e in monitor["spec"]["endpoints"]} == {port["name"] for port in metrics["spec"]["ports"]}
    jobs = {endpoint["relabelings"][0]["replacement"] for endpoint in monitor["spec"]["endpoints"]}
    assert jobs == {job["job_name"] for job in load(DEPLOY / "compose" / "prometheus.yml")["scrape_configs"]}
    (public,) = [service for service in services if service not in found]
    assert [port["name"] for port in public["spec"]["ports"]] == ["http"]


def test_the_heads_say_what_was_not_run() -> None:
    """Whoever copies a file sees what it was checked by."""
    files = [KUBERNETES / "base" / "kustomization.yaml", DEPLOY / "kserve" / "inferenceservice.yaml"]
    for file in [*files, DEPLOY / "Dockerfile", DEPLOY / "compose.yaml"]:
        head = re.split(r"^[^#\n]", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
        assert re.search(r"WITHOUT A CLUSTER|NOT BUILT|NEVER STARTED", head), file.name
