"""Divergences compared with values computed by hand, finite differences, closed forms and known inequalities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck

from sdpo.algorithm.divergence import (
    TAIL_LOG_SUM_MAX,
    add_tail,
    compute_divergence,
    compute_entropy,
    compute_kl,
    compute_sampled_token_surrogate,
    renormalize,
)

ALPHAS = (0.0, 0.3, 0.5, 1.0)
INF = float("inf")
LOG2, LOG3 = math.log(2), math.log(3)
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)

# Two distributions over four tokens, whose divergences are computed by hand below.
STUDENT = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
TEACHER = [1 / 8, 1 / 2, 1 / 8, 1 / 4]


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def identity(log_probs: Tensor) -> Tensor:
    return log_probs


LEVELS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "full": (4, identity),
    "tail": (2, add_tail),
    "renormalised": (2, renormalize),
}

# Full: student (1/2 1/4 1/8 1/8), teacher (1/8 1/2 1/8 1/4).
#   forward  1/8 log(1/4) + 1/2 log 2 + 0 + 1/4 log 2   = (-1/4 + 1/2 + 1/4) log 2 = 1/2 log 2
#   reverse  1/2 log 4 + 1/4 log(1/2) + 0 + 1/8 log(1/2) = (1 - 1/4 - 1/8) log 2   = 5/8 log 2
#   0.5: m = (5/16 3/8 1/8 3/16);   0.3: m = 0.7 student + 0.3 teacher = (.3875 .325 .125 .1625)
# Tail: the top two tokens of the student are the first two, so student (1/2 1/4 | 1/4), teacher (1/8 1/2 | 3/8).
#   forward  1/8 log(1/4) + 1/2 log 2 + 3/8 log(3/2)    = 3/8 log 3 - 1/8 log 2
#   reverse  1/2 log 4 + 1/4 log(1/2) + 1/4 log(2/3)    = log 2 - 1/4 log 3
#   0.5: m = (5/16 3/8 5/16);   0.3: m = (.3875 .325 .2875)
# Renormalised: student (2/3 1/3), teacher (1/5 4/5).
#   forward  1/5 log(3/10) + 4/5 log(12/5);   reverse  2/3 log(10/3) + 1/3 log(5/12)
#   0.5: m = (13/30 17/30);   0.3: m = (79/150 71/150)
BY_HAND = {
    ("full", 0.0): LOG2 / 2,
    ("full", 1.0): LOG2 * 5 / 8,
    ("full", 0.5): 0.5 * (math.log(8 / 5) / 2 + math.log(2 / 3) * 3 / 8)
    + 0.5 * (math.log(2 / 5) / 8 + math.log(4 / 3) * 3 / 4),
    ("full", 0.3): 0.7 * (math.log(0.5 / 0.3875) / 2 + math.log(0.25 / 0.325) / 4 + math.log(0.125 / 0.1625) / 8)
    + 0.3 * (math.log(0.125 / 0.3875) / 8 + math.log(0.5 / 0.325) / 2 + math.log(0.25 / 0.1625) / 4),
    ("tail", 0.0): LOG3 * 3 / 8 - LOG2 / 8,
    ("tail", 1.0): LOG2 - LOG3 / 4,
    ("tail", 0.5): 0.5 * (math.log(8 / 5) / 2 + math.log(2 / 3) / 4 + math.log(4 / 5) / 4)
    + 0.5 * (math.log(2 / 5) / 8 + math.log(4 / 3) / 2 + math.log(6 / 5) * 3 / 8),
    ("tail", 0.3): 0.7 * (math.log(0.5 / 0.3875) / 2 + math.log(0.25 / 0.325) / 4 + math.log(0.25 / 0.2875) / 4)
    + 0.3 * (math.log(0.125 / 0.3875) / 8 + math.log(0.5 / 0.325) / 2 + math.log(0.375 / 0.2875) * 3 / 8),
    ("renormalised", 0.0): math.log(3 / 10) / 5 + math.log(12 / 5) * 4 / 5,
    ("renormalised", 1.0): math.log(10 / 3) * 2 / 3 + math.log(5 / 12) / 3,
    ("renormalised", 0.5): 0.5 * (math.log(20 / 13) * 2 / 3 + math.log(10 / 17) / 3)
    + 0.5 * (math.log(6 / 13) / 5 + math.log(24 / 17) * 4 / 5),
    ("renormalised", 0.3): 0.7 * (math.log(100 / 79) * 2 / 3 + math.log(50 / 71) / 3)
    + 0.3 * (math.log(30 / 79) / 5 + math.log(120 / 71) * 4 / 5),
}


@pytest.mark.parametrize(("level", "alpha"), BY_HAND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_value_equals_the_value_by_hand(level: str, alpha: float, dtype: torch.dtype, tolerance: float) -> None:
    kept, complete = LEVELS[level]
    student, teacher = (complete(log(*p[:kept]).to(dtype)) for p in (STUDENT, TEACHER))
    value = compute_divergence(student, teacher, alpha)
    assert value.dtype == dtype
    assert float(value) == pytest.approx(BY_HAND[level, alpha], abs=tolerance)


def test_reference_equals_the_values_by_hand() -> None:
    for (level, alpha), expected in BY_HAND.items():
        kept, _ = LEVELS[level]
        complete = {"full": lambda x: x, "tail": reference.append_tail, "renormalised": reference.renormalize}[level]
        student, teacher = (complete(np.log(np.array(p[:kept]))) for p in (STUDENT, TEACHER))
        assert reference.divergence(student, teacher, alpha) == pytest.approx(expected, abs=1e-14)


def test_value_and_gradient_of_the_sampled_token_surrogate() -> None:
    # The loss is the log-ratio times log s, and the gradient by log s is the log-ratio.
    # Token 0: log s = -log 2, log t = -3 log 2, log-ratio 2 log 2.
    # Token 1: log s = -2 log 2, log t = -log 2, log-ratio -log 2.
    student = log(1 / 2, 1 / 4).requires_grad_()
    teacher = log(1 / 8, 1 / 2).requires_grad_()
    losses = compute_sampled_token_surrogate(student, teacher)
    assert losses.tolist() == pytest.approx([-2 * LOG2**2, 2 * LOG2**2], abs=1e-15)
    losses.sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx([2 * LOG2, -LOG2], abs=1e-15)
    assert teacher.grad is None


def test_entropy() -> None:
    # 1/2 log 2 + 1/4 log 4 + 2/8 log 8 = 7/4 log 2; a token of probability 0 adds nothing.
    assert float(compute_entropy(log(*STUDENT))) == pytest.approx(7 / 4 * LOG2, abs=1e-15)
    assert float(compute_entropy(log(*STUDENT, 0.0))) == pytest.approx(7 / 4 * LOG2, abs=1e-15)
    assert float(compute_entropy(log(1.0, 0.0))) == 0.0


def test_tail_and_renormalisation() -> None:
    assert add_tail(log(1 / 2, 1 / 4)).exp().tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4], abs=1e-15)
    assert renormalize(log(1 / 2, 1 / 4)).exp().tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-15)
    # If the kept probabilities sum to 1, the tail is clamped to 1 - exp(-1e-7), without gradient.
    kept = log(3 / 4, 1 / 4).requires_grad_()
    tail = add_tail(kept)[-1]
    assert float(tail.detach()) == pytest.approx(math.log(-math.expm1(TAIL_LOG_SUM_MAX)), abs=1e-12)
    tail.backward()
    assert kept.grad is not None
    assert kept.grad.tolist() == [0.0, 0.0]


def test_small_tail_is_computed_without_cancellation() -> None:
    # In float32, exp(-1e-6) is a multiple of 2^-24, so that 1 - exp(-1e-6) has an error of a percent; expm1 has not.
    tail = add_tail(torch.tensor([-1e-6], dtype=torch.float32))[-1]
    assert float(tail) == pytest.approx(math.log(-math.expm1(-1e-6)), abs=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        compute_divergence(log(0.5, 0.5), log(0.5, 0.5), alpha)


# Gradients


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_equal_finite_differences(level: str, alpha: float) -> None:
    kept, complete = LEVELS[level]
    indices = random_logits(3, 6).topk(3 if kept < 4 else 6, dim=-1).indices

    def value(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student, teacher = (x.log_softmax(-1).gather(-1, indices) for x in (student_logits, teacher_logits))
        return compute_divergence(complete(student), complete(teacher), alpha)

    # Both sides have a gradient here; the loss stops the teacher's gradient.
    inputs = random_logits(3, 6).requires_grad_(), random_logits(3, 6, seed=1).requires_grad_()
    assert gradcheck(value, inputs, atol=1e-8)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_by_the_logits_equal_the_closed_form(alpha: float) -> None:
    """Closed form of the gradient by the student's logits, with student p and teacher t.

    forward KL    p - t
    reverse KL    p (log(p / t) - KL(p || t)): Prop. 2.1, each entry by its advantage over the mean advantage
    between       (1 - alpha) p (log(p / m) - KL(p || m))
    """
    logits = random_logits(4, 7).requires_grad_()
    student, teacher = logits.log_softmax(-1), random_logits(4, 7, seed=1).log_softmax(-1)
    compute_divergence(student, teacher, alpha).sum().backward()
    p, t = student.detach().exp().numpy(), teacher.exp().numpy()
    if alpha == 0.0:
        expected = p - t
    else:
        scale, other = (1.0, t) if alpha == 1.0 else (1 - alpha, (1 - alpha) * p + alpha * t)
        advantage = np.log(other / p)
        expected = -scale * p * (advantage - (p * advantage).sum(-1, keepdims=True))
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-14)


def test_expected_gradient_of_the_sampled_token_surrogate_is_that_of_the_reverse_kl() -> None:
    logits, teacher = random_logits(7).requires_grad_(), random_logits(7, seed=1).log_softmax(-1)
    student = logits.log_softmax(-1)
    gradients = [
        torch.autograd.grad(compute_sampled_token_surrogate(student[y], teacher[y]), logits, retain_graph=True)[0]
        for y in range(7)
    ]
    p, t = student.detach().exp().numpy(), teacher.exp().numpy()
    expectation = sum(p[y] * gradients[y].numpy() for y in range(7))
    np.testing.assert_allclose(expectation, p * (np.log(p / t) - (p * np.log(p / t)).sum()), atol=1e-14)


# Properties


def logits(*shape: int, size: float = 9.0) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    return arrays(np.float64, shape, elements=st.floats(-size, size))


def distributions(pair: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    student, teacher = torch.from_numpy(pair).log_softmax(-1)
    return student, teacher


@PROPERTY
@given(pair=logits(2, 5), alpha=st.sampled_from(ALPHAS))
def test_divergence_is_within_its_bounds(pair: np.ndarray[Any, Any], alpha: float) -> None:
    """The lower bound is Pinsker's inequality, so only equal distributions give 0; the upper is the binary entropy."""
    student, teacher = distributions(pair)
    distance = float((student.exp() - teacher.exp()).abs().sum())
    value = float(compute_divergence(student, teacher, alpha))
    # KL >= d^2 / 2, and d(student, m) = alpha d, d(teacher, m) = (1 - alpha) d.
    assert value >= (distance**2 / 2 if alpha in (0, 1) else alpha * (1 - alpha) * distance**2 / 2) - 1e-12
    if 0 < alpha < 1:
        assert value <= -alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha) + 1e-12


@PROPERTY
@given(one=logits(5), alpha=st.sampled_from(ALPHAS), level=st.sampled_from(sorted(LEVELS)))
def test_value_and_gradient_are_zero_for_equal_distributions(
    one: np.ndarray[Any, Any], alpha: float, level: str
) -> None:
    kept, complete = LEVELS[level]
    student_logits = torch.from_numpy(one).requires_grad_()
    student = complete(student_logits.log_softmax(-1)[: kept + 1])
    value = compute_divergence(student, student.detach(), alpha)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-14)
    assert student_logits.grad is not None
    # The derivative of the tail's logarithm is 1 / tail, up to 1e7, which multiplies a rounding error of 1e-16.
    assert student_logits.grad.abs().max() < (1e-8 if level == "tail" else 1e-14)


@PROPERTY
@given(pair=logits(2, 5), alpha=st.sampled_from(ALPHAS))
def test_different_distributions_have_a_gradient(pair: np.ndarray[Any, Any], alpha: float) -> None:
    student_logits = torch.from_numpy(pair[0]).requires_grad_()
    student, teacher = student_logits.log_softmax(-1), torch.from_numpy(pair[1]).log_softmax(-1)
    value = compute_divergence(student, teacher, alpha)
    value.backward()
    assert student_logits.grad is not None
    # The divergence is convex along the segment to the teacher: value <= -grad . (teacher - student) in probabilities.
    # The gradient by the logits is g_i = p_i (f_i - mean f) for the gradient f, so sum (t/p - 1) g = f . (t - p).
    p, t = student.detach().exp(), teacher.exp()
    assert float(value.detach()) <= float(-((t / p - 1) * student_logits.grad).sum()) + 1e-9


@PROPERTY
@given(pair=logits(2, 5), shifts=arrays(np.float64, (2, 1), elements=st.floats(-50, 50)), alpha=st.sampled_from(ALPHAS))
def test_divergence_does_not_depend_on_a_shift_of_the_logits(pair: Any, shifts: Any, alpha: float) -> None:
    value = compute_divergence(*distributions(pair), alpha)
    assert float(compute_divergence(*distributions(pair + shifts), alpha)) == pytest.approx(float(value), abs=1e-12)


@PROPERTY
@given(pair=logits(2, 5), order=st.permutations(range(5)), alpha=st.sampled_from(ALPHAS))
def test_divergence_does_not_depend_on_the_order_of_the_vocabulary(pair: Any, order: list[int], alpha: float) -> None:
    value = compute_divergence(*distributions(pair), alpha)
    assert float(compute_divergence(*distributions(pair[:, order]), alpha)) == pytest.approx(float(value), abs=1e-12)


@PROPERTY
@given(pair=logits(2, 5), alpha=st.floats(0.01, 0.99))
def test_exchanged_sides_with_1_minus_alpha_give_the_same_value(pair: np.ndarray[Any, Any], alpha: float) -> None:
    student, teacher = distributions(pair)
    value = compute_divergence(student, teacher, alpha)
    assert float(value) == pytest.approx(float(compute_divergence(teacher, student, 1 - alpha)), abs=1e-13)
    assert float(value) == pytest.approx(reference.divergence(student.numpy(), teacher.numpy(), alpha), abs=1e-12)


def test_forward_kl_is_the_reverse_kl_of_exchanged_sides() -> None:
    student, teacher = log(*STUDENT), log(*TEACHER)
    assert compute_divergence(student, teacher, 0.0) == compute_divergence(teacher, student, 1.0)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_scaled_interpolation_tends_to_the_kl_at_the_end_points(end: float) -> None:
    """Divided by alpha (1 - alpha), it tends to the KL; undivided to 0, so the end points are special cases."""
    student, teacher = log(*STUDENT), log(*TEACHER)
    # alpha -> 0: m -> student, the student's part is of second order, and alpha KL(teacher || student) remains.
    weight = 1e-7
    alpha = weight if end == 0.0 else 1 - weight
    value = float(compute_divergence(student, teacher, alpha))
    assert value / weight == pytest.approx(float(compute_divergence(student, teacher, end)), rel=1e-6)


@PROPERTY
@given(pair=logits(2, 6), alpha=st.sampled_from(ALPHAS))
def test_top_k_of_all_entries_equals_the_full_vocabulary(pair: np.ndarray[Any, Any], alpha: float) -> None:
    """The clamped tails of 1 - exp(-1e-7) of both sides cancel.

    forward / reverse   tail * log(tail / tail)   = 0
    between             the same, because m has the same tail

    The remaining rounding error is below 1e-12 in float64. In float32 the sum of all probabilities has an error of
    about 1e-7 per side, so the tails lie between 1e-7 and about 1e-6, and 1e-6 * log(10) bounds their contribution.
    """
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        student, teacher = (x.to(dtype).log_softmax(-1) for x in torch.from_numpy(pair))
        full = compute_divergence(student, teacher, alpha)
        kept, indices = student.topk(6)
        for complete in (add_tail, renormalize):
            value = compute_divergence(complete(kept), complete(teacher[indices]), alpha)
            assert float(value) == pytest.approx(float(full), abs=bound, rel=1e-5 if dtype == torch.float32 else 1e-12)


@PROPERTY
@given(pair=logits(2, 6, size=6.0), alpha=st.sampled_from(ALPHAS), k=st.integers(1, 4))
def test_tail_reduces_the_divergence(pair: np.ndarray[Any, Any], alpha: float, k: int) -> None:
    """By the data processing inequality, the divergence with tail is at most the full divergence, and grows with k.

    Logits of at most 6 keep every tail above its minimum; the next test covers smaller tails.
    """
    student, teacher = distributions(pair)
    kept, indices = student.topk(k + 1)
    small, large = (
        float(compute_divergence(add_tail(kept[:n]), add_tail(teacher[indices[:n]]), alpha)) for n in (k, k + 1)
    )
    assert -1e-12 <= small <= large + 1e-12
    assert large <= float(compute_divergence(student, teacher, alpha)) + 1e-12


def test_minimum_of_the_tail_bounds_the_divergence() -> None:
    """Student tail 1e-12, clamped to 1e-7, and teacher tail 1/4: forward KL 1/4 log(1/4 / 1e-7) + 3/4 log(3/4)."""
    value = float(compute_divergence(add_tail(log(1 - 1e-12)), add_tail(log(0.75)), 0.0))
    assert value == pytest.approx(math.log(0.25 / 1e-7) / 4 + math.log(0.75) * 3 / 4, abs=1e-7)


# Tokens of probability 0


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("student", "teacher", "infinite_alphas"),
    [
        ((0.5, 0.5, 0.0), (0.25, 0.75, 0.0), ()),  # 0 on both sides: the entry adds nothing
        ((0.5, 0.5, 0.0), (0.25, 0.5, 0.25), (0.0,)),  # 0 for the student alone
        ((0.5, 0.25, 0.25), (0.25, 0.75, 0.0), (1.0,)),  # 0 for the teacher alone
        ((1.0, 0.0), (0.0, 1.0), (0.0, 1.0)),  # disjoint: the upper bound of the Jensen-Shannon divergence
    ],
)
def test_tokens_of_probability_zero(student: Any, teacher: Any, infinite_alphas: Any, alpha: float) -> None:
    expected = INF
    if alpha not in infinite_alphas:
        pairs = list(zip(student, teacher, strict=True))
        m = [(1 - alpha) * s + alpha * t for s, t in pairs]
        reverse = sum(s * math.log(s / x) for (s, t), x in zip(pairs, m if alpha < 1 else teacher, strict=True) if s)
        forward = sum(t * math.log(t / x) for (s, t), x in zip(pairs, m if alpha > 0 else student, strict=True) if t)
        expected = {0.0: forward, 1.0: reverse}.get(alpha, (1 - alpha) * reverse + alpha * forward)
    student_logits = log(*student).requires_grad_()
    value = compute_divergence(student_logits.log_softmax(-1), log(*teacher), alpha)
    assert float(value.detach()) == pytest.approx(expected, abs=1e-14)
    if expected == INF:
        return
    value.backward()
    # The gradient by the logits is p - t for the forward KL, else scale p (log(p / m) - mean). It is 0 for a token of
    # probability 0 under the student.
    expected_gradient = [s - t if s else 0.0 for s, t in zip(student, teacher, strict=True)]
    if alpha > 0:
        scale, other = (1.0, teacher) if alpha == 1 else (1 - alpha, m)
        log_ratio = [math.log(s / x) if s else 0.0 for s, x in zip(student, other, strict=True)]
        mean = sum(s * x for s, x in zip(student, log_ratio, strict=True))
        expected_gradient = [scale * s * (x - mean) for s, x in zip(student, log_ratio, strict=True)]
    assert student_logits.grad is not None
    assert student_logits.grad.tolist() == pytest.approx(expected_gradient, abs=1e-14)


def test_divergence_of_disjoint_distributions_is_the_binary_entropy() -> None:
    for alpha in (0.1, 0.3, 0.5, 0.9):
        value = float(compute_divergence(log(1.0, 0.0), log(0.0, 1.0), alpha))
        assert value == pytest.approx(-alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha), abs=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min])
def test_large_negative_logit_acts_as_probability_zero(alpha: float, fill: float) -> None:
    """Models mask tokens with the smallest finite number or with -inf."""
    student_logits = torch.tensor([0.3, -0.2, fill], requires_grad=True)
    teacher = torch.tensor([1.0, 0.1, fill]).log_softmax(-1)
    value = compute_divergence(student_logits.log_softmax(-1), teacher, alpha)
    without = compute_divergence(student_logits.detach()[:2].log_softmax(-1), teacher[:2], alpha)
    assert float(value.detach()) == pytest.approx(float(without), abs=1e-7)
    value.backward()
    assert student_logits.grad is not None
    assert torch.isfinite(student_logits.grad).all()
    assert student_logits.grad[2] == 0.0


def test_kl_has_gradients_by_both_sides() -> None:
    p, q = log(*STUDENT).requires_grad_(), log(*TEACHER).requires_grad_()
    compute_kl(p, q).backward()
    assert p.grad is not None
    assert q.grad is not None
    # By log p: p (log(p / q) + 1); by log q: -p.
    expected = [s * (math.log(s / t) + 1) for s, t in zip(STUDENT, TEACHER, strict=True)]
    assert p.grad.tolist() == pytest.approx(expected, abs=1e-15)
    assert q.grad.tolist() == pytest.approx([-s for s in STUDENT], abs=1e-15)
