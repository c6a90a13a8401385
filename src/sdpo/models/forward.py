"""Batch prompts and responses as tensors and run a forward pass, for sampling and training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.multimodal.vision_tower import ImageFeatures, VisionAdapter, inject_image_features
from sdpo.models.packing.attention import NO_MASK
from sdpo.models.packing.layout import PackedSequences


@dataclass(frozen=True)
class PaddedSequences:
    """Prompts padded on the left, responses on the right, so that all responses start at the same place.

    Attributes:
        token_ids: [B, L].
        attention_mask: [B, L].
        position_ids: [B, L], or [3, B, L] in models with multimodal rotary positions.
        response_mask: [B, T] bool, T the longest response; 0 without responses.
        images: of all prompts, row by row.
    """

    token_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_mask: Tensor
    images: tuple[bytes, ...]


def pad_sequences(
    prompts: Sequence[TokenPrompt],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
    vision: VisionAdapter | None = None,
) -> PaddedSequences:
    """Put prompt and response of each sample into one row; a response may be empty.

    Positions of a response continue from the prompt's maximum in steps of 1, on every axis.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts]
    prompt_length, response_length = max(lengths), max(map(len, responses))
    token_ids = torch.full((len(prompts), prompt_length + response_length), pad_token_id)
    mask = torch.zeros_like(token_ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = prompt_length - lengths[row], prompt_length + len(response)
        token_ids[row, start:end] = torch.tensor([*prompt.token_ids, *response])
        mask[row, start:end] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    if vision is not None and vision.num_axes > 1:
        position_ids = position_ids.repeat(vision.num_axes, 1, 1)
        for row, own in enumerate(compute_positions(prompts, response_length, vision)):
            if prompts[row].images:
                position_ids[:, row, prompt_length - lengths[row] :] = own
    return PaddedSequences(
        token_ids=token_ids.to(device),
        attention_mask=mask.to(device),
        position_ids=position_ids.to(device),
        response_mask=mask[:, prompt_length:].bool().to(device),
        images=tuple(image for prompt in prompts for image in prompt.images),
    )


def compute_positions(
    prompts: Sequence[TokenPrompt], response_length: int, vision: VisionAdapter | None
) -> list[Tensor]:
    """Position ids [L], or [3, L] in models with multimodal rotary positions, of each prompt and a response.

    Positions of a response continue from the prompt's maximum in steps of 1, on every axis. Shorter responses use the
    first of them. Equal prompts, such as those of a group, share one tensor.
    """
    keys = [(tuple(prompt.token_ids), prompt.images) for prompt in prompts]
    distinct = dict(zip(keys, prompts, strict=True))
    positions = {key: _compute_positions(prompt, response_length, vision) for key, prompt in distinct.items()}
    return [positions[key] for key in keys]


def _compute_positions(prompt: TokenPrompt, response_length: int, vision: VisionAdapter | None) -> Tensor:
    length = len(prompt.token_ids)
    text = torch.arange(length + response_length)
    if vision is None or vision.num_axes == 1:
        return text
    if not prompt.images:
        return text.expand(vision.num_axes, -1)
    own = vision.compute_positions(prompt)
    return torch.cat([own, (text[length:] + own.max() + 1 - length).expand(len(own), -1)], dim=1)


def compute_hidden(
    model: nn.Module,
    sequences: PaddedSequences | PackedSequences,
    *,
    vision: VisionAdapter | None = None,
    features: Sequence[ImageFeatures] = (),
) -> Tensor:
    """Hidden states [N, H] from which the output layer predicts each response token, response by response.

    Args:
        sequences: packed sequences need a model that ``enable_packing`` supports.
        features: of the sequences' images, in their order.
    """
    inputs: dict[str, Any] = vision.image_token_mask(sequences.token_ids) if vision is not None else {}
    if isinstance(sequences, PackedSequences):
        inputs |= {"layout": sequences.layout, "attention_mask": NO_MASK.to(sequences.token_ids.device)}
    else:
        inputs["attention_mask"] = sequences.attention_mask
    with inject_image_features(model, features) as shown:
        hidden: Tensor = get_transformer(model)(
            input_ids=sequences.token_ids,
            position_ids=sequences.position_ids,
            use_cache=False,
            **inputs,
            **shown,
        ).last_hidden_state
    if isinstance(sequences, PackedSequences):
        return hidden[0].index_select(0, sequences.predictor_index)
    return hidden[:, -sequences.response_mask.shape[1] - 1 : -1][sequences.response_mask]


def get_transformer(model: nn.Module) -> Any:
    """The part of a transformers model before its output layer."""
    transformer: Any = model
    # Classes such as Llama4ForCausalLM name a base model that they do not have.
    return transformer.model if transformer.base_model is model else transformer.base_model


def compute_logits(
    model: nn.Module,
    token_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    keep: int,
    *,
    vision: VisionAdapter | None = None,
    features: Sequence[ImageFeatures] = (),
    cache: Any = None,
) -> Tensor:
    """Logits [B, keep, V] after the last ``keep`` tokens of each row.

    Args:
        token_ids: [B, L]; with a ``cache``, only the tokens after the cached tokens.
        attention_mask: [B, all tokens so far]; None without padding.
        position_ids: as in ``PaddedSequences``, of ``token_ids``.
        features: of the images in ``token_ids``, row by row.
    """
    marks = vision.image_token_mask(token_ids) if vision is not None else {}
    kind: Any = type(model)
    cache_argument = _find_cache_argument(kind)
    if cache_argument == "cache_params" and attention_mask is not None and attention_mask.shape != token_ids.shape:
        attention_mask = None  # a state contains no padding
    with inject_image_features(model, features) as shown:
        output = model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{cache_argument: cache},
            use_cache=cache is not None,
            logits_to_keep=keep,
            **marks,
            **shown,
        )
    logits: Tensor = output.logits[:, -keep:]  # a model that ignores logits_to_keep returns all positions
    return logits


@functools.cache
def _find_cache_argument(kind: Any) -> str:
    """Name of the argument for the cache: state-space models have another one."""
    names = inspect.signature(kind.forward).parameters
    return "cache_params" if "cache_params" in names and "past_key_values" not in names else "past_key_values"
