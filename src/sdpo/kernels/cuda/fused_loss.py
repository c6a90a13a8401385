"""``fused_linear_sdpo_loss`` and ``score_tokens`` for CUDA: same signatures, same results up to rounding.

Chunks of 1,000 to 4,000 tokens go through eight steps without synchronizing with the GPU:

    1, 2  products of hidden states and head, of student and teacher, into two buffers
    3     a kernel reads both: log-sum-exps, sampled token, entropies, divergence         (``row_statistics``)
    4     top-k only: find the kept entries                                               (``top_k``)
    5     token losses and their derivatives by the numbers from step 3, by autograd through ``compute_token_losses``,
          so clips, weights and blends have one implementation
    6     a kernel reads both again and overwrites the student's with dL / d products     (``logits_gradient``)
    7, 8  products of dL / d products with head and hidden states: the gradients

Steps 2 to 6 run on each half of the chunk in turn, which halves the teacher's buffer. Distilled tokens come first, then
the other tokens, which skip step 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distributions import TokenDistributions
from sdpo.algorithm.loss import compute_token_losses
from sdpo.algorithm.sums import TokenValues, reduce_values
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.comparison import compare_topk
from sdpo.kernels.cuda.chunks import (
    Buffer,
    MixedBuffer,
    Rows,
    choose_chunk_size,
    cut_evenly,
    detach_all,
    select_rows,
)
from sdpo.kernels.cuda.logits import LOG2_E, Logits
from sdpo.kernels.cuda.logits_gradient import write_logits_gradient
from sdpo.kernels.cuda.row_statistics import RowStatistics, compute_row_statistics
from sdpo.kernels.cuda.scaling import scale
from sdpo.kernels.cuda.top_k import select_top_ids
from sdpo.kernels.cuda.weight_gradient import WeightGradient
from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.kernels.precomputed_grad import attach_gradients, differentiate

# Rows of the teacher's buffer as a fraction of the chunk's. A smaller buffer leaves memory for larger chunks, which
# make the gradients' matrix products faster.
TEACHER_FRACTION = 0.5


@dataclass(frozen=True)
class _Kept:
    """The student's top k entries, [n, K] each."""

    ids: Tensor
    log_probs: Tensor  # read without a graph
    leaf: Tensor  # the same values, differentiated by autograd
    slope: Tensor | None  # derivative of the soft-cap


def fused_linear_sdpo_loss(
    student: LinearHead,
    teacher: Sequence[LinearHead],
    batch: TokenBatch,
    config: SelfDistillationConfig,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> FusedOutputs:
    """As in ``sdpo.kernels.fused_linear_loss``; the default ``chunk_size`` depends on the free memory."""
    leaves = (student.hidden, student.weight, student.bias)
    needed = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    with torch.no_grad(), _on_device_of(student):
        dtypes = [None if leaf is None or not need else leaf.dtype for leaf, need in zip(leaves, needed, strict=True)]
        parts = detach_all([student, *(teacher if batch.distilled is not None else ())])
        run = _ChunkedForwardBackward(parts[0], parts[1:], batch, config, temperature, dtypes, chunk_size)
        for rows, teacher_rows in run.cut():
            run.add(rows, teacher_rows)
        outputs, gradients = run.finish()
    if not any(needed):
        return outputs
    return replace(outputs, loss=attach_gradients(outputs.loss, gradients, leaves, scale))


def score_tokens(
    student: LinearHead, sampled_ids: Tensor, *, temperature: float = 1.0, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """As ``sdpo.kernels.chunked_log_probs.score_tokens``."""
    with torch.no_grad(), _on_device_of(student):
        student = student.detach()
        log_probs, entropies = torch.empty(2, len(sampled_ids), device=student.hidden.device)
        size = chunk_size or choose_chunk_size(student, buffers=1 + TEACHER_FRACTION)
        buffer = Buffer(student, min(size, len(sampled_ids)), temperature)
        for rows in cut_evenly(0, len(sampled_ids), size):
            statistics = compute_row_statistics(buffer.multiply(student, rows), None, sampled_ids[rows])
            log_probs[rows] = statistics.student_log_probs
            entropies[rows] = statistics.student_entropies
    return log_probs, entropies


@contextmanager
def _on_device_of(student: LinearHead) -> Iterator[None]:
    """Launch kernels on the student's device, with autocast disabled."""
    with torch.cuda.device_of(student.hidden), torch.autocast(student.hidden.device.type, enabled=False):
        yield


def _stack(*rows: Tensor | None) -> Tensor:
    return torch.stack([row for row in rows if row is not None])


class _ChunkedForwardBackward:
    """One pass over the tokens, chunk by chunk: losses, sums and gradients so far."""

    def __init__(
        self,
        student: LinearHead,
        teacher: Sequence[LinearHead],
        batch: TokenBatch,
        config: SelfDistillationConfig,
        temperature: float,
        gradient_types: Sequence[torch.dtype | None],
        chunk_size: int | None,
    ) -> None:
        self.student = student
        self.batch = batch
        self.config = config
        self.differentiates = any(gradient_types)
        self.num_tokens = len(student.hidden)
        self.num_distilled = len(teacher[0].hidden) if teacher else 0
        self.size = chunk_size or choose_chunk_size(student, buffers=1 + TEACHER_FRACTION if teacher else 1)
        self.order: Tensor | None = None  # distilled tokens first; None: unchanged order
        if 0 < self.num_distilled < self.num_tokens:
            assert batch.distilled is not None
            self.order = torch.argsort(batch.distilled.logical_not().to(torch.uint8), stable=True)
        rows = min(self.size, self.num_tokens)
        self.student_buffer: Buffer | None = Buffer(student, rows, temperature)
        self.teacher_buffer: MixedBuffer | None = None
        if teacher:
            size = min(self.num_distilled, math.ceil(rows * TEACHER_FRACTION))
            self.teacher_buffer = MixedBuffer(teacher, max(1, size), temperature)
        # The kernels compare whole distributions (alpha); with top-k, the loss compares the kept entries (topk).
        self.alpha = config.alpha if config.full_logit_distillation and config.distillation_topk is None else None
        self.topk = config.distillation_topk if config.full_logit_distillation else None

        # Values by token, one tensor per chunk.
        self.token_losses: list[Tensor] = []
        self.student_log_probs: list[Tensor] = []
        self.teacher_log_probs: list[Tensor] = []
        self.values: dict[str, list[Tensor]] = {}
        of_hidden, of_weight, self.bias_type = gradient_types
        self.grad_hidden = (
            torch.empty(student.hidden.shape, dtype=of_hidden, device=student.hidden.device) if of_hidden else None
        )
        self.grad_weight = WeightGradient(student.weight, of_weight) if of_weight else None
        self.grad_bias = torch.zeros(len(student.weight), device=student.hidden.device) if self.bias_type else None

    def cut(self) -> Iterator[tuple[Rows, slice | None]]:
        """Rows of each chunk, and its teacher rows if its tokens are distilled."""
        for part in cut_evenly(0, self.num_distilled, self.size):
            yield part if self.order is None else self.order[part], part
        for part in cut_evenly(self.num_distilled, self.num_tokens, self.size):
            yield part if self.order is None else self.order[part], None

    def add(self, rows: Rows, teacher_rows: slice | None) -> None:
        """Add a chunk of tokens: all distilled, by ``teacher_rows``, or none."""
        assert self.student_buffer is not None
        student = self.student_buffer.multiply(self.student, rows)
        if teacher_rows is None:
            self._add_part(student, None, self.batch.select(rows))
        else:
            assert self.teacher_buffer is not None
            for part in cut_evenly(0, len(student.products), self.teacher_buffer.rows):
                teacher = self.teacher_buffer.multiply(select_rows(teacher_rows, part))
                self._add_part(student.select(part), teacher, self.batch.select(select_rows(rows, part)))
        if self.differentiates:
            self._multiply(rows, student.products)

    def _add_part(self, student: Logits, teacher: Logits | None, batch: TokenBatch) -> None:
        """Compute the losses of these rows and overwrite the student's products with dL / d products."""
        sampled_ids = batch.sampled_ids
        assert sampled_ids is not None
        alpha = self.alpha if teacher is not None else None
        topk = self.topk if teacher is not None else None
        statistics = compute_row_statistics(student, teacher, sampled_ids, alpha=alpha, group_maxima=topk is not None)
        tokens, kept = self._read(student, teacher, statistics, topk)
        compared = tokens.divergence if kept is None else kept.leaf
        entropies = tokens.student_entropies if batch.has_entropy_term else None
        leaves = [
            leaf if leaf is None else leaf.requires_grad_() for leaf in (tokens.student_log_probs, compared, entropies)
        ]
        with torch.enable_grad():
            token_losses, values = compute_token_losses(batch, tokens, self.config)
        self._keep(token_losses, statistics, values, is_taught=teacher is not None)
        if not self.differentiates:
            return
        by_sampled, by_compared, by_entropy = differentiate(token_losses, leaves)
        assert by_sampled is not None
        if topk is None or by_compared is None:
            coefficients = _stack(
                by_sampled if by_compared is None else by_compared, by_sampled, by_sampled, by_entropy
            )
            write_logits_gradient(student, teacher, sampled_ids, statistics, coefficients, alpha=alpha)
        else:
            assert kept is not None
            self._write_kept(student, sampled_ids, statistics, kept, by_sampled, by_compared, by_entropy)

    def _read(
        self, student: Logits, teacher: Logits | None, statistics: RowStatistics, topk: int | None
    ) -> tuple[TokenDistributions, _Kept | None]:
        """The loss's values from each token's statistics, and the kept entries with top-k."""
        tokens = TokenDistributions(
            statistics.student_log_probs.detach(), student_entropies=statistics.student_entropies.detach()
        )
        if teacher is None:
            return tokens, None
        tokens = replace(
            tokens, teacher_log_probs=statistics.teacher_log_probs, teacher_entropies=statistics.teacher_entropies
        )
        if topk is None:
            divergence = statistics.divergences.detach() if self.alpha is not None else None
            entropies: Tensor | None = statistics.teacher_entropies
            return replace(tokens, divergence=divergence, compared_teacher_entropies=entropies), None
        assert statistics.group_maxima is not None
        ids = select_top_ids(student, statistics.group_maxima, topk)
        logits, slope = student.gather(ids)
        teacher_logits, _ = teacher.gather(ids)
        log_probs = logits - statistics.student_log_sum_exp_2[:, None] / LOG2_E
        of_teacher = teacher_logits - statistics.teacher_log_sum_exp_2[:, None] / LOG2_E
        kept = _Kept(ids, log_probs, log_probs.detach().requires_grad_(), slope)
        divergence, entropies = compare_topk(kept.leaf, of_teacher, self.config)
        return replace(tokens, divergence=divergence, compared_teacher_entropies=entropies), kept

    def _write_kept(
        self,
        student: Logits,
        sampled_ids: Tensor,
        statistics: RowStatistics,
        kept: _Kept,
        by_sampled: Tensor,
        by_kept: Tensor,
        by_entropy: Tensor | None,
    ) -> None:
        """Write dL / d products of the whole vocabulary by kernel, then overwrite the kept entries from float32."""
        total = by_sampled + by_kept.sum(-1)
        coefficients = _stack(total, total, by_sampled, by_entropy)
        write_logits_gradient(student, None, sampled_ids, statistics, coefficients)
        probs = kept.log_probs.exp()
        gradient = by_kept - probs * total[:, None]
        gradient = gradient + torch.where(kept.ids == sampled_ids[:, None], by_sampled[:, None], 0.0)
        if by_entropy is not None:
            above = kept.log_probs + statistics.student_entropies[:, None]
            gradient = gradient - by_entropy[:, None] * torch.where(probs == 0.0, 0.0, probs * above)
        gradient = gradient * student.scale
        if kept.slope is not None:
            gradient = gradient * kept.slope
        student.products.scatter_(-1, kept.ids, gradient.to(student.products.dtype))

    def _keep(self, token_losses: Tensor, statistics: RowStatistics, values: TokenValues, *, is_taught: bool) -> None:
        self.token_losses.append(token_losses.detach())
        self.student_log_probs.append(statistics.student_log_probs)
        if is_taught:
            self.teacher_log_probs.append(statistics.teacher_log_probs)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def _multiply(self, rows: Rows, grad_logits: Tensor) -> None:
        if self.grad_hidden is not None:
            if isinstance(rows, slice):
                torch.mm(grad_logits, self.student.weight, out=self.grad_hidden[rows])
            else:
                self.grad_hidden[rows] = grad_logits @ self.student.weight
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=torch.float32)
        if self.grad_weight is not None:
            self.grad_weight.add(grad_logits, self.student.hidden[rows])

    def finish(self) -> tuple[FusedOutputs, list[Tensor | None]]:
        """Outputs, and the needed gradients by hidden states, weight and bias."""
        self.student_buffer = self.teacher_buffer = None
        token_losses = self._join(self.token_losses)
        values = {name: torch.cat(chunks) for name, chunks in self.values.items()}
        outputs = FusedOutputs(
            token_losses.sum(),
            token_losses,
            reduce_values(values),
            self._join(self.student_log_probs),
            self._join(self.values.get("entropy", [])),
            torch.cat([token_losses[:0], *self.teacher_log_probs]),
        )
        grad_weight = None if self.grad_weight is None else self.grad_weight.finish()
        grad_bias = None if self.grad_bias is None else self.grad_bias.to(self.bias_type)
        return outputs, [self.grad_hidden, grad_weight, grad_bias]

    def _join(self, chunks: Sequence[Tensor]) -> Tensor:
        """Concatenate the chunks' values [N] in the tokens' original order."""
        values = torch.cat([torch.empty(0, device=self.student.hidden.device), *chunks])
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(0, self.order, values)
