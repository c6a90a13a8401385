"""keep_freed_memory makes glibc reuse freed memory instead of requesting new pages."""

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
for _ in range(20):  # until the heap has its final size
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
def test_freed_pages_are_reused() -> None:
    assert count_faults("") > 10 * 1000  # a tenth of the faults with 4 KB pages; the system may use larger pages
    assert count_faults(KEEP) < 100


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_variables_of_the_environment_take_precedence() -> None:
    assert count_faults(KEEP, MALLOC_MMAP_MAX_="65536") > 10 * 1000


def test_child_processes_inherit_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())  # a C library without such a setting
    allocator.keep_freed_memory()
    assert environment == {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
