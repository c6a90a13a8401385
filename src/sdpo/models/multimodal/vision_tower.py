"""Run the vision tower of a vision-language model separately from its language model.

The tower is all layers before the language model: patches, blocks, projector. transformers' models call
``get_image_features`` in every forward pass; ``inject_image_features`` makes this call return precomputed features. The
model itself still inserts them among the tokens or feeds them to several layers (Qwen3-VL).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.errors import DataError
from sdpo.models.multimodal.processor import MultimodalProcessor, TokenPrompt


@dataclass(frozen=True)
class ImageFeatures:
    """Features of one image, the input of the language model.

    Attributes:
        tokens: [image tokens, H], or [crops, tokens per crop, H] in models that split images into crops.
        by_layer: the same for each layer with separate features (Qwen3-VL's deepstack); empty for most models.
        in_list: whether the model's tower returns a list with an entry per image, or one tensor.
    """

    tokens: Tensor
    by_layer: tuple[Tensor, ...]
    in_list: bool

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tokens, *self.by_layer)


def combine_features(features: Sequence[ImageFeatures]) -> Any:
    """The output of ``get_image_features`` for these images in this order."""
    tokens = [each.tokens for each in features]
    layers = zip(*(each.by_layer for each in features), strict=True)
    return SimpleNamespace(
        pooler_output=tokens if features[0].in_list else torch.cat(tokens),
        deepstack_features=[torch.cat(layer) for layer in layers],
    )


def run_vision_tower(model: nn.Module, pixels: Sequence[Mapping[str, Tensor]]) -> list[ImageFeatures]:
    """Compute the features of each image, in one run of the tower if its output can be split by image."""
    inner = get_inner_model(model)
    device = next(model.parameters()).device
    inputs = {name: _stack([each[name] for each in pixels]).to(device) for name in pixels[0]}
    settings = {
        name: getattr(model.config, name)
        for name in ("vision_feature_layer", "vision_feature_select_strategy")  # of the LLaVA family
        if name in inspect.signature(inner.get_image_features).parameters
    }
    output = inner.get_image_features(**inputs, **settings, return_dict=True)
    tokens, layers = output.pooler_output, getattr(output, "deepstack_features", None) or ()
    in_list = not isinstance(tokens, Tensor)
    if len(tokens) == len(pixels):
        parts = list(tokens) if in_list else list(tokens.split(1))
        lengths = [len(part) for part in parts]
        by_layer = list(zip(*(layer.split(lengths) for layer in layers), strict=True)) or [()] * len(parts)
        return [ImageFeatures(part, own, in_list) for part, own in zip(parts, by_layer, strict=True)]
    if len(pixels) > 1:
        return [run_vision_tower(model, [each])[0] for each in pixels]
    return [ImageFeatures(torch.cat(list(tokens)) if in_list else tokens, tuple(layers), in_list)]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis; pad the other axes with zeros to the largest size."""
    shape = torch.tensor([tensor.shape[1:] for tensor in tensors]).amax(0).tolist() if tensors[0].dim() > 1 else []
    padded = []
    for tensor in tensors:
        missing = [length - own for length, own in zip(shape, tensor.shape[1:], strict=True)]
        padding = [number for more in reversed(missing) for number in (0, more)]
        padded.append(nn.functional.pad(tensor, padding) if any(missing) else tensor)
    return torch.cat(padded)


def get_inner_model(model: nn.Module) -> Any:
    """The part of a vision-language model that has the vision tower.

    Raises:
        DataError: the model lacks transformers' common interface for image features.
    """
    inner = getattr(model, "model", None)
    if not hasattr(inner, "get_image_features"):
        raise DataError(f"model.path: {type(model).__name__} has no model.get_image_features; it is not supported")
    return inner


def get_vision_tower_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that image features depend on: the inner model without its language model."""
    inner = get_inner_model(model)
    return [p for name, p in inner.named_parameters() if not name.startswith("language_model.")]


def freeze_vision_tower(model: nn.Module) -> None:
    """Freeze the vision tower; only the language model and its head are trained.

    Raises:
        DataError: from ``get_inner_model``.
    """
    for param in get_vision_tower_parameters(model):
        param.requires_grad_(False)


class VisionAdapter:
    """Image tokens and position ids of a vision-language model.

    Args:
        model: a transformers model.
        reader: of the model's processor.
    """

    def __init__(self, model: nn.Module, reader: MultimodalProcessor) -> None:
        self.reader = reader
        self._inner = get_inner_model(model)
        config: Any = model.config
        self.image_token_id = config.image_token_id
        self._rope = getattr(self._inner, "get_rope_index", None)
        self.num_axes = 1 if self._rope is None else 3  # of position ids; 3: time, height, width
        self.marks_images = "token_type_ids" in inspect.signature(model.forward).parameters
        # These tokens never occur in text; a model that reads one in a response expects an image.
        names = ("image_token_id", "video_token_id", "audio_token_id")
        self.placeholder_ids = [i for name in names if (i := getattr(config, name, None)) is not None]

    def compute_positions(self, prompt: TokenPrompt) -> Tensor:
        """Position ids [3, L] of a prompt with images, for multimodal rotary positions."""
        assert self._rope is not None, "only for num_axes > 1"
        token_ids = torch.tensor([list(prompt.token_ids)])
        grids = torch.cat([self.reader.read_grid(image) for image in prompt.images])
        is_image = (token_ids == self.image_token_id).int()
        positions, _ = self._rope(input_ids=token_ids, mm_token_type_ids=is_image, image_grid_thw=grids)
        return positions[:, 0]

    def image_token_mask(self, token_ids: Tensor) -> dict[str, Tensor]:
        """Extra inputs that mark image tokens, for models in which image tokens attend to each other."""
        return {"token_type_ids": (token_ids == self.image_token_id).long()} if self.marks_images else {}


@contextmanager
def inject_image_features(model: nn.Module, features: Sequence[ImageFeatures]) -> Iterator[dict[str, Any]]:
    """Make the model's forward passes use these image features; yields extra inputs for them."""
    if not features:
        yield {}
        return
    inner = get_inner_model(model)
    combined = combine_features(features)
    inner.get_image_features = lambda *_, **__: combined
    try:
        yield {"pixel_values": combined.pooler_output[0]}  # the model only checks that it is not None
    finally:
        del inner.get_image_features
