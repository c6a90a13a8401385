"""Startup time of ``sdpo --help``, and of ``sdpo train`` with a tiny model until the end of the first step.

    python benchmarks/startup.py

The table has medians from the start of the process, with existing model and data, and the times of Python and of the
imports alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from record import print_table, save
from workload import Workload

SDPO = [sys.executable, "-m", "sdpo.cli"]
TARGETS = {"sdpo --help": 0.5, "sdpo train, first step": 15.0}


def time_command(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def time_first_step(folder: Path, config_file: Path) -> float:
    """Seconds until ``metrics.jsonl`` has its first row; kills the run afterwards."""
    output_dir = Path(tempfile.mkdtemp(dir=folder))
    rows, log = output_dir / "run" / "metrics.jsonl", output_dir / "log"
    started = time.perf_counter()
    command = [*SDPO, "train", str(config_file), f"output_dir={output_dir}/run", "max_steps=1000"]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        while not (rows.is_file() and "\n" in rows.read_text()):
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before its first step:\n{log.read_text()}")
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--note", default="", help="other load on the machine; saved with the results")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload = Workload(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, response_length=16)
        workload.write(folder)
        lines: dict[str, Callable[[], float]] = {
            "python -c pass": partial(time_command, [sys.executable, "-c", "pass"]),
            "sdpo --help": partial(time_command, [*SDPO, "--help"]),
            "import torch, transformers": partial(time_command, [sys.executable, "-c", "import torch, transformers"]),
            "sdpo train, first step": partial(time_first_step, folder, folder / "run.yaml"),
        }
        seconds: dict[str, list[float]] = {line: [] for line in lines}
        for repeat in range(options.repeats + 1):
            for line, measure in lines.items():
                value = measure()
                if repeat > 0:  # the first repeat fills the file cache
                    seconds[line].append(value)
    measured: dict[str, Any] = {
        line: {"seconds": statistics.median(values), "slowest": max(values), "target": TARGETS.get(line)}
        for line, values in seconds.items()
    }
    print_table(
        f"Seconds from the start of the process, {options.repeats} repeats",
        ["", "median", "slowest", "target"],
        [[line, m["seconds"], m["slowest"], f"< {m['target']}" if m["target"] else ""] for line, m in measured.items()],
    )
    save("startup", {"note": options.note, "repeats": options.repeats, "measured": measured})


if __name__ == "__main__":
    main()
