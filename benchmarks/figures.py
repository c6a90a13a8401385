"""Validation accuracy on figures: SDPO and GRPO with equal budgets, then the students on exchanged images.

    python benchmarks/figures.py

One seed takes about 15 minutes on two cores. --folder keeps models, data and runs, and a later call reuses them.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from record import print_table, run_all, save

CONFIGS = Path(__file__).parent.parent / "configs"
ACCURACY = "val-core/figures/acc/mean@1"


def prepare(folder: str, seed: int) -> None:
    """Write the task's files, and the validation rows with exchanged images."""
    import pyarrow.parquet as pq

    from sdpo.rewards.toy.drawing import write_rows
    from sdpo.rewards.toy.figures import Figures, shuffle_images

    Figures(dir=f"{folder}/{seed}", seed=seed).prepare()
    rows = pq.read_table(f"{folder}/{seed}/test.parquet").to_pylist()
    write_rows(shuffle_images(rows, seed), Path(f"{folder}/exchanged_{seed}.parquet"))


def train_and_evaluate(folder: str, config: str, seed: int, name: str) -> dict[str, Any]:
    """Train once, then evaluate the checkpoint on the exchanged images."""
    from sdpo import SDPOTrainer, load_config
    from sdpo.observability.progress import NullCallback
    from sdpo.report import read_run
    from sdpo.trainer.build import build_components

    settings = [f"seed={seed}", f"data.task_args.seed={seed}", f"data.task_args.dir={folder}/{seed}"]
    run = load_config(CONFIGS / config, [*settings, f"output_dir={folder}/runs/{name}_{seed}"])
    started = time.perf_counter()
    result = SDPOTrainer(run).train()
    seconds = time.perf_counter() - started
    steps, accuracies = read_run(result.output_dir).series(ACCURACY)

    checkpoint = result.output_dir / "checkpoints" / f"step_{run.max_steps}"
    components = build_components(
        load_config(
            CONFIGS / config,
            [
                *settings,
                f"model.path={checkpoint}",
                f"data.val_files=[{folder}/exchanged_{seed}.parquet]",
                f"output_dir={folder}/runs/{name}_{seed}_exchanged",
            ],
        ),
        NullCallback(),
    )
    exchanged = components.evaluator.evaluate(components.actor.student, None)[ACCURACY]
    components.sampler.close()
    components.folder.close()
    return {
        "name": name,
        "seed": seed,
        "steps": list(steps),
        "accuracies": list(accuracies),
        "before": accuracies[0],
        "final": accuracies[-1],
        "exchanged": exchanged,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", default="data/benchmark_figures")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    seeds = range(options.seeds)
    run_all(prepare, [(options.folder, seed) for seed in seeds], options.workers)
    pairs = [("SDPO", "figures.yaml"), ("GRPO", "figures_grpo.yaml")]
    results = run_all(
        train_and_evaluate,
        [(options.folder, config, seed, name) for seed in seeds for name, config in pairs],
        options.workers,
    )
    print_table(
        "Figures: validation exact match",
        ["", "seed", "before", "final", "images exchanged", "seconds"],
        [[r["name"], r["seed"], r["before"], r["final"], r["exchanged"], round(r["seconds"])] for r in results],
    )
    save("figures", {"runs": results})


if __name__ == "__main__":
    main()
