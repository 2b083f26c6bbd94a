"""nginx as deploy/nginx.conf sets it up, as a process of the test's own on loopback, and clients that trust it."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from elude_runtime.cli.server_settings import free_ports
from elude_runtime.client import AsyncClient, Client

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
PROGRAM = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
MISSING = "nginx and openssl are needed; Debian or Ubuntu: sudo apt-get install nginx-light openssl"
INSTALLED = PROGRAM is not None and shutil.which("openssl") is not None
KEYS = {"ann": "a1" * 32, "bob": "b2" * 32, "cleo": "c3" * 32, "dan": "d4" * 32, "eve": "e5" * 32, "fay": "f6" * 32}
# The part that a distribution's nginx.conf plays. Temporary files in the prefix: the default folders are root's.
_MAIN = """user {user};
worker_processes 2;
pid nginx.pid;
error_log error.log info;
events {{ worker_connections 512; }}
http {{
    client_body_temp_path body;
    proxy_temp_path proxied;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include conf.d/*.conf;
}}
"""


class Front:
    """nginx before two pools of instances (host:port) as a context manager; ready on entry, gone after it.

    change: makes another text of deploy/nginx.conf, after the names of addresses and files were put in.
    """

    def __init__(
        self,
        prefix: Path,
        blue: Sequence[str],
        green: Sequence[str] = (),
        change: Callable[[str], str] = lambda text: text,
    ) -> None:
        self.prefix, self.blue, self.green, self.change = prefix, list(blue), list(green or blue), change
        (self.port,) = free_ports(1)
        self.url = f"https://127.0.0.1:{self.port}"
        self.file = prefix / "conf.d" / "elude.conf"
        self._process: subprocess.Popen[bytes] | None = None

    def write(self) -> None:
        """The shipped files with this test's ports and paths."""
        text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
        text = _once(text, "listen 443 ssl http2;", f"listen 127.0.0.1:{self.port} ssl http2;")
        text = _once(text, "/var/log/nginx/elude.log", str(self.prefix / "elude.log"))
        for pool, instances in (("blue", self.blue), ("green", self.green)):
            shown = re.search(rf"upstream {pool} {{[^}}]*?\n((?:    server [^\n]*\n)+)", text)
            assert shown is not None, f"deploy/nginx.conf has no pool {pool}"
            line = re.sub(r"server \S+", "server {}", shown[1].splitlines(keepends=True)[0])
            text = _once(text, shown[1], "".join(line.format(instance) for instance in instances))
        self.file.write_text(self.change(text), encoding="utf-8")

    def install(self) -> None:
        """The files of deploy/ and keys for the tests' clients, where a distribution would have them."""
        folder = self.prefix / "elude"
        folder.mkdir()
        lines = [f'"Bearer {key}" {name};\n' for name, key in KEYS.items()]
        (folder / "keys.map").write_text("".join(lines), encoding="utf-8")
        for file in (DEPLOY / "nginx").iterdir():
            shutil.copy(file, folder)
        (folder / "release.conf").symlink_to("blue.conf")

    def start(self) -> Front:
        self.file.parent.mkdir(parents=True)
        (self.prefix / "nginx.conf").write_text(_MAIN.format(user=getpass.getuser()), encoding="utf-8")
        self.install()
        make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        make += " -addext subjectAltName=IP:127.0.0.1 -keyout tls.key -out tls.crt"
        subprocess.run(make.split(), cwd=self.prefix / "elude", check=True, capture_output=True, timeout=60)
        self.write()
        self.command("-t")
        self._process = subprocess.Popen([*self.words(), "-g", "daemon off;"], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}/nowhere", verify=self.trust())
                return self
            except httpx.ConnectError:
                time.sleep(0.05)
        raise AssertionError(f"nginx did not start: {(self.prefix / 'error.log').read_text()}")

    def command(self, *words: str) -> None:
        """`nginx -t` or `nginx -s reload`, of this process."""
        ran = subprocess.run([*self.words(), *words], capture_output=True, text=True, timeout=30, check=False)
        assert ran.returncode == 0 and "[warn]" not in ran.stderr, ran.stderr

    def reload(self) -> None:
        """Returns when only workers of the new configuration take requests; the old ones finish theirs."""
        self.settle(lambda: self.command("-s", "reload"))

    def settle(self, reload: Callable[[], object]) -> None:
        """The same, for a reload that somebody else asks for."""
        before = self.workers()
        reload()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if len(self.workers() - before) == 2 and all(map(_shuts_down, before)):
                return
            time.sleep(0.02)
        raise AssertionError(f"nginx did not reload: {(self.prefix / 'error.log').read_text()}")

    def rewrite(self, change: Callable[[str], str]) -> None:
        """Another change of the shipped file, from now on."""
        self.change = change
        self.write()
        self.reload()

    def workers(self) -> set[int]:
        """Process ids of nginx' workers."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}

    def switch(self, release: str) -> None:
        """The two steps of deploy/scale.md: another release, and a reload."""
        link = self.prefix / "elude" / "release.conf"
        link.unlink()
        link.symlink_to(f"{release}.conf")
        self.command("-t")
        self.reload()

    @property
    def release(self) -> str:
        """The one that was switched to last."""
        return (self.prefix / "elude" / "release.conf").readlink().stem

    def log(self, enough: Callable[[list[dict[str, Any]]], bool] = lambda _: True) -> list[dict[str, Any]]:
        """The access log, whose lines are written after the answers: waits for what is to be in it."""
        deadline = time.monotonic() + 10
        while True:
            lines = (self.prefix / "elude.log").read_text(encoding="utf-8").splitlines()
            read = [json.loads(line) for line in lines]
            if enough(read) or time.monotonic() > deadline:
                return read
            time.sleep(0.02)

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.prefix / "elude" / "tls.crt"))

    def client(self, model: str, who: str = "ann", **settings: Any) -> Client:
        settings = {"token": KEYS[who], "timeout": 60, **settings}
        return Client(self.url, model, transport=httpx.HTTPTransport(verify=self.trust()), **settings)

    def async_client(self, model: str, who: str = "ann", **settings: Any) -> AsyncClient:
        settings = {"token": KEYS[who], "timeout": 60, **settings}
        return AsyncClient(self.url, model, transport=httpx.AsyncHTTPTransport(verify=self.trust()), **settings)

    def http(self, who: str | None = "ann") -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEYS[who]}"} if who else {}
        return httpx.Client(base_url=self.url, headers=headers, verify=self.trust(), timeout=30)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()  # its workers end with it
            self._process.wait(15)
            self._process = None

    def __enter__(self) -> Front:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def words(self) -> list[str]:
        """`nginx`, of this prefix."""
        assert PROGRAM is not None
        return [PROGRAM, "-p", f"{self.prefix}/", "-c", str(self.prefix / "nginx.conf"), "-e", "error.log"]


def _shuts_down(worker: int) -> bool:
    """Whether a worker has ended or takes no new connections: nginx says so in the name of its process."""
    try:
        return b"shutting down" in Path(f"/proc/{worker}/cmdline").read_bytes()
    except OSError:
        return True


def _once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"deploy/nginx.conf has {old!r} {text.count(old)} times"
    return text.replace(old, new)
