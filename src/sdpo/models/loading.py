"""Load a model and its tokenizer; failures raise ``ConfigError``."""

from __future__ import annotations

import os

import torch
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

from sdpo.config.model import ModelConfig
from sdpo.errors import ConfigError
from sdpo.kernels.cpu.fast_linear import speed_up_linear_layers

# transformers' progress bars would garble the trainer's output.
transformers_logging.disable_progress_bar()


def resolve_device(name: str, setting: str) -> torch.device:
    """Resolve a device name; ``auto`` is the first GPU, or the CPU without a GPU.

    Raises:
        ConfigError: the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device  # with an index, so that cuda equals cuda:0
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{setting}: no device {name!r} here ({reason}); use auto or cpu") from error


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """Load the model in evaluation mode, with weights in ``model.dtype`` on ``device``.

    Raises:
        ConfigError: it cannot be loaded, or its files lack weights, which transformers would initialize randomly.
    """
    kind = _get_auto_class(_load_architecture(config))
    try:
        model, found = kind.from_pretrained(
            config.path,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the error below names the mismatched weights
        )
    except Exception as error:  # transformers and remote code may raise any exception
        raise ConfigError(f"model.path: {config.path}: cannot be loaded ({_explain(error)})") from error
    lacking = sorted({*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])})
    if lacking:
        raise ConfigError(
            f"model.path: {config.path}: {len(lacking)} weights are missing or have another shape: "
            f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}; use weights and config of the same model"
        )
    speed_up_linear_layers(model)
    return model.to(device).eval()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; without a padding token it pads with the end token, which is masked."""
    _require_model(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # broken files may raise any exception
        raise ConfigError(f"model.path: {config.path}: its tokenizer cannot be loaded ({_explain(error)})") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path: {config.path}: the tokenizer has no end-of-sequence token; set eos_token in its config"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_meta_model(config: ModelConfig) -> PreTrainedModel:
    """Build the model's architecture without weights, to count parameters and FLOPs."""
    architecture = _load_architecture(config)
    try:
        with torch.device("meta"):
            return _get_auto_class(architecture).from_config(architecture, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # invalid settings may raise any exception
        raise ConfigError(f"model.path: {config.path}: cannot be loaded ({_explain(error)})") from error


def reads_images(config: ModelConfig) -> bool:
    """Whether transformers lists the model as an image-text-to-text model."""
    return type(_load_architecture(config)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _load_architecture(config: ModelConfig) -> PretrainedConfig:
    _require_model(config)
    try:
        return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # broken files may raise any exception
        raise ConfigError(f"model.path: {config.path}: cannot be loaded ({_explain(error)})") from error


def _get_auto_class(architecture: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    return (
        AutoModelForImageTextToText
        if type(architecture) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        else AutoModelForCausalLM
    )


def get_stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: from the tokenizer and from the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    more = configured if isinstance(configured, list) else [configured]
    for token_id in more:
        if not isinstance(token_id, int | None):
            raise ConfigError(f"model.path: eos_token_id={token_id!r:.40} in generation_config.json is not an integer")
    return sorted({tokenizer.eos_token_id, *(token for token in more if token is not None)})


def find_unknown_ids(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> list[int]:
    """Ids below ``num_rows`` that the tokenizer does not have: the padding of an output layer to a round size.

    Such ids decode to nothing, so they are never sampled and have no probability in the loss.
    """
    known = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return [token_id for token_id in range(num_rows) if token_id not in known]


def require_same_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Check that the model has an embedding for each token of the tokenizer.

    Added tokens may lack one, as Gemma's image token does in text-only models.

    Raises:
        ConfigError: another token or the end or padding token lacks an embedding.
    """
    size = count_embeddings(model)
    added = set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id, tokenizer.pad_token_id}
    largest = max((token_id for token_id in tokenizer.get_vocab().values() if token_id not in added), default=0)
    if largest >= size:
        raise ConfigError(
            f"model.path: {path}: the tokenizer has token ids up to {largest}, but the model has {size} embeddings; "
            "use tokenizer and weights of the same model"
        )


def count_embeddings(model: PreTrainedModel) -> int:
    """Number of tokens with an embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def get_window(model: PreTrainedModel) -> int | None:
    """Maximum number of tokens of a sequence, if the model's config has it."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


def looks_local(path: str) -> bool:
    """Whether a model's path cannot be a name on the Hugging Face Hub (``owner/name``)."""
    return path.startswith(("/", ".")) or path.count("/") > 1


def _require_model(config: ModelConfig) -> None:
    exists = os.path.exists(config.path)
    if not exists and looks_local(config.path):
        raise ConfigError(f"model.path: {config.path}: no such folder")
    if exists and not os.path.isfile(os.path.join(config.path, "config.json")):
        raise ConfigError(
            f"model.path: {config.path}: config.json is missing; use a model folder in the Hugging Face format"
        )


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    # The text of a KeyError is only the key.
    return f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or not text else f"{text:.250}"
