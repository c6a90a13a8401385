"""The loss from hidden states, without next-token distributions [N, V] of all tokens in memory.

With a vocabulary of 150,000 the logits of a batch take more memory than the model. So head, softmax and loss run on
chunks of tokens. A single pass computes each chunk's losses and adds its gradients to the total. Nearly all of the time
goes into four matrix products, each as large as the head times the tokens: logits of student and teacher, gradients by
hidden states and head. The operations between the products run in float32 on blocks that fit in the CPU cache, so in
half precision no float32 copy of a chunk exists.

The gradient of one token's loss L, with z its logits, s = softmax(z) and d = dL / d log s:

    dL / dz_j = sum_i d_i (d log s_i / dz_j) = d_j - s_j sum_i d_i        for log s_i = z_i - log sum exp z

L depends on log s through few numbers per token: the sampled token's entry, the divergence (or the k kept entries from
which it is computed) and, if the loss has an entropy term, the entropy H with dH / dz_j = -s_j (log s_j + H). Autograd
computes the derivative by these numbers through ``compute_loss`` itself, so clips, weights and blends have one
implementation. The derivative of the divergence by all V entries is the closed form of ``differentiate_divergence``.
From dL / dz (G, one row per token) follow, with X the hidden states and W the head:

    z = X W^T + b        dL / dX = G W        dL / dW = G^T X        dL / db = sum of G's rows

A soft-cap c tanh(u / c) between head and softmax multiplies G by 1 - tanh(u / c)^2; the temperature divides G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distributions import TokenDistributions, gather_log_probs
from sdpo.algorithm.loss import LossOutputs, compute_loss
from sdpo.algorithm.sums import Sums, add_sums
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.chunked_log_probs import ChunkedLogProbs, LinearHead, choose_chunk_size, cut_slice
from sdpo.kernels.comparison import Comparison, compare
from sdpo.kernels.divergence_grad import compute_entropy
from sdpo.kernels.head_grad import HeadGradAccumulator, blocked_matmul
from sdpo.kernels.precomputed_grad import attach_gradients, differentiate

# In half precision the head's gradient takes a float32 buffer, so the teacher's buffer holds 1 / 4 of a chunk's rows.
HALF_PRECISION_TEACHER_DIVISOR = 4


@dataclass(frozen=True)
class FusedOutputs(LossOutputs):
    """The loss to differentiate; all other tensors are detached."""

    student_log_probs: Float[Tensor, "N"]  # of the sampled tokens
    student_entropies: Float[Tensor, "N"]  # in nats
    teacher_log_probs: Float[Tensor, "M"]


def fused_linear_sdpo_loss(
    student: LinearHead,
    teacher: Sequence[LinearHead],
    batch: TokenBatch,
    config: SelfDistillationConfig,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> FusedOutputs:
    """Compute from hidden states what ``read_distributions`` and ``compute_loss`` compute from distributions.

    Args:
        student: N tokens; its hidden states, weight and bias get gradients if they require them.
        teacher: M tokens each, the distilled tokens' rows in order; several models' logits are added (trust region).
            Empty if no token is distilled. Never receives a gradient, not even for a head shared with the student.
        batch: the N tokens, with ``sampled_ids``.
        temperature: of the sampler, > 0; divides the logits of student and teacher.
        chunk_size: tokens per chunk, >= 1; by default ``choose_chunk_size``. Affects only rounding.

    Returns:
        Loss, token losses, sums. Non-finite token losses are returned unchanged, as by ``compute_loss``; the gradients
        are then invalid. Drop the sample and call again.
    """
    leaves = (student.hidden, student.weight, student.bias)
    needed = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    size = chunk_size or choose_chunk_size(len(student.weight), student.hidden.dtype, student.hidden.device)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        run = _ChunkedForwardBackward(
            student.detach(), [part.detach() for part in teacher], config, temperature, needed, size
        )
        every_row = torch.arange(len(student.hidden), device=student.hidden.device)
        for rows, teacher_rows in _split_rows(batch.distilled if teacher else None, every_row, size):
            run.add(batch.select(rows), rows, teacher_rows)
        outputs, gradients = run.finish([None if leaf is None else leaf.dtype for leaf in leaves])
    if not any(needed):
        return outputs
    return replace(outputs, loss=attach_gradients(outputs.loss, gradients, leaves))


class _ChunkedForwardBackward:
    """One pass over the tokens, chunk by chunk: losses, sums and gradients so far."""

    def __init__(
        self,
        student: LinearHead,
        teacher: Sequence[LinearHead],
        config: SelfDistillationConfig,
        temperature: float,
        needed: Sequence[bool],
        chunk_size: int,
    ) -> None:
        self.config = config
        self.temperature = temperature
        self.differentiates = any(needed)
        self.head = student
        self.student = ChunkedLogProbs([student], temperature, chunk_size)
        divisor = 1 if student.hidden.dtype == self.student.type else HALF_PRECISION_TEACHER_DIVISOR
        self.teacher_size = -(-chunk_size // (divisor * max(1, len(teacher))))
        self.teacher = ChunkedLogProbs(teacher, temperature, self.teacher_size) if teacher else None
        self.sums: Sums = {}
        self.token_losses = student.hidden.new_zeros(len(student.hidden), dtype=self.student.type)
        self.student_log_probs = torch.zeros_like(self.token_losses)
        self.student_entropies = torch.zeros_like(self.token_losses)
        self.teacher_log_probs = self.token_losses.new_zeros(len(teacher[0].hidden) if teacher else 0)
        self.grad_hidden = torch.zeros_like(student.hidden) if needed[0] else None
        self.grad_weight = HeadGradAccumulator(student.weight, self.student.type) if needed[1] else None
        self.grad_bias = self.token_losses.new_zeros(len(student.weight)) if needed[2] else None

    def add(self, batch: TokenBatch, rows: Tensor, teacher_rows: Tensor | None) -> None:
        """Add the tokens at ``rows``: all distilled, by ``teacher_rows``, or none."""
        grad_logits = self.student.multiply(rows)
        for part in cut_slice(len(rows), len(rows) if teacher_rows is None else self.teacher_size):
            if teacher_rows is not None:
                assert self.teacher is not None
                self.teacher.multiply(teacher_rows[part])
            for block in cut_slice(part.stop - part.start, self.student.block_size):
                shifted = slice(part.start + block.start, part.start + block.stop)
                self._add_block(
                    batch.select(shifted),
                    rows[shifted],
                    None if teacher_rows is None else teacher_rows[shifted],
                    shifted,
                    block,
                    grad_logits[shifted],
                )
        if not self.differentiates:
            return
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = blocked_matmul(grad_logits, self.head.weight, self.student.type)
        if self.grad_weight is not None:
            self.grad_weight.add(grad_logits, self.head.hidden[rows])

    def _add_block(
        self,
        batch: TokenBatch,
        rows: Tensor,
        teacher_rows: Tensor | None,
        block: slice,
        teacher_block: slice,
        grad_logits: Tensor,
    ) -> None:
        """Compute the losses of a block and overwrite its logits with dL / dz."""
        student, student_probs = self.student.normalise(block)
        teacher = teacher_probs = None
        if teacher_rows is not None:
            assert self.teacher is not None
            teacher, teacher_probs = self.teacher.normalise(teacher_block)
        tokens = _read_sampled(batch, student, student_probs, teacher, teacher_probs)
        comparison = None
        if teacher is not None and teacher_probs is not None and self.config.full_logit_distillation:
            tokens, comparison = compare(tokens, student, student_probs, teacher, teacher_probs, self.config)
        with torch.enable_grad():
            outputs = compute_loss(batch, tokens, self.config)
        assert tokens.student_entropies is not None and batch.sampled_ids is not None
        add_sums(self.sums, outputs.sums)
        self.token_losses[rows] = outputs.token_losses.detach().to(self.student.type)
        self.student_log_probs[rows] = tokens.student_log_probs.detach()
        self.student_entropies[rows] = tokens.student_entropies.detach()
        if tokens.teacher_log_probs is not None:
            self.teacher_log_probs[teacher_rows] = tokens.teacher_log_probs
        if not self.differentiates:
            return
        entropies = tokens.student_entropies if batch.has_entropy_term else None
        leaves = (tokens.student_log_probs, None if comparison is None else comparison.leaf, entropies)
        by_sampled, by_compared, by_entropy = differentiate(outputs.loss, leaves)
        assert by_sampled is not None
        by_entropies = None
        if entropies is not None and by_entropy is not None:
            by_entropies = self._differentiate_entropies(student_probs, entropies.detach(), by_entropy)
        gradient = student_probs  # overwrites them
        self._differentiate(gradient, batch.sampled_ids, comparison, by_sampled, by_compared)
        if by_entropies is not None:
            gradient.add_(by_entropies)
        if self.head.softcap is not None:
            gradient.mul_(self.student.compute_slope(block, out=student))
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(0)
        grad_logits.copy_(gradient)

    def finish(self, dtypes: Sequence[torch.dtype | None]) -> tuple[FusedOutputs, list[Tensor | None]]:
        """Outputs, and the needed gradients by hidden states, weight and bias in these types."""
        del self.student, self.teacher  # their memory is needed for the gradients in half precision
        loss = self.token_losses.sum()
        outputs = FusedOutputs(
            loss, self.token_losses, self.sums, self.student_log_probs, self.student_entropies, self.teacher_log_probs
        )
        grad_weight = None
        if self.grad_weight is not None and dtypes[1] is not None:
            grad_weight = self.grad_weight.finish(dtypes[1])
        grad_hidden, grad_bias = (
            None if gradient is None or dtype is None else gradient.to(dtype)
            for gradient, dtype in ((self.grad_hidden, dtypes[0]), (self.grad_bias, dtypes[2]))
        )
        return outputs, [grad_hidden, grad_weight, grad_bias]

    def _differentiate_entropies(self, student: Tensor, entropies: Tensor, by_entropy: Tensor) -> Tensor:
        """dL / dH dH / dz, [n, V], with ``student`` its probabilities."""
        gradient = torch.xlogy(student, student).addcmul_(student, entropies[:, None])
        return gradient.mul_(-by_entropy[:, None] / self.temperature)

    def _differentiate(
        self,
        student: Tensor,
        sampled_ids: Tensor,
        comparison: Comparison | None,
        by_sampled: Tensor,
        by_compared: Tensor | None,
    ) -> None:
        """Overwrite the student's probabilities s with dL / dz = (d - s sum(d)) / temperature, [n, V].

        d is the divergence's derivative times dL / d divergence, or dL / d log s at the kept entries; dL / d log s of
        the sampled token is added to either.
        """
        by_sampled = by_sampled[:, None] / self.temperature
        if comparison is None or by_compared is None:
            student.mul_(-by_sampled)
        elif comparison.derivative is not None:
            by_divergence = by_compared[:, None] / self.temperature
            total = by_sampled + by_divergence * comparison.derivative.sum(-1, keepdim=True)
            student.mul_(-total).addcmul_(comparison.derivative, by_divergence)
        else:
            assert comparison.topk_ids is not None
            by_kept = by_compared / self.temperature
            total = by_sampled + by_kept.sum(-1, keepdim=True)
            student.mul_(-total).scatter_add_(-1, comparison.topk_ids, by_kept)
        student.scatter_add_(-1, sampled_ids[:, None], by_sampled)


def _split_rows(distilled: Tensor | None, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Chunks of distilled rows with their teacher rows, then chunks of the other rows."""
    if distilled is not None:
        taught = rows[distilled]
        for part in cut_slice(len(taught), size):
            yield taught[part], rows[part]
        rows = rows[~distilled]
    for part in cut_slice(len(rows), size):
        yield rows[part], None


def _read_sampled(
    batch: TokenBatch, student: Tensor, student_probs: Tensor, teacher: Tensor | None, teacher_probs: Tensor | None
) -> TokenDistributions:
    """Sampled tokens' log-probabilities and all entropies, of tokens that are all distilled or none.

    The student's are leaves: the log-probabilities and, if the loss has an entropy term, the entropies.
    """
    assert batch.sampled_ids is not None
    entropies = compute_entropy(student, student_probs).requires_grad_(batch.has_entropy_term)
    tokens = TokenDistributions(gather_log_probs(student, batch.sampled_ids).requires_grad_(), entropies)
    if teacher is None:
        return tokens
    return replace(
        tokens,
        teacher_log_probs=gather_log_probs(teacher, batch.sampled_ids),
        teacher_entropies=compute_entropy(teacher, teacher_probs),
    )
