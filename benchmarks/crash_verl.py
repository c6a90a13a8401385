"""Kill a run on verl repeatedly, resume it, and compare with an uninterrupted run.

    python benchmarks/crash_verl.py         # ten kills, about ten minutes on two cores

One step off policy on the CPU (``crash.py`` does the same with the native trainer). Every step is saved. All processes
get SIGKILL at once, alternately while a checkpoint is written and at any moment of a step, each followed by a resume.
At the end weights, teacher, AdamW's moments, the data's position and the metrics of both must be equal, bit for bit. A
step killed after its checkpoint and before its line in metrics.jsonl has no line; these steps are counted.
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
LONGEST = {"saving": 0.5, "step": 2.0}  # maximum of the seconds from the start of the phase to the kill
LIMIT = 600  # seconds for one start
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
    end, begun_with, last = time.monotonic() + LIMIT, read_step(output_dir), None
    while process.poll() is None:
        if time.monotonic() > end:
            kill(process)
            sys.exit(f"{output_dir}: no end after {LIMIT} s")
        step = read_step(output_dir)
        is_saving = (output_dir / "checkpoints" / f"global_step_{step + 1}").exists()
        sign = {"saving": is_saving and last == (step, False), "step": step > begun_with, None: False}[phase]
        if sign:
            time.sleep(delay)
            kill(process)
            return True
        last = (step, is_saving)
        time.sleep(0.005)
    if process.returncode != 0:
        sys.exit(f"{output_dir}: exit code {process.returncode}; see {output_dir.with_suffix('.log')}")
    return False


def kill(process: psutil.Popen) -> None:
    family = [*process.children(recursive=True), process] if process.is_running() else []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def read_rows(output_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics of each step without times and memory; of a step that was logged twice, the later values."""
    rows: dict[int, dict[str, float]] = {}
    for path in sorted(output_dir.glob("metrics*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            values = {k: v for k, v in row["data"].items() if not k.startswith(("timing_", "perf/", "actor/perf/"))}
            rows.setdefault(row["step"], {}).update(values)
    return rows


def differ(whole: Path, killed: Path) -> tuple[list[str], int]:
    """Names of what differs between the two runs in any bit, and the number of steps without metrics in the second."""
    import torch

    found = []
    ends = [run / "checkpoints" / f"global_step_{NUM_STEPS}" for run in (whole, killed)]
    names = [sorted(p.relative_to(end).as_posix() for p in end.rglob("*") if p.is_file()) for end in ends]
    if names[0] != names[1]:
        found.append("files")
    for name in sorted(set(names[0]) & set(names[1])):
        one, two = (end / name for end in ends)
        if name.endswith(".pt"):
            os.environ["VERL_PLATFORM"] = "cpu"
            states = [torch.load(path, weights_only=False, map_location="cpu") for path in (one, two)]
            for state in states:
                state.pop("rng", None)  # of the worker's process, which uses no random numbers in an update
            same = equal(*states)
        else:
            same = one.read_bytes() == two.read_bytes()
        if not same:
            found.append(name)
    rows, again = read_rows(whole), read_rows(killed)
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
    place = (options.folder / time.strftime("%Y%m%d_%H%M%S")).absolute()
    place.mkdir(parents=True)
    common = [*SETTINGS, f"data.task_args.dir={options.folder.absolute()}/task"]
    whole, killed = place / "whole", place / "killed"
    wait(start(whole, common), whole, None)
    print("the uninterrupted run has ended", flush=True)
    kills: list[dict[str, Any]] = []
    while len(kills) < options.kills:
        phase = PHASES[len(kills) % len(PHASES)]
        if not wait(start(killed, common), killed, phase, rng.uniform(0.0, LONGEST[phase])):
            break  # the run ended first
        kills.append({"phase": phase, "resumes from": read_step(killed)})
        print(kills[-1], flush=True)
    else:
        wait(start(killed, common), killed, None)
    differences, missing = differ(whole, killed)
    rows = [[phase, sum(kill["phase"] == phase for kill in kills)] for phase in PHASES]
    print_table(f"{len(kills)} kills; differs: {', '.join(differences) or 'nothing'}", ["killed in", ""], rows)
    print(f"metrics are missing for {missing} of {NUM_STEPS} steps")
    save("crash_verl", {"kills": kills, "differences": differences, "steps_without_metrics": missing})


if __name__ == "__main__":
    main()
