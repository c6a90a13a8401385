"""Functions that the benchmarks share: processes, peak memory, description of the machine, tables, result files."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Folder of the results; a trial sets BENCHMARK_RESULTS to another folder.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
ALLOCATION = ("THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")  # of torch and of glibc


def run_all(work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    """Call ``work`` with each tuple of arguments in at most ``workers`` processes; return the results in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(work, *values) for values in arguments]]


def reset_peak() -> int:
    """Return freed memory to the system and reset the peak of the resident set (Linux).

    Returns:
        Resident bytes now.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _read_status("VmRSS")


def read_peak() -> int:
    """Peak bytes of the resident set since ``reset_peak``."""
    return _read_status("VmHWM")


def _read_status(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def compute_slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Exponent p of the fit y ~ x^p to the last three points (x, y); None unless every y is above 0."""
    if min(y for _, y in points[-3:]) <= 0:
        return None
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points[-3:]), strict=True)
    return statistics.linear_regression(xs, ys).slope


def median_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median of each column."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def describe_kernels() -> dict[str, Any]:
    """Settings and libraries that affect the speed of matrix products and memory allocation in this process."""
    import torch

    cpu = _read("/proc/cpuinfo")
    flags = set(re.search(r"^flags\s*: (.*)", cpu, flags=re.MULTILINE)[1].split()) if "flags" in cpu else set()
    return {
        "threads": torch.get_num_threads(),
        "onednn": torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled),
        "onednn_max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "default"),
        "aten_capability": torch.backends.cpu.get_cpu_capability(),
        "processor_flags": sorted(flag for flag in flags if re.match(r"avx|amx|fma|bf16", flag)),
        "libraries": re.findall(r"- (.*(?:Math Kernel|MKL-DNN|CUDA Runtime|CuDNN).*)", torch.__config__.show()),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        **{name: os.environ.get(name, "not set") for name in ALLOCATION},
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def describe_machine() -> dict[str, Any]:
    import torch
    import transformers

    model = re.search(r"^model name\s*: (.*)", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    return {
        "date": date.today().isoformat(),
        "processor": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{package: version(package) for package in ("trl", "liger_kernel") if find_spec(package)},
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich import box  # a GPU machine may lack rich
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row])
    Console(width=130).print(table)


def save(name: str, results: Mapping[str, Any]) -> None:
    """Write the results with machine and versions to ``NAME.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe_machine(), **results}, indent=2) + "\n")
    print(f"results: {path}")
