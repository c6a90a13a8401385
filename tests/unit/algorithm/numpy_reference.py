"""Independent reference of the SDPO loss: the formulas in float64, one token at a time, without torch and sdpo.

Gradients are complex-step derivatives: every function takes complex numbers, and the imaginary part of f(x + ih) over h
is the derivative of f to the last digit. Where the loss stops the gradient, the reference uses the real part.

Run as a script, this file rewrites the golden file ``tests/golden/self_distillation_loss.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STEP = 1e-30
GOLDEN_FILE = Path(__file__).parents[2] / "golden" / "self_distillation_loss.json"


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.real.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl(p: Array, q: Array) -> Any:
    """Sum of p log(p / q); 0 log(0 / q) = 0, and p log(p / 0) = inf."""
    total: Any = 0.0
    for p_log, q_log in zip(p, q, strict=True):
        if np.real(p_log) == -np.inf:
            continue
        total = total + (np.inf if np.real(q_log) == -np.inf else np.exp(p_log) * (p_log - q_log))
    return total


def divergence(student: Array, teacher: Array, alpha: float) -> Any:
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    mixture = np.log((1 - alpha) * np.exp(student) + alpha * np.exp(teacher))
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)


def append_tail(topk: Array) -> Array:
    total = np.exp(topk).sum()
    log_total = np.log(total)
    if log_total.real > -1e-7:
        log_total = np.full_like(log_total, -1e-7)
    return np.append(topk, np.log(-np.expm1(log_total)))


def renormalize(topk: Array) -> Array:
    return topk - np.log(np.exp(topk).sum())


def entropy(log_probs: Array) -> Any:
    return -sum(np.exp(x) * x for x in log_probs if x != -np.inf)


def token_loss(
    student: Array, teacher: Array, token: int, old_log_prob: float, rollout_weight: float, settings: Mapping[str, Any]
) -> Any:
    """Loss of one distilled token from the log-probabilities [V] of student and teacher."""
    if not settings.get("full_logit_distillation", True):
        log_ratio = student[token].real - teacher[token]
        value, size = log_ratio * student[token], abs(log_ratio)
    else:
        topk = settings.get("distillation_topk")
        if topk is not None:
            ids = np.argsort(-student.real, kind="stable")[:topk]
            complete = append_tail if settings.get("distillation_add_tail", True) else renormalize
            pair = complete(student[ids]), complete(teacher[ids])
        else:
            pair = student, teacher
        value = divergence(*pair, settings.get("alpha", 0.0))
        size = value.real
        value = value * math.exp(-settings.get("teacher_entropy_beta", 0.0) * entropy(pair[1]))
    limit = settings.get("divergence_clip")
    if limit is not None and size > limit:
        value = value * (limit / size)
    is_clip = settings.get("is_clip", 2.0)
    if is_clip is not None:
        exponent = max(-20.0, min(20.0, student[token].real - old_log_prob))
        value = value * min(math.exp(exponent), is_clip)
    return value * rollout_weight


def aggregate(token_losses: list[list[Any]], mode: str, horizon: int) -> Any:
    """Aggregate the token losses of each sample; ignore samples without tokens."""
    samples = [losses for losses in token_losses if losses]
    if not samples:
        return 0.0
    if mode == "token-mean":
        return sum(sum(losses) for losses in samples) / sum(len(losses) for losses in samples)
    if mode == "seq-mean-token-sum":
        return sum(sum(losses) for losses in samples) / len(samples)
    if mode == "seq-mean-token-mean":
        return sum(sum(losses) / len(losses) for losses in samples) / len(samples)
    if mode == "seq-mean-token-sum-norm":
        return sum(sum(losses) for losses in samples) / len(samples) / horizon
    raise ValueError(mode)


@dataclass(frozen=True)
class Batch:
    """A padded batch: logits [B, T, V], mask of samples [B], all other arrays [B, T]."""

    student_logits: Array
    teacher_logits: Array
    tokens: Array
    old_log_probs: Array
    rollout_is_weights: Array
    response_mask: Array
    self_distillation_mask: Array

    def select(self, samples: Array) -> Batch:
        """Select samples, by index or mask."""
        return replace(self, **{name: values[samples] for name, values in vars(self).items()})


def make_batch(num_samples: int = 3, num_tokens: int = 4, vocab_size: int = 5, seed: int = 0) -> Batch:
    """Batch of responses with different lengths; of three or more samples, the last is not distilled."""
    rng = np.random.default_rng(seed)
    shape = (num_samples, num_tokens)
    student_logits = rng.normal(size=(*shape, vocab_size)) * 1.5
    tokens = rng.integers(vocab_size, size=shape)
    token_log_probs = np.apply_along_axis(log_softmax, -1, student_logits)
    token_log_probs = np.take_along_axis(token_log_probs, tokens[..., None], -1)[..., 0]
    lengths = np.array([num_tokens - i % num_tokens for i in range(num_samples)])
    sample_mask = np.ones(num_samples)
    if num_samples > 2:
        sample_mask[-1] = 0
    return Batch(
        student_logits=student_logits,
        teacher_logits=rng.normal(size=(*shape, vocab_size)) * 1.5,
        tokens=tokens,
        old_log_probs=token_log_probs + rng.normal(size=shape),
        rollout_is_weights=rng.uniform(0.2, 2.0, size=shape),
        response_mask=(np.arange(num_tokens) < lengths[:, None]).astype(float),
        self_distillation_mask=sample_mask,
    )


def loss(batch: Batch, settings: Mapping[str, Any], mode: str = "token-mean") -> Any:
    """Distillation loss of a batch."""
    token_losses: list[list[Any]] = []
    for b in range(len(batch.tokens)):
        token_losses.append([])
        for t in range(batch.tokens.shape[1]):
            if batch.response_mask[b, t] and batch.self_distillation_mask[b]:
                token_losses[-1].append(
                    token_loss(
                        log_softmax(batch.student_logits[b, t]),
                        log_softmax(batch.teacher_logits[b, t]),
                        int(batch.tokens[b, t]),
                        float(batch.old_log_probs[b, t]),
                        float(batch.rollout_is_weights[b, t]),
                        settings,
                    )
                )
    return aggregate(token_losses, mode, horizon=batch.tokens.shape[1])


def gradient(batch: Batch, settings: Mapping[str, Any], mode: str = "token-mean") -> Array:
    """Gradient [B, T, V] of ``loss`` by the student's logits."""
    result = np.zeros(batch.student_logits.shape)
    for index in np.ndindex(*result.shape):
        logits = batch.student_logits.astype(complex)
        logits[index] += 1j * STEP
        result[index] = np.imag(loss(replace(batch, student_logits=logits), settings, mode)) / STEP
    return result


LEVELS: dict[str, dict[str, Any]] = {
    f"{level}, alpha={alpha}": {"alpha": alpha, **extra}
    for level, extra in {
        "full vocabulary": {},
        "top-k with tail": {"distillation_topk": 2},
        "top-k renormalised": {"distillation_topk": 2, "distillation_add_tail": False},
    }.items()
    for alpha in (0.0, 0.3, 0.5, 1.0)
}
LEVELS["sampled token"] = {"alpha": 1.0, "full_logit_distillation": False}


def write_golden() -> None:
    batch = make_batch(num_samples=3, num_tokens=2, vocab_size=4, seed=7)
    cases = [
        {
            "name": name,
            "settings": settings,
            "loss": loss(batch, settings),
            "grad_logits": gradient(batch, settings).tolist(),
        }
        for name, settings in LEVELS.items()
    ]
    fields = {name: values.tolist() for name, values in vars(batch).items()}
    lines = ",\n".join(map(json.dumps, cases))
    GOLDEN_FILE.write_text(f'{{"batch": {json.dumps(fields)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    write_golden()
