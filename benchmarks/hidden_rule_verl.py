"""Validation accuracy on the hidden rule with the verl backend: the shipped config file, one step off policy.

    python benchmarks/hidden_rule_verl.py

The script starts Ray and FSDP2 and takes about ten minutes on two idle cores without a GPU. --folder keeps the model
and the data, and a later call reuses them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from record import print_table, save

from sdpo.observability import metrics
from sdpo.report import read_run

CONFIG = Path(__file__).parent.parent / "configs" / "hidden_rule.yaml"
ACCURACY = "val-core/hidden_rule/acc/mean@1"


def record(output_dir: Path, seconds: float) -> None:
    """Print and save the accuracies of a finished run."""
    run = read_run(output_dir)
    steps, accuracies = run.series(ACCURACY)
    _, staleness = run.series(metrics.STALENESS)
    columns = ["step", *map(str, steps)]
    print_table("SDPO on verl: validation exact match", columns, [["", *accuracies]])
    results = {
        "verl": version("verl"),
        "ray": version("ray"),
        "steps": steps,
        "accuracy": accuracies,
        "largest_staleness": max(staleness),
        "seconds": round(seconds),
    }
    save("hidden_rule_verl", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="data/benchmark_hidden_rule_verl")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(options.folder).absolute()
    output_dir = folder / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-seed{options.seed}"
    settings = {
        "output_dir": output_dir,
        "seed": options.seed,
        "data.task_args.seed": options.seed,
        "data.task_args.dir": folder / f"seed{options.seed}",
        "max_staleness": 1,
        "eval_steps": 20,
    }
    started = time.perf_counter()
    command = [sys.executable, "-m", "sdpo.cli", "verl", str(CONFIG)]
    subprocess.run([*command, *(f"{key}={value}" for key, value in settings.items())], check=True)
    record(output_dir, time.perf_counter() - started)


if __name__ == "__main__":
    main()
