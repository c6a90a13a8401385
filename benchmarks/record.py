"""What the benchmarks share: run in the background of each other, note the machine, print a table, keep the numbers."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def run_all(work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    """``work(*arguments)`` for each, ``workers`` processes at a time, results in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(work, *each) for each in arguments]]


def describe_machine() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "date": date.today().isoformat(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row])
    Console(width=110).print(table)


def save(name: str, results: Mapping[str, Any]) -> None:
    """Write ``results/NAME.json`` with the machine and versions beside the numbers."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe_machine(), **results}, indent=2) + "\n")
    print(f"numbers: {path}")
