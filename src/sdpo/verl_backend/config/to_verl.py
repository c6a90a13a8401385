"""Translation of a config file into verl's settings, so that ``sdpo train`` and ``sdpo verl`` read the same file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.config.actor import ActorConfig, OptimConfig
from sdpo.config.data import DataConfig, RewardConfig
from sdpo.config.loader import flatten_keys
from sdpo.config.model import LoraConfig, ModelConfig
from sdpo.config.monitoring import EvalConfig, HealthConfig, TrackingConfig
from sdpo.config.rollout import RolloutConfig, RolloutCorrectionConfig
from sdpo.config.root import SDPOConfig, iterate_settings
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import ConfigError
from sdpo.models.loading import looks_local
from sdpo.models.optimizer import choose_optimizer
from sdpo.observability.health_callback import HEALTH_EVENTS_FILE

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
REFERENCE = "actor_rollout_ref.ref"
MODEL = "actor_rollout_ref.model"

ALL_LINEAR = "all-linear"  # verl's default of model.target_modules

# Health settings without an effect on verl, and the reason.
HEALTH_WITHOUT_EFFECT = {
    "teacher_underperforms_student": "verl evaluates the student alone",
    "min_accuracy_gap": "verl evaluates the student alone",
    "ref_kl_interval": "the workers hold no reference model for it",
}
# Settings of the native trainer without a counterpart in verl.
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
    """verl's config name and Hydra overrides, and the keys of the config file that have no effect on verl."""

    config_name: str
    overrides: list[str]
    unused: list[str]


def to_verl_overrides(config: SDPOConfig) -> VerlOverrides:
    """Return the Hydra overrides that make verl train as ``config`` says.

    The overrides of ``config.verl`` come last, so they win.

    Raises:
        ConfigError: a setting has no counterpart in verl.
    """
    if config.optim.lr_scheduler_type == "linear":
        raise ConfigError("optim.lr_scheduler_type=linear: verl does not have it; use constant or cosine")
    folder = Path(config.output_dir).absolute()
    settings: dict[str, Any] = {
        **_data(config.data, config.reward, config.eval, config.rollout.max_response_length, config.seed),
        **_model(config.model, config.actor),
        **_lora(config.lora),
        **_actor(config.actor, config.data.train_batch_size),
        **_rollout_correction(config.rollout_correction),
        **_optimizer(config.optim),
        **_rollout(config.rollout, config.seed),
        **_validation(config.eval),
        "trainer.total_training_steps": config.max_steps,
        "trainer.total_epochs": config.max_steps,  # V1 trainers end with the earlier of the two
        "trainer.test_freq": config.eval_steps or config.max_steps,
        "trainer.save_freq": config.save_steps or config.max_steps,
        "trainer.max_actor_ckpt_to_keep": config.save_total_limit,
        "trainer.save_best_limit": config.save_best_limit,
        "trainer.health_events_file": str(folder / HEALTH_EVENTS_FILE),
        "trainer.resume_mode": "disable" if config.resume_mode == "disable" else "auto",
        "trainer.default_local_dir": str(folder / "checkpoints"),
        **_logging(config.tracking, folder),
        **_changed_fields(f"{ACTOR}.self_distillation", config.self_distillation, SelfDistillationConfig()),
        **_changed_fields("health", config.health, HealthConfig(), omitted=HEALTH_WITHOUT_EFFECT),
    }
    parts = (settings, flatten_keys(config.verl))
    defaults = dict(iterate_settings())
    return VerlOverrides(
        config_name="sdpo_trainer" if config.max_staleness else "sdpo_sync",
        overrides=[f"{key}={quote(value)}" for part in parts for key, value in part.items()],
        unused=[key for key in UNSUPPORTED_KEYS if config.get(key) != defaults[key].default],
    )


def quote(value: Any) -> str:
    """Write a value in the grammar of Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(quote(each) for each in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{quote(each)}" for key, each in value.items()) + "}"
    if isinstance(value, str):
        # A backslash escapes only before a quote; all backslashes before a quote, or before the end, must be doubled.
        doubled = re.sub(r'(\\+)("|\Z)', r"\1\1\2", value)
        return '"' + doubled.replace('"', '\\"') + '"'
    return repr(value)


def _changed_fields(section: str, values: Any, defaults: Any, omitted: Container[str] = ()) -> dict[str, Any]:
    """Settings of a section that differ from their defaults."""
    names = [f.name for f in dataclasses.fields(defaults) if f.name not in omitted]
    return {
        f"{section}.{name}": getattr(values, name) for name in names if getattr(values, name) != getattr(defaults, name)
    }


def _data(
    data: DataConfig, reward: RewardConfig, evaluation: EvalConfig, max_response_length: int, seed: int
) -> dict[str, Any]:
    return {
        "data.train_files": [str(Path(f).absolute()) for f in data.train_files],
        "data.val_files": [str(Path(f).absolute()) for f in data.val_files],
        "data.train_batch_size": data.train_batch_size,
        "data.max_prompt_length": data.max_prompt_length,
        "data.max_response_length": max_response_length,
        "data.filter_overlong_prompts": data.filter_overlong_prompts,
        "data.max_pixels": data.max_pixels,
        "data.solution_key": data.solution_key,
        "data.filter_unreadable_images": data.filter_unreadable_images,
        "data.shuffle": data.shuffle,
        "data.seed": seed,
        "data.val_max_samples": evaluation.max_prompts or -1,
        "reward.custom_reward_function.path": "pkg://sdpo.verl_backend.rollout.reward",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs.task": _absolute_if_file(data.task),
        "+reward.custom_reward_function.reward_kwargs.task_args": json.dumps(data.task_args),
        "+reward.custom_reward_function.reward_kwargs.timeout_s": reward.timeout_s,
        "data.max_failure_fraction": reward.max_failure_fraction,
    }


def _model(model: ModelConfig, actor: ActorConfig) -> dict[str, Any]:
    half = actor.autocast or model.dtype == "bfloat16"
    settings: dict[str, Any] = {
        f"{MODEL}.path": _absolute_if_file(model.path),
        f"{MODEL}.trust_remote_code": model.trust_remote_code,
        f"{MODEL}.enable_gradient_checkpointing": actor.gradient_checkpointing,
        f"++{MODEL}.override_config.attn_implementation": model.attn_implementation,
        f"{ACTOR}.fsdp_config.model_dtype": "bf16" if model.dtype == "bfloat16" else "fp32",
    }
    # FSDP2 casts gathered weights to param_dtype, so a reference model stored in that data type computes the same.
    settings[f"{REFERENCE}.fsdp_config.model_dtype"] = "bf16" if half else "fp32"
    for part, dtype in (("param", "bf16" if half else "fp32"), ("reduce", "fp32"), ("buffer", "fp32")):
        settings[f"++{ACTOR}.fsdp_config.mixed_precision.{part}_dtype"] = dtype
    return settings


def _lora(lora: LoraConfig) -> dict[str, Any]:
    if lora.rank == 0:
        return {}
    return {
        f"{MODEL}.lora_rank": lora.rank,
        f"{MODEL}.lora_alpha": lora.scale_numerator,
        f"{MODEL}.target_modules": lora.target_modules or ALL_LINEAR,
        f"{MODEL}.lora.merge": True,
    }


def _actor(actor: ActorConfig, train_batch_size: int) -> dict[str, Any]:
    return {
        f"{ACTOR}.ppo_mini_batch_size": actor.mini_batch_size or train_batch_size,
        f"{ACTOR}.ppo_max_token_len_per_gpu": actor.max_tokens_per_micro_batch,
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": actor.max_tokens_per_micro_batch,
        f"{ACTOR}.freeze_vision_tower": actor.freeze_vision_tower,
        f"{ACTOR}.loss_agg_mode": actor.loss_agg_mode,
        f"{ACTOR}.use_kl_loss": actor.kl_loss_coef > 0,
        f"{ACTOR}.kl_loss_coef": actor.kl_loss_coef,
        f"{ACTOR}.kl_loss_type": actor.kl_loss_type,
        f"{ACTOR}.entropy_coeff": actor.entropy_coeff,
    }


def _rollout_correction(correction: RolloutCorrectionConfig) -> dict[str, Any]:
    level = correction.rollout_is
    return {
        "algorithm.rollout_correction.rollout_is": None if level == "none" else level,
        "algorithm.rollout_correction.rollout_is_threshold": correction.rollout_is_threshold,
    }


def _optimizer(optim: OptimConfig) -> dict[str, Any]:
    module, optimizer, arguments = choose_optimizer(optim)
    return {
        f"{ACTOR}.optim.optimizer_impl": module,
        f"{ACTOR}.optim.optimizer": optimizer,
        # verl's default is null; only ++ can add a key below it.
        **{f"++{ACTOR}.optim.override_optimizer_config.{name}": value for name, value in arguments.items()},
        f"{ACTOR}.optim.lr": optim.lr,
        f"{ACTOR}.optim.weight_decay": optim.weight_decay,
        f"{ACTOR}.optim.betas": list(optim.betas),
        f"{ACTOR}.optim.lr_warmup_steps": optim.warmup_steps,
        f"{ACTOR}.optim.lr_scheduler_type": optim.lr_scheduler_type,
        f"{ACTOR}.optim.clip_grad": optim.max_grad_norm,
    }


def _rollout(rollout: RolloutConfig, seed: int) -> dict[str, Any]:
    return {
        f"{ROLLOUT}.n": rollout.n,
        f"{ROLLOUT}.temperature": rollout.temperature,
        f"{ROLLOUT}.top_p": rollout.top_p,
        # Of all tokens, also with top-p; vLLM has them only before the temperature.
        f"{ROLLOUT}.logprobs_mode": "processed_logprobs" if rollout.top_p >= 1 else "raw_logprobs",
        f"{ROLLOUT}.max_num_seqs": rollout.max_num_seqs,
        f"{ROLLOUT}.seed": seed,
    }


def _validation(evaluation: EvalConfig) -> dict[str, Any]:
    samples = evaluation.n > 0
    return {
        f"{ROLLOUT}.val_kwargs.n": max(evaluation.n, 1),
        f"{ROLLOUT}.val_kwargs.do_sample": samples,
        f"{ROLLOUT}.val_kwargs.temperature": evaluation.temperature if samples else 0,
        f"{ROLLOUT}.val_kwargs.top_p": evaluation.top_p if samples else 1.0,
        "trainer.val_before_train": evaluation.val_before_train,
    }


def _logging(tracking: TrackingConfig, folder: Path) -> dict[str, Any]:
    return {
        "trainer.rollout_data_dir": str(folder / "rollouts") if tracking.log_completions_steps else None,
        "trainer.logger": ["console", "file", *tracking.report_to],
        "trainer.project_name": tracking.project,
        "trainer.experiment_name": tracking.name or folder.name,
    }


def _absolute_if_file(name: str) -> str:
    """Make a local path absolute: Ray's processes start in another folder."""
    return str(Path(name).absolute()) if looks_local(name) or Path(name).exists() else name
