"""What a worker keeps of the memory that it freed, by the system's own count of page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from elude_runtime.api.config import ConfigError, ServingConfig
from elude_runtime.api.memory import keep_freed

# 40 MiB: above the largest block that glibc keeps by itself
SCRIPT = """
import resource, sys, torch
from elude_runtime.api.memory import keep_freed
kept = keep_freed(int(sys.argv[1]))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def batch(mebibytes):
    torch.ones(mebibytes << 18).mul(2).add(1)
each = []
for _ in range(15):
    before = faults()
    batch(40)
    each.append(faults() - before)
print(kept, sorted(each)[7])  # some batches find a hole too small, and take a new piece
with open("/proc/self/statm") as file:
    at_rest = int(file.read().split()[1])
batch(400)
with open("/proc/self/statm") as file:
    print((int(file.read().split()[1]) - at_rest) * resource.getpagesize() >> 20)
"""
ASKED_TWICE = [(-3, 64 << 20), (-3, 32 << 20), (-1, 64 << 20)]
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")


def run(bound: int) -> tuple[bool, int, int]:
    """(kept, median page faults of a batch, MiB more after a batch larger than the bound)"""
    out = subprocess.run([sys.executable, "-c", SCRIPT, str(bound)], check=True, capture_output=True, text=True).stdout
    kept, faults, more = out.split()
    return kept == "True", int(faults), int(more)


@glibc
def test_a_kept_heap_makes_no_page_faults_from_batch_to_batch() -> None:
    kept, faults, _ = run(256 << 20)
    assert kept
    assert faults < 50
    kept, faults, _ = run(0)
    assert not kept
    assert faults > 100  # at the least, with huge pages


@glibc
def test_a_batch_above_the_bound_is_given_back() -> None:
    assert run(256 << 20)[2] < 50


def test_where_the_c_library_has_no_such_setting_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed(1 << 20)


@pytest.mark.parametrize(
    ("takes", "kept", "asked"),
    [
        (lambda which, size: 1, True, [(-3, 64 << 20), (-1, 64 << 20)]),
        (lambda which, size: int(which == -1 or size <= 32 << 20), True, ASKED_TWICE),
        (lambda which, size: 0, False, ASKED_TWICE),
    ],
)
def test_a_library_that_takes_less(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    takes: Callable[[int, int], int],
    kept: bool,
    asked: list[tuple[int, int]],
) -> None:
    calls: list[tuple[int, int]] = []

    def mallopt(which: int, size: int) -> int:
        calls.append((which, size))
        return takes(which, size)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert keep_freed(64 << 20) is kept
    assert calls == asked and ("does not keep freed memory" in caplog.text) is not kept


def test_the_configuration_bounds_what_is_kept() -> None:
    assert ServingConfig().keep_memory_bytes == 256 << 20
    assert ServingConfig.resolve({}, {"ELUDE_KEEP_MEMORY_BYTES": "0"}).keep_memory_bytes == 0
    with pytest.raises(ConfigError, match="keep_memory_bytes"):
        ServingConfig.resolve({"keep_memory_bytes": 2**31}, {})
