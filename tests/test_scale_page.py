"""deploy/scale.md: its shell blocks run as they stand, and its commands and statements are the programs' own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from nginx_front import DEPLOY, INSTALLED, KEYS, MISSING, Front
from nginx_instance import Instance

from elude_runtime.cli.app import app
from elude_runtime.cli.server_settings import read_properties, write_settings
from elude_runtime.client import Client, ProblemError

PAGE = (DEPLOY / "scale.md").read_text(encoding="utf-8")
BLOCKS = {code.splitlines()[0].removeprefix("# "): code for code in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)}
SHOWN = "10.0.0.12:8080"  # the instance that the page takes out


class PageFront(Front):
    """nginx, set up by the page."""

    def install(self) -> None:
        shims = {"sudo": 'exec "$@"', "nginx": f'exec {shlex.join(self.words())} "$@"'}
        (self.prefix / "bin").mkdir()
        for name, line in shims.items():
            (self.prefix / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (self.prefix / "bin" / name).chmod(0o755)
        self.run("set up")
        self.key = self.run("a key").split()[-1]

    def run(self, block: str) -> str:
        """What a block prints; it fails with the first of its lines that does."""
        text = BLOCKS[block].replace("/etc/nginx", str(self.prefix)).replace(SHOWN, self.blue[1])
        path = f"{self.prefix / 'bin'}:{os.environ['PATH']}"
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=DEPLOY.parent, env={**os.environ, "PATH": path},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, (text, ran.stderr)
        return ran.stdout


@pytest.fixture(scope="module")
def instances() -> Iterator[list[Instance]]:
    made = [Instance(name) for name in ("blue-1", "blue-2", "green-1")]
    yield made
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, instances: list[Instance]) -> Iterator[PageFront]:
    if not INSTALLED:
        pytest.skip(MISSING)
    *blue, green = (one.address for one in instances)
    with PageFront(tmp_path_factory.mktemp("page"), blue, [green]) as made:
        yield made


def answered_by(front: PageFront, path: str = "/predictions/vit") -> set[str]:
    with front.http(who=None) as http:
        headers = {"Authorization": f"Bearer {front.key}"}
        return {http.post(path, content=b"image", headers=headers).json()["by"] for _ in range(8)}


def test_set_up_as_the_page_says(front: PageFront) -> None:
    assert answered_by(front) == {"blue-1", "blue-2"}
    assert (front.prefix / "elude" / "keys.map").stat().st_mode & 0o77 == 0, "keys are for the owner"
    with front.client("vit", token=KEYS["ann"]) as client, pytest.raises(ProblemError, match="server-unauthorized"):
        client.predict(b"image")
    front.settle(lambda: front.run("try it and take it into use"))
    lines = front.log(lambda lines: any(line["client"] == "" for line in lines))
    assert {line["client"] for line in lines} == {"ann", ""}, "the name beside the key is what the log has"


def test_one_is_taken_out_and_in_again(front: PageFront) -> None:
    front.settle(lambda: front.run("take one out"))
    assert answered_by(front) == {"blue-1"}
    front.settle(lambda: front.run("take it in again"))
    assert answered_by(front) == {"blue-1", "blue-2"}


def test_a_release_and_back(front: PageFront) -> None:
    blue, green = {"blue-1", "blue-2"}, {"green-1"}
    assert answered_by(front, "/predictions/vit/2.0") == green, "before anything is switched"
    front.settle(lambda: front.run("one client in ten on green"))
    assert answered_by(front) in (blue, green)
    front.settle(lambda: front.run("all on green"))
    assert answered_by(front) == green
    front.settle(lambda: front.run("roll back"))
    assert answered_by(front) == blue


def test_every_block_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'(?:run\(|BLOCKS\[)"([^"]+)"', source)) == set(BLOCKS) and len(BLOCKS) == 9


def test_an_instance_is_configured_by_its_line(tmp_path: Path) -> None:
    """The line that the page gives makes a file that `elude serve --config` takes."""
    (tmp_path / "deploy").mkdir()
    for file in ("config.properties", "metrics.yaml"):
        (tmp_path / "deploy" / file).write_bytes((DEPLOY / file).read_bytes())
    subprocess.run(["bash", "-euc", BLOCKS["an instance"]], cwd=tmp_path, check=True, timeout=60)
    (tmp_path / "run").mkdir()
    addresses = write_settings(tmp_path / "run", tmp_path / "deploy" / "instance.properties", {})
    assert addresses["inference_address"] == "http://10.0.0.11:8080"
    assert addresses["management_address"] == "http://127.0.0.1:8081"


def commands() -> list[list[str]]:
    """The words of every call of `elude` on the page."""
    spans = re.findall(r"(?<!`)`(elude [^`]+)`(?!`)", PAGE) + re.findall(r"^    (elude .*)$", PAGE, re.MULTILINE)
    return [shlex.split(span)[1:] for span in spans]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_call_of_elude_is_one(words: list[str]) -> None:
    offered: Any = typer.main.get_command(app)
    command = offered.commands[words[0]]
    known = {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)}
    assert [w for w in words if w.startswith("--") and w not in known] == []


def test_its_numbers_are_the_configurations() -> None:
    model = yaml.safe_load((DEPLOY / "model-config.yaml").read_text())
    properties = read_properties(DEPLOY / "config.properties")
    nginx = (DEPLOY / "nginx.conf").read_text()
    (reading,) = re.findall(r"proxy_read_timeout (\d+)s;", nginx)
    assert f"`proxy_read_timeout` ({reading} s)" in PAGE and f"above {reading} s" in PAGE
    assert f"`responseTimeout` ({model['responseTimeout']} s)" in PAGE
    assert f"`job_queue_size` ({properties['job_queue_size']})" in PAGE
    assert set(re.findall(r"max_fails=(\d) fail_timeout=(\d)s", nginx)) == {("2", "5")}
    assert "after two failures it gets nothing for 5 s" in PAGE


def test_what_its_python_says_exists() -> None:
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        compile(code, "scale.md", "exec")
    client = Client("https://elude.example.com", "vit", token="k", checkpoint_sha256="ab" * 32)
    client.close()
