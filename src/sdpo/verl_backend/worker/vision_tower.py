"""Vision towers on verl's engine: one pass per distinct image, freezing, position ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from verl.utils.transformers_compat import unpack_visual_output

from sdpo.errors import ConfigError, SDPOError
from sdpo.models.multimodal import vision_tower


def share_images(module: nn.Module) -> None:
    """Make the vision tower process each distinct image of a forward pass once, for all rollouts that contain it.

    Applies to models whose forward pass verl has replaced (the Qwen-VL family), which passes all images of a
    micro-batch to ``model.visual``; others stay unchanged. The tower then returns the tensor of image tokens, or a pair
    of this tensor and the list of deepstack features. verl accepts both, but for a batch without images verl 0.9.1
    accepts the tensor alone and crashes on transformers' output. No upstream issue found (2026-11).
    """
    inner: Any = getattr(module, "model", None)
    tower = getattr(inner, "visual", None)
    if tower is None or not type(inner).forward.__module__.startswith("verl."):
        return
    run = tower.forward

    def forward(hidden_states: Tensor, grid_thw: Tensor, **settings: Any) -> Any:
        sizes = grid_thw.prod(1).tolist()  # patches of each image
        patches = hidden_states.split(sizes)
        distinct, places = find_distinct(patches, grid_thw)
        if len(distinct) < len(patches):
            hidden_states, grid_thw = torch.cat([patches[i] for i in distinct]), grid_thw[distinct]
        tokens, layers = unpack_visual_output(run(hidden_states, grid_thw=grid_thw, **settings))
        if len(distinct) < len(patches):
            lengths = [sizes[i] * len(tokens) // len(hidden_states) for i in distinct]
            tokens = _repeat(tokens, lengths, places)
            layers = layers and [_repeat(layer, lengths, places) for layer in layers]
        return (tokens, layers) if layers else tokens

    tower.forward = forward


def find_distinct(patches: Sequence[Tensor], grids: Tensor) -> tuple[list[int], list[int]]:
    """Return the indices of the distinct images, and for each image its place among them.

    Args:
        patches: one tensor [patches, values per patch] per image.
        grids: [images, 3].
    """
    sums = torch.stack([image.sum(dtype=torch.float64) for image in patches]).tolist()  # images with other sums differ
    first: dict[Any, list[int]] = {}
    distinct: list[int] = []
    places = []
    for i, key in enumerate(zip(map(tuple, grids.tolist()), sums, strict=True)):
        alike = first.setdefault(key, [])
        place = next((place for place in alike if torch.equal(patches[distinct[place]], patches[i])), None)
        if place is None:
            place = len(distinct)
            distinct.append(i)
            alike.append(place)
        places.append(place)
    return distinct, places


def _repeat(features: Tensor, lengths: Sequence[int], places: Sequence[int]) -> Tensor:
    parts = features.split(list(lengths))
    return torch.cat([parts[place] for place in places])


def freeze_vision_tower(module: nn.Module) -> None:
    """Train the language model and its head only.

    verl's FSDP engine ignores the setting: https://github.com/verl-project/verl/issues/2526.

    Raises:
        ConfigError: the model has no vision tower.
    """
    try:
        vision_tower.freeze_vision_tower(module)
    except SDPOError as error:
        raise ConfigError(f"actor_rollout_ref.actor.freeze_vision_tower=True: {error}") from error


def compute_positions(module: nn.Module, token_ids: Tensor, prompt_length: int, grids: Tensor | None) -> Tensor:
    """Return position ids [4, L] of a prompt and its response in verl's order: text, time, height, width.

    Args:
        module: with transformers' ``get_rope_index``, which positions images.
        token_ids: [L].
        prompt_length: image tokens behind it count as text.
        grids: [images, 3] of the prompt; None without images.
    """
    text = torch.arange(len(token_ids), device=token_ids.device)
    if grids is None:
        return text.expand(4, -1)
    model: Any = module
    is_image = (token_ids == model.config.image_token_id) & (text < prompt_length)
    axes, _ = model.model.get_rope_index(
        input_ids=token_ids[None], mm_token_type_ids=is_image[None].int(), image_grid_thw=grids.to(token_ids.device)
    )
    return torch.cat([text[None], axes[:, 0]])
