"""The teacher's sequences as one of verl's micro-batches, with images and positions."""

from __future__ import annotations

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu

from sdpo.verl_backend.worker.packing import PackedTokens
from sdpo.verl_backend.worker.vision_tower import compute_positions

FORWARD_SETTINGS = ("temperature", "use_remove_padding", "pad_mode", "pad_token_id")


def build_teacher_inputs(tokens: PackedTokens, micro_batch: TensorDict, model: nn.Module) -> TensorDict:
    """Build a micro-batch of the teacher's sequences, with the images of their samples.

    A micro-batch without distilled samples gets one dummy token: every rank must run the teacher, since its forward
    pass gathers shards.

    Args:
        tokens: of the student's micro-batch.
        micro_batch: the student's.
        model: the student without PEFT's wrapper, whose ``get_rope_index`` positions images.
    """
    sequences = tokens.teacher_sequences or [tokens.rows.new_zeros(1)]
    images = read_images(micro_batch)
    shown = [images[i] for i in tokens.teacher_samples] or [{}]
    batch = TensorDict(
        {"input_ids": torch.nested.as_nested_tensor(sequences, layout=torch.jagged)}, batch_size=len(sequences)
    )
    if micro_batch["position_ids"].dim() == 3:
        lengths = tokens.teacher_prompt_lengths or [1]
        positions = [
            compute_positions(model, ids, length, inputs.get("image_grid_thw"))
            for ids, length, inputs in zip(sequences, lengths, shown, strict=True)
        ]
        batch["position_ids"] = tu.nested_tensor_from_tensor_list(positions, ragged_idx=2)
    else:
        positions = [torch.arange(len(ids), device=ids.device) for ids in sequences]
        batch["position_ids"] = torch.nested.as_nested_tensor(positions, layout=torch.jagged)
    if any(shown):
        batch["multi_modal_inputs"] = NonTensorStack(*map(NonTensorData, shown))
    for name in FORWARD_SETTINGS:
        value = tu.get_non_tensor_data(data=micro_batch, key=name, default=None)
        if value is not None:
            tu.assign_non_tensor(batch, **{name: value})
    return batch


def read_images(micro_batch: TensorDict) -> list[dict[str, Tensor]]:
    """Return the vision tower's arguments for each sample; an empty dictionary for a sample without images."""
    if "multi_modal_inputs" not in micro_batch:
        return [{}] * len(micro_batch)
    entries = (getattr(entry, "data", entry) for entry in micro_batch["multi_modal_inputs"])
    return [entry or {} for entry in entries]
