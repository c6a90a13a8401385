"""Sequences side by side in one row, without padding, and what several begin with read once.

    family of three                prefix | rest 1 | rest 2 | rest 3
    a sequence by itself           the whole of it

Every rest is read as if its prefix stood before it alone. So the n rollouts of a prompt cost one prompt and n
responses, and n teacher prompts that differ in their feedback cost one question. Layers that treat every token by
itself need nothing for that; attention is computed call by call (``Attention``), see ``attention.py``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sdpo.models.processing import TokenPrompt


@dataclass(frozen=True)
class Family:
    """Consecutive sequences that begin alike.

    Attributes:
        prefix: tokens that are read once for all members; 0 for a sequence by itself.
        lengths: of each member, prefix included.
    """

    prefix: int
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are read."""
        return sum(self.lengths) - (len(self.lengths) - 1) * self.prefix


@dataclass(frozen=True)
class ReadingCost:
    """What reading costs a model, in floating-point operations of a forward pass.

    A backward pass multiplies the first two by about the same, so that choices hold for it too.

    Attributes:
        by_token: products with weights.
        by_pair: attention of one token to another, all layers; kernels compute pairs that a mask rules out too.
        by_call: the operations that a device could have done in the time in which one call of attention is started in
            every layer, its rows gathered and scattered.
    """

    by_token: float
    by_pair: float
    by_call: float


@dataclass(frozen=True)
class Attention:
    """One call of attention in each layer: equally many queries and keys in each of its rows.

    Row by row, the last query sees all keys, the one before it all but the last, and so on.

    Attributes:
        queries: [rows, Q] places in the packed row; what answers a place beyond a sequence's end is nobody's.
        keys: [rows, K], K >= Q.
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Layout:
    """How a packed row's attention is computed.

    Attributes:
        calls: they answer every place of the row at least once.
        answers: [L] for each place, which of the calls' queries, one after the other, is its own.
    """

    calls: tuple[Attention, ...]
    answers: Tensor


@dataclass(frozen=True)
class PackedSequences:
    """Prompts and responses packed into one row.

    Attributes:
        token_ids: [1, L].
        position_ids: [1, L], or [3, 1, L] in models with multimodal rotary positions.
        scored: [N] places after which the response tokens come, response by response.
        layout: how its attention is computed.
        images: those of its prompts, in the order in which the row shows them.
    """

    token_ids: Tensor
    position_ids: Tensor
    scored: Tensor
    layout: Layout
    images: tuple[bytes, ...]


def count_shared_tokens(prompts: Sequence[TokenPrompt], image_token_ids: Sequence[int]) -> int:
    """Tokens that all of these prompts begin with; images are among them all together or not at all."""
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


def find_families(
    prompts: Sequence[TokenPrompt],
    response_lengths: Sequence[int],
    groups: Sequence[Hashable],
    cost: ReadingCost,
    image_token_ids: Sequence[int] = (),
) -> list[Family]:
    """Consecutive sequences of one group as a family, where that pays; every other sequence by itself.

    Args:
        prompts: of the sequences; all images of a prompt are those of its group.
        response_lengths: what follows each prompt.
        groups: which sequences may share; those of a rollout's prompt, for student and teacher.
    """
    families: list[Family] = []
    for _, places in groupby(range(len(prompts)), key=lambda i: groups[i]):
        members = list(places)
        lengths = tuple(len(prompts[i].token_ids) + response_lengths[i] for i in members)
        shared = count_shared_tokens([prompts[i] for i in members], image_token_ids) if len(members) > 1 else 0
        family, apart = Family(shared, lengths), [Family(0, (length,)) for length in lengths]
        families += [family] if shared and count_cost([family], cost) < count_cost(apart, cost) else apart
    return families


def count_cost(families: Sequence[Family], cost: ReadingCost) -> float:
    """What these sequences cost as one packed row."""
    shapes = [shape for _, shape in _plan_calls(families, cost)]
    tokens = sum(family.num_tokens for family in families)
    pairs = sum(rows * queries * keys for rows, queries, keys in shapes)
    return tokens * cost.by_token + pairs * cost.by_pair + len(shapes) * cost.by_call


def pack_sequences(
    families: Sequence[Family],
    prompts: Sequence[TokenPrompt],
    responses: Sequence[Sequence[int]],
    positions: Sequence[Tensor],
    cost: ReadingCost,
    device: torch.device,
    image_token_ids: Sequence[int] = (),
) -> PackedSequences:
    """One row of these sequences.

    Args:
        families: of the sequences, in order.
        positions: position ids [..., L] of each sequence, the whole of it or more.
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
            # Where the response's tokens are predicted, the first of them perhaps by the prefix's last token.
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


# A piece of the row that attends to itself and, if it is a rest, to its family's prefix: (family, member); -1 stands
# for the prefix.
_Piece = tuple[int, int]


def _plan_calls(families: Sequence[Family], cost: ReadingCost) -> list[tuple[list[_Piece], tuple[int, int, int]]]:
    """Which pieces share a call of attention, and how many rows, queries and keys it has."""
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
    prefix: int, pieces: Sequence[tuple[int, _Piece]], cost: ReadingCost
) -> list[tuple[int, list[_Piece]]]:
    """Pieces, longest first, in calls of one length: a new one where padding would cost more than the call."""
    calls: list[tuple[int, list[_Piece]]] = []
    wasted = 0.0
    for length, piece in pieces:
        if calls:
            longest = calls[-1][0]
            wasted += (longest * (prefix + longest) - length * (prefix + length)) * cost.by_pair
        if not calls or wasted > cost.by_call:
            calls.append((length, []))
            wasted = 0.0
        calls[-1][1].append(piece)
    return calls


def _lay_out(
    families: Sequence[Family],
    starts: Sequence[tuple[int, list[int]]],
    num_tokens: int,
    cost: ReadingCost,
    device: torch.device,
) -> Layout:
    calls: list[Attention] = []
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
            # Beyond its end stands the piece itself again: a number that is not finite stays in its own sequence, for a
            # mask does not keep it away.
            own = first + torch.arange(num_queries).clamp(max=length - 1)
            queries.append(own)
            keys.append(torch.cat([start + torch.arange(num_keys - num_queries), own]))
            answers[first : first + length] = answered + torch.arange(length)
            answered += num_queries
        calls.append(Attention(torch.stack(queries).to(device), torch.stack(keys).to(device)))
    return Layout(tuple(calls), answers.to(device))
