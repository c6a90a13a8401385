"""A run file of ours as settings of verl: ``sdpo verl RUN.yaml`` and ``sdpo train RUN.yaml`` mean the same run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.config.loader import flatten_keys
from sdpo.config.monitoring import HealthConfig
from sdpo.config.root import SDPOConfig, get_setting, iterate_settings
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import ConfigError
from sdpo.models.loading import looks_local
from sdpo.models.optimizer import choose_optimizer
from sdpo.observability.health_callback import ALARMS_FILE

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
REFERENCE = "actor_rollout_ref.ref"
MODEL = "actor_rollout_ref.model"

ALL_LINEAR = "all-linear"  # verl's default of model.target_modules

# Health settings without an effect on verl, and why.
HEALTH_WITHOUT_EFFECT = {
    "teacher_underperforms_student": "verl evaluates the student alone",
    "min_accuracy_gap": "verl evaluates the student alone",
    "ref_kl_interval": "the workers hold no initial model beside student and teacher",
}
# Settings of the embedded engine that verl has no counterpart for.
UNSUPPORTED_KEYS = (
    "shutdown_timeout",
    "rollout.max_restarts",
    "rollout.engine",
    "rollout.kv_cache_memory_gib",
    "rollout.device",
    "rollout.num_threads",
    "actor.device",
    "actor.num_threads",
    "eval.evaluate_teacher",
    *(f"health.{name}" for name in HEALTH_WITHOUT_EFFECT),
    "tracking.num_completions",
)


@dataclass(frozen=True)
class VerlOverrides:
    """What to start verl with, and which settings of the run have no effect there."""

    config_name: str
    overrides: list[str]
    unused: list[str]


def translate(run: SDPOConfig) -> VerlOverrides:
    """Hydra overrides that make verl do what the run says; those of ``run.verl`` come last, and so win.

    Raises:
        ConfigError: the run asks for what verl has not.
    """
    if run.optim.lr_scheduler_type == "linear":
        raise ConfigError("optim.lr_scheduler_type=linear does not exist in verl; use constant or cosine")
    settings: dict[str, Any] = {
        **_data(run),
        **_policy(run),
        **_adapters(run),
        **_learning(run),
        **_sampling(run),
        **_bookkeeping(run),
        **{
            f"{ACTOR}.self_distillation.{f.name}": getattr(run.self_distillation, f.name)
            for f in dataclasses.fields(SelfDistillationConfig)
            if getattr(run.self_distillation, f.name) != getattr(SelfDistillationConfig(), f.name)
        },
        **{
            f"health.{f.name}": getattr(run.health, f.name)
            for f in dataclasses.fields(HealthConfig)
            if f.name not in HEALTH_WITHOUT_EFFECT and getattr(run.health, f.name) != getattr(HealthConfig(), f.name)
        },
    }
    overrides = [f"{key}={quote(value)}" for part in (settings, flatten_keys(run.verl)) for key, value in part.items()]
    plain = dict(iterate_settings())
    unused = [key for key in UNSUPPORTED_KEYS if get_setting(run, key) != plain[key].default]
    return VerlOverrides(
        config_name="sdpo_trainer" if run.max_staleness else "sdpo_sync",
        overrides=overrides,
        unused=unused,
    )


def quote(value: Any) -> str:
    """A value in the grammar of Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(quote(each) for each in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{quote(each)}" for key, each in value.items()) + "}"
    if isinstance(value, str):
        # A backslash escapes only before a quote, and there each of several must be doubled: also before the last one.
        doubled = re.sub(r'(\\+)("|\Z)', r"\1\1\2", value)
        return '"' + doubled.replace('"', '\\"') + '"'
    return repr(value)


def _data(run: SDPOConfig) -> dict[str, Any]:
    return {
        "data.train_files": [str(Path(f).absolute()) for f in run.data.train_files],
        "data.val_files": [str(Path(f).absolute()) for f in run.data.val_files],
        "data.train_batch_size": run.data.train_batch_size,
        "data.max_prompt_length": run.data.max_prompt_length,
        "data.max_response_length": run.rollout.max_response_length,
        "data.filter_overlong_prompts": run.data.filter_overlong_prompts,
        "data.max_pixels": run.data.max_pixels,
        "data.filter_unreadable_images": run.data.filter_unreadable_images,
        "data.shuffle": run.data.shuffle,
        "data.seed": run.seed,
        "data.val_max_samples": run.eval.max_prompts or -1,
        "reward.custom_reward_function.path": "pkg://sdpo.verl_backend.rollout.reward",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs.task": _absolute_if_file(run.data.task),
        "+reward.custom_reward_function.reward_kwargs.task_args": json.dumps(run.data.task_args),
        "+reward.custom_reward_function.reward_kwargs.timeout_s": run.reward.timeout_s,
        "data.max_failure_fraction": run.reward.max_failure_fraction,
    }


def _policy(run: SDPOConfig) -> dict[str, Any]:
    half = run.actor.autocast or run.model.dtype == "bfloat16"
    settings: dict[str, Any] = {
        f"{MODEL}.path": _absolute_if_file(run.model.path),
        f"{MODEL}.trust_remote_code": run.model.trust_remote_code,
        f"{MODEL}.enable_gradient_checkpointing": run.actor.gradient_checkpointing,
        f"++{MODEL}.override_config.attn_implementation": run.model.attn_implementation,
        f"{ACTOR}.fsdp_config.model_dtype": "bf16" if run.model.dtype == "bfloat16" else "fp32",
    }
    # FSDP2 casts what it gathers, so a reference model kept in that data type computes the same.
    settings[f"{REFERENCE}.fsdp_config.model_dtype"] = "bf16" if half else "fp32"
    for part, dtype in (("param", "bf16" if half else "fp32"), ("reduce", "fp32"), ("buffer", "fp32")):
        settings[f"++{ACTOR}.fsdp_config.mixed_precision.{part}_dtype"] = dtype
    return settings


def _adapters(run: SDPOConfig) -> dict[str, Any]:
    if run.lora.rank == 0:
        return {}
    return {
        f"{MODEL}.lora_rank": run.lora.rank,
        f"{MODEL}.lora_alpha": run.lora.scale_numerator,
        f"{MODEL}.target_modules": run.lora.target_modules or ALL_LINEAR,
        f"{MODEL}.lora.merge": True,
    }


def _learning(run: SDPOConfig) -> dict[str, Any]:
    level = run.rollout_correction.rollout_is
    module, optimizer, arguments = choose_optimizer(run.optim)
    return {
        f"{ACTOR}.optim.optimizer_impl": module,
        f"{ACTOR}.optim.optimizer": optimizer,
        # verl's default is null, below which only ++ can add
        **{f"++{ACTOR}.optim.override_optimizer_config.{name}": value for name, value in arguments.items()},
        f"{ACTOR}.ppo_mini_batch_size": run.actor.mini_batch_size or run.data.train_batch_size,
        f"{ACTOR}.ppo_max_token_len_per_gpu": run.actor.max_tokens_per_micro_batch,
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": run.actor.max_tokens_per_micro_batch,
        f"{ACTOR}.freeze_vision_tower": run.actor.freeze_vision_tower,
        f"{ACTOR}.loss_agg_mode": run.actor.loss_agg_mode,
        f"{ACTOR}.use_kl_loss": run.actor.kl_loss_coef > 0,
        f"{ACTOR}.kl_loss_coef": run.actor.kl_loss_coef,
        f"{ACTOR}.kl_loss_type": run.actor.kl_loss_type,
        f"{ACTOR}.entropy_coeff": run.actor.entropy_coeff,
        "algorithm.rollout_correction.rollout_is": None if level == "none" else level,
        "algorithm.rollout_correction.rollout_is_threshold": run.rollout_correction.rollout_is_threshold,
        f"{ACTOR}.optim.lr": run.optim.lr,
        f"{ACTOR}.optim.weight_decay": run.optim.weight_decay,
        f"{ACTOR}.optim.betas": list(run.optim.betas),
        f"{ACTOR}.optim.lr_warmup_steps": run.optim.warmup_steps,
        f"{ACTOR}.optim.lr_scheduler_type": run.optim.lr_scheduler_type,
        f"{ACTOR}.optim.clip_grad": run.optim.max_grad_norm,
    }


def _sampling(run: SDPOConfig) -> dict[str, Any]:
    samples = run.eval.n > 0
    return {
        f"{ROLLOUT}.n": run.rollout.n,
        f"{ROLLOUT}.temperature": run.rollout.temperature,
        f"{ROLLOUT}.top_p": run.rollout.top_p,
        f"{ROLLOUT}.max_num_seqs": run.rollout.max_num_seqs,
        f"{ROLLOUT}.seed": run.seed,
        f"{ROLLOUT}.val_kwargs.n": max(run.eval.n, 1),
        f"{ROLLOUT}.val_kwargs.do_sample": samples,
        f"{ROLLOUT}.val_kwargs.temperature": run.eval.temperature if samples else 0,
        f"{ROLLOUT}.val_kwargs.top_p": run.eval.top_p if samples else 1.0,
    }


def _bookkeeping(run: SDPOConfig) -> dict[str, Any]:
    folder = Path(run.output_dir).absolute()
    return {
        "trainer.total_training_steps": run.max_steps,
        "trainer.total_epochs": run.max_steps,  # V1 trainers end with whichever comes first
        "trainer.val_before_train": run.eval.val_before_train,
        "trainer.test_freq": run.eval_steps or run.max_steps,
        "trainer.save_freq": run.save_steps or run.max_steps,
        "trainer.max_actor_ckpt_to_keep": run.save_total_limit,
        "trainer.save_best_limit": run.save_best_limit,
        "trainer.alarms_file": str(folder / ALARMS_FILE),
        "trainer.resume_mode": "disable" if run.resume_mode == "disable" else "auto",
        "trainer.default_local_dir": str(folder / "checkpoints"),
        "trainer.rollout_data_dir": str(folder / "rollouts") if run.tracking.log_completions_steps else None,
        "trainer.logger": ["console", "file", *run.tracking.report_to],
        "trainer.project_name": run.tracking.project,
        "trainer.experiment_name": run.tracking.name or folder.name,
    }


def _absolute_if_file(name: str) -> str:
    """Ray's processes have a working directory of their own."""
    return str(Path(name).absolute()) if looks_local(name) or Path(name).exists() else name
