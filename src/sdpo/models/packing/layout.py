"""Pack sequences into one row without padding; a shared prefix is read once.

    prefix group of three          prefix | suffix 1 | suffix 2 | suffix 3
    single sequence                sequence

Each suffix attends only to its prefix and itself. So the n rollouts of a prompt cost one prompt and n responses, and n
teacher prompts with different feedback cost one question. Token-wise layers need no change; attention is computed in
one call or several, see ``attention_plan.py``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.packing.attention_plan import AttentionCostModel, PackedLayout, PrefixGroup, count_cost


@dataclass(frozen=True)
class PackedSequences:
    """Prompts and responses packed into one row.

    Attributes:
        token_ids: [1, L].
        position_ids: [1, L], or [3, 1, L] in models with multimodal rotary positions.
        predictor_index: [N] indices of the tokens that predict the response tokens, response by response.
        layout: of the row's attention.
        images: of the prompts, in the order of their tokens in the row.
    """

    token_ids: Tensor
    position_ids: Tensor
    predictor_index: Tensor
    layout: PackedLayout
    images: tuple[bytes, ...]


def count_shared_tokens(prompts: Sequence[TokenPrompt], image_token_ids: Sequence[int]) -> int:
    """Length of the prompts' common prefix, which contains all images or none."""
    first = prompts[0].token_ids
    shared = min(len(prompt.token_ids) for prompt in prompts)
    for prompt in prompts[1:]:
        other = prompt.token_ids
        if first[:shared] != other[:shared]:
            shared = next(i for i in range(shared) if first[i] != other[i])
    image_index = [i for i, token in enumerate(first) if token in image_token_ids] if prompts[0].images else []
    if image_index and image_index[-1] >= shared:
        shared = min(shared, image_index[0])
    return shared


def group_by_prefix(
    prompts: Sequence[TokenPrompt],
    response_lengths: Sequence[int],
    groups: Sequence[Hashable],
    cost: AttentionCostModel,
    image_token_ids: Sequence[int] = (),
) -> list[PrefixGroup]:
    """Split sequences into prefix groups: a prefix is shared if that is cheaper than single sequences.

    Args:
        prompts: of the sequences; prompts with equal ``groups`` have the same images.
        response_lengths: tokens of the response after each prompt.
        groups: consecutive sequences with equal values may share a prefix: rollouts of one prompt, for student and
            teacher.
    """
    prefix_groups: list[PrefixGroup] = []
    for _, indices in groupby(range(len(prompts)), key=lambda i: groups[i]):
        own = list(indices)
        lengths = tuple(len(prompts[i].token_ids) + response_lengths[i] for i in own)
        shared = count_shared_tokens([prompts[i] for i in own], image_token_ids) if len(own) > 1 else 0
        together, single = [PrefixGroup(shared, lengths)], [PrefixGroup(0, (length,)) for length in lengths]
        prefix_groups += together if shared and count_cost(together, cost) < count_cost(single, cost) else single
    return prefix_groups


def pack_sequences(
    groups: Sequence[PrefixGroup],
    prompts: Sequence[TokenPrompt],
    responses: Sequence[Sequence[int]],
    positions: Sequence[Tensor],
    cost: AttentionCostModel,
    device: torch.device,
    image_token_ids: Sequence[int] = (),
) -> PackedSequences:
    """Pack sequences into one row.

    Args:
        groups: of the sequences, in order.
        positions: position ids [..., L] of each sequence, for at least all of its tokens.
    """
    token_ids: list[int] = []
    position_ids: list[Tensor] = []
    predictor_index: list[Tensor] = []
    images: list[bytes] = []
    starts: list[tuple[int, list[int]]] = []  # of each group's prefix, and of its suffixes
    first = 0
    for group in groups:
        prefix_start = len(token_ids)
        suffix_starts = []
        for i in range(first, first + len(group.lengths)):
            sequence = [*prompts[i].token_ids, *responses[i]]
            num_skipped = 0 if i == first else group.prefix
            suffix_start = len(token_ids) + group.prefix - num_skipped
            suffix_starts.append(suffix_start)
            if i == first or not _has_image(sequence[: group.prefix], image_token_ids):
                images += prompts[i].images
            # The prefix's last token may predict the first response token.
            index = torch.arange(len(prompts[i].token_ids) - 1, len(sequence) - 1)
            in_prefix, in_suffix = index + prefix_start, index - group.prefix + suffix_start
            predictor_index.append(torch.where(index < group.prefix, in_prefix, in_suffix))
            token_ids += sequence[num_skipped:]
            position_ids.append(positions[i][..., num_skipped : len(sequence)])
        starts.append((prefix_start, suffix_starts))
        first += len(group.lengths)
    return PackedSequences(
        token_ids=torch.tensor([token_ids], device=device),
        position_ids=torch.cat(position_ids, dim=-1).unsqueeze(-2).to(device),
        predictor_index=torch.cat(predictor_index).to(device),
        layout=PackedLayout(tuple(groups), tuple(starts), len(token_ids), cost, device),
        images=tuple(images),
    )


def _has_image(token_ids: Sequence[int], image_token_ids: Sequence[int]) -> bool:
    return any(token in image_token_ids for token in token_ids)
