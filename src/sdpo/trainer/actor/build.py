"""Build an actor from a config."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from sdpo.algorithm.teacher import Teacher, build_teacher
from sdpo.config.root import SDPOConfig
from sdpo.errors import ConfigError
from sdpo.models.lora.adapters import copy_without_adapters
from sdpo.models.lora.teacher import build_lora_teacher
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.models.output_head import measure_logit_scale
from sdpo.models.packing.support import enable_packing
from sdpo.models.training_mode import check_training_mode
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.actor.collate import Collator
from sdpo.trainer.actor.forward import PolicyForward
from sdpo.trainer.actor.oom import TokenBudget
from sdpo.trainer.actor.optimization import Optimization
from sdpo.trainer.actor.schedule import StepSchedule


def build_actor(
    student: PreTrainedModel,
    config: SDPOConfig,
    pad_token_id: int,
    vision: VisionAdapter | None = None,
    suppressed_ids: Sequence[int] | None = None,
) -> Actor:
    """Build the actor of a student.

    Args:
        pad_token_id: fills rows of models that cannot read packed sequences.
        vision: of a vision-language model.
        suppressed_ids: tokens that are never sampled; by default the placeholders of images.

    Raises:
        ConfigError: ``distillation_topk`` is larger than the vocabulary, or the model draws random numbers with
            gradient checkpointing.
    """
    _check_topk(student, config.self_distillation.distillation_topk)
    if suppressed_ids is None:
        suppressed_ids = vision.placeholder_ids if vision is not None else ()
    forward = PolicyForward(
        student=student,
        vision=vision,
        suppressed_ids=suppressed_ids,
        logit_scale=measure_logit_scale(student),
        temperature=config.rollout.temperature,
        autocast=config.actor.autocast,
        gradient_checkpointing=config.actor.gradient_checkpointing,
        trains_vision=config.trains_vision,
    )
    cost = enable_packing(student, vision, autocast=config.actor.autocast)
    collator = Collator(pad_token_id, student.device, vision, cost)
    if config.actor.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        check_training_mode(student)
    build = build_lora_teacher if config.lora.rank else build_teacher
    teacher = build(student, config.self_distillation) if config.self_distillation.distills else None
    initial = None
    if config.needs_initial:
        initial = _keep_initial(student, teacher if config.teacher_stays_initial else None, config.lora.rank > 0)
    mini_batch_size = config.actor.mini_batch_size or config.data.train_batch_size
    num_updates = config.max_steps * (config.data.train_batch_size // mini_batch_size)
    return Actor(
        student,
        teacher,
        initial,
        forward=forward,
        collator=collator,
        budget=TokenBudget(config.actor.max_tokens_per_micro_batch, collator),
        optimization=Optimization(student, config.optim, num_updates, config.seed),
        config=config.actor,
        loss=config.self_distillation,
        correction=config.rollout_correction,
        schedule=StepSchedule(
            mini_batch_size=mini_batch_size * config.rollout.n,
            max_steps=config.max_steps,
            horizon=config.rollout.max_response_length,
            ref_kl_interval=config.health.ref_kl_interval,
        ),
    )


def _keep_initial(student: PreTrainedModel, initial: Teacher | None, has_adapters: bool) -> nn.Module | None:
    """The reference model: the module of a teacher that never changes, else a copy of the student."""
    if initial is not None:
        return initial.module
    copied = copy_without_adapters(student) if has_adapters else copy.deepcopy(student)
    return copied.requires_grad_(False).eval()


def _check_topk(student: PreTrainedModel, topk: int | None) -> None:
    vocab_size = student.config.get_text_config().vocab_size
    if topk is not None and topk > vocab_size:
        raise ConfigError(
            f"self_distillation.distillation_topk={topk}: more than the model's vocabulary of {vocab_size}; "
            "lower it or remove it"
        )
