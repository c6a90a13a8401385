"""Validation accuracy on the hidden rule: SDPO and GRPO with equal budgets (mode B), stability of teachers (mode A).

    python benchmarks/hidden_rule.py --seeds 3

The script takes about 25 minutes on two cores. --folder keeps models, data and runs, and a later call reuses them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from record import print_table, run_all, save

CONFIGS = Path(__file__).parent.parent / "configs"
ACCURACY = "val-core/hidden_rule/acc/mean@1"
TEACHERS = {
    "EMA 0.05": ["teacher_regularization=ema", "ema_update_rate=0.05"],
    "EMA 0.01": ["teacher_regularization=ema", "ema_update_rate=0.01"],
    "trust region 0.05": ["teacher_regularization=trust-region", "ema_update_rate=0.05"],
    "frozen": ["teacher_regularization=frozen"],
    "live": ["teacher_regularization=live"],
}


def prepare(folder: str, mode: str, seed: int) -> None:
    from sdpo.rewards.toy.hidden_rule import HiddenRule

    HiddenRule(dir=f"{folder}/{mode}_{seed}", mode=mode, seed=seed).prepare()


def train(folder: str, config: str, mode: str, seed: int, name: str, overrides: list[str]) -> dict[str, Any]:
    """Train once; return the accuracy before training, the best and the final accuracy, and the seconds."""
    from sdpo import SDPOTrainer, load_config
    from sdpo.report import read_run

    run = load_config(
        CONFIGS / config,
        [
            f"seed={seed}",
            f"data.task_args.seed={seed}",
            f"data.task_args.dir={folder}/{mode}_{seed}",
            f"output_dir={folder}/runs/{name}_{seed}".replace(" ", "_"),
            *overrides,
        ],
    )
    started = time.perf_counter()
    result = SDPOTrainer(run).train()
    _, accuracies = read_run(result.output_dir).series(ACCURACY)
    return {
        "name": name,
        "seed": seed,
        "before": accuracies[0],
        "best": max(accuracies),
        "final": accuracies[-1],
        "seconds": time.perf_counter() - started,
    }


def tabulate(results: list[dict[str, Any]]) -> list[list[Any]]:
    """One row per run, then mean and minimum of the final accuracy over all seeds of a name."""
    rows: list[list[Any]] = []
    for name in dict.fromkeys(r["name"] for r in results):
        group = [r for r in results if r["name"] == name]
        rows += [[r["name"], r["seed"], r["before"], r["best"], r["final"], round(r["seconds"])] for r in group]
        if len(group) > 1:
            finals = [r["final"] for r in group]
            rows.append(
                [f"{name}: mean, lowest final", "", "", "", f"{statistics.mean(finals):.3f}, {min(finals):.3f}", ""]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of mode B")
    parser.add_argument("--peer-seeds", type=int, default=1, help="seeds of mode A, five runs each")
    parser.add_argument("--folder", default="data/benchmark_hidden_rule")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    seeds, peer_seeds = range(options.seeds), range(options.peer_seeds)
    tasks = [("feedback", s) for s in seeds] + [("peers", s) for s in peer_seeds]
    run_all(prepare, [(options.folder, *task) for task in tasks], options.workers)

    pairs = [("SDPO", "hidden_rule.yaml"), ("GRPO", "hidden_rule_grpo.yaml")]
    jobs_b = [(options.folder, config, "feedback", s, name, []) for name, config in pairs for s in seeds]
    jobs_a = [
        (options.folder, "hidden_rule_peers.yaml", "peers", s, name, [f"self_distillation.{o}" for o in overrides])
        for name, overrides in TEACHERS.items()
        for s in peer_seeds
    ]
    results = run_all(train, jobs_b + jobs_a, options.workers)
    mode_b, mode_a = results[: len(jobs_b)], results[len(jobs_b) :]
    columns = ["", "seed", "before", "best", "final", "seconds"]
    print_table("Mode B (feedback): validation exact match", columns, tabulate(mode_b))
    print_table("Mode A (successful rollouts): validation exact match by teacher", columns, tabulate(mode_a))
    save("hidden_rule", {"mode_b": mode_b, "mode_a": mode_a})


if __name__ == "__main__":
    main()
