"""Sizes of a model's parts, read from its architecture without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sdpo.config.model import LoraConfig, ModelConfig
from sdpo.models.loading import build_meta_model, get_window, reads_images
from sdpo.models.lora.adapters import find_target_layers
from sdpo.models.multimodal.feature_cache import CHUNK_SIZE
from sdpo.models.multimodal.vision_tower import get_vision_tower_parameters

# Values that a layer saves for its backward pass, per token and per row and column of its matrices. Attention matrices
# are not counted, since flash and SDPA kernels never store them. Both factors are measured on tiny models of several
# families and checked in tests/unit/models/test_memory_estimate.py.
SAVED_VALUES_PER_DIM = 2.2
# Values that a layer holds at its peak in a forward pass without gradients, per token and per row and column.
INFERENCE_VALUES_PER_DIM = 1.7


@dataclass(frozen=True)
class LayerStack:
    """Consecutive layers of the same kind, of a language model or a vision tower.

    Attributes:
        num_params: parameters of the layers and of all modules around them.
        num_layers: number of layers.
        hidden_size: size of a token's or a patch's vector between two layers.
        matrix_dims: rows plus columns, summed over all matrices except embeddings and output layer.
    """

    num_params: int
    num_layers: int
    hidden_size: int
    matrix_dims: int

    def training_bytes_per_token(self, value_bytes: int, residual_bytes: int, *, checkpointing: bool) -> int:
        """Peak of forward and backward pass.

        Args:
            value_bytes: bytes of a value in the layers' matrix products.
            residual_bytes: bytes of a value between layers.
            checkpointing: whether a layer saves its input alone and is run again in the backward pass.
        """
        saved = SAVED_VALUES_PER_DIM * self.matrix_dims * value_bytes
        saved_per_layer = saved / self.num_layers
        if checkpointing:
            return int((self.num_layers + 4) * self.hidden_size * residual_bytes + 1.5 * saved_per_layer)
        return int(saved + saved_per_layer)

    def inference_bytes_per_token(self, value_bytes: int) -> int:
        """Peak of a forward pass without gradients."""
        return int(INFERENCE_VALUES_PER_DIM * self.matrix_dims / self.num_layers * value_bytes)


@dataclass(frozen=True)
class LoraSize:
    """Sizes of LoRA adapters.

    Attributes:
        num_params: parameters of the adapters.
        num_adapted_params: parameters of the layers that have adapters.
        largest_adapted_param: values of the largest of their weights.
        saved_values_per_token: values that all adapters save for the backward pass: their inputs, and those times A.
    """

    num_params: int
    num_adapted_params: int
    largest_adapted_param: int
    saved_values_per_token: int


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model's parts.

    Attributes:
        language_model: includes embeddings and output layer.
        vision_tower: includes the projector; None for a model without images.
        vocab_size: logits per token.
        kv_values_per_token: keys and values of all layers.
        feature_values_per_token: values of the vision tower's output per image token.
        values_per_patch: numbers in the pixels of a patch.
        patches_per_token: patches that become one image token.
        largest_param: values of the largest parameter.
        num_params_outside_layers: parameters outside the modules that transformers never splits; FSDP2 gathers them
            together.
        window: maximum number of tokens that the model reads; None if its config has no limit.
        lora: None without LoRA.
    """

    language_model: LayerStack
    vision_tower: LayerStack | None
    vocab_size: int
    kv_values_per_token: int
    feature_values_per_token: int
    values_per_patch: int
    patches_per_token: int
    largest_param: int
    num_params_outside_layers: int
    window: int | None
    lora: LoraSize | None = None

    @property
    def num_params(self) -> int:
        return self.language_model.num_params + self.num_vision_params

    @property
    def num_vision_params(self) -> int:
        return self.vision_tower.num_params if self.vision_tower else 0

    def vision_tower_bytes(self, max_pixels: int, value_bytes: int, residual_bytes: int, *, checkpointing: bool) -> int:
        """Peak of the vision tower's forward and backward pass over one chunk of images."""
        if self.vision_tower is None:
            return 0
        # Three channels, twice: some processors repeat an image, as the two frames of a video.
        num_values = max(CHUNK_SIZE, 6 * max_pixels)
        per_patch = self.vision_tower.training_bytes_per_token(value_bytes, residual_bytes, checkpointing=checkpointing)
        return num_values * 4 + -(-num_values // self.values_per_patch) * per_patch


def measure_model(config: ModelConfig, lora: LoraConfig | None = None) -> ModelSize:
    """Count the parameters of the architecture; of the model's folder only ``config.json`` is read.

    Raises:
        ConfigError: from ``build_meta_model`` or ``find_target_layers``.
    """
    model = build_meta_model(config)
    text: Any = model.config.get_text_config()
    vision: Any = getattr(model.config, "vision_config", None)
    vision_tower = _measure_vision_tower(model) if reads_images(config) else None
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    in_layers = {
        id(param): param.numel()
        for module in model.modules()
        if type(module).__name__ in (model._no_split_modules or ())
        for param in module.parameters()
    }
    num_params = sum(param.numel() for param in model.parameters())
    in_tower = {id(param) for param in get_vision_tower_parameters(model)} if vision_tower else set()
    return ModelSize(
        language_model=LayerStack(
            num_params=num_params - (vision_tower.num_params if vision_tower else 0),
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            matrix_dims=_sum_matrix_dims(model, {id(param) for param in model.parameters()} - in_tower),
        ),
        vision_tower=vision_tower,
        vocab_size=text.vocab_size,
        kv_values_per_token=text.num_hidden_layers * kv_heads * head_size * 2,
        feature_values_per_token=text.hidden_size * (1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())),
        values_per_patch=_count_patch_values(vision) if vision_tower else 0,
        patches_per_token=(_get_first(vision, "spatial_merge_size") or 1) ** 2,
        largest_param=max(param.numel() for param in model.parameters()),
        num_params_outside_layers=num_params - sum(in_layers.values()),
        window=get_window(model),
        lora=_measure_lora(model, lora) if lora is not None and lora.rank else None,
    )


def _measure_lora(model: PreTrainedModel, lora: LoraConfig) -> LoraSize:
    weights = [layer.weight for layer in find_target_layers(model, lora).values()]
    return LoraSize(
        num_params=lora.rank * sum(sum(weight.shape) for weight in weights),
        num_adapted_params=sum(weight.numel() for weight in weights),
        largest_adapted_param=max(weight.numel() for weight in weights),
        saved_values_per_token=sum(weight.shape[1] + lora.rank for weight in weights),
    )


def _measure_vision_tower(model: nn.Module) -> LayerStack:
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    params = get_vision_tower_parameters(model)
    return LayerStack(
        num_params=sum(param.numel() for param in params),
        num_layers=_get_first(vision, "num_hidden_layers", "depth", "num_layers") or 1,
        hidden_size=max(_get_first(vision, "embed_dim"), _get_first(vision, "hidden_size")),
        matrix_dims=_sum_matrix_dims(model, {id(param) for param in params}),
    )


def _sum_matrix_dims(model: Any, chosen: set[int]) -> int:
    head = model.get_output_embeddings()
    matrices = (
        param
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module is not head
        for param in module.parameters(recurse=False)
        if param.dim() == 2 and id(param) in chosen
    )
    return sum(sum(param.shape) for param in matrices)


def _count_patch_values(vision: Any) -> int:
    patch = _get_first(vision, "patch_size", "spatial_patch_size") or 14
    channels = _get_first(vision, "in_channels", "num_channels", "in_chans") or 3
    return channels * (_get_first(vision, "temporal_patch_size") or 1) * patch**2


def _get_first(config: Any, *names: str) -> int:
    """The first of these settings that is set, or 0; of a pair its first number."""
    for name in names:
        value = getattr(config, name, None)
        if value:
            return int(value[0] if isinstance(value, Sequence) else value)
    return 0
