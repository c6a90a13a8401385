"""Checks of a finished run of ``suite.py``: losses, sampler, teacher, images, checkpoints.

Thresholds on GPUs allow for bfloat16. On these models, measured on a CPU, the mean change of the sampled tokens'
probabilities is 2e-4 to 6e-4 by its rounding, 1.5e-2 to 4.4e-2 by weights one update old, and 5e-3 by other images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.algorithm.distributions import gather_log_probs
from sdpo.config.model import ModelConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.forward import compute_logits, pad_sequences
from sdpo.models.loading import load_model
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.models.multimodal.processor import TokenPrompt, load_reader
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.observability import metrics
from sdpo.prompting.images import collect_images
from sdpo.rewards.toy.figures import PICTURE_SIZE
from sdpo.verl_backend.driver.teacher_batch import Rollout, TeacherBatchBuilder
from sdpo.verl_backend.worker.packing import TEACHER_PROMPT_LENGTHS, TEACHER_PROMPTS

STEPS = 3
EMA_RATE = 0.05
LORA_RANK, LORA_SCALE = 4, 2.0
DISTILLATION: dict[str, Any] = {"alpha": 0.5, "ema_update_rate": EMA_RATE, "include_environment_feedback": True}
# verl's metrics of the difference between the sampler's and the actor's probabilities of sampled tokens
SAMPLER_DIFFERENCE = "training/rollout_probs_diff_mean"
SAMPLER_CORRELATION = "training/rollout_actor_probs_pearson_corr"


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Args:
        folder: with ``checkpoints/`` and ``metrics.END.jsonl``.
        task: folder of the task's model and rows.
        ends: the steps at which the run ended; it was resumed after each but the last.
        is_exact: whether sampler and actor compute in float32 with the same weights: not on a GPU, and not with LoRA,
            which rounds the sampler's merged weights to bfloat16.
    """

    folder: Path
    task: Path
    ends: tuple[int, ...]
    is_exact: bool

    def read_metrics(self) -> dict[int, dict[str, float]]:
        """All metrics by step."""
        rows: dict[int, dict[str, float]] = {}
        for end in self.ends:
            for line in (self.folder / f"metrics.{end}.jsonl").read_text().splitlines():
                row = json.loads(line)
                rows.setdefault(row["step"], {}).update(row["data"])
        return rows

    @property
    def is_off_policy(self) -> bool:
        """Whether batches are sampled one update ahead."""
        return (self.folder / f"checkpoints/global_step_{STEPS - 1}/prefetched.pt").is_file()


def check_losses(run: Finished) -> str:
    losses = [row[metrics.DISTILLATION_LOSS] for row in run.read_metrics().values() if metrics.DISTILLATION_LOSS in row]
    if len(losses) != STEPS or not all(loss > 0 for loss in losses):
        raise AssertionError(f"self-distillation losses are {losses}")
    return f"self-distillation loss {', '.join(f'{loss:.4f}' for loss in losses)}"


def check_validation(run: Finished) -> str:
    name = metrics.val_name(run.task.name, "mean@1")
    values = {step: row[name] for step, row in run.read_metrics().items() if name in row}
    if not {0, STEPS} <= values.keys():
        raise AssertionError(f"validated at steps {sorted(values)}")
    return f"validation accuracy {values[0]:.3f} before, {values[STEPS]:.3f} after"


def check_sampler(run: Finished) -> str:
    """Check that sampler and actor assign the sampled tokens the same probabilities in steps with equal weights."""
    most, least = (5e-4, 0.9999) if run.is_exact else (2e-3, 0.995)
    rows = run.read_metrics()
    steps = [1] if run.is_off_policy else range(1, STEPS + 1)  # later batches were sampled one update before
    found = {step: (rows[step][SAMPLER_DIFFERENCE], rows[step][SAMPLER_CORRELATION]) for step in steps}
    text = ", ".join(f"{difference:.1e} and {correlation:.5f}" for difference, correlation in found.values())
    if not all(difference < most and correlation > least for difference, correlation in found.values()):
        raise AssertionError(f"sampler's and actor's probabilities: mean difference and correlation {text}")
    return f"sampler's and actor's probabilities: mean difference and correlation {text}"


def check_teacher(run: Finished) -> str:
    """Check that the teacher follows the student at the moving average's rate, and that both change."""
    along = length = error = 0.0
    moved = []
    for step in range(2, STEPS + 1):
        before, saved = (load_teacher(run.folder, k) for k in (step - 1, step))
        earlier, student = (load_averaged_source(run.folder, k) for k in (step - 1, step))
        for name, value in before.items():
            distance, move = (weights[name].double() - value.double() for weights in (student, saved))
            error = max(error, float((move - EMA_RATE * distance).abs().max()))
            along += float((move * distance).sum())
            length += float(distance.square().sum())
        moved += [
            max(float((new[name].float() - old[name].float()).abs().max()) for name in old)
            for old, new in ((before, saved), (earlier, student))
        ]
    rate = along / length if length else 0.0
    if abs(rate / EMA_RATE - 1) > 1e-3 or error > 1e-6 or min(moved) < 1e-5:
        raise AssertionError(
            f"it moves by {rate:.5f} of the distance instead of {EMA_RATE}, off the moving average by {error:.1e}; "
            f"least move of teacher and student {min(moved):.1e}"
        )
    return f"teacher moves by {rate:.5f} of the distance, off the moving average by {error:.1e} at most"


def check_batch_ahead(run: Finished) -> str:
    """Check that the batch sampled ahead in step k has the log-probabilities of the weights after step k - 1."""
    step = STEPS - 1
    most, ratio = (1e-4, 10) if run.is_exact else (0.1, 3)
    batch = load_batch_ahead(run.folder)
    model, vision = load_vision_model(run.task)
    sampled = batch.batch["rollout_log_probs"][batch.batch["response_mask"].bool()]
    errors = []
    for version in (step - 1, step):
        model.load_state_dict(load_weights(run.folder, version))
        log_probs = compute_log_probs(model, vision, read_prompts(batch), batch, vision.placeholder_ids)
        errors.append(float((log_probs - sampled).abs().max()))
    if errors[0] > most or errors[1] < ratio * errors[0]:
        raise AssertionError(f"log-probabilities differ by {errors[0]:.1e}, from the next weights' by {errors[1]:.1e}")
    return (
        f"the batch ahead has the synced weights' log-probabilities to {errors[0]:.1e} (the next weights': "
        f"{errors[1]:.1e})"
    )


def check_images(run: Finished) -> str:
    """Check that the last step's teacher metric is reproduced with the rows' images and not with other images."""
    most, ratio = (1e-5, 100) if run.is_exact else (2e-2, 3)
    measured = run.read_metrics()[STEPS][metrics.LOGPROB_DIFF_MEAN]
    batch = load_batch_ahead(run.folder)
    model, vision = load_vision_model(run.task)
    students = read_prompts(batch)
    teachers = _build_teacher_prompts(vision, batch)
    order = [*range(1, len(students)), 0]  # a prompt's n rollouts are adjacent: most get another prompt's image
    errors = []
    for shown in (teachers, _exchange_images(teachers, order)):
        model.load_state_dict(load_weights(run.folder, STEPS - 1, teacher=True))
        teacher = compute_log_probs(model, vision, shown, batch, vision.placeholder_ids)
        model.load_state_dict(load_weights(run.folder, STEPS - 1))
        student = compute_log_probs(model, vision, students, batch, vision.placeholder_ids)
        errors.append(abs(float((teacher - student).mean()) - measured))
    if errors[0] > most or errors[1] < ratio * errors[0]:
        raise AssertionError(
            f"the teacher's log-probabilities differ by {errors[0]:.1e}, with images exchanged by {errors[1]:.1e}"
        )
    return (
        f"teacher sees the images: its log-probabilities are reproduced to {errors[0]:.1e} (exchanged: {errors[1]:.1e})"
    )


def check_checkpoint(run: Finished) -> str:
    """Check that the last checkpoint has the teacher, with a step count that includes steps before the resume."""
    last = (run.folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    newest = run.folder / f"checkpoints/global_step_{last}"
    steps = json.loads((newest / "actor" / "teacher" / "teacher.json").read_text())["num_steps"]
    if last != str(STEPS) or steps != STEPS or not load_teacher(run.folder, STEPS):
        raise AssertionError(f"the last checkpoint is of step {last}, its teacher of step {steps}")
    size = sum(file.stat().st_size for file in newest.rglob("*"))
    resumed = f", resumed at step {', '.join(map(str, run.ends[:-1]))}" if run.ends[1:] else ""
    return f"checkpoint of step {last} with a teacher of {steps} steps{resumed}, {size / 1e6:.1f} MB"


def load_weights(folder: Path, step: int, *, teacher: bool = False) -> dict[str, torch.Tensor]:
    """Load verl's weights of a single rank as plain tensors."""
    # DTensor would warn about compilation for each tensor.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    actor = folder / f"checkpoints/global_step_{step}/actor" / ("teacher" if teacher else "")
    state = torch.load(actor / "model_world_size_1_rank_0.pt", map_location="cpu", weights_only=False)
    return {name: getattr(value, "_local_tensor", value) for name, value in state.items()}


def load_teacher(folder: Path, step: int) -> dict[str, Tensor]:
    """Load the moving average: the teacher's weights, or with LoRA its deltas."""
    state = folder / f"checkpoints/global_step_{step}/actor/teacher/state_world_size_1_rank_0.pt"
    deltas: dict[str, Tensor] | None = torch.load(state, map_location="cpu", weights_only=True)["weights"]
    return load_weights(folder, step, teacher=True) if deltas is None else deltas


def load_averaged_source(folder: Path, step: int) -> dict[str, Tensor]:
    """Load the average's source: the student's weights, or with LoRA the products of its adapters."""
    weights = {name.removeprefix("base_model.model."): value for name, value in load_weights(folder, step).items()}
    down, up = ".lora_A.default.weight", ".lora_B.default.weight"
    layers = [name.removesuffix(down) for name in weights if name.endswith(down)]
    products = {f"{name}.weight": LORA_SCALE * weights[name + up] @ weights[name + down] for name in layers}
    return products or weights


def load_vision_model(task: Path) -> tuple[nn.Module, VisionAdapter]:
    """Load a task's model and its vision adapter."""
    config = ModelConfig(path=str(task / "model"))
    model, reader = load_model(config, torch.device("cpu")), load_reader(config, PICTURE_SIZE**2)
    assert reader is not None
    return model, VisionAdapter(model, reader)


def load_batch_ahead(folder: Path) -> Any:
    """Load the rollouts of the last step from the checkpoint before it."""
    saved = torch.load(folder / f"checkpoints/global_step_{STEPS - 1}/prefetched.pt", weights_only=False)
    return saved["batch"][3]


def read_prompts(batch: Any) -> list[TokenPrompt]:
    """Return the student's prompts of verl's batch."""
    masks = batch.batch["attention_mask"][:, : batch.batch["prompts"].shape[1]].bool()
    return [
        TokenPrompt(ids[mask].tolist(), collect_images(messages))
        for ids, mask, messages in zip(batch.batch["prompts"], masks, batch.non_tensor_batch["raw_prompt"], strict=True)
    ]


def _read_responses(batch: Any) -> list[list[int]]:
    masks = batch.batch["response_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(batch.batch["responses"], masks, strict=True)]


def _build_teacher_prompts(vision: VisionAdapter, batch: Any) -> list[TokenPrompt]:
    fields = batch.non_tensor_batch
    rollouts = [
        Rollout(
            uid=fields["uid"][i],
            messages=fields["raw_prompt"][i],
            response_ids=response,
            response_mask=[1] * len(response),
            score=float(batch.batch["rm_scores"][i].sum()),
            feedback=str(fields["feedback"][i]),
            ground_truth=str(fields["reward_model"][i]["ground_truth"]),
        )
        for i, response in enumerate(_read_responses(batch))
    ]
    build = TeacherBatchBuilder(
        SelfDistillationConfig(**DISTILLATION), vision.reader, None, seed=0, max_steps=STEPS
    ).build
    made, _ = build(rollouts, STEPS)
    return [
        TokenPrompt(ids[:length].tolist(), collect_images(rollout.messages))
        for ids, length, rollout in zip(made[TEACHER_PROMPTS], made[TEACHER_PROMPT_LENGTHS], rollouts, strict=True)
    ]


def _exchange_images(prompts: Sequence[TokenPrompt], order: Sequence[int]) -> list[TokenPrompt]:
    return [replace(prompt, images=prompts[i].images) for prompt, i in zip(prompts, order, strict=True)]


@torch.no_grad()
def compute_log_probs(
    model: nn.Module, vision: VisionAdapter, prompts: Sequence[TokenPrompt], batch: Any, forbidden: Sequence[int] = ()
) -> Tensor:
    """Return [N] log-probabilities of the batch's response tokens after these prompts, without forbidden tokens."""
    padded = pad_sequences(prompts, _read_responses(batch), 0, torch.device("cpu"), vision)
    logits = compute_logits(
        model,
        padded.token_ids,
        padded.attention_mask,
        padded.position_ids,
        padded.response_mask.shape[1] + 1,
        vision=vision,
        features=ImageFeatureCache(vision.reader).select(model, padded.images),
    )[:, :-1][padded.response_mask]
    logits[:, list(forbidden)] = float("-inf")
    sampled = padded.token_ids[:, -padded.response_mask.shape[1] :][padded.response_mask]
    return gather_log_probs(logits.log_softmax(-1), sampled)
