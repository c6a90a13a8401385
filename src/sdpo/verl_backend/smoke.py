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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdpo import metrics
from sdpo.algorithm.inputs import gather_log_probs
from sdpo.config import ModelConfig, SelfDistillationConfig
from sdpo.context.images import collect_images
from sdpo.errors import UserError
from sdpo.models.forward import compute_logits, pad_sequences
from sdpo.models.loading import load_model
from sdpo.models.processing import TokenPrompt, load_reader
from sdpo.models.vision import SeenImages, Vision
from sdpo.tasks.figures import Figures
from sdpo.verl_backend.main import CPU
from sdpo.verl_backend.packing import TEACHER_PROMPT_LENGTHS, TEACHER_PROMPTS
from sdpo.verl_backend.teacher_batch import Rollout, TeacherBatch, read_ground_truth
from sdpo.verl_backend.translate import quote

STEPS = 3
EMA_RATE = 0.05
DISTILLATION: dict[str, Any] = {"alpha": 0.5, "ema_update_rate": EMA_RATE, "include_environment_feedback": True}
MAX_PIXELS = 84 * 84  # the figures' own size


def build_overrides(folder: Path) -> list[str]:
    """A run of three one-step-off steps on drawn figures, all of them saved."""
    settings: dict[str, Any] = {
        "actor_rollout_ref.model.path": str(folder / "task" / "model"),
        "data.train_files": str(folder / "task" / "train.parquet"),
        "data.val_files": str(folder / "task" / "test.parquet"),
        "data.train_batch_size": 8,
        "data.max_prompt_length": 64,
        "data.max_response_length": 6,
        "data.max_pixels": MAX_PIXELS,
        "reward.custom_reward_function.path": "pkg://sdpo.verl_backend.reward",
        "+reward.custom_reward_function.reward_kwargs.task": "figures",
        "+reward.custom_reward_function.reward_kwargs.task_args": json.dumps({"dir": str(folder / "task")}),
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
        **{f"actor_rollout_ref.actor.self_distillation.{name}": value for name, value in DISTILLATION.items()},
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
    Figures(str(folder / "task"), pretrain_steps=50, num_train=200, num_test=32).prepare()
    settings = [*build_overrides(folder), *overrides]
    if CPU in settings:
        os.environ["VERL_PLATFORM"] = "cpu"  # also for the checks, which read verl's files
    command = [sys.executable, "-m", "sdpo.verl_backend.main", *settings]
    with log.open("w") as output:
        environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), file=sys.stderr)
        print(f"error: verl ended with exit code {code}; all it said is in {log}", file=sys.stderr)
        return code
    logging.disable(logging.INFO)  # what verl says of itself when its files are read
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
    name = metrics.val_name("figures", "mean@1")
    values = {row["step"]: row["data"][name] for row in rows if name in row["data"]}
    if sorted(values) != [0, STEPS]:
        raise AssertionError(f"validated at steps {sorted(values)}")
    return f"validation accuracy {values[0]:.3f} before, {values[STEPS]:.3f} after"


def check_teacher(folder: Path) -> str:
    teacher = load_vision_model(folder)[0].state_dict()
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
    batch = load_batch_ahead(folder)
    model, vision = load_vision_model(folder)
    sampled = batch.batch["rollout_log_probs"][batch.batch["response_mask"].bool()]
    errors = []
    for version in (step - 1, step):
        model.load_state_dict(load_weights(folder, version))
        log_probs = compute_log_probs(model, vision, read_prompts(batch), batch, vision.placeholder_ids)
        errors.append(float((log_probs - sampled).abs().max()))
    if errors[0] > 1e-4 or errors[1] < 10 * errors[0]:
        raise AssertionError(f"log-probabilities differ by {errors[0]:.1e}, from the next weights' by {errors[1]:.1e}")
    return (
        f"sampler's log-probabilities are the synced weights' to {errors[0]:.1e} (the next weights': {errors[1]:.1e})"
    )


def check_images(folder: Path) -> str:
    """What the last step measured of teacher and student comes out again with the rows' images, and not with others."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = next(row["data"][metrics.TEACHER_GAP] for row in rows if row["step"] == STEPS)
    batch = load_batch_ahead(folder)
    model, vision = load_vision_model(folder)
    students = read_prompts(batch)
    teachers = _build_teacher_prompts(vision, batch)
    order = [*range(1, len(students)), 0]  # the n rollouts of a prompt stand together: most get another prompt's image
    errors = []
    for shown in (teachers, _exchange_images(teachers, order)):
        model.load_state_dict(load_weights(folder, STEPS - 1, teacher=True))
        teacher = compute_log_probs(model, vision, shown, batch)
        model.load_state_dict(load_weights(folder, STEPS - 1))
        student = compute_log_probs(model, vision, students, batch)
        errors.append(abs(float((teacher - student).mean()) - measured))
    # How much an image matters to a random model differs from run to run: it has to be far above what rounding leaves.
    if errors[0] > 1e-5 or errors[1] < max(100 * errors[0], 1e-6):
        raise AssertionError(
            f"the teacher's log-probabilities are off by {errors[0]:.1e}, with images exchanged by {errors[1]:.1e}"
        )
    return (
        f"teacher sees the images: its log-probabilities come out again to {errors[0]:.1e} (exchanged: {errors[1]:.1e})"
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
    check_images,
    check_checkpoint,
)


def load_weights(folder: Path, step: int, *, teacher: bool = False) -> dict[str, torch.Tensor]:
    """What verl saved on a single rank, as plain tensors."""
    # A warning for each tensor, about compiling what is only read here.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    actor = folder / f"checkpoints/global_step_{step}/actor" / ("teacher" if teacher else "")
    state = torch.load(actor / "model_world_size_1_rank_0.pt", map_location="cpu", weights_only=False)
    return {name: getattr(value, "_local_tensor", value) for name, value in state.items()}


def load_vision_model(folder: Path) -> tuple[nn.Module, Vision]:
    """The task's model, with what reads images for it."""
    config = ModelConfig(path=str(folder / "task" / "model"))
    model, reader = load_model(config, torch.device("cpu")), load_reader(config, MAX_PIXELS)
    assert reader is not None
    return model, Vision(model, reader)


def load_batch_ahead(folder: Path) -> Any:
    """The rollouts of the last step, which the checkpoint before it holds."""
    saved = torch.load(folder / f"checkpoints/global_step_{STEPS - 1}/prefetched.pt", weights_only=False)
    return saved["batch"][3]


def read_prompts(batch: Any) -> list[TokenPrompt]:
    """The student's prompts of verl's batch."""
    masks = batch.batch["attention_mask"][:, : batch.batch["prompts"].shape[1]].bool()
    return [
        TokenPrompt(ids[mask].tolist(), collect_images(messages))
        for ids, mask, messages in zip(batch.batch["prompts"], masks, batch.non_tensor_batch["raw_prompt"], strict=True)
    ]


def _read_responses(batch: Any) -> list[list[int]]:
    masks = batch.batch["response_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(batch.batch["responses"], masks, strict=True)]


def _build_teacher_prompts(vision: Vision, batch: Any) -> list[TokenPrompt]:
    fields = batch.non_tensor_batch
    rollouts = [
        Rollout(
            group=fields["uid"][i],
            messages=fields["raw_prompt"][i],
            response_ids=response,
            score=float(batch.batch["rm_scores"][i].sum()),
            feedback=str(fields["feedback"][i]),
            ground_truth=read_ground_truth(fields["reward_model"][i]),
        )
        for i, response in enumerate(_read_responses(batch))
    ]
    build = TeacherBatch(SelfDistillationConfig(**DISTILLATION), vision.reader, None, seed=0, total_steps=STEPS).build
    made, _ = build(rollouts, STEPS)
    return [
        TokenPrompt(ids[:length].tolist(), collect_images(rollout.messages))
        for ids, length, rollout in zip(made[TEACHER_PROMPTS], made[TEACHER_PROMPT_LENGTHS], rollouts, strict=True)
    ]


def _exchange_images(prompts: Sequence[TokenPrompt], order: Sequence[int]) -> list[TokenPrompt]:
    return [replace(prompt, images=prompts[i].images) for prompt, i in zip(prompts, order, strict=True)]


@torch.no_grad()
def compute_log_probs(
    model: nn.Module, vision: Vision, prompts: Sequence[TokenPrompt], batch: Any, forbidden: Sequence[int] = ()
) -> Tensor:
    """[N] of the batch's response tokens after these prompts, forbidden tokens left out of the distribution."""
    padded = pad_sequences(prompts, _read_responses(batch), 0, torch.device("cpu"), vision)
    logits = compute_logits(
        model,
        padded.token_ids,
        padded.attention_mask,
        padded.position_ids,
        padded.response_mask.shape[1] + 1,
        vision=vision,
        features=SeenImages(model, vision.reader).select(padded.images),
    )[:, :-1][padded.response_mask]
    logits[:, list(forbidden)] = float("-inf")
    sampled = padded.token_ids[:, -padded.response_mask.shape[1] :][padded.response_mask]
    return gather_log_probs(logits.log_softmax(-1), sampled)


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
