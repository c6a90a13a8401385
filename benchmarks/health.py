"""Health checks on runs that collapse on purpose: warnings before the score drops, and the effect of actions.

Two healthy configurations run as well; no check may fail in them.

    python benchmarks/health.py --seeds 3

The script takes about 10 minutes on one core. --folder keeps models, data and runs, and a later call reuses them.
docs/images/health.png shows the collapse of the first seed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from hidden_rule import ACCURACY, CONFIGS, prepare
from record import print_table, run_all, save

IMAGE = Path(__file__).parent.parent / "docs" / "images" / "health.png"
SCORE_DROP = 0.2  # a validation score this far below the best counts as lost

# name -> (config file, mode of the task, overrides)
LIVE = [
    "self_distillation.teacher_regularization=live",
    "max_steps=150",
    "eval_steps=2",
    "eval.max_prompts=200",
    "eval.n=0",
]
RUNS: dict[str, tuple[str, str, list[str]]] = {
    "live teacher": ("hidden_rule_peers.yaml", "peers", [*LIVE, "health.ref_kl_interval=2"]),
    "live teacher, frozen by a health check": (
        "hidden_rule_peers.yaml",
        "peers",
        [
            *LIVE,
            *(
                f"health.{rule}=freeze_teacher"
                for rule in ("teacher_entropy_increase", "score_collapse", "entropy_explosion")
            ),
        ],
    ),
    "feedback, frozen teacher": ("hidden_rule.yaml", "feedback", []),
    "peers, trust region": (
        "hidden_rule_peers.yaml",
        "peers",
        ["self_distillation.teacher_regularization=trust-region"],
    ),
}
COLLAPSING = "live teacher"


def train(folder: str, name: str, seed: int) -> dict[str, Any]:
    """Train once; return health events, validation scores, and the step at which the score has lost ``SCORE_DROP``."""
    from sdpo import SDPOTrainer, load_config
    from sdpo.report import read_run

    config, mode, overrides = RUNS[name]
    run = load_config(
        CONFIGS / config,
        [
            f"seed={seed}",
            f"data.task_args.seed={seed}",
            f"data.task_args.dir={folder}/{mode}_{seed}",
            f"output_dir={find_run_dir(folder, name, seed)}",
            *overrides,
        ],
    )
    record = read_run(SDPOTrainer(run).train().output_dir)
    steps, accuracies = record.series(ACCURACY)
    best = accuracies[0]
    lost_at = None
    for step, accuracy in zip(steps, accuracies, strict=True):
        best = max(best, accuracy)
        if lost_at is None and accuracy < best - SCORE_DROP:
            lost_at = step
    return {
        "name": name,
        "seed": seed,
        "alarms": [{key: event[key] for key in ("step", "rule", "reason")} for event in record.health_events],
        "best": best,
        "lost_at": lost_at,
        "final": accuracies[-1],
        "steps": record.last_step,
    }


def find_run_dir(folder: str, name: str, seed: int) -> Path:
    return Path(folder) / "runs" / f"{name}_{seed}".replace(" ", "_").replace(",", "")


def draw(folder: str, seed: int) -> None:
    from sdpo.observability import metrics
    from sdpo.report import read_run
    from sdpo.report.plots import Panel, plot_panels

    record = replace(read_run(find_run_dir(folder, COLLAPSING, seed)), name="live teacher")
    panels = [
        Panel("Validation accuracy", ACCURACY, unit_range=True, smooth=False),
        Panel("Training score", metrics.SCORE_MEAN, unit_range=True),
        Panel("Entropy, nats", metrics.ENTROPY, teacher=metrics.TEACHER_ENTROPY),
        Panel("Log-prob gap, positive part", metrics.LOGPROB_DIFF_POSITIVE_PART),
        Panel("Truncated responses", metrics.RESPONSE_LENGTH_CLIP_RATIO, unit_range=True),
        Panel("KL to the reference model, nats", metrics.REF_KL, smooth=False),
    ]
    plot_panels([record], panels, IMAGE)
    print(f"image: {IMAGE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--folder", default="data/benchmark_hidden_rule")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    modes = dict.fromkeys(RUNS[name][1] for name in options.runs)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    run_all(prepare, [(options.folder, mode, s) for mode in modes for s in seeds], options.workers)
    jobs = [(options.folder, name, s) for name in options.runs for s in seeds]
    results = run_all(train, jobs, options.workers)
    rows = [
        [
            r["name"],
            r["seed"],
            ", ".join(f"{a['step']} {a['rule']}" for a in r["alarms"]) or "-",
            r["lost_at"] or "-",
            r["best"],
            r["final"],
            r["steps"],
        ]
        for r in results
    ]
    columns = ["", "seed", "failed checks", f"{SCORE_DROP} lost at", "best", "final", "steps"]
    print_table("Failed health checks, and the validation score", columns, rows)
    save("health", {"runs": results})
    if COLLAPSING in options.runs:
        draw(options.folder, options.first_seed)


if __name__ == "__main__":
    main()
