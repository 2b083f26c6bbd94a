"""`elude explore`: a server of its own and an explorer, both gone at its end; bad input in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import Rewritten
from support import Run, encoded, picture, refused

from elude_runtime.explore.guard import HEADER

COMMAND = [sys.executable, "-c", "from elude_runtime.cli import main; main()", "explore"]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key_file.json"
    file.write_text(json.dumps({"inference": {"key": "abc"}}))
    return file


@pytest.mark.server
def test_a_run_from_start_to_sigterm(vit: Rewritten, tmp_path: Path) -> None:
    pytest.importorskip("ts")
    scratch = tempfile.mkdtemp(prefix="ex-", dir="/tmp")  # short, for TorchServe's sockets
    environment = {**os.environ, "TMPDIR": scratch, "ELUDE_THREADS": "1"}
    process = subprocess.Popen(
        [*COMMAND, str(vit.path), "--json"], env=environment, cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        facts = json.loads("".join(lines))
        token = json.loads(Path(facts["key_file"]).read_text())["inference"]["key"]
        with httpx.Client(follow_redirects=True, headers={HEADER: "1"}, timeout=60) as browser:
            page = browser.get(facts["address"])
            assert page.status_code == 200 and "Drop an image" in page.text
            origin = str(page.url).rpartition("/")[0]
            for name in ("index.html", "features.html", "assets/explore/explore.js", "assets/core.js"):
                assert browser.get(f"{origin}/{name}").status_code == 200
            assert browser.get(f"{origin}/api/server").json()["model"] == facts["model"]
            image = browser.post(f"{origin}/api/images", content=encoded(picture(3))).json()["image"]
            reply = browser.post(f"{origin}/api/ask", json={"image": image, "request": {"top_k": 2}})
            assert len(reply.json()["predictions"]) == 2 and token not in reply.text
            assert httpx.get(f"{origin}/api/server").status_code == 403
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("java" in child.name() for child in family)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert gone and not alive
        assert os.listdir(scratch) == []
        assert token not in "".join(lines) + process.communicate()[1]
    finally:
        process.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_server_that_does_not_answer_yet_is_no_reason_not_to_start(vit: Rewritten, tmp_path: Path) -> None:
    """The page says so, and goes on when it is there."""
    with subprocess.Popen(
        [*COMMAND, str(vit.path), "--json", "--url", "http://127.0.0.1:9", "--model", "m"],
        env={**os.environ, "ELUDE_TOKEN": "abc"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        facts = json.loads("".join(process.stdout.readline() for _ in range(5)))
        assert facts["url"] == "http://127.0.0.1:9" and "key_file" not in facts
        with httpx.Client(follow_redirects=True) as browser:
            page = browser.get(facts["address"])
            reply = browser.get(str(page.url.join("/api/server")))
        assert reply.json()["type"] == "server-unreachable" and "abc" not in reply.text
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


class TestBadInput:
    def test_no_checkpoint(self, run: Run, tmp_path: Path) -> None:
        refused(run("explore", tmp_path / "nothing"), "nothing")

    def test_keys_of_no_server(self, run: Run, vit: Rewritten, key_file: Path) -> None:
        refused(run("explore", vit.path, "--key-file", key_file), "--url")

    @pytest.mark.parametrize("text", ["{", "[]", '{"management": {"key": "x"}}', None])
    def test_a_key_file_that_is_none(self, run: Run, vit: Rewritten, key_file: Path, text: str | None) -> None:
        key_file.unlink() if text is None else key_file.write_text(text)
        refused(run("explore", vit.path, "--url", "http://127.0.0.1:9", "--key-file", key_file), "key_file.json")

    def test_an_address_that_is_none(self, run: Run, vit: Rewritten) -> None:
        refused(run("explore", vit.path, "--url", "127.0.0.1:8080"), "http://")

    def test_a_port_that_is_taken(self, run: Run, vit: Rewritten) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            refused(run("explore", vit.path, "--url", "http://127.0.0.1:9", "--port", port), str(port), "--port")

    def test_code_that_nobody_trusted(self, run: Run, vit: Rewritten, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(vit.path, tmp_path / "ckpt"))
        manifest = json.loads((folder / "elude.json").read_text())
        manifest["model"] |= {"kind": "factory", "file": "f.py", "function": "f", "files": {}}
        (folder / "elude.json").write_text(json.dumps(manifest))
        refused(run("explore", folder), "--trust-factory")
