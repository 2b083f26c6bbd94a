"""The container image's Dockerfile: linted, pinned, and in agreement with the rest of the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from deploy_files import DEPLOY, check_call, dockerfile, exec_form
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = DEPLOY.parent
FILE = DEPLOY / "Dockerfile"


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint here; its package has none for this platform")
    said = subprocess.run([program, "--failure-threshold", "style", str(FILE)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


def test_base_images_are_pinned_by_their_full_version() -> None:
    """Here and in the compose file: neither `latest`, nor a tag that moves with the next release."""
    stages = dockerfile()
    bases = [rest.split()[0] for stage in stages.values() for word, rest in stage if word == "FROM"]
    compose = re.findall(r"^ +image: (\S+)$", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    foreign = [name for name in bases + compose if ":" in name and not name.startswith("elude-serving")]
    assert len(foreign) == 3 and all(re.search(r":v?\d+\.\d+\.\d+", name) for name in foreign), foreign
    assert set(bases) - set(foreign) <= {*stages, "device-${DEVICE}"}


def test_both_devices_have_a_stage_and_cpu_is_the_default() -> None:
    stages = dockerfile()
    assert ["ARG", "DEVICE=cpu"] in stages[""] and {"device-cpu", "device-gpu"} <= set(stages)
    assert any("ELUDE_DEVICE=cpu" in rest for _, rest in stages["device-cpu"])


def test_runs_as_a_user_without_rights_and_without_a_shell() -> None:
    serving = dockerfile()["serving"]
    words = [word for word, _ in serving]
    assert ["USER", "10001:10001"] in serving
    # everything that needs root comes before, and nothing after it gives rights back
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :]) and words.count("USER") == 1
    assert any("--uid 10001" in rest for word, rest in serving if word == "RUN")
    assert exec_form("serving", "ENTRYPOINT") == ["tini", "--", "elude"]
    assert all("secret" not in rest.lower() and "password" not in rest.lower() for _, rest in serving)


def test_the_command_and_the_health_check_are_ours() -> None:
    called = check_call(exec_form("serving", "CMD"))
    assert called["foreground"] is True and called["token_auth"] is False
    # TorchServe's sockets: 107 bytes at most, see cli/torchserve.py
    assert len(f"{called['run_dir']}/tmp/.ts.sock.12345") < 60
    check = exec_form("serving", "HEALTHCHECK")
    asked = check_call(check[1:])
    assert check[0] == "elude" and asked["ready"] is True and asked["run_dir"] == called["run_dir"]


def test_everything_that_is_copied_exists_and_is_let_into_the_build() -> None:
    """The ignore file keeps everything out that it does not name."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = [
        source
        for stage in dockerfile().values()
        for word, rest in stage
        if word == "COPY" and "--from" not in rest
        for source in [part for part in rest.split() if not part.startswith("--")][:-1]
    ]
    assert len(copied) > 5
    for source in copied:
        assert any(source == name or source.startswith(f"{name}/") for name in let_in), f"{source} is kept out"
        assert "*" in source or (REPOSITORY / source).exists(), f"{source} does not exist"


def test_the_builder_copies_all_that_the_package_is_made_of() -> None:
    """A wheel that cannot be built would be found out only where images are built."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {*project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"], "pyproject.toml"}
    needed |= {*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], project["project"]["readme"]}
    needed |= set(project["project"]["license-files"])
    copied = " ".join(rest for word, rest in dockerfile()["builder"] if word == "COPY").split()
    assert [name for name in sorted(needed) if name not in copied and name.split("/")[0] not in copied] == []


def constraints() -> dict[str, str]:
    lines = (DEPLOY / "container" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_image_pins_all_that_it_installs() -> None:
    """What pyproject.toml asks for, and what that needs in turn where it is installed here in the pinned version."""
    pinned = constraints()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["serve"]]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if re.match("nvidia|cuda|triton", name):  # torch pins them itself
            continue
        assert name in pinned, f"{name} has no version in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} is not met by {pinned[name]}"
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if name not in seen and installed.version.split("+")[0] == pinned[name]:
            extras = requirement.extras or {""}
            needs = [Requirement(text) for text in installed.requires or []]
            waiting += [n for n in needs if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]
        seen.add(name)
    assert len(seen) > 20


def test_the_commands_that_the_page_shows_are_ours() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    elude (.+)$|`elude ((?:archive|serve) [^`]+)`", text, re.MULTILINE)
    calls = [(block or span).split() for block, span in shown]
    assert {words[0] for words in calls} == {"archive", "serve"}
    for words in calls:
        check_call(words)
