"""Loading a model and its tokenizer, with the errors that a person meets."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from sdpo.config import ModelConfig
from sdpo.errors import UserError
from sdpo.models.linear import speed_up_linear_layers

# Its bars for loading and writing shards would break the run's own.
transformers_logging.disable_progress_bar()


def resolve_device(name: str, setting: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        UserError: the device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device  # with its index: cuda and cuda:0 are the same
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{setting}: no device {name!r} here ({reason}); use auto or cpu") from error


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The model in evaluation mode, its weights in ``model.dtype`` on ``device``."""
    kind = _get_auto_class(_load_architecture(config))
    try:
        model = kind.from_pretrained(
            config.path,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"model.path: {config.path}: cannot be loaded ({_first_line(error)})") from error
    speed_up_linear_layers(model)
    return model.to(device).eval()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end token, which masks hide anyway."""
    _require_model(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.path: {config.path}: its tokenizer cannot be loaded ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path: {config.path}: the tokenizer has no end-of-sequence token; responses could not end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model's architecture without weights, to count with."""
    architecture = _load_architecture(config)
    try:
        with torch.device("meta"):
            return _get_auto_class(architecture).from_config(architecture, trust_remote_code=config.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise UserError(f"model.path: {config.path}: cannot be loaded ({_first_line(error)})") from error


def reads_images(config: ModelConfig) -> bool:
    """Whether transformers knows the model as one that reads images and text."""
    return type(_load_architecture(config)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _load_architecture(config: ModelConfig) -> PretrainedConfig:
    _require_model(config)
    try:
        return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.path: {config.path}: cannot be loaded ({_first_line(error)})") from error


def _get_auto_class(architecture: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    return (
        AutoModelForImageTextToText
        if type(architecture) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        else AutoModelForCausalLM
    )


def get_stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the tokenizer's and those that the model's generation settings add."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    more = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *(token for token in more if token is not None)})


def get_window(model: PreTrainedModel) -> int | None:
    """Most tokens the model can read, if its configuration says so."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


def looks_local(path: str) -> bool:
    """Whether a model's path cannot be the name of one on a hub (``owner/name``)."""
    return path.startswith(("/", ".")) or path.count("/") > 1


def _require_model(config: ModelConfig) -> None:
    if not Path(config.path).exists() and looks_local(config.path):
        raise UserError(f"model.path: {config.path}: no such folder")
    if Path(config.path).exists() and not (Path(config.path) / "config.json").is_file():
        raise UserError(
            f"model.path: {config.path}: holds no config.json; a model folder in the Hugging Face format does"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
