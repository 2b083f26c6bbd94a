"""A stand-in for a container engine: a program in Linux namespaces of its own, as an image's and a pod's settings ask.

It has a read-only root made of this host's folders, /tmp and /metrics of its own in memory, its own processes (it is
process 1) and network (loopback and one address beside it), the image's user, no capabilities and no new privileges.
No image is built: Python, Java and the package are this host's. It needs root, or rights that containers often lack.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
OUTSIDE = "192.0.2.1"
"""An address that is not loopback, as the pod's would be; reserved for documentation, and local to the sandbox."""
_HOST = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/dev")
# As the container starts: process 1 of a new session of processes, with a network of its own, mounts that vanish.
_UNSHARE = ["unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child", "--propagation", "private"]


def require_namespaces() -> None:
    """Skips the test where the kernel does not let us."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None or shutil.which("ip") is None:
        pytest.skip("unshare, setpriv or ip is missing: Linux with util-linux and iproute2 has them")
    tried = subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"namespaces are not permitted here: {tried.stderr.strip()}")


class Sandbox:
    """`command` in a sandbox as a context manager; killed at the end, with all that it started."""

    def __init__(
        self, folder: Path, command: Sequence[str], *, user: str, files: dict[str, Path], environment: dict[str, str]
    ) -> None:
        """folder: an empty one for the mounts and the output. user: `uid:gid`. files: what is copied to which path of
        the root. `elude` is on the PATH, from this tree."""
        self._folder, self._command, self._user, self._environment = folder, list(command), user, environment
        self._files = files
        self.output = folder / "output.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        script = self._folder / "enter.sh"
        script.write_text(self._script(), encoding="utf-8")
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                [*_UNSHARE, "bash", str(script)], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()  # and with it process 1 of the sandbox, whose end is everybody's
        self._process.wait()

    @property
    def pid(self) -> int:
        """Process 1 of the sandbox, by its number out here, once it has its own root."""
        assert self._process is not None
        for _ in range(200):
            for child in psutil.Process(self._process.pid).children():
                if os.readlink(f"/proc/{child.pid}/root") != "/":
                    return int(child.pid)
            time.sleep(0.05)
        raise AssertionError(f"it did not start: {self.output.read_text()}")

    def wait(self, seconds: float) -> int:
        """Its exit status."""
        assert self._process is not None
        return self._process.wait(seconds)

    def running(self) -> bool:
        assert self._process is not None
        return self._process.poll() is None

    def execute(self, command: Sequence[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A further program inside, as the same user: what `docker exec` and exec probes do."""
        return subprocess.run(self._inside(command), capture_output=True, text=True, timeout=timeout, check=False)

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A second container of the same pod: shares the network and the folders; ends with the first at the latest."""
        return subprocess.Popen(self._inside(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def _inside(self, command: Sequence[str]) -> list[str]:
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--ipc", "--root", "--wd"]
        return [*enter, *self._as_user(), *command]

    def _as_user(self) -> list[str]:
        user, _, group = self._user.partition(":")
        variables = {
            "PATH": "/opt/elude/bin:/usr/bin:/bin", "HOME": "/tmp", "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1", **self._environment,
        }  # fmt: skip
        if "JAVA_HOME" in os.environ:
            variables["JAVA_HOME"] = os.environ["JAVA_HOME"]
        without = ["--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        given = [f"{name}={value}" for name, value in variables.items()]
        return ["setpriv", f"--reuid={user}", f"--regid={group}", *without, "env", "-i", *given]

    def _script(self) -> str:
        """Builds the root and becomes the program."""
        root = self._folder / "root"
        seen = [*_HOST, sys.prefix, sys.base_prefix, str(REPOSITORY), *filter(None, [os.environ.get("JAVA_HOME")])]
        lines = ["set -eu", "umask 022", f"R={shlex.quote(str(root))}"]
        lines += ["mkdir -p $R", "mount -t tmpfs -o mode=755 tmpfs $R", "mkdir -m 1777 $R/tmp"]
        lines += ["mkdir $R/proc $R/etc $R/models $R/metrics", "mount -t tmpfs -o mode=1777 tmpfs $R/tmp"]
        # The host's /etc without its secrets; a copy, so that ours can be added.
        lines.append("cp -r --preserve=links,mode /etc/[a-z]* $R/etc/ && rm -f $R/etc/*shadow*")
        lines += ["mount -t tmpfs tmpfs $R/metrics", f"chown {self._user} $R/metrics", "mount -t proc proc $R/proc"]
        for folder in dict.fromkeys(seen):
            if Path(folder).exists():  # bound, whether it is a folder of the host or a link to one
                place = shlex.quote(folder)
                lines.append(f"mkdir -p $R{place}; mount --rbind {place} $R{place}; mount -o remount,bind,ro $R{place}")
        lines.append("mkdir -p $R/opt/elude/bin")
        program = "import sys; from elude_runtime.cli import main; sys.exit(main())"
        wrapper = f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c '{program}' \"$@\"\n"
        lines.append(f"printf %s {shlex.quote(wrapper)} > $R/opt/elude/bin/elude; chmod 755 $R/opt/elude/bin/elude")
        for place, source in self._files.items():
            lines.append(f"install -D -m 444 {shlex.quote(str(source))} $R{shlex.quote(place)}")
        lines += ["mount -o remount,ro $R", "ip link set lo up", f"ip addr add {OUTSIDE}/32 dev lo", "cd $R"]
        lines.append(f"exec chroot . {shlex.join([*self._as_user(), *self._command])}")
        return "\n".join(lines) + "\n"
