"""Freed memory is handed out again: pages are asked of the system once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sdpo.kernels.cpu import allocator

COUNT = """
import resource, torch
{call}
def use():
    torch.zeros(16_000_000).add_(1)  # 64 MB
for _ in range(20):  # until the heap has its size
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from sdpo.kernels.cpu.allocator import keep_freed_memory; keep_freed_memory()"


def count_faults(call: str, **variables: str) -> int:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(call=call)], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_pages_are_asked_of_the_system_once() -> None:
    assert count_faults("") > 10 * 1000  # a tenth of what pages of 4 KB would be, for larger ones
    assert count_faults(KEEP) < 100


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_what_the_environment_says_already_is_left_alone() -> None:
    assert count_faults(KEEP, MALLOC_MMAP_MAX_="65536") > 10 * 1000


def test_processes_started_later_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())  # a C library without such a setting
    allocator.keep_freed_memory()
    assert environment == {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
