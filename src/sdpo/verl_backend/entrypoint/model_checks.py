"""Checks of the model at ``actor_rollout_ref.model.path``, before Ray starts."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from sdpo.errors import ConfigError, SDPOError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sdpo.config.model import LoraConfig

MODEL = "actor_rollout_ref.model"
FLASH_ATTENTION_ALONE = ("qwen2_vl", "qwen2_5_vl", "glm4v")


def check_model(config: DictConfig) -> None:
    """Check that the model can be loaded, trained and sampled; set ``rollout.max_model_len`` if it is null.

    Raises:
        ConfigError: names the key and the fix.
    """
    from sdpo.config.model import ModelConfig
    from sdpo.models.loading import build_meta_model, get_window, reads_images
    from sdpo.verl_backend.config.schema import LOSS_MODE, read_lora

    model = config.actor_rollout_ref.model
    path = os.path.expanduser(model.path)
    try:
        plain = build_meta_model(ModelConfig(path=path, trust_remote_code=model.trust_remote_code))
        limit_length(config, get_window(plain))
        if config.actor_rollout_ref.actor.policy_loss.loss_mode == LOSS_MODE:
            _check_adapters(plain, read_lora(model))
        else:
            check_stock_attention(model, plain.config.model_type)
        if reads_images(ModelConfig(path=path, trust_remote_code=model.trust_remote_code)):
            _check_processor(path, trust_remote_code=model.trust_remote_code)
        elif config.actor_rollout_ref.actor.freeze_vision_tower:
            raise ConfigError(
                f"actor.freeze_vision_tower=True: the model {model.path} has no vision tower; set it to false"
            )
    except SDPOError as error:
        raise ConfigError(f"actor_rollout_ref.{error}") from error
    if config.actor_rollout_ref.rollout.name == "vllm":
        check_head_size(plain.config, model.path)


def check_stock_attention(model: DictConfig, model_type: str) -> None:
    """Refuse packed rows for which verl's own FSDP engine would call flash-attn under another implementation's name.

    verl replaces the attention of these models (models/transformers/monkey_patch.py); without flash-attn the first
    forward pass raises ``NameError``, and with it a micro-batch of one sequence raises. sdpo's engine keeps
    transformers' attention (``workarounds.keep_stock_attention``). No upstream issue found (2026-11).

    Args:
        model: verl's section of the model.
        model_type: of the model's configuration.

    Raises:
        ConfigError: names the key and the fix.
    """
    attention = model.override_config.get("attn_implementation")
    if model.use_remove_padding and model_type in FLASH_ATTENTION_ALONE and attention != "flash_attention_2":
        raise ConfigError(
            f"model.use_remove_padding=True: verl's own engine packs rows of a {model_type} with flash-attn only, and "
            f"attn_implementation is {attention}; set use_remove_padding to false, or use loss_mode=sdpo with "
            "self_distillation.policy_loss_weight=1"
        )


def limit_length(config: DictConfig, window: int | None) -> None:
    """Limit the sampler to the longest possible sequence; vLLM's default is the model's window, which costs memory.

    Args:
        config: the run's.
        window: at most this many tokens fit the model; None if its configuration has no limit.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.max_model_len is None:
        max_length = rollout.prompt_length + rollout.response_length
        rollout.max_model_len = max_length if window is None else min(max_length, window)


def check_head_size(architecture: Any, path: str) -> None:
    """Refuse a Qwen2 model with a ``head_dim`` that vLLM does not read.

    vLLM 0.24 computes ``hidden_size / num_attention_heads`` in its place (model_executor/models/qwen2.py). No upstream
    issue found (2026-11).

    Args:
        architecture: the model's configuration (transformers).
        path: of the model, for the message.

    Raises:
        ConfigError: the two numbers differ.
    """
    text = architecture.get_text_config()
    size = getattr(text, "head_dim", None)
    if text.model_type.startswith("qwen2") and size and size * text.num_attention_heads != text.hidden_size:
        raise ConfigError(
            f"{MODEL}.path={path}: vLLM cannot sample from it: its head_dim={size} is not hidden_size / "
            f"num_attention_heads = {text.hidden_size} / {text.num_attention_heads}; use another model"
        )


def _check_adapters(plain: PreTrainedModel, lora: LoraConfig) -> None:
    from sdpo.models.lora.adapters import find_target_layers

    if lora.rank == 0:
        return
    try:
        find_target_layers(plain, lora)
    except SDPOError as error:
        message = str(error).replace("lora.target_modules", "model.target_modules", 1)
        raise ConfigError(message.replace("lora.rank", "model.lora_rank", 1)) from error


def _check_processor(path: str, *, trust_remote_code: bool) -> None:
    """Refuse a model whose processor verl cannot load; verl would train without it and reject rows with images later.

    No upstream issue found (2026-11).
    """
    from verl.utils import hf_processor

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor = hf_processor(path, trust_remote_code=trust_remote_code)
    if processor is None:
        reasons = [str(w.message) for w in caught if str(w.message).startswith("Failed to create processor")]
        reason = " ".join(reasons[-1].split()) if reasons else "it has none"
        raise ConfigError(f"model.path={path}: verl cannot load its image processor ({reason})")
