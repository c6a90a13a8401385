"""SDPO's settings in verl's configuration: schema, readers and checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.utils.import_utils import import_external_libs
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import FSDPActorConfig

from sdpo.algorithm.regularization import Regularization
from sdpo.config.actor import ActorConfig
from sdpo.config.model import LoraConfig
from sdpo.config.monitoring import HealthConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import ConfigError, SDPOError
from sdpo.verl_backend.config.to_verl import ALL_LINEAR, HEALTH_WITHOUT_EFFECT

LOSS_MODE = "sdpo"
CPU_SAMPLER = "transformers"  # the name under which cpu/rollout.py registers its engine
ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model"
# Keys below model.lora, which are for Megatron: name, verl's default, and the key for FSDP.
MEGATRON_LORA = (
    ("rank", 0, "lora_rank"),
    ("alpha", 32, "lora_alpha"),
    ("target_modules", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], "target_modules"),
    ("dropout", 0.0, None),
    ("adapter_path", None, None),
)
ROLLOUT = "actor_rollout_ref.rollout"
MULTI_TURN = f"{ROLLOUT}.multi_turn"
TOOL_PATHS = ("tool_config_path", "function_tool_path")
# sdpo's agent loops (agent_loop.py), and verl's names of the loops that they replace.
SINGLE_TURN, TOOL_TURNS = "sdpo_single_turn", "sdpo_tools"
AGENT_LOOPS = {SINGLE_TURN: "single_turn_agent", TOOL_TURNS: "tool_agent"}


@dataclass
class SelfDistillationActorConfig(FSDPActorConfig):  # type: ignore[misc]
    """verl's FSDP actor config with the section ``self_distillation``."""

    self_distillation: Any = field(default_factory=SelfDistillationConfig)


def build_schema(section: type[SelfDistillationConfig] | type[HealthConfig]) -> DictConfig:
    """Build Hydra's schema of a section: keys, types and defaults of the dataclass."""
    schema = OmegaConf.structured(section)
    OmegaConf.set_readonly(schema, None)  # a frozen dataclass becomes a read-only node, which rejects overrides
    return schema


def read_health(config: DictConfig) -> HealthConfig:
    """Read the section ``health``.

    Raises:
        ConfigError: a value is out of range.
    """
    values: Any = OmegaConf.to_container(config.health, resolve=True)
    return HealthConfig(**values)


def read_self_distillation(actor: DictConfig) -> SelfDistillationConfig | None:
    """Read the settings of an actor with ``policy_loss.loss_mode=sdpo``; None for another loss.

    Raises:
        ConfigError: a value is out of range or contradicts another.
    """
    if actor.policy_loss.loss_mode != LOSS_MODE:
        return None
    values: Any = OmegaConf.to_container(actor.self_distillation, resolve=True)
    try:
        return SelfDistillationConfig(**values)
    except SDPOError as error:
        raise ConfigError(str(error).replace("self_distillation.", f"{ACTOR}.self_distillation.", 1)) from None


def read_lora(model: Any) -> LoraConfig:
    """Read the adapters from verl's section ``model``: ``lora_rank``, ``lora_alpha``, ``target_modules``."""
    if not model.lora_rank:
        return LoraConfig()
    targets = model.target_modules
    chosen = [targets] if isinstance(targets, str) else list(targets)
    return LoraConfig(model.lora_rank, model.lora_alpha, [] if chosen == [ALL_LINEAR] else chosen)


def read_regularization(actor: DictConfig) -> Regularization:
    """Read KL to the reference policy and entropy from verl's keys of an actor.

    Raises:
        ConfigError: a value is out of range.
    """
    names = ("kl_loss_coef", "kl_loss_type", "entropy_coeff")
    try:
        given = ActorConfig(**{name: actor[name] for name in names})
    except SDPOError as error:
        raise ConfigError(str(error).replace("actor.", f"{ACTOR}.", 1)) from None
    kl_loss_coef = float(given.kl_loss_coef) if actor.use_kl_loss else None
    return Regularization(kl_loss_coef, given.kl_loss_type, float(given.entropy_coeff))  # verl's defaults are integers


def import_sampler(rollout: DictConfig) -> None:
    """Import ``checkpoint_engine.custom_backend_module``, which registers its sampler in this process."""
    import_external_libs(rollout.checkpoint_engine.custom_backend_module or None)


def complete_turns(config: DictConfig) -> None:
    """Select the agent loop with tools if ``multi_turn.enable``; make the tools' paths absolute for Ray."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.multi_turn.enable and rollout.agent.default_agent_loop == SINGLE_TURN:
        rollout.agent.default_agent_loop = TOOL_TURNS
    for name in TOOL_PATHS:
        if rollout.multi_turn[name]:
            rollout.multi_turn[name] = str(Path(rollout.multi_turn[name]).expanduser().absolute())


def check_config(config: DictConfig) -> None:
    """Refuse settings that verl or sdpo would ignore or that would fail later.

    Raises:
        ConfigError: names the key and the fix.
    """
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    _check_batches(config)
    settings = read_self_distillation(actor)
    _check_health(config, settings)
    if settings is None:
        if actor.freeze_vision_tower:
            raise ConfigError(
                f"{ACTOR}.freeze_vision_tower=True has no effect on verl's own FSDP engine, which "
                f"loss_mode={actor.policy_loss.loss_mode} uses; use loss_mode=sdpo with "
                "self_distillation.policy_loss_weight=1"
            )
        return
    if actor.strategy != "fsdp2":
        raise ConfigError(
            f"{ACTOR}.strategy={actor.strategy}: not supported with loss_mode=sdpo, whose teacher is sharded by FSDP2 "
            "and whose loss needs the complete output layer on each rank; use fsdp2"
        )
    _check_sampler(config.actor_rollout_ref.rollout.name)
    _check_lora(actor, model)
    read_regularization(actor)
    ignored = {
        f"{ACTOR}.calculate_entropy": (actor.calculate_entropy, False),
        f"{ACTOR}.calculate_sum_pi_squared": (actor.get("calculate_sum_pi_squared", False), False),
        f"{ACTOR}.use_prefix_grouper": (actor.get("use_prefix_grouper", False), False),
        f"{ACTOR}.clip_ratio_low": (actor.clip_ratio_low, settings.clip_ratio_low),
        f"{ACTOR}.clip_ratio_high": (actor.clip_ratio_high, settings.clip_ratio_high),
        "algorithm.norm_adv_by_std_in_grpo": (
            config.algorithm.norm_adv_by_std_in_grpo,
            settings.norm_adv_by_std_in_grpo,
        ),
        "actor_rollout_ref.model.use_fused_kernels": (model.get("use_fused_kernels", False), False),
        f"{ACTOR}.fsdp_config.pad_to_length": (actor.fsdp_config.get("pad_to_length", False), False),
        "distillation.enabled": (config.distillation.enabled, False),
    }
    for key, (value, wanted) in ignored.items():
        if value != wanted:
            hint = ""
            if key.split(".")[-1] in ("clip_ratio_low", "clip_ratio_high", "norm_adv_by_std_in_grpo"):
                hint = f", or set {ACTOR}.self_distillation.{key.split('.')[-1]} instead"
            raise ConfigError(f"{key}={value} has no effect with loss_mode=sdpo; set it to {wanted}{hint}")
    _check_turns(config.actor_rollout_ref.rollout)
    for name, section in ((ACTOR, actor), (f"{ACTOR}.fsdp_config", actor.fsdp_config)):
        if section.ulysses_sequence_parallel_size != 1:
            raise ConfigError(
                f"{name}.ulysses_sequence_parallel_size={section.ulysses_sequence_parallel_size} is not supported with "
                "loss_mode=sdpo, which compares student and teacher on the rank that has all tokens of a sequence; set "
                f"it to 1, and lower {ACTOR}.ppo_max_token_len_per_gpu if memory runs out"
            )
    if model.get("enable_activation_offload", False):
        raise ConfigError(
            "actor_rollout_ref.model.enable_activation_offload=True is not supported with loss_mode=sdpo: it runs the "
            "output layer, which computes the loss, twice; set it to false"
        )
    precision = actor.fsdp_config.get("mixed_precision") or {}
    if PrecisionType.is_fp16(precision.get("param_dtype")):
        raise ConfigError(
            f"{ACTOR}.fsdp_config.mixed_precision.param_dtype={precision.get('param_dtype')} is not supported with "
            "loss_mode=sdpo: a token's gradient underflows in it; use bf16 or fp32"
        )
    if actor.loss_agg_mode == "token-sum":
        raise ConfigError(f"{ACTOR}.loss_agg_mode=token-sum is not supported with loss_mode=sdpo; use token-mean")
    correction = config.algorithm.rollout_correction
    _check_truncated_sampling(config.actor_rollout_ref.rollout, correction)
    if correction.get("rollout_is") is not None and correction.get("bypass_mode"):
        raise ConfigError(
            "algorithm.rollout_correction.rollout_is has no effect with bypass_mode=true, which uses the sampler as "
            "the old policy and truncates the ratio by is_clip; set rollout_is to null or bypass_mode to false"
        )


def _check_truncated_sampling(rollout: DictConfig, correction: DictConfig) -> None:
    """Refuse top-p and top-k where log-probabilities of the truncated distribution would enter the loss."""
    if rollout.top_p >= 1 and rollout.top_k <= 0:
        return
    name, value = ("top_p", rollout.top_p) if rollout.top_p < 1 else ("top_k", rollout.top_k)
    key = f"actor_rollout_ref.rollout.{name}={value}"
    if correction.get("bypass_mode"):
        raise ConfigError(
            f"{key} cannot be used with algorithm.rollout_correction.bypass_mode=true: the sampler's log-probabilities "
            "of the truncated distribution would replace the old policy's; set bypass_mode to false, or top_p to 1 and "
            "top_k to -1"
        )
    has_all_tokens = rollout.logprobs_mode == "raw_logprobs" and rollout.temperature == 1
    if rollout.name == "vllm" and correction.get("rollout_is") is not None and not has_all_tokens:
        raise ConfigError(
            f"{key} with algorithm.rollout_correction.rollout_is={correction.rollout_is}: vLLM's log-probabilities are "
            "those of the tokens that are left, so that an unchanged policy has importance weights below 1; set "
            "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs and temperature=1, or rollout_is to null"
        )


def _check_sampler(name: str) -> None:
    """Refuse inference engines other than vLLM and that of ``cpu/rollout.py``."""
    if name not in ("vllm", CPU_SAMPLER):
        raise ConfigError(
            f"{ROLLOUT}.name={name}: not supported with loss_mode=sdpo, which gives probability 0 to the tokens that "
            "verl's vLLM server never samples; use vllm"
        )


def _check_lora(actor: DictConfig, model: DictConfig) -> None:
    if model.lora_adapter_path:
        raise ConfigError(
            f"{MODEL}.lora_adapter_path={model.lora_adapter_path} is not supported with loss_mode=sdpo: the teacher "
            f"starts from the model at {MODEL}.path without it; merge the adapter into this model"
        )
    for key, default, name in MEGATRON_LORA:
        if model.lora.get(key, default) != default:
            hint = f"set {MODEL}.{name} instead" if name else "remove it"
            raise ConfigError(
                f"{MODEL}.lora.{key}={model.lora[key]} is for Megatron, and verl's FSDP ignores it; {hint}"
            )
    if not model.lora_rank:
        if model.lora.merge:
            raise ConfigError(f"{MODEL}.lora.merge=True has no effect with lora_rank=0; set lora_rank or remove it")
        return
    if not model.lora.merge:
        raise ConfigError(
            f"{MODEL}.lora.merge must be true with lora_rank={model.lora_rank} and loss_mode=sdpo: the weight sync "
            "sends merged weights"
        )
    for key in ("target_parameters", "exclude_modules"):
        if model.get(key):
            raise ConfigError(
                f"{MODEL}.{key} is not supported with loss_mode=sdpo, which adapts linear layers only; name the "
                f"layers by {MODEL}.target_modules"
            )
    if actor.freeze_vision_tower:
        raise ConfigError(
            f"{ACTOR}.freeze_vision_tower=True has no effect with LoRA, which never trains the vision tower; remove it"
        )


def _check_turns(rollout: DictConfig) -> None:
    turns, agent = rollout.multi_turn, rollout.agent
    given = [name for name in TOOL_PATHS if turns[name]]
    if given and not turns.enable:
        raise ConfigError(f"{MULTI_TURN}.{given[0]} has no effect without {MULTI_TURN}.enable=true")
    if turns.enable and not given:
        keys = " or ".join(f"{MULTI_TURN}.{name}" for name in TOOL_PATHS)
        raise ConfigError(f"{MULTI_TURN}.enable=true needs tools: set {keys}")
    if agent.agent_loop_config_path:
        raise ConfigError(
            f"{ROLLOUT}.agent.agent_loop_config_path is not supported with loss_mode=sdpo: the teacher's prompt is "
            "built from the row's messages, which a custom loop may change for the student; set it to null"
        )
    wanted = TOOL_TURNS if turns.enable else SINGLE_TURN
    if agent.default_agent_loop not in (wanted, AGENT_LOOPS[wanted]):
        raise ConfigError(
            f"{ROLLOUT}.agent.default_agent_loop={agent.default_agent_loop} must be {wanted} with loss_mode=sdpo and "
            f"{MULTI_TURN}.enable={str(turns.enable).lower()}"
        )


def _check_health(config: DictConfig, settings: SelfDistillationConfig | None) -> None:
    health, usual = read_health(config), HealthConfig()
    for name, reason in HEALTH_WITHOUT_EFFECT.items():
        value = getattr(health, name)
        if value != getattr(usual, name):
            raise ConfigError(f"health.{name}={value} has no effect on verl: {reason}; remove it")
    # Other losses do not distill.
    health.check_actions(settings or SelfDistillationConfig(policy_loss_weight=1.0))
    save_best_limit = config.trainer.save_best_limit
    if not isinstance(save_best_limit, int) or isinstance(save_best_limit, bool) or save_best_limit < 0:
        raise ConfigError(f"trainer.save_best_limit must be an integer, at least 0, got {save_best_limit!r}")


def _check_batches(config: DictConfig) -> None:
    mini, batch = config.actor_rollout_ref.actor.ppo_mini_batch_size, config.data.train_batch_size
    num_gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    if batch % mini:
        raise ConfigError(f"{ACTOR}.ppo_mini_batch_size={mini} must divide data.train_batch_size={batch}")
    rollouts = mini * config.actor_rollout_ref.rollout.n
    if rollouts % num_gpus:
        raise ConfigError(
            f"{ACTOR}.ppo_mini_batch_size * actor_rollout_ref.rollout.n = {rollouts} must be a multiple of the "
            f"{num_gpus} training GPUs (trainer.nnodes * trainer.n_gpus_per_node)"
        )
