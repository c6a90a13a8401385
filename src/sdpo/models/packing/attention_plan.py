"""Which tokens of a packed row attend to which: one call for all segments, or few calls of similar segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixGroup:
    """Consecutive sequences with a shared prefix.

    Attributes:
        prefix: number of tokens that are read once for all sequences; 0 for a single sequence.
        lengths: number of tokens of each sequence, prefix included.
    """

    prefix: int
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the packed row."""
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
        queries: [rows, Q] indices into the packed row. Queries past the end of a segment are padding; their outputs are
            discarded.
        keys: [rows, K] indices into the packed row, K >= Q.
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class SegmentBounds:
    """The attention of a packed row as one call of a kernel for segments of different lengths.

    The row's queries are in order. The keys of a suffix are those of its prefix and its own, so the keys of a prefix
    occur once for itself and once for each suffix.

    Attributes:
        query_bounds, key_bounds: [segments + 1] int32, cumulative numbers of queries and keys.
        key_index: [K] indices into the packed row; None if the keys are those of the row in order.
        max_queries, max_keys: of a segment.
    """

    query_bounds: Tensor
    key_bounds: Tensor
    key_index: Tensor | None
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class AttentionCalls:
    """The attention of a packed row as calls of a kernel for segments of equal lengths.

    Attributes:
        calls: attention calls that together contain every token of the row as a query.
        output_index: [L] for each token, the index of its query in the concatenation of all calls' queries.
    """

    calls: tuple[AttentionCall, ...]
    output_index: Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Which tokens of a packed row attend to which, in one of two forms; each is built when a layer first needs it.

    Attributes:
        groups: of the row's sequences.
        starts: of each group's prefix, and of its suffixes.
        num_tokens: L, of the row.
        cost: decides which segments share a call.
        device: of the tensors.
    """

    groups: tuple[PrefixGroup, ...]
    starts: tuple[tuple[int, list[int]], ...]
    num_tokens: int
    cost: AttentionCostModel
    device: torch.device

    @cached_property
    def attention_calls(self) -> AttentionCalls:
        """One call for each set of segments with similar lengths."""
        return _build_calls(self.groups, self.starts, self.num_tokens, self.cost, self.device)

    @cached_property
    def segment_bounds(self) -> SegmentBounds:
        """One call for all segments."""
        return _build_bounds(self.groups, self.starts, self.device)


def count_cost(groups: Sequence[PrefixGroup], cost: AttentionCostModel) -> float:
    """Cost of these sequences as one packed row, in FLOPs."""
    shapes = [shape for _, shape in _plan_calls(groups, cost)]
    tokens = sum(group.num_tokens for group in groups)
    pairs = sum(rows * queries * keys for rows, queries, keys in shapes)
    return tokens * cost.flops_per_token + pairs * cost.flops_per_pair + len(shapes) * cost.flops_per_call


# A prefix or a suffix in the row: index of its group, and of its sequence in the group, or -1 for the prefix. A segment
# attends to itself; a suffix also attends to its prefix.
_Segment = tuple[int, int]


def _plan_calls(
    groups: Sequence[PrefixGroup], cost: AttentionCostModel
) -> list[tuple[list[_Segment], tuple[int, int, int]]]:
    """Segments of each attention call, and its numbers of rows, queries and keys."""
    without_prefix: list[tuple[int, _Segment]] = []
    by_prefix: list[tuple[int, list[tuple[int, _Segment]]]] = [(0, without_prefix)]
    for g, group in enumerate(groups):
        if not group.prefix:
            without_prefix += [(length, (g, i)) for i, length in enumerate(group.lengths)]
            continue
        without_prefix.append((group.prefix, (g, -1)))
        suffixes = [(length - group.prefix, (g, i)) for i, length in enumerate(group.lengths)]
        by_prefix.append((group.prefix, [suffix for suffix in suffixes if suffix[0]]))
    calls = []
    for prefix, segments in by_prefix:
        for length, chosen in _split_into_calls(prefix, sorted(segments, reverse=True), cost):
            calls.append((chosen, (len(chosen), length, prefix + length)))
    return calls


def _split_into_calls(
    prefix: int, segments: Sequence[tuple[int, _Segment]], cost: AttentionCostModel
) -> list[tuple[int, list[_Segment]]]:
    """Split segments, longest first, into calls; a new call begins if padding would cost more."""
    calls: list[tuple[int, list[_Segment]]] = []
    padding_cost = 0.0
    for length, segment in segments:
        if calls:
            longest = calls[-1][0]
            padding_cost += (longest * (prefix + longest) - length * (prefix + length)) * cost.flops_per_pair
        if not calls or padding_cost > cost.flops_per_call:
            calls.append((length, []))
            padding_cost = 0.0
        calls[-1][1].append(segment)
    return calls


def _build_bounds(
    groups: Sequence[PrefixGroup], starts: Sequence[tuple[int, list[int]]], device: torch.device
) -> SegmentBounds:
    num_queries: list[int] = []
    keys: list[Tensor] = []
    for group, (prefix_start, suffix_starts) in zip(groups, starts, strict=True):
        prefix = torch.arange(prefix_start, prefix_start + group.prefix)
        if group.prefix:
            num_queries.append(group.prefix)
            keys.append(prefix)
        for start, length in zip(suffix_starts, group.lengths, strict=True):
            if length > group.prefix:
                num_queries.append(length - group.prefix)
                keys.append(torch.cat([prefix, torch.arange(start, start + length - group.prefix)]))
    num_keys = [len(own) for own in keys]
    has_prefix = any(group.prefix for group in groups)
    query_bounds, key_bounds = (
        torch.tensor([0, *accumulate(numbers)], dtype=torch.int32, device=device) for numbers in (num_queries, num_keys)
    )
    key_index = torch.cat(keys).to(device) if has_prefix else None
    return SegmentBounds(query_bounds, key_bounds, key_index, max(num_queries), max(num_keys))


def _build_calls(
    groups: Sequence[PrefixGroup],
    starts: Sequence[tuple[int, list[int]]],
    num_tokens: int,
    cost: AttentionCostModel,
    device: torch.device,
) -> AttentionCalls:
    calls: list[AttentionCall] = []
    output_index = torch.empty(num_tokens, dtype=torch.long)
    num_outputs = 0
    for segments, (_, num_queries, num_keys) in _plan_calls(groups, cost):
        queries, keys = [], []
        for g, i in segments:
            group, (prefix_start, suffix_starts) = groups[g], starts[g]
            if i < 0:
                start, length = prefix_start, group.prefix
            else:
                start, length = suffix_starts[i], group.lengths[i] - group.prefix
            # Padding repeats the segment's last token. A token of another sequence could pass on NaN, which a mask
            # does not stop.
            own = start + torch.arange(num_queries).clamp(max=length - 1)
            queries.append(own)
            keys.append(torch.cat([prefix_start + torch.arange(num_keys - num_queries), own]))
            output_index[start : start + length] = num_outputs + torch.arange(length)
            num_outputs += num_queries
        calls.append(AttentionCall(torch.stack(queries).to(device), torch.stack(keys).to(device)))
    return AttentionCalls(tuple(calls), output_index.to(device))
