"""Check that two versions of the source train to the same numbers: same seed, same loss.

    python benchmarks/same_loss.py main HEAD                # two git revisions
    python benchmarks/same_loss.py main src --steps 20      # a revision and a folder that contains sdpo/

Both versions train the same tiny model on the same data with this interpreter. Every number of ``metrics.jsonl`` except
the timings has to be equal, bit for bit; the exit code is 1 if a number differs. A renamed metric counts as the same
metric (``RENAMED_METRICS``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from sdpo.observability.metrics import replace_old_names

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "hidden_rule.yaml"
TASK = ["data.task_args.pretrain_steps=100", "data.task_args.num_train=200", "data.task_args.num_test=20"]
TIMINGS = ("timing_s/", "perf/throughput")


def train(version: str, folder: Path, name: str, settings: list[str]) -> list[dict[str, float]]:
    """Train with a git revision or source folder; return the rows of ``metrics.jsonl`` without the timings."""
    source, tree, out = Path(version).resolve(), folder / f"{name}_tree", folder / name
    if not (source / "sdpo").is_dir():
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, version], check=True)
        source = tree / "src"
    try:
        command = [sys.executable, "-m", "sdpo.cli", "train", CONFIG, f"output_dir={out}", *settings]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True)
    finally:
        if tree.is_dir():
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    if done.returncode:
        raise SystemExit(f"{version}: training failed; its config keys may differ from {CONFIG.name}\n{done.stderr}")
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [replace_old_names(json.loads(line)) for line in lines]
    return [{key: value for key, value in row.items() if not key.startswith(TIMINGS)} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="git revision or source folder")
    parser.add_argument("new", help="git revision or source folder")
    parser.add_argument("--steps", type=int, default=5, help="training steps (default: 5)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for both versions")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = [f"max_steps={options.steps}", f"data.task_args.dir={folder / 'data'}", *TASK, *options.set]
        old, new = (train(getattr(options, name), folder, name, settings) for name in ("old", "new"))
    for before, after in zip(old, new, strict=True):
        for key in before | after:
            values = before.get(key), after.get(key)
            if repr(values[0]) != repr(values[1]):  # repr keeps every digit, and NaN equals NaN
                print(f"step {before['training/global_step']}: {key}: {values[0]} before, {values[1]} after")
                return 1
    print(f"equal: {sum(map(len, new))} numbers, {options.steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
