"""Weighted sum of GRPO and SDPO on packed tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_reference import LEVELS
from torch import Tensor

from sdpo import SelfDistillationConfig
from sdpo.algorithm.aggregation import compute_token_weights
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distributions import TokenDistributions
from sdpo.algorithm.loss import LossOutputs, compute_loss, compute_policy_token_losses
from sdpo.algorithm.official import METRIC_NAMES
from sdpo.algorithm.regularization import Regularization
from sdpo.observability import metrics

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
N, V = 7, 5
COEF = 0.7
NAMES = ["full vocabulary, alpha=0.0", "full vocabulary, alpha=0.5", "top-k with tail, alpha=1.0", "sampled token"]


def make_tokens(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Packed tokens with ratios below, within and above PPO's bounds, and with advantages of both signs and 0."""
    rng = np.random.default_rng(seed)
    student_logits = rng.normal(size=(N, V))
    tokens = rng.integers(V, size=N)
    token_log_probs = np.array([reference.log_softmax(x)[y] for x, y in zip(student_logits, tokens, strict=True)])
    return {
        "student_logits": student_logits,
        "teacher_logits": rng.normal(size=(N, V)),
        "tokens": tokens,
        "old": token_log_probs - np.log([0.5, 1.05, 2.5, 0.6, 3.0, 0.95, 1.5]),
        "advantages": np.array([1.2, -0.8, 0.5, -1.5, -0.3, 0.0, 0.9]),
        "policy_weights": rng.uniform(0.1, 1.0, size=N),
        "rollout": rng.uniform(0.2, 2.0, size=N),
        "distilled": np.array([True, False, True, True, False, True, True]),
        "distillation_weights": rng.uniform(0.1, 1.0, size=N),
    }


def expected_token_losses(
    values: Mapping[str, np.ndarray[Any, Any]], overrides: Mapping[str, Any], coef: float = COEF
) -> list[Any]:
    policy_weight = overrides.get("policy_loss_weight", 0.0)
    low, high = 1 - overrides.get("clip_ratio_low", 0.2), 1 + overrides.get("clip_ratio_high", 0.2)
    losses: list[Any] = []
    for i in range(N):
        student = reference.log_softmax(values["student_logits"][i])
        token, advantage, weight = values["tokens"][i], values["advantages"][i], values["rollout"][i]
        ratio = np.exp(student[token] - values["old"][i])
        clipped = ratio if low <= ratio.real <= high else min(max(ratio.real, low), high)
        loss = max(-advantage * ratio, -advantage * clipped, key=np.real)
        losses.append(policy_weight * values["policy_weights"][i] * weight * loss)
        if values["distilled"][i]:
            teacher = reference.log_softmax(values["teacher_logits"][i])
            losses[-1] += (
                (1 - policy_weight)
                * coef
                * values["distillation_weights"][i]
                * reference.token_loss(student, teacher, token, values["old"][i], weight, overrides)
            )
    return losses


def expected_gradient(values: Mapping[str, np.ndarray[Any, Any]], overrides: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    result = np.zeros((N, V))
    for index in np.ndindex(N, V):
        logits = values["student_logits"].astype(complex)
        logits[index] += 1j * reference.STEP
        result[index] = (
            sum(np.imag(expected_token_losses({**values, "student_logits": logits}, overrides))) / reference.STEP
        )
    return result


def build_inputs(
    values: Mapping[str, np.ndarray[Any, Any]],
    config: SelfDistillationConfig,
    logits: Tensor,
    part: np.ndarray[Any, Any] | None = None,
) -> tuple[TokenBatch, TokenDistributions]:
    """Loss inputs of the tokens in ``part``, by default all."""
    part = np.arange(N) if part is None else part
    data = {name: torch.from_numpy(array[part]) for name, array in values.items()}
    distilled = data["distilled"]
    student = logits[torch.from_numpy(part)].log_softmax(-1)
    teacher = data["teacher_logits"].log_softmax(-1)[distilled]
    tokens = data["tokens"][:, None]
    rows = student[distilled]
    student_rows, teacher_rows = rows, teacher
    if config.distillation_topk is not None:
        student_rows, indices = rows.topk(config.distillation_topk, dim=-1)
        teacher_rows = teacher.gather(-1, indices)
    batch = TokenBatch(
        old_log_probs=data["old"],
        policy_weights=data["policy_weights"],
        advantages=data["advantages"],
        rollout_is_weights=data["rollout"],
        distilled=distilled,
        distillation_weights=data["distillation_weights"],
        distillation_coef=COEF,
    )
    return batch, TokenDistributions(
        student_log_probs=student.gather(-1, tokens)[:, 0],
        teacher_log_probs=teacher.gather(-1, tokens[distilled])[:, 0],
        student_distribution=student_rows,
        teacher_distribution=teacher_rows,
    )


def copy_logits(values: Mapping[str, np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(values["student_logits"].copy()).requires_grad_()


def run(
    values: Mapping[str, np.ndarray[Any, Any]], overrides: Mapping[str, Any]
) -> tuple[LossOutputs, np.ndarray[Any, Any]]:
    config, logits = SelfDistillationConfig(**overrides), copy_logits(values)
    outputs = compute_loss(*build_inputs(values, config, logits), config)
    outputs.loss.backward()
    assert logits.grad is not None
    return outputs, logits.grad.numpy()


# GRPO and SDPO


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy_loss_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bounds", [{}, {"clip_ratio_low": 0.45, "clip_ratio_high": 0.6}])
def test_token_losses_and_gradients(name: str, policy_loss_weight: float, bounds: dict[str, float]) -> None:
    overrides = LEVELS[name] | {"policy_loss_weight": policy_loss_weight} | bounds
    outputs, gradient = run(make_tokens(), overrides)
    expected = expected_token_losses(make_tokens(), overrides)
    np.testing.assert_allclose(outputs.token_losses.detach().numpy(), np.real(expected), atol=1e-14)
    assert float(outputs.loss.detach()) == pytest.approx(sum(np.real(expected)), abs=1e-14)
    np.testing.assert_allclose(gradient, expected_gradient(make_tokens(), overrides), atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_weighted_sum_of_grpo_and_sdpo(name: str) -> None:
    parts = [run(make_tokens(), LEVELS[name] | {"policy_loss_weight": coef}) for coef in (0.0, 0.3, 1.0)]
    sdpo, mixed, grpo = (float(outputs.loss.detach()) for outputs, _ in parts)
    assert mixed == pytest.approx(0.3 * grpo + 0.7 * sdpo, abs=1e-14)
    np.testing.assert_allclose(parts[1][1], 0.3 * parts[2][1] + 0.7 * parts[0][1], atol=1e-14)


def test_grpo_needs_no_teacher() -> None:
    config, logits = SelfDistillationConfig(policy_loss_weight=1.0), copy_logits(make_tokens())
    batch, tokens = build_inputs(make_tokens(), config, logits)
    reduced = replace(batch, distilled=None, distillation_weights=None), TokenDistributions(tokens.student_log_probs)
    complete, reduced_outputs = compute_loss(batch, tokens, config), compute_loss(*reduced, config)
    assert torch.equal(complete.token_losses, reduced_outputs.token_losses)
    assert "distillation_loss" not in complete.sums


@pytest.mark.parametrize("name", NAMES)
def test_sdpo_needs_no_advantages(name: str) -> None:
    config, logits = SelfDistillationConfig(**LEVELS[name]), copy_logits(make_tokens())
    batch, tokens = build_inputs(make_tokens(), config, logits)
    reduced = replace(batch, advantages=None, policy_weights=None)
    complete, reduced_outputs = compute_loss(batch, tokens, config), compute_loss(reduced, tokens, config)
    assert torch.equal(complete.token_losses, reduced_outputs.token_losses)
    assert "policy_loss" not in complete.sums


def test_distillation_coefficient_scales_only_the_distillation_loss() -> None:
    overrides = LEVELS["full vocabulary, alpha=0.5"] | {"policy_loss_weight": 0.3}
    config = SelfDistillationConfig(**overrides)
    for coef in (0.0, 0.25, 2.0):
        batch, tokens = build_inputs(make_tokens(), config, copy_logits(make_tokens()))
        losses = compute_loss(replace(batch, distillation_coef=coef), tokens, config).token_losses
        expected = np.real(expected_token_losses(make_tokens(), overrides, coef))
        np.testing.assert_allclose(losses.detach().numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("policy_loss_weight", [0.0, 0.3])
@pytest.mark.parametrize("absent", [True, False])
def test_undistilled_tokens_can_be_differentiated(policy_loss_weight: float, absent: bool) -> None:
    """A micro-batch may contain only samples without teacher context."""
    config, logits = SelfDistillationConfig(policy_loss_weight=policy_loss_weight), copy_logits(make_tokens())
    values = make_tokens() | {"distilled": np.zeros(N, dtype=bool)}
    batch, tokens = build_inputs(values, config, logits)
    outputs = compute_loss(replace(batch, distilled=None) if absent else batch, tokens, config)
    outputs.loss.backward()
    expected = expected_token_losses(values, {"policy_loss_weight": policy_loss_weight})
    np.testing.assert_allclose(outputs.token_losses.detach().numpy(), np.real(expected), atol=1e-14)
    assert logits.grad is not None
    np.testing.assert_allclose(
        logits.grad.numpy(), expected_gradient(values, {"policy_loss_weight": policy_loss_weight}), atol=1e-14
    )
    assert (policy_loss_weight == 0.0) == (logits.grad == 0.0).all()


def test_only_the_student_has_gradients() -> None:
    config, logits = (
        SelfDistillationConfig(policy_loss_weight=0.3, alpha=0.5, teacher_entropy_beta=0.1),
        copy_logits(make_tokens()),
    )
    batch, tokens = build_inputs(make_tokens(), config, logits)
    old = batch.old_log_probs.detach().requires_grad_()
    names = ("teacher_log_probs", "teacher_distribution")
    leaves = {name: getattr(tokens, name).detach().requires_grad_() for name in names}
    compute_loss(replace(batch, old_log_probs=old), replace(tokens, **leaves), config).loss.backward()
    assert logits.grad is not None
    assert old.grad is None
    assert {name: leaf.grad for name, leaf in leaves.items()} == dict.fromkeys(names)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy_loss_weight", [0.0, 0.3, 1.0])
def test_nonfinite_token_has_a_nonfinite_token_loss(value: float, policy_loss_weight: float) -> None:
    config = SelfDistillationConfig(policy_loss_weight=policy_loss_weight)
    batch, tokens = build_inputs(make_tokens(), config, copy_logits(make_tokens()))
    expected = compute_loss(batch, tokens, config).token_losses.detach()
    student_log_probs = tokens.student_log_probs.detach().clone()
    student_log_probs[2] = value
    nonfinite = replace(tokens, student_log_probs=student_log_probs)
    token_losses = compute_loss(batch, nonfinite, config).token_losses.detach()
    assert not torch.isfinite(token_losses[2])
    others = torch.arange(N) != 2
    assert torch.equal(token_losses[others], expected[others])


# PPO's clip

CLIPPED = [
    # ratio, advantage, loss, gradient by the log-probability; bounds 0.8 and 1.3
    (0.5, 1.0, -0.5, -0.5),  # below the range, positive advantage: the gradient stays
    (1.5, 1.0, -1.3, 0.0),  # above the range, positive advantage: no gradient
    (0.5, -1.0, 0.8, 0.0),  # below the range, negative advantage: no gradient
    (1.5, -1.0, 1.5, 1.5),  # above the range, negative advantage: the gradient stays
    (1.1, 2.0, -2.2, -2.2),
    (0.9, -2.0, 1.8, 1.8),
    (1.29, 1.0, -1.29, -1.29),
    (1.31, 1.0, -1.3, 0.0),
    (0.81, -1.0, 0.81, 0.81),
    (0.79, -1.0, 0.8, 0.0),
    (1.0, 0.0, 0.0, 0.0),
    (math.exp(25), 1.0, -1.3, 0.0),
    (math.exp(25), -1.0, math.exp(20), 0.0),  # the exponent is clamped at 20, without gradient
    (math.exp(-25), 1.0, -math.exp(-20), 0.0),
]


def test_ppo_clip() -> None:
    ratios, advantages, losses, gradients = (torch.tensor(x, dtype=torch.float64) for x in zip(*CLIPPED, strict=True))
    student = torch.full((len(CLIPPED),), -1.5, dtype=torch.float64, requires_grad=True)
    config = SelfDistillationConfig(policy_loss_weight=1.0, clip_ratio_low=0.2, clip_ratio_high=0.3)
    batch = TokenBatch(old_log_probs=student.detach() - ratios.log(), advantages=advantages)
    result, values = compute_policy_token_losses(batch, student, config)
    torch.testing.assert_close(result, losses, rtol=1e-13, atol=1e-15)
    result.sum().backward()
    torch.testing.assert_close(student.grad, gradients, rtol=1e-13, atol=1e-15)
    # PPO's clip removes 5 gradients; the bounds of the exponent do not count.
    assert (float(values["policy_clip_fraction"].sum()), len(values["policy_clip_fraction"])) == (5.0, len(CLIPPED))
    assert values["advantage"].tolist() == advantages.tolist()
    halved = replace(batch, rollout_is_weights=torch.full_like(ratios, 0.5))
    weighted, _ = compute_policy_token_losses(halved, student, config)
    torch.testing.assert_close(weighted, losses * 0.5, rtol=1e-13, atol=1e-15)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """With ratio 1 the gradient is -A grad log p, also with clip ranges of 0."""
    for bounds in ({}, {"clip_ratio_low": 0.0, "clip_ratio_high": 0.0}):
        student = torch.tensor([-0.3, -2.0], dtype=torch.float64, requires_grad=True)
        advantages = torch.tensor([0.7, -1.1], dtype=torch.float64)
        batch = TokenBatch(old_log_probs=student.detach(), advantages=advantages)
        config = SelfDistillationConfig(policy_loss_weight=1.0, **bounds)
        losses, _ = compute_policy_token_losses(batch, student, config)
        losses.sum().backward()
        assert student.grad is not None
        assert student.grad.tolist() == pytest.approx([-0.7, 1.1])


# Micro-batches and sums


@PROPERTY
@given(
    parts=st.lists(st.integers(0, 3), min_size=N, max_size=N),
    name=st.sampled_from(NAMES),
    policy_loss_weight=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_result_does_not_depend_on_the_split_into_micro_batches(
    parts: list[int], name: str, policy_loss_weight: float
) -> None:
    overrides = LEVELS[name] | {"policy_loss_weight": policy_loss_weight}
    config, values = SelfDistillationConfig(**overrides), make_tokens()
    complete, gradient = run(values, overrides)
    logits, loss = copy_logits(values), 0.0
    sums: dict[str, tuple[float, int]] = {}
    for number in sorted(set(parts)):
        part = np.nonzero(np.array(parts) == number)[0]
        outputs = compute_loss(*build_inputs(values, config, logits, part), config)
        outputs.loss.backward()
        loss += float(outputs.loss.detach())
        for key, (total, count) in outputs.sums.items():
            before = sums.get(key, (0.0, 0))
            sums[key] = before[0] + float(total), before[1] + int(count)
    assert logits.grad is not None
    assert loss == pytest.approx(float(complete.loss.detach()), abs=1e-13)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=1e-13)
    assert sums.keys() == complete.sums.keys()
    for key, (total, count) in complete.sums.items():
        assert sums[key] == (pytest.approx(float(total), abs=1e-12), int(count)), key


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_losses_of_micro_batches_add_up_to_the_mini_batch(mode: str) -> None:
    """Three samples with 3, 0 and 4 tokens are split; the sum of the parts is the aggregate of all."""
    lengths = torch.tensor([3, 0, 4])
    weights = compute_token_weights(lengths.double(), mode, horizon=9).repeat_interleave(lengths).numpy()
    overrides = LEVELS["full vocabulary, alpha=0.5"]
    values = make_tokens() | {"distilled": np.ones(N, dtype=bool), "distillation_weights": weights}
    config = SelfDistillationConfig(**overrides)
    parts = [
        float(compute_loss(*build_inputs(values, config, copy_logits(values), part), config).loss.detach())
        for part in (np.arange(3), np.arange(3, 7))
    ]
    unit = values | {"distillation_weights": np.ones(N)}
    losses = [float(np.real(x)) for x in expected_token_losses(unit, overrides)]
    expected = reference.aggregate([losses[:3], [], losses[3:]], mode, horizon=9)
    assert sum(parts) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("policy_loss_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_metric_sums(policy_loss_weight: float, name: str) -> None:
    overrides = LEVELS[name] | {"policy_loss_weight": policy_loss_weight, "is_clip": 1.4}
    values = make_tokens()
    outputs, _ = run(values, overrides)
    rows = []
    for i in range(N):
        student, teacher = (reference.log_softmax(values[x][i]) for x in ("student_logits", "teacher_logits"))
        token, old = values["tokens"][i], values["old"][i]
        gap = teacher[token] - student[token]
        unclipped = reference.token_loss(student, teacher, token, old, 1.0, overrides | {"is_clip": None})
        divergence = -gap if name == "sampled token" else unclipped
        rows.append((gap, divergence, math.exp(student[token] - old), student[token]))
    gaps, divergences, ratios, token_log_probs = np.array(rows).T
    distilled = values["distilled"]
    part_losses = {
        coef: sum(np.real(expected_token_losses(values, overrides | {"policy_loss_weight": coef}, 1.0)))
        for coef in (0, 1)
    }
    expected: dict[str, tuple[float, int]] = {
        "loss": (sum(np.real(expected_token_losses(values, overrides))), 0),
        "ppo_kl": (float((values["old"] - token_log_probs).sum()), N),
    }
    if policy_loss_weight > 0:
        # Ratios 0.5 1.05 2.5 0.6 3 0.95 1.5, advantages + - + - - 0 +: clipped at 2.5 with +, 0.6 with -, 1.5 with +.
        expected |= {
            "policy_loss": (part_losses[1], 0),
            "policy_clip_fraction": (3.0, N),
            "advantage": (float(values["advantages"].sum()), N),
        }
    if policy_loss_weight < 1:
        expected |= {
            "distillation_loss": (part_losses[0], 0),
            "divergence": (divergences[distilled].sum(), 5),
            "teacher_gap": (gaps[distilled].sum(), 5),
            "gap_positive_fraction": (float((gaps[distilled] > 0).sum()), 5),
            "gap_positive_part": (np.maximum(gaps, 0)[distilled].sum(), 5),
            "gap_negative_part": (np.minimum(gaps, 0)[distilled].sum(), 5),
            "is_ratio": (np.minimum(ratios, 1.4)[distilled].sum(), 5),
            "is_clip_fraction": (2.0, 5),  # the ratios 2.5 and 1.5 of the distilled tokens 0, 2, 3, 5, 6 are above 1.4
        }
    assert outputs.sums.keys() == expected.keys()
    for key, (total, count) in expected.items():
        assert float(outputs.sums[key][0]) == pytest.approx(total, abs=1e-13), key
        assert int(outputs.sums[key][1]) == count, key
        assert not outputs.sums[key][0].requires_grad, key


def test_every_sum_has_a_metric() -> None:
    """The algorithm does not import the names of the metrics, so only this test compares the two."""
    config = SelfDistillationConfig(policy_loss_weight=0.3)
    batch, tokens = build_inputs(make_tokens(), config, copy_logits(make_tokens()))
    batch = replace(batch, ref_log_probs=batch.old_log_probs, regularization=Regularization(0.1, "kl", 0.1))
    entropies = torch.ones_like(tokens.student_log_probs)
    tokens = replace(tokens, student_entropies=entropies, teacher_entropies=entropies[batch.distilled])
    sums = compute_loss(batch, tokens, config).sums
    assert sums.keys() == metrics.LOSS_METRICS.keys()
    assert METRIC_NAMES.items() <= metrics.LOSS_METRICS.items()
    assert metrics.name_loss_sums({"loss": 1.0, "is_ratio": 2.0}) == {metrics.LOSS: 1.0, metrics.IS_RATIO_MEAN: 2.0}
