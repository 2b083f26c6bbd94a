"""What the tests of `deploy/` read: YAML, built Kubernetes objects, the Dockerfile's instructions, commands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from elude_runtime.api.config import ENVIRONMENT_PREFIX, ServingConfig
from elude_runtime.cli.app import app

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


def load(file: Path) -> Any:
    """The only document of a YAML file."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send. Skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here, whose kustomize builds the manifests")
    built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


def pod_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The pod template of the only Deployment."""
    (deployment,) = of_kind(objects, "Deployment")
    return dict(deployment["spec"]["template"])


def container(pod_spec: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in pod_spec["containers"] if each["name"] == name]
    return dict(found)


def dockerfile() -> dict[str, list[list[str]]]:
    """Stage -> its instructions, each as [keyword, rest], with continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    stages: dict[str, list[list[str]]] = {"": []}
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, _, rest = line.strip().partition(" ")
            if keyword == "FROM":
                stages[rest.split(" AS ")[1]] = []
            stages[list(stages)[-1]].append([keyword, rest.strip()])
    return stages


def exec_form(stage: str, keyword: str) -> list[str]:
    """The words of the stage's only ENTRYPOINT, CMD or HEALTHCHECK; fails for the shell's form."""
    (rest,) = [rest for found, rest in dockerfile()[stage] if found == keyword]
    return list(json.loads(rest[rest.index("[") :]))


@cache
def elude_commands() -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    return dict(command.commands)


def check_call(words: list[str]) -> dict[str, Any]:
    """Parses `elude WORDS…` with our own command line and gives the values; fails where it would refuse them."""
    try:
        return dict(elude_commands()[words[0]].make_context(words[0], list(words[1:])).params)
    except click.ClickException as error:
        pytest.fail(f"elude {' '.join(words)}: {error.format_message()}")


def settings_of(names: list[str]) -> Iterator[str]:
    """The serving configuration's keys for those variables that begin with ELUDE_; fails for one that is no key."""
    for name in names:
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
            assert key in ServingConfig.model_fields, f"{name} sets nothing"
            yield key
