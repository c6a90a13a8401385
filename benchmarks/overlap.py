"""Overlap of sampling and training: time of a step over max(sampling, training), for max_staleness 0 and 1.

    python benchmarks/overlap.py

Perfect overlap is 1.0 with staleness 1; without overlap the ratio is (sampling + training) / max. Sampler and actor
have one thread each. With the chosen sizes both take about the same time, where overlap saves the most. The runs of the
two settings alternate in slices, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from record import print_table, save

CONFIG = Path(__file__).parent.parent / "configs" / "hidden_rule.yaml"
WARM_UP = 3  # skipped steps: the first calls allocate, and the first batch does not overlap with training


def measure(folder: str, staleness: int, steps: int, overrides: list[str]) -> list[dict[str, float]]:
    """Train one run and return its rows of metrics."""
    from sdpo import SDPOTrainer, load_config
    from sdpo.report import read_run

    run = load_config(
        CONFIG,
        [
            f"data.task_args.dir={folder}/data",
            "data.task_args.pretrain_steps=0",
            f"output_dir={folder}/run",
            f"max_staleness={staleness}",
            f"max_steps={steps + WARM_UP}",
            "rollout.num_threads=1",
            "eval_steps=0",
            "eval.val_before_train=false",
            "eval.max_prompts=1",
            *overrides,
        ],
    )
    return list(read_run(SDPOTrainer(run).train().output_dir).rows)[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="measured steps per slice")
    parser.add_argument("--slices", type=int, default=3)
    parser.add_argument("--response", type=int, default=64, help="maximum tokens per response")
    options = parser.parse_args()
    overrides = [f"rollout.max_response_length={options.response}", "rollout.n=8", "data.train_batch_size=16"]
    rows: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.slices):
            for staleness in rows:
                rows[staleness] += measure(folder, staleness, options.steps, overrides)
    table: list[list[Any]] = []
    results: dict[str, Any] = {}
    for staleness, measured in rows.items():
        step, sampling, training = (
            statistics.median(row[f"timing_s/{name}"] for row in measured) for name in ("step", "gen", "update_actor")
        )
        ratio = statistics.median(
            row["timing_s/step"] / max(row["timing_s/gen"], row["timing_s/update_actor"]) for row in measured
        )
        table.append([f"staleness {staleness}", step, sampling, training, ratio])
        results[f"staleness_{staleness}"] = dict(step=step, sampling=sampling, learning=training, ratio=ratio)
    speedup = results["staleness_0"]["step"] / results["staleness_1"]["step"]
    print_table("Seconds per step (medians)", ["", "step", "sampling", "training", "step / max"], table)
    print(f"a step with staleness 0 takes {speedup:.2f} times as long as one with staleness 1")
    save("overlap", results | {"speedup": speedup, "steps": options.steps * options.slices})


if __name__ == "__main__":
    main()
