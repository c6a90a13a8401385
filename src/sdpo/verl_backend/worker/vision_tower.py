"""Vision towers on verl's engine: each distinct image through the tower once, frozen towers, positions of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from verl.utils.transformers_compat import unpack_visual_output

from sdpo.errors import ConfigError, SDPOError
from sdpo.models.multimodal import vision_tower


def share_images(module: nn.Module) -> None:
    """Let the tower of a model see each distinct image of a forward pass once, however many rollouts show it.

    Does nothing to models other than those whose forward pass verl has replaced by its own (the Qwen-VL family), which
    hands all images of a micro-batch to ``model.visual``. The tower's output becomes the tensor of image tokens, or a
    pair of it and the list of deepstack features, which verl reads as well as transformers' own output; where a batch
    has no image at all, verl 0.9.1 reads nothing but the tensor.
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
    """Numbers of the first of equal images, and for each image its place among those.

    Args:
        patches: [patches, numbers of one], one tensor an image.
        grids: [images, 3].
    """
    sums = torch.stack([image.sum(dtype=torch.float64) for image in patches]).tolist()  # to compare few
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
    """Leave the language model, with its head, alone to be trained.

    Raises:
        ConfigError: the model reads no images.
    """
    try:
        vision_tower.freeze_vision_tower(module)
    except SDPOError as error:
        raise ConfigError(f"actor_rollout_ref.actor.freeze_vision_tower=True: {error}") from error


def compute_positions(module: nn.Module, token_ids: Tensor, prompt_length: int, grids: Tensor | None) -> Tensor:
    """Position ids [4, L] of a prompt and its response, as verl's forward pass reads them: text, time, height, width.

    Args:
        module: whose ``get_rope_index`` says what images take.
        token_ids: [L].
        prompt_length: image tokens after it are none.
        grids: [images, 3] of the prompt, or None.
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
