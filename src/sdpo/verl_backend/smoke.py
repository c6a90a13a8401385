"""``SMOKE_TEST=1 bash train.sh``: a tiny model and task through the whole pipeline, and a look at what came out.

Without GPUs for both roles it runs on the CPU. What is checked is what a wrong pipeline would get wrong silently: that
there is something to distil, that the teacher is the moving average, that the sampler has the trained weights.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sdpo import metrics
from sdpo.algorithm.inputs import gather_log_probs
from sdpo.errors import UserError
from sdpo.tasks.hidden_rule import HiddenRule
from sdpo.verl_backend.main import CPU
from sdpo.verl_backend.translate import quote

STEPS = 3
EMA_RATE = 0.05


def build_overrides(folder: Path) -> list[str]:
    """A run of three one-step-off steps on the hidden rule, all of them saved."""
    self_distillation = "actor_rollout_ref.actor.self_distillation"
    settings: dict[str, Any] = {
        "actor_rollout_ref.model.path": str(folder / "task" / "model"),
        "data.train_files": str(folder / "task" / "train.parquet"),
        "data.val_files": str(folder / "task" / "test.parquet"),
        "data.train_batch_size": 8,
        "data.max_prompt_length": 32,
        "data.max_response_length": 12,
        "reward.custom_reward_function.path": "pkg://sdpo.verl_backend.reward",
        "+reward.custom_reward_function.reward_kwargs.task": "hidden_rule",
        "+reward.custom_reward_function.reward_kwargs.task_args": json.dumps({"dir": str(folder / "task")}),
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
        f"{self_distillation}.alpha": 0.5,
        f"{self_distillation}.ema_update_rate": EMA_RATE,
        f"{self_distillation}.demonstration_source": "peer_then_ground_truth",
        f"{self_distillation}.include_environment_feedback": True,
        "trainer.total_training_steps": STEPS,
        "trainer.test_freq": STEPS,
        "trainer.save_freq": 1,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": str(folder / "checkpoints"),
        "trainer.logger": ["console", "file"],
    }
    on_cpu = [] if torch.cuda.device_count() >= 2 else [CPU]
    return [*on_cpu, *(f"{key}={quote(value)}" for key, value in settings.items())]


def run(overrides: Sequence[str]) -> int:
    """Make the task, train, check; 0 if everything is as it must be. Writes to ``SMOKE_DIR``, or a temporary folder.

    Raises:
        UserError: that folder holds something.
    """
    started = time.perf_counter()
    folder = Path(os.environ.get("SMOKE_DIR") or tempfile.mkdtemp(prefix="sdpo-smoke-")).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"SMOKE_DIR: {folder}: is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "verl.log"
    print(f"smoke test in {folder}; what verl says goes to {log}")
    HiddenRule(str(folder / "task"), pretrain_steps=100, num_train=200, num_test=32).prepare()
    command = [sys.executable, "-m", "sdpo.verl_backend.main", *build_overrides(folder), *overrides]
    with log.open("w") as output:
        environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), file=sys.stderr)
        print(f"error: verl ended with exit code {code}; all it said is in {log}", file=sys.stderr)
        return code
    failed = 0
    for check in CHECKS:
        try:
            print(f"  ok    {check(folder)}")
        except Exception as error:  # every check is heard
            failed += 1
            print(f"  WRONG {check.__name__.replace('_', ' ')}: {error}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed in {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


def check_distillation(folder: Path) -> str:
    rows = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row[metrics.DISTILLATION_LOSS] for row in rows if metrics.DISTILLATION_LOSS in row]
    if len(losses) != STEPS or not all(loss > 0 for loss in losses):
        raise AssertionError(f"self-distillation losses are {losses}")
    return f"self-distillation loss {', '.join(f'{loss:.4f}' for loss in losses)}"


def check_validation(folder: Path) -> str:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    name = metrics.val_name("hidden_rule", "mean@1")
    values = {row["step"]: row["data"][name] for row in rows if name in row["data"]}
    if sorted(values) != [0, STEPS]:
        raise AssertionError(f"validated at steps {sorted(values)}")
    return f"validation accuracy {values[0]:.3f} before, {values[STEPS]:.3f} after"


def check_teacher(folder: Path) -> str:
    teacher = AutoModelForCausalLM.from_pretrained(folder / "task" / "model", dtype=torch.float32).state_dict()
    error = moved = 0.0
    for step in range(1, STEPS + 1):
        student, saved = load_weights(folder, step), load_weights(folder, step, teacher=True)
        for name, before in teacher.items():
            expected = (1 - EMA_RATE) * before + EMA_RATE * student[name]
            error = max(error, float((saved[name] - expected).abs().max()))
            moved = max(moved, float((saved[name] - before).abs().max()))
        teacher = saved
    if error > 1e-6 or moved < 1e-5:
        raise AssertionError(f"off the moving average by {error:.1e}, moved by {moved:.1e}")
    return f"teacher follows the moving average to {error:.1e} (largest move a step {moved:.1e})"


def check_sampler(folder: Path) -> str:
    """The batch sampled ahead in step k has the log-probabilities of the weights after step k - 1, and not others'."""
    step = STEPS - 1
    _, _, _, batch, _ = torch.load(folder / f"checkpoints/global_step_{step}/prefetched.pt", weights_only=False)[
        "batch"
    ]
    model = AutoModelForCausalLM.from_pretrained(folder / "task" / "model", dtype=torch.float32)
    errors = []
    for version in (step - 1, step):
        model.load_state_dict(load_weights(folder, version))
        errors.append(_largest_difference(model, batch.batch))
    if errors[0] > 1e-4 or errors[1] < 10 * errors[0]:
        raise AssertionError(f"log-probabilities differ by {errors[0]:.1e}, from the next weights' by {errors[1]:.1e}")
    return (
        f"sampler's log-probabilities are the synced weights' to {errors[0]:.1e} (the next weights': {errors[1]:.1e})"
    )


def check_checkpoint(folder: Path) -> str:
    last = (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    size = sum(file.stat().st_size for file in (folder / f"checkpoints/global_step_{last}").rglob("*"))
    if last != str(STEPS) or not load_weights(folder, STEPS, teacher=True):
        raise AssertionError(f"the last checkpoint is of step {last}")
    return f"checkpoint of step {last} with the teacher, {size / 1e6:.1f} MB"


CHECKS: tuple[Callable[[Path], str], ...] = (
    check_distillation,
    check_validation,
    check_teacher,
    check_sampler,
    check_checkpoint,
)


def load_weights(folder: Path, step: int, *, teacher: bool = False) -> dict[str, torch.Tensor]:
    """What verl saved on a single rank, as plain tensors."""
    # A warning for each tensor, about compiling what is only read here.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    actor = folder / f"checkpoints/global_step_{step}/actor" / ("teacher" if teacher else "")
    state = torch.load(actor / "model_world_size_1_rank_0.pt", map_location="cpu", weights_only=False)
    return {name: getattr(value, "_local_tensor", value) for name, value in state.items()}


@torch.no_grad()
def _largest_difference(model: Any, batch: Any) -> float:
    length = batch["responses"].shape[1]
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch["input_ids"], attention_mask=mask, position_ids=positions).logits[:, -length - 1 : -1]
    chosen = batch["response_mask"].bool()
    log_probs = gather_log_probs(logits[chosen].log_softmax(-1), batch["responses"][chosen])
    return float((log_probs - batch["rollout_log_probs"][chosen]).abs().max())


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
