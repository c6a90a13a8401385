"""Growth of memory and open files in a long run: 2,000 steps of the hidden rule with staleness 1.

    python benchmarks/soak.py               # about six minutes

The script reads resident memory, shared memory, open file descriptors and threads of actor and sampler at intervals.
The slope of each over the second half is the Theil-Sen estimate (the median of the slopes between all pairs), so that a
single jump does not count. Without a leak the slope is zero up to fluctuations of the allocators.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from record import print_table, save

CONFIG = Path(__file__).parent.parent / "configs" / "hidden_rule.yaml"
INTERVAL = 20  # steps


def measure() -> dict[str, float]:
    """Current memory, open files and threads of this process and of the sampler's process (Linux)."""
    pids = {"actor": os.getpid(), "sampler": _find_child("sdpo-sampler")}
    values: dict[str, float] = {}
    for name, pid in pids.items():
        status = Path(f"/proc/{pid}/status").read_text()
        values[f"{name}: resident, MB"] = _read(status, "VmRSS") / 1024
        values[f"{name}: shared, MB"] = _read(status, "RssShmem") / 1024
        values[f"{name}: open files"] = len(os.listdir(f"/proc/{pid}/fd"))
        values[f"{name}: threads"] = _read(status, "Threads")
    return values


def _find_child(name: str) -> int:
    import multiprocessing

    return next(child.pid for child in multiprocessing.active_children() if child.name == name and child.pid)


def _read(status: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", status, flags=re.MULTILINE)
    assert match is not None
    return int(match[1])


def compute_slope(points: list[tuple[int, float]]) -> float:
    """Median of the slopes between all pairs of points (Theil-Sen)."""
    return statistics.median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", default="data/benchmark_soak")
    options = parser.parse_args()

    from sdpo import SDPOTrainer, load_config
    from sdpo.kernels.cpu.allocator import keep_freed_memory
    from sdpo.observability.progress import NullCallback

    history: list[tuple[int, dict[str, float]]] = []

    class Recorder(NullCallback):
        def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
            if step and step % INTERVAL == 0 and step < options.steps:
                history.append((step, measure()))

    keep_freed_memory()
    run = load_config(
        CONFIG,
        [
            f"output_dir={options.folder}/run",
            f"data.task_args.dir={options.folder}/task",
            f"max_steps={options.steps}",
            "max_staleness=1",
            "rollout.num_threads=1",
            "eval_steps=100",
            "save_steps=100",
            "self_distillation.teacher_regularization=ema",
            "self_distillation.ema_update_rate=0.01",
        ],
    )
    SDPOTrainer(run, Recorder()).train()
    second_half = [(step, values) for step, values in history if step > options.steps // 2]
    rows: list[list[Any]] = []
    for name in history[0][1]:
        slope = 1000 * compute_slope([(step, values[name]) for step, values in second_half])
        rows.append([name, history[0][1][name], second_half[0][1][name], second_half[-1][1][name], slope])
    columns = [
        "",
        f"step {history[0][0]}",
        f"step {second_half[0][0]}",
        f"step {second_half[-1][0]}",
        "slope per 1,000 steps",
    ]
    print_table(f"{options.steps} steps, staleness 1", columns, rows)
    results = [dict(zip(("name", "first", "half", "last", "slope_in_1000_steps"), row, strict=True)) for row in rows]
    save("soak", {"steps": options.steps, "held": results})


if __name__ == "__main__":
    main()
