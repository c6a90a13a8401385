"""Pack sequences into one row without padding; a shared prefix is read once.

    family of three                prefix | rest 1 | rest 2 | rest 3
    single sequence                sequence

Each rest attends only to its prefix and itself. So the n rollouts of a prompt cost one prompt and n responses, and n
teacher prompts with different feedback cost one question. Token-wise layers need no change; attention is computed call
by call (``AttentionCall``), see ``attention.py``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sdpo.models.multimodal.processor import TokenPrompt


@dataclass(frozen=True)
class PrefixGroup:
    """Consecutive sequences with a shared prefix.

    Attributes:
        prefix: tokens that are read once for all members; 0 for a single sequence.
        lengths: tokens of each member, prefix included.
    """

    prefix: int
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the packed row."""
        return sum(self.lengths) - (len(self.lengths) - 1) * self.prefix


@dataclass(frozen=True)
class AttentionCostModel:
    """Cost of a forward pass, in FLOPs.

    A backward pass multiplies ``flops_per_token`` and ``flops_per_pair`` by about the same factor, so the same packing
    is best.

    Attributes:
        flops_per_token: products of a token with all weights.
        flops_per_pair: attention of one token to another, all layers; kernels compute masked pairs too.
        flops_per_call: overhead of one attention call in every layer: launch, gather and scatter.
    """

    flops_per_token: float
    flops_per_pair: float
    flops_per_call: float


@dataclass(frozen=True)
class AttentionCall:
    """One attention call per layer, with Q queries and K keys in each of its rows.

    In each row the last query attends to all keys, the previous query to all but the last key, and so on.

    Attributes:
        queries: [rows, Q] places in the packed row. Queries past the end of a sequence are padding; their outputs are
            discarded.
        keys: [rows, K], K >= Q.
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class PackedLayout:
    """How a packed row's attention is computed.

    Attributes:
        calls: attention calls that together contain every place of the row as a query.
        answers: [L] for each place, the index of its query in the concatenation of all calls' queries.
    """

    calls: tuple[AttentionCall, ...]
    answers: Tensor


@dataclass(frozen=True)
class PackedSequences:
    """Prompts and responses packed into one row.

    Attributes:
        token_ids: [1, L].
        position_ids: [1, L], or [3, 1, L] in models with multimodal rotary positions.
        scored: [N] places that predict the response tokens, response by response.
        layout: of the row's attention.
        images: of the prompts, in the order of their tokens in the row.
    """

    token_ids: Tensor
    position_ids: Tensor
    scored: Tensor
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
    places = [i for i, token in enumerate(first) if token in image_token_ids] if prompts[0].images else []
    if places and places[-1] >= shared:
        shared = min(shared, places[0])
    return shared


def group_by_prefix(
    prompts: Sequence[TokenPrompt],
    response_lengths: Sequence[int],
    groups: Sequence[Hashable],
    cost: AttentionCostModel,
    image_token_ids: Sequence[int] = (),
) -> list[PrefixGroup]:
    """Make a family of consecutive sequences of a group if that is cheaper, else single sequences.

    Args:
        prompts: of the sequences; prompts of a group have the same images.
        response_lengths: tokens of the response after each prompt.
        groups: sequences with equal values may share a prefix: rollouts of one prompt, for student and teacher.
    """
    families: list[PrefixGroup] = []
    for _, places in groupby(range(len(prompts)), key=lambda i: groups[i]):
        members = list(places)
        lengths = tuple(len(prompts[i].token_ids) + response_lengths[i] for i in members)
        shared = count_shared_tokens([prompts[i] for i in members], image_token_ids) if len(members) > 1 else 0
        family, apart = PrefixGroup(shared, lengths), [PrefixGroup(0, (length,)) for length in lengths]
        families += [family] if shared and count_cost([family], cost) < count_cost(apart, cost) else apart
    return families


def count_cost(families: Sequence[PrefixGroup], cost: AttentionCostModel) -> float:
    """Cost of these sequences as one packed row, in FLOPs."""
    shapes = [shape for _, shape in _plan_calls(families, cost)]
    tokens = sum(family.num_tokens for family in families)
    pairs = sum(rows * queries * keys for rows, queries, keys in shapes)
    return tokens * cost.flops_per_token + pairs * cost.flops_per_pair + len(shapes) * cost.flops_per_call


def pack_sequences(
    families: Sequence[PrefixGroup],
    prompts: Sequence[TokenPrompt],
    responses: Sequence[Sequence[int]],
    positions: Sequence[Tensor],
    cost: AttentionCostModel,
    device: torch.device,
    image_token_ids: Sequence[int] = (),
) -> PackedSequences:
    """Pack sequences into one row.

    Args:
        families: of the sequences, in order.
        positions: position ids [..., L] of each sequence, for at least all of its tokens.
    """
    token_ids: list[int] = []
    places: list[Tensor] = []
    scored: list[Tensor] = []
    images: list[bytes] = []
    starts: list[tuple[int, list[int]]] = []  # of each family's prefix, and of its members' rests
    member = 0
    for family in families:
        start = len(token_ids)
        rests = []
        for i in range(member, member + len(family.lengths)):
            whole = [*prompts[i].token_ids, *responses[i]]
            skipped = 0 if i == member else family.prefix
            rests.append(len(token_ids) + family.prefix - skipped)
            if i == member or not _has_image(whole[: family.prefix], image_token_ids):
                images += prompts[i].images
            # Places that predict the response's tokens; the prefix's last token may predict the first of them.
            before = torch.arange(len(prompts[i].token_ids) - 1, len(whole) - 1)
            scored.append(torch.where(before < family.prefix, before + start, before - family.prefix + rests[-1]))
            token_ids += whole[skipped:]
            places.append(positions[i][..., skipped : len(whole)])
        starts.append((start, rests))
        member += len(family.lengths)
    return PackedSequences(
        token_ids=torch.tensor([token_ids], device=device),
        position_ids=torch.cat(places, dim=-1).unsqueeze(-2).to(device),
        scored=torch.cat(scored).to(device),
        layout=_lay_out(families, starts, len(token_ids), cost, device),
        images=tuple(images),
    )


def _has_image(token_ids: Sequence[int], image_token_ids: Sequence[int]) -> bool:
    return any(token in image_token_ids for token in token_ids)


# A prefix or a rest in the row: (family, member), with member -1 for the prefix. A piece attends to itself; a rest also
# attends to its family's prefix.
_Piece = tuple[int, int]


def _plan_calls(
    families: Sequence[PrefixGroup], cost: AttentionCostModel
) -> list[tuple[list[_Piece], tuple[int, int, int]]]:
    """Pieces of each attention call, and its numbers of rows, queries and keys."""
    alone: list[tuple[int, _Piece]] = []
    groups: list[tuple[int, list[tuple[int, _Piece]]]] = [(0, alone)]
    for f, family in enumerate(families):
        if not family.prefix:
            alone += [(length, (f, i)) for i, length in enumerate(family.lengths)]
            continue
        alone.append((family.prefix, (f, -1)))
        rests = [(length - family.prefix, (f, i)) for i, length in enumerate(family.lengths)]
        groups.append((family.prefix, [rest for rest in rests if rest[0]]))
    calls = []
    for prefix, pieces in groups:
        for length, chosen in _share_calls(prefix, sorted(pieces, reverse=True), cost):
            calls.append((chosen, (len(chosen), length, prefix + length)))
    return calls


def _share_calls(
    prefix: int, pieces: Sequence[tuple[int, _Piece]], cost: AttentionCostModel
) -> list[tuple[int, list[_Piece]]]:
    """Group pieces, longest first, into calls; start a new call if padding would cost more."""
    calls: list[tuple[int, list[_Piece]]] = []
    wasted = 0.0
    for length, piece in pieces:
        if calls:
            longest = calls[-1][0]
            wasted += (longest * (prefix + longest) - length * (prefix + length)) * cost.flops_per_pair
        if not calls or wasted > cost.flops_per_call:
            calls.append((length, []))
            wasted = 0.0
        calls[-1][1].append(piece)
    return calls


def _lay_out(
    families: Sequence[PrefixGroup],
    starts: Sequence[tuple[int, list[int]]],
    num_tokens: int,
    cost: AttentionCostModel,
    device: torch.device,
) -> PackedLayout:
    calls: list[AttentionCall] = []
    answers = torch.empty(num_tokens, dtype=torch.long)
    answered = 0
    for pieces, (_, num_queries, num_keys) in _plan_calls(families, cost):
        queries, keys = [], []
        for f, member in pieces:
            family, (start, rests) = families[f], starts[f]
            if member < 0:
                first, length = start, family.prefix
            else:
                first, length = rests[member], family.lengths[member] - family.prefix
            # Padding repeats the piece's last token. Another sequence's token could pass on NaN, which a mask does not
            # stop.
            own = first + torch.arange(num_queries).clamp(max=length - 1)
            queries.append(own)
            keys.append(torch.cat([start + torch.arange(num_keys - num_queries), own]))
            answers[first : first + length] = answered + torch.arange(length)
            answered += num_queries
        calls.append(AttentionCall(torch.stack(queries).to(device), torch.stack(keys).to(device)))
    return PackedLayout(tuple(calls), answers.to(device))
