"""Kill runs of the native trainer repeatedly, resume them, and compare with uninterrupted runs.

    python benchmarks/crash.py              # 32 kills, about six minutes

Each mode (sampling and training in turn or overlapped; all weights or LoRA) runs once without interruption, and once
with SIGKILL at random moments of training, saving and weight sync. A resume follows each kill. At the end the weights,
the teacher, AdamW's moments and the metrics of both runs must be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from record import print_table, save

CONFIG = Path(__file__).parent.parent / "configs" / "hidden_rule.yaml"
PHASES = ("training", "saving", "weight sync")
MODES = {
    "in turn": ["max_staleness=0"],
    "overlapped": ["max_staleness=1", "rollout.num_threads=1"],
    "in turn, LoRA": ["max_staleness=0", "lora.rank=4"],
    "overlapped, LoRA": ["max_staleness=1", "rollout.num_threads=1", "lora.rank=4"],
}
SETTINGS = [
    "max_steps=40",
    "save_steps=2",
    "eval_steps=4",
    "eval.max_prompts=20",
    "data.train_batch_size=4",
    "actor.mini_batch_size=2",
    "rollout.n=4",
    "data.task_args.pretrain_steps=20",
    "data.task_args.num_train=200",
    "data.task_args.num_test=20",
    "self_distillation.teacher_regularization=ema",
    "resume_mode=auto",
]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_training(rng: random.Random) -> None:
    """Kill the process at a random moment of the first steps, which include saving and weight sync."""
    from sdpo.trainer.actor.actor import Actor

    update_policy = Actor.update_policy

    def update_policy_with_timer(*args: Any, **kwargs: Any) -> Any:
        if not hasattr(kill_in_training, "timer"):
            kill_in_training.timer = threading.Timer(rng.uniform(0, 1.5), kill_self)  # type: ignore[attr-defined]
            kill_in_training.timer.start()  # type: ignore[attr-defined]
        return update_policy(*args, **kwargs)

    Actor.update_policy = update_policy_with_timer  # type: ignore[method-assign]


def kill_in_saving(rng: random.Random) -> None:
    """Kill the process before a random call that writes, fsyncs or renames a checkpoint or removes an older one."""
    calls_left = rng.randrange(45)

    def count_calls(call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls_left
            calls_left -= 1
            if calls_left < 0:
                kill_self()
            return call(*args, **kwargs)

        return counted

    import torch
    from safetensors import torch as safetensors

    os.fsync, os.rename, os.unlink = count_calls(os.fsync), count_calls(os.rename), count_calls(os.unlink)
    torch.save, safetensors.save_file = count_calls(torch.save), count_calls(safetensors.save_file)


def kill_in_weight_sync(rng: random.Random) -> None:
    """Kill the process before, during or after the copy of the weights."""
    from sdpo.trainer.rollout import weight_sync
    from sdpo.trainer.rollout.local import LocalSampler

    calls_left, fraction = rng.randrange(4), rng.random()

    def write_partially(shared: weight_sync.SharedWeights, *args: Any) -> None:
        nonlocal calls_left
        calls_left -= 1
        tensors = dict(shared.tensors)
        if calls_left < 0:
            for name in list(tensors)[: int(fraction * len(tensors))]:
                tensors[name].fill_(fraction)
            kill_self()
        write(shared, *args)

    def load_weights(sampler: LocalSampler, *args: Any) -> None:
        nonlocal calls_left
        calls_left -= 1
        if calls_left < 0 and fraction < 0.5:
            kill_self()
        load(sampler, *args)
        if calls_left < 0:
            kill_self()

    write, load = weight_sync.SharedWeights.write, LocalSampler.load_weights
    weight_sync.SharedWeights.write = write_partially  # type: ignore[method-assign]
    LocalSampler.load_weights = load_weights  # type: ignore[method-assign]


def run_child(overrides: list[str], phase: str, seed: int) -> None:
    """Train in this process and kill it in the given phase, if any."""
    from sdpo import SDPOTrainer, load_config

    schedule_kill = {"training": kill_in_training, "saving": kill_in_saving, "weight sync": kill_in_weight_sync}
    if phase in schedule_kill:
        schedule_kill[phase](random.Random(seed))
    SDPOTrainer(load_config(CONFIG, overrides)).train()


def start(overrides: list[str], phase: str = "none", seed: int = 0) -> int:
    command = [sys.executable, __file__, "--child", phase, str(seed), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.returncode


def find_differences(one: Path, two: Path) -> list[str]:
    """Names of the files that differ between two run folders, metrics without timings included."""
    import torch
    from safetensors.torch import load_file

    found = []
    rows = [[_drop_timings(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    checkpoints = [max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:])) for run in (one, two)]
    names = [sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")) for folder in checkpoints]
    if names[0] != names[1]:
        return [*found, "files"]
    for name in names[0]:
        tensors = [load_file(folder / name) for folder in checkpoints]
        if not equal(*tensors):
            found.append(name)
    states = [torch.load(folder / "training_state.pt") for folder in checkpoints]
    if not equal(*(state["actor"] for state in states)) or states[0]["rollouts"] != states[1]["rollouts"]:
        found.append("training_state.pt")
    return found


def _drop_timings(line: str) -> dict[str, float]:
    return {k: v for k, v in json.loads(line).items() if not k.startswith(("timing_s/", "perf/throughput"))}


def equal(one: Any, two: Any) -> bool:
    """Whether two trees of tensors, arrays and plain values are equal, bit for bit."""
    import numpy as np
    import torch
    from torch.utils._pytree import tree_flatten

    (leaves, spec), (others, other_spec) = tree_flatten(one), tree_flatten(two)
    if spec != other_spec:
        return False
    for leaf, other in zip(leaves, others, strict=True):
        leaf, other = (getattr(x, "_local_tensor", x) for x in (leaf, other))
        if isinstance(leaf, torch.Tensor):
            same = torch.equal(leaf, other)
        else:
            same = np.array_equal(leaf, other) if isinstance(leaf, np.ndarray) else leaf == other
        if not same:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8, help="kills per mode")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark_crash"))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = options.folder / time.strftime("%Y%m%d_%H%M%S")
    rows: list[dict[str, Any]] = []
    for mode in options.modes:
        common = [*SETTINGS, *MODES[mode], f"data.task_args.dir={options.folder}/task"]
        name = mode.replace(", ", "_").replace(" ", "_")
        uninterrupted, killed = (folder / f"{name}_{kind}" for kind in ("uninterrupted", "killed"))
        start([*common, f"output_dir={uninterrupted}"])
        kills: list[str] = []
        attempts = 0
        while len(kills) < options.kills:
            phase = PHASES[attempts % len(PHASES)]
            attempts += 1
            if start([*common, f"output_dir={killed}"], phase, rng.getrandbits(32)) == 0:
                break  # the run ended first
            kills.append(phase)
        else:
            start([*common, f"output_dir={killed}"])
        differences = find_differences(uninterrupted, killed)
        rows.append({"way": mode, "kills": {p: kills.count(p) for p in PHASES}, "differences": differences})
        print(mode, rows[-1]["kills"], differences or "equal", flush=True)
    tried = sum(sum(row["kills"].values()) for row in rows)
    survived = sum(sum(row["kills"].values()) for row in rows if not row["differences"])
    columns = ["", *(f"killed in {phase}" for phase in PHASES), "differences from the uninterrupted run"]
    table = [[r["way"], *r["kills"].values(), ", ".join(r["differences"]) or "nothing"] for r in rows]
    print_table(f"Survived {survived} of {tried} kills", columns, table)
    save("crash", {"survived": survived, "tried": tried, "ways": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[4:], sys.argv[2], int(sys.argv[3]))
    else:
        main()
