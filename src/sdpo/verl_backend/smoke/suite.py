"""``SMOKE_TEST=1 bash train.sh`` and ``bash prove.sh``: tiny models through the complete pipeline, with checks.

    python -m sdpo.verl_backend.smoke.suite [PART ...] [KEY=VALUE ...]

A part is a run of three steps with a checkpoint each; ``all`` selects every part that this machine can run. Without
GPUs the parts run on the CPU, with transformers in place of vLLM. The checks (``checks.py``) find errors that raise no
exception.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdpo.errors import ConfigError, SDPOError
from sdpo.rewards.toy.figures import PICTURE_SIZE, Figures
from sdpo.rewards.toy.hidden_rule import HiddenRule
from sdpo.verl_backend.config.to_verl import quote
from sdpo.verl_backend.entrypoint.main import CPU, METRICS_PATH
from sdpo.verl_backend.smoke import checks
from sdpo.verl_backend.smoke.checks import STEPS, Finished

LIMIT = 900  # seconds for one start of verl
GAIN = 3.0  # of the weights with images, so that another image changes probabilities 10 times as much as bf16 rounding


@dataclass(frozen=True)
class Part:
    """One run: its task, its trainer, and the steps at which it ends and is resumed."""

    task: str
    config_name: str
    ends: tuple[int, ...]
    overrides: tuple[str, ...]
    checks: tuple[Callable[[Finished], str], ...]


MODEL = "actor_rollout_ref.model"
LORA = (
    f"{MODEL}.lora_rank={checks.LORA_RANK}",
    f"{MODEL}.lora_alpha={checks.LORA_RANK * checks.LORA_SCALE:g}",
    f"{MODEL}.target_modules=all-linear",
    f"{MODEL}.lora.merge=true",
    "actor_rollout_ref.actor.optim.lr=1e-2",
)
COMMON = (checks.check_losses, checks.check_validation, checks.check_sampler, checks.check_teacher)
ON_ONE_POOL = (*COMMON, checks.check_checkpoint)
PARTS = {
    "text": Part("hidden_rule", "sdpo_sync", (STEPS - 1, STEPS), (), ON_ONE_POOL),
    "images": Part("figures", "sdpo_sync", (STEPS,), (), ON_ONE_POOL),
    "lora": Part("hidden_rule", "sdpo_sync", (STEPS,), LORA, ON_ONE_POOL),
    "one-step-off": Part(
        "figures",
        "sdpo_trainer",
        (STEPS,),
        (),
        (*COMMON, checks.check_batch_ahead, checks.check_images, checks.check_checkpoint),
    ),
}


def choose_parts(names: Sequence[str], num_gpus: int) -> list[str]:
    """Return the parts to run; by default one-step-off if this machine can run it, otherwise images.

    Raises:
        ConfigError: an unknown part, or a part that needs a second GPU.
    """
    possible = [name for name, part in PARTS.items() if num_gpus != 1 or part.config_name == "sdpo_sync"]
    chosen = []
    for name in names or ("one-step-off" if "one-step-off" in possible else "images",):
        if name != "all" and name not in PARTS:
            raise ConfigError(f"{name}: no such part; choose from all, {', '.join(PARTS)}")
        if name != "all" and name not in possible:
            raise ConfigError(f"{name}: needs two GPUs, one for sampling and one for training; leave it out")
        chosen += possible if name == "all" else [name]
    return list(dict.fromkeys(chosen))


def prepare_task(name: str, folder: Path) -> None:
    """Create the tiny model and the rows of a task."""
    if name == "hidden_rule":
        HiddenRule(str(folder), pretrain_steps=150, num_train=200, num_test=16).prepare()
        return
    Figures(str(folder), pretrain_steps=50, num_train=200, num_test=16).prepare()
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(GAIN if weight.dim() > 1 else 1.0)
    model.save_pretrained(folder / "model")


def build_overrides(part: Part, folder: Path, end: int) -> list[str]:
    """Return Hydra overrides for a run of a part that ends at this step and resumes if it can."""
    task, rollout, actor = folder.parent / "tasks" / part.task, "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    settings: dict[str, Any] = {
        "actor_rollout_ref.model.path": str(task / "model"),
        "data.train_files": str(task / "train.parquet"),
        "data.val_files": str(task / "test.parquet"),
        "data.train_batch_size": 8,
        "data.max_prompt_length": 64,
        "data.max_response_length": 8,
        "data.max_pixels": PICTURE_SIZE**2,
        "data.dataloader_num_workers": 0,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": "pkg://sdpo.verl_backend.rollout.reward",
        "+reward.custom_reward_function.reward_kwargs.task": part.task,
        "+reward.custom_reward_function.reward_kwargs.task_args": json.dumps({"dir": str(task)}),
        f"{rollout}.n": 4,
        f"{rollout}.agent.num_workers": 1,
        f"{rollout}.enforce_eager": True,  # capturing CUDA graphs takes longer than three steps save
        f"{rollout}.gpu_memory_utilization": 0.3,
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes": 64,
        f"+{rollout}.engine_kwargs.vllm.limit_mm_per_prompt": {"image": 1, "video": 0},
        f"{actor}.optim.lr": 1e-3,
        f"{actor}.optim.lr_warmup_steps": 0,
        **{f"{actor}.self_distillation.{name}": value for name, value in checks.DISTILLATION.items()},
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.total_training_steps": end,
        "trainer.total_epochs": STEPS,  # V1 trainers end with the earlier of the two
        "trainer.test_freq": STEPS,
        "trainer.save_freq": 1,
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": str(folder / "checkpoints"),
        "trainer.logger": ["console", "file"],
    }
    return [*(f"{key}={quote(value)}" for key, value in settings.items()), *part.overrides]


def run_part(name: str, folder: Path, num_gpus: int, overrides: Sequence[str]) -> list[str]:
    """Train and check; return one line per failure."""
    part = PARTS[name]
    folder.mkdir()
    started = time.perf_counter()
    for end in part.ends:
        arguments = ["--config-name", part.config_name, *([] if num_gpus else [CPU])]
        log = folder / f"verl.{end}.log"
        code = _start([*arguments, *build_overrides(part, folder, end), *overrides], folder, log, end)
        if code != 0:
            print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), file=sys.stderr)
            return [f"verl ended with exit code {code}; its output is in {log}"]
    print(f"{name}: {len(part.ends)} starts of verl, {time.perf_counter() - started:.0f} s", flush=True)
    is_exact = num_gpus == 0 and part.overrides != LORA
    finished, failed = Finished(folder, folder.parent / "tasks" / part.task, part.ends, is_exact), []
    for check in part.checks:
        try:
            print(f"  ok    {check(finished)}")
        except Exception as error:  # the other checks are still worth running
            failed.append(f"{check.__name__.replace('_', ' ')}: {error or type(error).__name__}")
            print(f"  WRONG {failed[-1]}")
    print(f"  {len(part.checks) - len(failed)} of {len(part.checks)} checks passed", flush=True)
    return failed


def _start(arguments: Sequence[str], folder: Path, log: Path, end: int) -> int:
    environment = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiling its kernels takes longer than three steps
        "RAY_USAGE_STATS_ENABLED": "0",
        **os.environ,
        METRICS_PATH: str(folder / f"metrics.{end}.jsonl"),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdpo.verl_backend.entrypoint.main", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        return -signal.SIGALRM
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def run(arguments: Sequence[str]) -> int:
    """Run the parts in ``SMOKE_DIR`` or a temporary folder; return 0 if every check passed.

    Raises:
        ConfigError: an unknown part, or a folder that is not empty.
    """
    started = time.perf_counter()
    num_gpus = torch.cuda.device_count()
    names = choose_parts([argument for argument in arguments if "=" not in argument], num_gpus)
    overrides = [argument for argument in arguments if "=" in argument]
    folder = Path(os.environ.get("SMOKE_DIR") or tempfile.mkdtemp(prefix="sdpo-smoke-")).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"SMOKE_DIR={folder}: not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    devices = f"{num_gpus} GPU{'s' * (num_gpus > 1)}" if num_gpus else "the CPU, with transformers in place of vLLM"
    print(f"{', '.join(names)}: in {folder}, on {devices}", flush=True)
    for task in dict.fromkeys(PARTS[name].task for name in names):
        prepare_task(task, folder / "tasks" / task)
    if not num_gpus:
        os.environ["VERL_PLATFORM"] = "cpu"  # the checks read verl's files, too
    logging.disable(logging.INFO)  # verl logs when the checks read its files
    failed = {name: run_part(name, folder / name, num_gpus, overrides) for name in names}
    num_failed = sum(map(len, failed.values()))
    print(f"{'WRONG' if num_failed else 'ok'}: {num_failed} failures in {time.perf_counter() - started:.0f} s")
    for name, lines in failed.items():
        for line in lines:
            print(f"error: {name}: {line}", file=sys.stderr)
    return 1 if num_failed else 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except SDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
