"""Kill runs of the native trainer repeatedly, resume them, and compare with uninterrupted runs.

    python benchmarks/crash.py              # 32 kills, about six minutes

Each setting (in turn or overlapped; all weights or LoRA) runs once without interruption, and once with SIGKILL at
random moments of training, saving and weight sync, each followed by a resume. At the end weights, teacher, AdamW's
moments and metrics of both must be equal, bit for bit.
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
WAYS = {
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


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_training(rng: random.Random) -> None:
    """At any moment of a few steps, including saving and weight sync."""
    from sdpo.trainer.actor.actor import Actor

    learn = Actor.update_policy

    def learn_for_a_while(*arguments: Any, **how: Any) -> Any:
        if not hasattr(die_in_training, "timer"):
            die_in_training.timer = threading.Timer(rng.uniform(0, 1.5), die)  # type: ignore[attr-defined]
            die_in_training.timer.start()  # type: ignore[attr-defined]
        return learn(*arguments, **how)

    Actor.update_policy = learn_for_a_while  # type: ignore[method-assign]


def die_in_saving(rng: random.Random) -> None:
    """Before a random call that writes, fsyncs or renames a checkpoint or removes an older one."""
    left = rng.randrange(45)

    def counted(call: Any) -> Any:
        def count(*arguments: Any, **how: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                die()
            return call(*arguments, **how)

        return count

    import torch
    from safetensors import torch as safetensors

    os.fsync, os.rename, os.unlink = counted(os.fsync), counted(os.rename), counted(os.unlink)
    torch.save, safetensors.save_file = counted(torch.save), counted(safetensors.save_file)


def die_in_weight_sync(rng: random.Random) -> None:
    """Before, during or after the copy of the weights."""
    from sdpo.trainer.rollout import weight_sync
    from sdpo.trainer.rollout.local import LocalSampler

    calls_left, part = rng.randrange(4), rng.random()

    def write_a_part(shared: weight_sync.SharedWeights, *arguments: Any) -> None:
        nonlocal calls_left
        calls_left -= 1
        tensors = dict(shared.tensors)
        if calls_left < 0:
            for name in list(tensors)[: int(part * len(tensors))]:
                tensors[name].fill_(part)
            die()
        write(shared, *arguments)

    def load_weights(sampler: LocalSampler, *arguments: Any) -> None:
        nonlocal calls_left
        calls_left -= 1
        if calls_left < 0 and part < 0.5:
            die()
        load(sampler, *arguments)
        if calls_left < 0:
            die()

    write, load = weight_sync.SharedWeights.write, LocalSampler.load_weights
    weight_sync.SharedWeights.write = write_a_part  # type: ignore[method-assign]
    LocalSampler.load_weights = load_weights  # type: ignore[method-assign]


def run_child(overrides: list[str], phase: str, seed: int) -> None:
    """Run in a process that is killed in the given phase, if any."""
    from sdpo import SDPOTrainer, load_config

    die_in = {"training": die_in_training, "saving": die_in_saving, "weight sync": die_in_weight_sync}
    if phase in die_in:
        die_in[phase](random.Random(seed))
    SDPOTrainer(load_config(CONFIG, overrides)).train()


def start(overrides: list[str], phase: str = "none", seed: int = 0) -> int:
    command = [sys.executable, __file__, "--child", phase, str(seed), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.returncode


def differ(one: Path, two: Path) -> list[str]:
    """Names of what differs between two run folders, in any bit."""
    import torch
    from safetensors.torch import load_file

    found = []
    rows = [[_without_clock(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    ends = [max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:])) for run in (one, two)]
    names = [sorted(p.relative_to(end).as_posix() for p in end.rglob("*.safetensors")) for end in ends]
    if names[0] != names[1]:
        return [*found, "files"]
    for name in names[0]:
        tensors = [load_file(end / name) for end in ends]
        if not equal(*tensors):
            found.append(name)
    states = [torch.load(end / "training_state.pt") for end in ends]
    if not equal(*(state["actor"] for state in states)) or states[0]["rollouts"] != states[1]["rollouts"]:
        found.append("training_state.pt")
    return found


def _without_clock(line: str) -> dict[str, float]:
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
    parser.add_argument("--kills", type=int, default=8, help="of each way of running")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark_crash"))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    place = options.folder / time.strftime("%Y%m%d_%H%M%S")
    rows: list[dict[str, Any]] = []
    for way in options.ways:
        common = [*SETTINGS, *WAYS[way], f"data.task_args.dir={options.folder}/task"]
        whole, killed = (place / f"{way}_{kind}".replace(", ", "_").replace(" ", "_") for kind in ("whole", "killed"))
        start([*common, f"output_dir={whole}"])
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
        differences = differ(whole, killed)
        rows.append({"way": way, "kills": {p: kills.count(p) for p in PHASES}, "differences": differences})
        print(way, rows[-1]["kills"], differences or "the same", flush=True)
    tried = sum(sum(row["kills"].values()) for row in rows)
    survived = sum(sum(row["kills"].values()) for row in rows if not row["differences"])
    columns = ["", *(f"killed in {phase}" for phase in PHASES), "differs from the uninterrupted run"]
    table = [[r["way"], *r["kills"].values(), ", ".join(r["differences"]) or "nothing"] for r in rows]
    print_table(f"Survived {survived} of {tried} kills", columns, table)
    save("crash", {"survived": survived, "tried": tried, "ways": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[4:], sys.argv[2], int(sys.argv[3]))
    else:
        main()
