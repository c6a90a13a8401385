"""The loss from hidden states, without next-token distributions [N, V] of all tokens in memory.

With a vocabulary of 150,000 the logits of a batch outweigh the model. So tokens go through head, softmax and loss in
chunks; what is kept of a chunk is its losses and its share of the gradients, which are accumulated in this one pass.

The gradient of one token's loss L, with z its logits, s = softmax(z) and d = dL / d log s:

    dL / dz_j = sum_i d_i (d log s_i / dz_j) = d_j - s_j sum_i d_i        for log s_i = z_i - log sum exp z

L reads log s in few places: the sampled token's entry, and the divergence (or the k kept entries that it is made of).
The derivative by those few numbers a token is autograd's, through the very ``compute_loss`` that the engines call, so
that every clip, weight and blend is written once. The derivative of the divergence by all V entries is the closed form
of ``differentiate_divergence``. From dL / dz (G, one row a token) follow, with X the hidden states and W the head:

    z = X W^T + b        dL / dX = G W        dL / dW = G^T X        dL / db = sum of G's rows

A soft-cap c tanh(u / c) between head and softmax multiplies G by 1 - tanh(u / c)^2, the temperature divides it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdpo import metrics
from sdpo.algorithm.divergence import differentiate_divergence
from sdpo.algorithm.inputs import build_loss_inputs, gather_log_probs
from sdpo.algorithm.loss import LossInputs, LossOutputs, Sums, add_sums, compute_loss, compute_token_weights
from sdpo.config import SelfDistillationConfig

# A buffer [chunk, V] takes at most this much: 263 tokens of V = 151,936 in float32. Student's and teacher's logits have
# one each; two more are needed in half precision and where a teacher adds several models' logits up.
BUFFER_BYTES = 160_000_000
# Between the matrix products a processor works in blocks [block, V] of this much: what stays near the cache costs less
# to read again, and small temporaries need no fresh pages. An accelerator takes the whole chunk.
BLOCK_BYTES = 8_000_000


@dataclass(frozen=True)
class LazyLogits:
    """Logits [N, V] that are not computed yet: hidden states and the head that makes logits of them.

    logits = coefficient * softcap * tanh((hidden @ weight.T + bias) / softcap); without a soft-cap the head's output
    itself. The product has the type of the hidden states, everything after it float32 (float64 if they are float64).
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None  # > 0
    coefficient: float = 1.0  # with which a policy of several models adds its logits up


@dataclass(frozen=True)
class TokenInputs:
    """What the loss reads of N packed tokens beside their distributions; see ``LossInputs``."""

    sampled_ids: Tensor  # [N]
    old_log_probs: Tensor | None = None  # [N]; the student's own, if not given
    policy_weights: Tensor | None = None  # [N]
    advantages: Tensor | None = None  # [N]
    rollout_is_weights: Tensor | None = None  # [N]
    rollout_log_probs: Tensor | None = None  # [N], of which those weights are made where they are not given
    rollout_is_threshold: float = math.inf  # above which they are truncated then
    distilled: Tensor | None = None  # [N] bool, M of them set
    distillation_weights: Tensor | None = None  # [N], read at distilled tokens
    distillation_coef: float = 1.0

    def select(self, rows: Tensor | slice) -> TokenInputs:
        """Those of some rows."""
        chosen: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **chosen)


@dataclass(frozen=True)
class FusedOutputs(LossOutputs):
    """The loss to differentiate; ``token_losses`` and what follows are without a graph here."""

    student_log_probs: Tensor  # [N] of the sampled tokens
    teacher_log_probs: Tensor  # [M]


def choose_chunk_size(vocab_size: int, dtype: torch.dtype) -> int:
    """Tokens a chunk, at least 1, so that a buffer of the softmax's type stays below ``BUFFER_BYTES``."""
    return max(1, BUFFER_BYTES // (vocab_size * _softmax_type(dtype).itemsize))


def compute_fused_loss(
    student: LazyLogits,
    teacher: Sequence[LazyLogits],
    tokens: TokenInputs,
    config: SelfDistillationConfig,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> FusedOutputs:
    """``compute_loss`` of ``build_loss_inputs``, and the entropies' metrics, from hidden states.

    Args:
        student: [N, H]; gradients reach its hidden states, weight and bias, whichever require them.
        teacher: [M, H] each, the distilled tokens' rows in order; several add their logits up (trust region). Empty
            where nothing is distilled. Never receives a gradient, also where it shares its head with the student.
        tokens: N of them.
        temperature: of the sampler, > 0; both sides' logits are divided by it.
        chunk_size: tokens at a time, >= 1; by default ``choose_chunk_size``. Changes nothing but rounding.

    Returns:
        Loss, losses by token, sums. As with ``compute_loss`` a token whose contribution is not finite stands in
        ``token_losses`` as it is, and the gradient is of no use then: drop its sample and call again.
    """
    leaves = (student.hidden, student.weight, student.bias)
    needed = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    size = chunk_size or choose_chunk_size(len(student.weight), student.hidden.dtype)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        run = _Pass(_prepare(student), [_prepare(part) for part in teacher], config, temperature, needed)
        every_row = torch.arange(len(student.hidden), device=student.hidden.device)
        for rows, teacher_rows in _cut(tokens.distilled if teacher else None, every_row, size):
            run.add(tokens.select(rows), rows, teacher_rows)
        outputs, gradients = run.finish()
    if not any(needed):
        return outputs
    casted = [
        None if g is None or leaf is None else g.to(leaf.dtype) for g, leaf in zip(gradients, leaves, strict=True)
    ]
    attached: Tensor = _KnownGradients.apply(outputs.loss, casted, *leaves)  # type: ignore[no-untyped-call]
    return replace(outputs, loss=attached)


def compute_token_log_probs(
    student: LazyLogits, sampled_ids: Tensor, *, temperature: float = 1.0, chunk_size: int | None = None
) -> Tensor:
    """Log-probabilities [N] of the sampled tokens [N], without a graph; float32 (float64 if the hidden states are it).

    Args:
        student: [N, H].
        temperature: of the sampler, > 0.
        chunk_size: tokens at a time, >= 1; by default ``choose_chunk_size``.
    """
    size = chunk_size or choose_chunk_size(len(student.weight), student.hidden.dtype)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        policy = [_prepare(student)]
        buffers = _Buffers(policy[0])
        result = student.hidden.new_empty(len(sampled_ids), dtype=buffers.type)
        for rows in torch.arange(len(sampled_ids), device=sampled_ids.device).split(size):
            logits = buffers.compute_logits("student", policy, rows, temperature)
            result[rows] = gather_log_probs(logits, sampled_ids[rows]) - logits.logsumexp(-1)
    return result


def fused_self_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    sampled_ids: Tensor,
    loss_mask: Tensor,
    self_distillation_config: SelfDistillationConfig,
    *,
    old_log_probs: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    self_distillation_mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``compute_self_distillation_loss`` from hidden states, averaged over the counted tokens (``token-mean``).

    Its memory does not grow with N times V; loss and gradients are the same, computed in one pass.

    Args:
        student_hidden: [N, H], what the student's head reads at the positions that predict the sampled tokens.
        student_head: [V, H], the head's weight. Gradients reach both, and ``student_bias``.
        teacher_hidden: [N, H'], the teacher's for the same tokens; read at distilled tokens.
        teacher_head: [V, H'], be it the student's very tensor; the teacher never receives a gradient.
        sampled_ids: [N], the tokens that were sampled.
        loss_mask: [N], 1 at tokens that count. What stands at others never matters.
        self_distillation_config: which divergence, which level, which clips.
        old_log_probs: [N], needed unless ``is_clip`` is None.
        rollout_is_weights: [N], truncated importance weights old policy / sampler.
        advantages: [N]. If given, the loss is grpo_coef * GRPO + (1 - grpo_coef) * distillation; if not, it is the
            distillation part alone, whatever ``grpo_coef``.
        self_distillation_mask: [N], 1 at tokens that are distilled; by default all that count.
        temperature: of the sampler, > 0; both sides' logits are divided by it.
        softcap: logits -> softcap * tanh(logits / softcap) on both sides, > 0.
        student_bias, teacher_bias: [V], the heads' biases.
        chunk_size: tokens at a time, >= 1; by default as many as keep a buffer [chunk, V] below ``BUFFER_BYTES``.

    Returns:
        The scalar loss and its metrics, those of distilled tokens only if there are any. No counted token at all gives
        a loss of exactly 0 with a zero gradient.

    Raises:
        ValueError: ``old_log_probs`` is missing where the settings need it.

    A token with a number that is not finite is left out as if it were not there, and counted in
    ``self_distillation/nonfinite_samples``: here every token is a sample of its own.
    """
    config = self_distillation_config
    if advantages is None:
        config = replace(config, grpo_coef=0.0)
    if config.is_clip is not None and old_log_probs is None:
        raise ValueError("old_log_probs is needed by these settings (is_clip)")
    counted = loss_mask.bool()
    distilled = counted if self_distillation_mask is None else counted & self_distillation_mask.bool()
    if advantages is None:
        counted = distilled
    num_counted = int(counted.sum())
    for given in (old_log_probs, rollout_is_weights, advantages):
        if given is not None:
            counted = counted & torch.isfinite(given)
    while True:
        distilled = distilled & counted
        outputs = compute_fused_loss(
            LazyLogits(student_hidden[counted], student_head, student_bias, softcap),
            [LazyLogits(teacher_hidden[distilled], teacher_head, teacher_bias, softcap)],
            TokenInputs(
                sampled_ids=sampled_ids[counted],
                old_log_probs=None if old_log_probs is None else old_log_probs[counted].detach(),
                policy_weights=_average(counted, student_hidden)[counted],
                advantages=None if advantages is None else advantages[counted],
                rollout_is_weights=None if rollout_is_weights is None else rollout_is_weights[counted].detach(),
                distilled=distilled[counted],
                distillation_weights=_average(distilled, student_hidden)[counted],
            ),
            config,
            temperature=temperature,
            chunk_size=chunk_size,
        )
        finite = torch.isfinite(outputs.token_losses)
        finite[distilled[counted]] &= torch.isfinite(outputs.teacher_log_probs)
        if bool(finite.all()):
            break
        counted = counted.masked_scatter(counted, finite)
    values = {name: float(total / count.clamp(min=1)) for name, (total, count) in outputs.sums.items()}
    num_dropped = num_counted - int(counted.sum())
    return outputs.loss, values | {metrics.NONFINITE_SAMPLES: float(num_dropped)}


def _average(mask: Tensor, like: Tensor) -> Tensor:
    """What a token counts in the mean over the tokens of a mask, [N]."""
    count = mask.sum()[None].to(_softmax_type(like.dtype))
    return compute_token_weights(count, "token-mean").expand(len(mask))


class _KnownGradients(torch.autograd.Function):
    """A number whose gradients are known; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *leaves: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if known is None else known * scale for known in ctx.saved_tensors)


class _Buffers:
    """Buffers [chunk, V] by name, and logits in them."""

    def __init__(self, head: LazyLogits) -> None:
        self.weight = head.weight
        self.type = _softmax_type(head.hidden.dtype)
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, num_rows: int, dtype: torch.dtype) -> Tensor:
        # The first chunk is the largest but for that of undistilled tokens after a few distilled ones.
        if name not in self.buffers or len(self.buffers[name]) < num_rows:
            self.buffers[name] = self.weight.new_empty(num_rows, len(self.weight), dtype=dtype)
        return self.buffers[name][:num_rows]

    def compute_logits(self, name: str, policy: Sequence[LazyLogits], rows: Tensor, temperature: float) -> Tensor:
        """[n, V] logits of a policy over the temperature, in the buffer of that name."""
        logits = self.get(name, len(rows), self.type)
        for i, part in enumerate(policy):
            more = logits if i == 0 else self.get("more", len(rows), self.type)
            self._apply_head(part, rows, more)
            if part.softcap is not None:
                more.div_(part.softcap).tanh_().mul_(part.softcap)
            if part.coefficient != temperature:
                more.mul_(part.coefficient / temperature)
            if i > 0:
                logits.add_(more)
        return logits

    def _apply_head(self, part: LazyLogits, rows: Tensor, out: Tensor) -> None:
        hidden = part.hidden[rows]
        if hidden.dtype == out.dtype:
            torch.mm(hidden, part.weight.T, out=out)
        else:
            product = self.get("product", len(rows), hidden.dtype)
            out.copy_(torch.mm(hidden, part.weight.T, out=product))
        if part.bias is not None:
            out.add_(part.bias)


class _Pass:
    """One pass over the tokens, chunk by chunk: losses, sums and gradients so far."""

    def __init__(
        self,
        student: LazyLogits,
        teacher: Sequence[LazyLogits],
        config: SelfDistillationConfig,
        temperature: float,
        needed: Sequence[bool],
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.config = config
        self.temperature = temperature
        self.differentiates = any(needed)
        self.type = _softmax_type(student.hidden.dtype)
        self.block_size = max(1, BLOCK_BYTES // (len(student.weight) * self.type.itemsize))
        if student.hidden.device.type != "cpu":
            self.block_size = len(student.hidden)
        self.buffers = _Buffers(student)
        self.sums: Sums = {}
        num_tokens = len(student.hidden)
        num_taught = len(teacher[0].hidden) if teacher else 0
        self.token_losses = student.hidden.new_zeros(num_tokens, dtype=self.type)
        self.student_log_probs = torch.zeros_like(self.token_losses)
        self.teacher_log_probs = student.hidden.new_zeros(num_taught, dtype=self.type)
        # Sums over many chunks: in half precision the later ones would be lost.
        self.by_hidden = torch.zeros_like(student.hidden) if needed[0] else None
        self.by_weight = torch.zeros_like(student.weight, dtype=self.type) if needed[1] else None
        self.by_bias = student.weight.new_zeros(len(student.weight), dtype=self.type) if needed[2] else None

    def add(self, tokens: TokenInputs, rows: Tensor, teacher_rows: Tensor | None) -> None:
        """The tokens at ``rows``; either all are distilled, by the teacher's rows, or none is."""
        student = self.buffers.compute_logits("student", [self.student], rows, self.temperature)
        teacher = None
        if teacher_rows is not None:
            teacher = self.buffers.compute_logits("teacher", self.teacher, teacher_rows, self.temperature)
        for block in torch.arange(len(rows), device=rows.device).split(self.block_size):
            part = slice(int(block[0]), int(block[-1]) + 1)
            self._add_block(
                tokens.select(part),
                student[part],
                None if teacher is None else teacher[part],
                rows[part],
                None if teacher_rows is None else teacher_rows[part],
            )
        if self.differentiates:
            self._accumulate(student, rows)

    def _add_block(
        self,
        tokens: TokenInputs,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        rows: Tensor,
        teacher_rows: Tensor | None,
    ) -> None:
        """Losses of a few tokens; dL / dz takes the place of the student's logits."""
        student = student_logits.log_softmax(-1)
        teacher = None if teacher_logits is None else teacher_logits.log_softmax(-1)
        inputs, sums = build_loss_inputs(student, config=self.config, teacher=teacher, **vars(tokens))
        inputs, compared, derivative = self._find_leaves(inputs)
        with torch.enable_grad():
            outputs = compute_loss(inputs, self.config)
        add_sums(self.sums, sums | outputs.sums)
        self.token_losses[rows] = outputs.token_losses.detach().to(self.type)
        self.student_log_probs[rows] = inputs.student_log_probs.detach()
        if inputs.teacher_log_probs is not None:
            self.teacher_log_probs[teacher_rows] = inputs.teacher_log_probs
        if not self.differentiates:
            return
        slope = None
        if self.student.softcap is not None:
            slope = 1.0 - (student_logits * (self.temperature / self.student.softcap)).square()
        torch.exp(student, out=student_logits)
        self._differentiate(outputs.loss, inputs, student_logits, tokens.sampled_ids, compared, derivative)
        if self.temperature != 1.0:
            student_logits.div_(self.temperature)
        if slope is not None:
            student_logits.mul_(slope)

    def finish(self) -> tuple[FusedOutputs, list[Tensor | None]]:
        loss = self.token_losses.sum()
        outputs = FusedOutputs(loss, self.token_losses, self.sums, self.student_log_probs, self.teacher_log_probs)
        return outputs, [self.by_hidden, self.by_weight, self.by_bias]

    def _find_leaves(self, inputs: LossInputs) -> tuple[LossInputs, Tensor | None, Tensor | None]:
        """The inputs with leaves for what the loss reads: few numbers a token.

        One is the sampled token's log-probability. The other, if whole distributions are compared: the divergence [m],
        with its derivative [m, V]; or the kept entries [m, K], without one, for they are log-probabilities themselves.
        """
        inputs = replace(inputs, student_log_probs=inputs.student_log_probs.requires_grad_())
        student, teacher = inputs.student_distribution, inputs.teacher_distribution
        if student is None or teacher is None or not self.config.full_logit_distillation:
            return inputs, None, None
        if self.config.distillation_topk is not None:
            return inputs, student.requires_grad_(), None
        value, derivative = differentiate_divergence(student, teacher, self.config.alpha)
        return replace(inputs, divergence=value), value.requires_grad_(), derivative

    def _differentiate(
        self,
        loss: Tensor,
        inputs: LossInputs,
        student: Tensor,
        sampled_ids: Tensor,
        compared: Tensor | None,
        derivative: Tensor | None,
    ) -> None:
        """dL / dz = d - s sum(d), [n, V], in the place of the student's probabilities s.

        d is the divergence's derivative times dL / d divergence, or dL / d log s at the kept entries, and on top of
        either dL / d log s of the sampled token.
        """
        leaves = [leaf for leaf in (inputs.student_log_probs, compared) if leaf is not None]
        by_leaf = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        by_sampled = by_leaf[0][:, None]
        if compared is None:
            student.mul_(-by_sampled)
        elif derivative is not None:
            by_divergence = by_leaf[1][:, None]
            total = by_sampled + by_divergence * derivative.sum(-1, keepdim=True)
            student.mul_(-total).addcmul_(derivative, by_divergence)
        else:
            assert inputs.kept_ids is not None
            total = by_sampled + by_leaf[1].sum(-1, keepdim=True)
            student.mul_(-total).scatter_add_(-1, inputs.kept_ids, by_leaf[1])
        student.scatter_add_(-1, sampled_ids[:, None], by_sampled)

    def _accumulate(self, by_logits: Tensor, rows: Tensor) -> None:
        if self.by_bias is not None:
            self.by_bias += by_logits.sum(0)
        hidden = self.student.hidden[rows]
        if hidden.dtype != by_logits.dtype:
            by_logits = self.buffers.get("product", len(rows), hidden.dtype).copy_(by_logits)
        if self.by_hidden is not None:
            self.by_hidden[rows] = by_logits @ self.student.weight
        if self.by_weight is not None and self.by_weight.dtype == hidden.dtype:
            self.by_weight.addmm_(by_logits.T, hidden)
        elif self.by_weight is not None:
            self.by_weight += by_logits.T @ hidden


def _prepare(part: LazyLogits) -> LazyLogits:
    """Without a graph, and with the head in the type of the hidden states."""
    hidden = part.hidden.detach()
    return replace(part, hidden=hidden, weight=part.weight.detach().to(hidden.dtype))


def _cut(distilled: Tensor | None, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Chunks of rows with the teacher's rows for them, then chunks of those that have none."""
    if distilled is not None:
        taught = rows[distilled]
        for chunk, teacher_rows in zip(taught.split(size), rows[: len(taught)].split(size), strict=True):
            if len(chunk):  # nothing at all is split into one chunk of nothing
                yield chunk, teacher_rows
        rows = rows[~distilled]
    for chunk in rows.split(size):
        if len(chunk):
            yield chunk, None


def _softmax_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
