"""Log-probabilities from hidden states, without logits [N, V] of all tokens in memory.

The head runs on chunks of tokens. The softmax runs in float32 on blocks of a chunk that fit in the CPU cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdpo.algorithm.distributions import gather_log_probs
from sdpo.kernels.cpu.onednn import find_round_length, multiply_into
from sdpo.kernels.divergence_grad import compute_entropy, exponentiate

# Size limit of a chunk's logits, for student and teacher each. Larger chunks read and write the head's gradient less
# often and make faster matrix products.
BUFFER_BYTES = 156_000_000
# Size of a softmax block [block, V] on a CPU; five blocks should fit in the L2 or L3 cache.
BLOCK_BYTES = 2_500_000
# An accelerator needs larger chunks and blocks for full utilization.
ACCELERATOR_BUFFER_BYTES = 280_000_000
ACCELERATOR_BLOCK_BYTES = 60_000_000


@dataclass(frozen=True)
class LinearHead:
    """Logits before they are computed: hidden states and head.

    logits = coefficient * softcap * tanh((hidden @ weight.T + bias) / softcap); without a soft-cap, coefficient
    times the head's output. The product has the hidden states' type, all later operations ``softmax_type``.
    """

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, "V"] | None = None
    softcap: float | None = None  # > 0
    coefficient: float = 1.0  # of this model in a policy that adds the logits of several models

    def detach(self) -> LinearHead:
        """Detached, with the head's weight cast to the hidden states' type."""
        hidden = self.hidden.detach()
        return replace(self, hidden=hidden, weight=self.weight.detach().to(hidden.dtype))


def choose_chunk_size(vocab_size: int, dtype: torch.dtype, device: torch.device | None = None) -> int:
    """Tokens per chunk, at least 1, for hidden states of this type.

    The logits take at most ``BUFFER_BYTES``; on CUDA ``ACCELERATOR_BUFFER_BYTES`` or 1 / 8 of the free memory.
    """
    num_bytes = BUFFER_BYTES
    if device is not None and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        num_bytes = min(ACCELERATOR_BUFFER_BYTES, (torch.cuda.mem_get_info(device)[0] + cached) // 8)
    return max(1, num_bytes // (vocab_size * dtype.itemsize))


class ChunkedLogProbs:
    """A policy's log-probabilities in two steps: the head on a chunk, then the softmax on its blocks."""

    def __init__(self, parts: Sequence[LinearHead], temperature: float, chunk_size: int) -> None:
        self.parts = parts
        self.temperature = temperature
        hidden, (vocab_size, _) = parts[0].hidden, parts[0].weight.shape
        self.type = softmax_type(hidden.dtype)
        block_bytes = BLOCK_BYTES if hidden.device.type == "cpu" else ACCELERATOR_BLOCK_BYTES
        self.block_size = max(1, block_bytes // (vocab_size * self.type.itemsize))
        rows = min(chunk_size, max(1, max(len(part.hidden) for part in parts)))
        self.products = [part.hidden.new_empty(rows, vocab_size) for part in parts]
        self.block_size = min(self.block_size, rows)
        self.log_probs = hidden.new_empty(self.block_size, vocab_size, dtype=self.type)
        self.probs = torch.empty_like(self.log_probs)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply hidden states by the head at these rows, [n, V]; returns the last model's product."""
        for part, product in zip(self.parts, self.products, strict=True):
            multiply_into(product[: len(rows)], part.hidden[rows], part.weight)
        return self.products[-1][: len(rows)]

    def normalise(self, block: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities and probabilities of a block of the chunk, [b, V]; valid until the next call."""
        log_probs, probs = self.log_probs[: block.stop - block.start], self.probs[: block.stop - block.start]
        for i, (part, product) in enumerate(zip(self.parts, self.products, strict=True)):
            logits = log_probs if i == 0 else probs
            logits.copy_(product[block])
            if part.bias is not None:
                logits.add_(part.bias)
            if part.softcap is not None:
                logits.div_(part.softcap).tanh_().mul_(part.softcap)
            if part.coefficient != self.temperature:
                logits.mul_(part.coefficient / self.temperature)
            if i > 0:
                log_probs.add_(logits)
        # Computing softmax and log-softmax together takes fewer passes over memory.
        exponentiate(log_probs.sub_(log_probs.amax(-1, keepdim=True)), out=probs)
        total = probs.sum(-1, keepdim=True)
        return log_probs.sub_(total.log()), probs.div_(total)

    def compute_slope(self, block: slice, out: Tensor) -> Tensor:
        """Derivative of the soft-capped logits by the head's output, 1 - tanh^2, [b, V]."""
        (part,), (product,) = self.parts, self.products
        assert part.softcap is not None
        out.copy_(product[block])
        if part.bias is not None:
            out.add_(part.bias)
        return out.div_(part.softcap).tanh_().square_().neg_().add_(1.0)


def score_tokens(
    student: LinearHead, sampled_ids: Int[Tensor, "N"], *, temperature: float = 1.0, chunk_size: int | None = None
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Log-probabilities of the sampled tokens, and entropies of their distributions in nats.

    Detached, of type ``softmax_type``.

    Args:
        student: N tokens.
        temperature: of the sampler, > 0.
        chunk_size: tokens per chunk, >= 1; by default ``choose_chunk_size``.
    """
    size = chunk_size or choose_chunk_size(len(student.weight), student.hidden.dtype, student.hidden.device)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        policy = ChunkedLogProbs([student.detach()], temperature, size)
        scores = student.hidden.new_empty(2, len(sampled_ids), dtype=policy.type)
        every_row = torch.arange(len(sampled_ids), device=sampled_ids.device)
        for chunk in cut_slice(len(sampled_ids), size):
            rows = every_row[chunk]
            policy.multiply(rows)
            for block in cut_slice(len(rows), policy.block_size):
                log_probs, probs = policy.normalise(block)
                scores[0, rows[block]] = gather_log_probs(log_probs, sampled_ids[rows[block]])
                scores[1, rows[block]] = compute_entropy(log_probs, probs)
    return scores[0], scores[1]


def cut_slice(length: int, size: int) -> Iterator[slice]:
    """Slices of nearly equal, round length (``find_round_length``), at most ``size``, and a few short ones at the end.

    The lengths are nearly equal because a short slice costs almost as much as a long one.
    """
    start = 0
    while start < length:
        left = length - start
        number = -(-left // size)
        round_length = find_round_length(left // number)
        for _ in range(number):
            yield slice(start, start + round_length)
            start += round_length


def softmax_type(dtype: torch.dtype) -> torch.dtype:
    """Type of softmax and loss: float64 for float64 hidden states, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
