"""Upper bounds of the memory that a model and its passes need, in bytes, from settings and architecture alone.

``sdpo.trainer`` and ``sdpo.verl_backend`` add these bounds up for their devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdpo.algorithm.ema import ENTRIES_AT_ONCE
from sdpo.algorithm.teacher import is_averaged, is_updated
from sdpo.config.actor import ActorConfig
from sdpo.config.data import DataConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels import chunked_log_probs
from sdpo.models.model_size import ModelSize
from sdpo.prompting.demonstrations import shows_ground_truth

BYTES = {"float32": 4, "bfloat16": 2}
# Blocks [block, V] of the loss that exist together: log-probabilities and probabilities of both sides, and temporaries.
NUM_LOSS_BLOCKS = 10


@dataclass(frozen=True)
class MemoryEstimate:
    """Upper bounds for one GPU of each role, in bytes by purpose.

    Attributes:
        tokens_per_step: prompts and responses of all rollouts.
        num_params: all parameters; None if the model does not exist yet.
        num_vision_params: parameters of the vision tower and its projector.
        persistent: what the actor's device holds all the time.
        training: what it also holds while it trains, and frees before it samples.
        phases: what each training phase adds, by its name; only one phase runs at a time.
        sampler: what sampling needs, on a separate device or, if ``colocated``, on the actor's between its phases.
        colocated: whether actor and sampler use the same device.
        num_actor_gpus: GPUs over which the actor is sharded.
        num_sampler_gpus: GPUs that sample.
    """

    tokens_per_step: int
    num_params: int | None
    num_vision_params: int = 0
    persistent: Mapping[str, int] = field(default_factory=dict)
    training: Mapping[str, int] = field(default_factory=dict)
    phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sampler: Mapping[str, int] = field(default_factory=dict)
    colocated: bool = True
    num_actor_gpus: int = 1
    num_sampler_gpus: int = 1

    @property
    def training_peak(self) -> int:
        """Peak of training, without the persistent part."""
        return sum(self.training.values()) + max(sum(phase.values()) for phase in self.phases.values())

    @property
    def sampler_peak(self) -> int:
        """Peak of sampling."""
        return sum(self.sampler.values())

    @property
    def actor_peak(self) -> int:
        """Peak of the actor's device."""
        sampling = self.sampler_peak if self.colocated else 0
        return sum(self.persistent.values()) + max(self.training_peak, sampling)


@dataclass(frozen=True)
class LengthBounds:
    """Maximum numbers of tokens per sequence and per micro-batch, images included.

    Attributes:
        prompt: tokens of a prompt.
        teacher_prompt: tokens of a reprompt; 0 without distillation.
        response: tokens of a response.
        student_batch: the student's tokens in a micro-batch.
        scored_batch: the response tokens among them.
        teacher_batch: the teacher's tokens in a micro-batch.
    """

    prompt: int
    teacher_prompt: int
    response: int
    student_batch: int
    scored_batch: int
    teacher_batch: int


def bound_lengths(
    data: DataConfig,
    rollout: RolloutConfig,
    actor: ActorConfig,
    self_distillation: SelfDistillationConfig,
    window: int | None,
) -> LengthBounds:
    """Bound the lengths of a run's sequences and micro-batches.

    If every sample is distilled, the teacher reads at least half of a micro-batch.

    Args:
        window: maximum number of tokens that the model reads; None for no limit.
    """
    distills, response = self_distillation.distills, rollout.max_response_length
    room = data.max_prompt_length if window is None else max(window - response, 1)
    prompt = min(data.max_prompt_length, room)
    teacher_prompt = 0
    if distills:
        reprompt = self_distillation.max_reprompt_len
        teacher_prompt = reprompt if window is None else min(reprompt, room)
    distills_all = shows_ground_truth(self_distillation) and not self_distillation.distill_only_failed
    num_rollouts = data.train_batch_size * rollout.n
    budget = actor.max_tokens_per_micro_batch
    student = budget // 2 if distills_all else budget
    # A micro-batch has at least one sample, even one longer than the budget.
    return LengthBounds(
        prompt=prompt,
        teacher_prompt=teacher_prompt,
        response=response,
        student_batch=min(max(student, prompt + response), num_rollouts * (prompt + response)),
        scored_batch=min(max(student, response), num_rollouts * response),
        teacher_batch=min(max(budget, teacher_prompt + response), num_rollouts * (teacher_prompt + response))
        * distills,
    )


def count_trained_params(model: ModelSize, *, freeze_vision_tower: bool) -> int:
    """Parameters with gradients: the adapters with LoRA, else all that are not frozen."""
    if model.lora is not None:
        return model.lora.num_params
    return model.language_model.num_params if freeze_vision_tower else model.num_params


def count_averaged_params(model: ModelSize, config: SelfDistillationConfig, dtype: str) -> int:
    """Entries of the teacher that are float32 tensors besides its module, computed from the student at an update.

    Those are a moving average next to weights in ``dtype``, or with LoRA the deltas of the adapted layers.
    """
    if not config.distills or not is_updated(config):
        return 0
    if model.lora is not None:
        return model.lora.num_adapted_params
    return model.num_params if is_averaged(config) and dtype != "float32" else 0


def moment_bytes(optimizer: str, num_params: int, param_bytes: int) -> int:
    """AdamW's two moments per parameter; of 8 bits with a float32 scale for every 256 in ``adamw_8bit``."""
    if optimizer == "adamw_8bit":
        return 2 * (num_params + num_params // 256 * 4)
    return 2 * num_params * param_bytes


def update_bytes(model: ModelSize, num_averaged: int, param_bytes: int) -> int:
    """Peak of the temporary tensors of the optimizer step and of the teacher's update after it.

    AdamW makes two tensors of a parameter's size at a time on a CPU, and none on a GPU, where it is one kernel.

    Args:
        num_averaged: from ``count_averaged_params``. They are cast slice by slice; LoRA's deltas are computed one at a
            time, from a product of the same size, while the previous ones are averaged.
    """
    if model.lora is not None:
        largest = min(model.lora.largest_adapted_param, num_averaged)
        deltas = min(num_averaged, max(ENTRIES_AT_ONCE, largest) + largest) + largest
        return max(2 * model.lora.num_params * 4, deltas * 4)
    return max(2 * model.largest_param * param_bytes, min(num_averaged, ENTRIES_AT_ONCE) * 4)


def fused_loss_bytes(
    vocab_size: int, hidden_size: int, value_bytes: int, num_tokens: int, *, trains_head: bool = True
) -> int:
    """Peak of ``fused_linear_sdpo_loss`` and its backward pass on an accelerator.

    Logits of a chunk and the blocks of the loss do not depend on the number of tokens. The teacher's logits take as
    much as the student's, or in half precision a quarter. The number of blocks was counted with torch's profiler. The
    kernels of ``sdpo.kernels.cuda`` hold as much in two buffers, and accumulate the head's gradient in its data type.

    Args:
        value_bytes: bytes of a value in matrix products.
        num_tokens: tokens whose hidden states have gradients.
        trains_head: whether the output layer has a gradient; false with LoRA.
    """
    chunks = int((2 if value_bytes == 4 else 1.25) * chunked_log_probs.ACCELERATOR_BUFFER_BYTES)
    blocks = NUM_LOSS_BLOCKS * chunked_log_probs.ACCELERATOR_BLOCK_BYTES
    # The head's gradient is accumulated in float32. Next to it is a chunk's product, and at the end the cast gradient.
    head = (4 + value_bytes) * vocab_size * hidden_size if trains_head else 0
    return chunks + blocks + head + 4 * value_bytes * num_tokens * hidden_size


def log_probs_bytes() -> int:
    """Peak of log-probabilities and entropies that are computed in chunks."""
    return chunked_log_probs.ACCELERATOR_BUFFER_BYTES + NUM_LOSS_BLOCKS * chunked_log_probs.ACCELERATOR_BLOCK_BYTES
