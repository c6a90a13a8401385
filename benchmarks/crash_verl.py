"""Kill a run on verl repeatedly, resume it, and compare with an uninterrupted run.

    python benchmarks/crash_verl.py         # ten kills, about ten minutes on two cores

The runs train one step off policy on the CPU (``crash.py`` does the same with the native trainer) and save every step.
The script kills all processes at once, alternately while a checkpoint is written and at a random moment of a step, and
resumes. At the end the weights, the teacher, AdamW's moments, the data's position and the metrics of both runs must be
equal, bit for bit. A step killed after its checkpoint and before its line in metrics.jsonl has no line; the script
counts these steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from crash import CONFIG, equal
from record import print_table, save

PHASES = ("saving", "step")
MAX_DELAY = {"saving": 0.5, "step": 2.0}  # maximum seconds from the start of the phase to the kill
TIMEOUT = 600  # seconds of one attempt
NUM_STEPS = 40
SETTINGS = [
    "max_staleness=1",
    f"max_steps={NUM_STEPS}",
    "save_steps=1",
    "save_total_limit=2",
    "eval_steps=4",
    "eval.max_prompts=4",
    "data.train_batch_size=4",
    "rollout.n=2",
    "rollout.max_num_seqs=1",  # sampled one by one, so that a rollout does not depend on its batch
    "rollout.max_response_length=8",
    "optim.lr=1e-3",
    "self_distillation.teacher_regularization=ema",
    "self_distillation.policy_loss_weight=0.3",
    "data.task_args.pretrain_steps=20",
    "data.task_args.num_train=64",
    "data.task_args.num_test=8",
    "actor_rollout_ref.rollout.full_determinism=true",
    "resume_mode=auto",
]


def start(output_dir: Path, common: list[str]) -> psutil.Popen:
    command = [sys.executable, "-m", "sdpo.cli", "verl", str(CONFIG), *common, f"output_dir={output_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with output_dir.with_suffix(".log").open("a") as log:
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def read_step(output_dir: Path) -> int:
    """Step of the latest checkpoint, from which a run would resume."""
    tracker = output_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def wait(process: psutil.Popen, output_dir: Path, phase: str | None, delay: float = 0.0) -> bool:
    """Wait for the phase and kill the run; returns False if the run ended before."""
    deadline, first_step, last = time.monotonic() + TIMEOUT, read_step(output_dir), None
    while process.poll() is None:
        if time.monotonic() > deadline:
            kill(process)
            sys.exit(f"{output_dir}: the run did not end within {TIMEOUT} s")
        step = read_step(output_dir)
        is_saving = (output_dir / "checkpoints" / f"global_step_{step + 1}").exists()
        is_due = {"saving": is_saving and last == (step, False), "step": step > first_step, None: False}[phase]
        if is_due:
            time.sleep(delay)
            kill(process)
            return True
        last = (step, is_saving)
        time.sleep(0.005)
    if process.returncode != 0:
        sys.exit(f"{output_dir}: exit code {process.returncode}; see {output_dir.with_suffix('.log')}")
    return False


def kill(process: psutil.Popen) -> None:
    processes = [*process.children(recursive=True), process] if process.is_running() else []
    for member in processes:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)


def read_rows(output_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics of each step without times and memory; the later values win where a step was logged twice."""
    rows: dict[int, dict[str, float]] = {}
    for path in sorted(output_dir.glob("metrics*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            values = {k: v for k, v in row["data"].items() if not k.startswith(("timing_", "perf/", "actor/perf/"))}
            rows.setdefault(row["step"], {}).update(values)
    return rows


def find_differences(uninterrupted: Path, killed: Path) -> tuple[list[str], int]:
    """Names of the files and steps that differ, and the number of steps that ``killed`` has not logged."""
    import torch

    found = []
    checkpoints = [run / "checkpoints" / f"global_step_{NUM_STEPS}" for run in (uninterrupted, killed)]
    names = [
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) for folder in checkpoints
    ]
    if names[0] != names[1]:
        found.append("files")
    for name in sorted(set(names[0]) & set(names[1])):
        one, two = (folder / name for folder in checkpoints)
        if name.endswith(".pt"):
            os.environ["VERL_PLATFORM"] = "cpu"
            states = [torch.load(path, weights_only=False, map_location="cpu") for path in (one, two)]
            for state in states:
                state.pop("rng", None)  # an update draws no random numbers in the worker's process
            same = equal(*states)
        else:
            same = one.read_bytes() == two.read_bytes()
        if not same:
            found.append(name)
    rows, again = read_rows(uninterrupted), read_rows(killed)
    # A resumed run starts with an evaluation, which the other run may lack.
    found += [
        f"metrics of step {step}" for step in rows if step in again and not rows[step].items() <= again[step].items()
    ]
    return found, len(rows.keys() - again.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark_crash_verl"))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = (options.folder / time.strftime("%Y%m%d_%H%M%S")).absolute()
    folder.mkdir(parents=True)
    common = [*SETTINGS, f"data.task_args.dir={options.folder.absolute()}/task"]
    uninterrupted, killed = folder / "uninterrupted", folder / "killed"
    wait(start(uninterrupted, common), uninterrupted, None)
    print("the uninterrupted run has ended", flush=True)
    kills: list[dict[str, Any]] = []
    while len(kills) < options.kills:
        phase = PHASES[len(kills) % len(PHASES)]
        if not wait(start(killed, common), killed, phase, rng.uniform(0.0, MAX_DELAY[phase])):
            break  # the run ended first
        kills.append({"phase": phase, "resumes from": read_step(killed)})
        print(kills[-1], flush=True)
    else:
        wait(start(killed, common), killed, None)
    differences, missing = find_differences(uninterrupted, killed)
    rows = [[phase, sum(kill["phase"] == phase for kill in kills)] for phase in PHASES]
    print_table(f"{len(kills)} kills; differences: {', '.join(differences) or 'nothing'}", ["killed in", ""], rows)
    print(f"metrics are missing for {missing} of {NUM_STEPS} steps")
    save("crash_verl", {"kills": kills, "differences": differences, "steps_without_metrics": missing})


if __name__ == "__main__":
    main()
