"""The loss from hidden states compared with the loss from distributions: value, gradients, metrics, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdpo import SelfDistillationConfig, compute_self_distillation_loss, fused_self_distillation_loss
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distributions import read_distributions
from sdpo.algorithm.loss import compute_loss
from sdpo.algorithm.regularization import Regularization
from sdpo.kernels.chunked_log_probs import LinearHead, choose_chunk_size, cut_slice, score_tokens
from sdpo.kernels.fused_linear_loss import fused_linear_sdpo_loss
from sdpo.observability import metrics

N, V, H = 7, 11, 4
DISTRIBUTIONS = {
    f"{level}, alpha={alpha}": {"alpha": alpha, **extra}
    for level, extra in {
        "full": {},
        "tail": {"distillation_topk": 3},
        "renormalised": {"distillation_topk": 3, "distillation_add_tail": False},
    }.items()
    for alpha in (0.0, 0.3, 0.5, 1.0)
}
SAMPLED = {"alpha": 1.0, "full_logit_distillation": False}
LEVELS: dict[str, dict[str, Any]] = DISTRIBUTIONS | {"sampled token": SAMPLED}
CLIPS: dict[str, dict[str, Any]] = {
    "no clip": {"is_clip": None},
    "ratio clip": {"is_clip": 1.1},
    "divergence clip": {"is_clip": 2.0, "divergence_clip": 0.05},
    "teacher entropy": {"is_clip": None, "teacher_entropy_beta": 0.6},
}
MASKS = {
    "all": ([1] * N, [1] * N),
    "some": ([1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 0, 1, 1]),
    "none distilled": ([1, 1, 0, 1, 1, 1, 1], [0] * N),
    "all masked": ([0] * N, [1] * N),
}


@dataclass(frozen=True)
class Case:
    """N tokens of a student and of a teacher with other hidden states."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_bias: Tensor
    ids: Tensor
    old: Tensor
    rollout: Tensor
    advantages: Tensor
    temperature: float = 0.7
    softcap: float | None = None

    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.head, self.bias

    def gradients(self) -> list[Tensor]:
        grads = [leaf.grad for leaf in self.leaves()]
        for leaf in self.leaves():
            leaf.grad = None
        return [
            torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(self.leaves(), grads, strict=True)
        ]

    def log_probs(self, hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        logits = (hidden @ head.T).to(torch.promote_types(hidden.dtype, torch.float32)) + bias
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits / self.temperature).log_softmax(-1)

    def student(self) -> Tensor:
        return self.log_probs(self.hidden, self.head, self.bias)

    def teacher(self) -> Tensor:
        return self.log_probs(self.teacher_hidden, self.teacher_head, self.teacher_bias).detach()


def make_case(dtype: torch.dtype = torch.float64, *, tied: bool = False, size: tuple[int, ...] = (N, V, H)) -> Case:
    generator = torch.Generator().manual_seed(11)
    n, v, h = size

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    hidden, head, bias = (x.requires_grad_() for x in (normal(n, h), normal(v, h), normal(v, scale=0.3)))
    case = Case(
        hidden,
        head,
        bias,
        teacher_hidden=normal(n, h),
        teacher_head=head if tied else normal(v, h),
        teacher_bias=bias if tied else normal(v, scale=0.3),
        ids=torch.randint(v, (n,), generator=generator),
        old=torch.zeros(n),
        rollout=torch.rand(n, generator=generator, dtype=torch.float64) + 0.3,
        advantages=normal(n).double(),
    )
    token_log_probs = case.student().detach().double().gather(-1, case.ids[:, None])[:, 0]
    ratios = torch.tensor([0.5, 1.05, 2.5, 0.6, 3.0, 0.95, 1.5], dtype=torch.float64).repeat(n // 7 + 1)[:n]
    return replace(case, old=token_log_probs - ratios.log())


def run_fused(
    case: Case, config: SelfDistillationConfig, mask: Tensor, distilled: Tensor, chunk_size: int | None, **changes: Any
) -> tuple[Tensor, dict[str, float]]:
    return fused_self_distillation_loss(
        case.hidden,
        case.head,
        case.teacher_hidden,
        case.teacher_head,
        case.ids,
        mask,
        config,
        **{
            "old_log_probs": case.old,
            "rollout_is_weights": case.rollout,
            "self_distillation_mask": distilled,
            "temperature": case.temperature,
            "softcap": case.softcap,
            "student_bias": case.bias,
            "teacher_bias": case.teacher_bias,
            "chunk_size": chunk_size,
        }
        | changes,
    )


def run_reference(
    case: Case, config: SelfDistillationConfig, mask: Tensor, distilled: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The loss from distributions on N samples of one token each."""
    student, teacher = case.student(), case.teacher()
    distributions: dict[str, Tensor] = {}
    if config.distillation_topk is not None:
        student_topk, indices = student.topk(config.distillation_topk, dim=-1)
        distributions = {"student_topk_log_probs": student_topk[:, None]}
        distributions |= {"teacher_topk_log_probs": teacher.gather(-1, indices)[:, None]}
    elif config.full_logit_distillation:
        distributions = {"student_all_log_probs": student[:, None], "teacher_all_log_probs": teacher[:, None]}
    return compute_self_distillation_loss(
        student.gather(-1, case.ids[:, None]),
        teacher.gather(-1, case.ids[:, None]),
        mask[:, None],
        config,
        old_log_probs=case.old[:, None],
        self_distillation_mask=distilled,
        rollout_is_weights=case.rollout[:, None],
        **distributions,
    )


def assert_same_run(case: Case, config: SelfDistillationConfig, mask: Tensor, distilled: Tensor, size: Any) -> None:
    loss, values = run_reference(case, config, mask, distilled)
    (3.0 * loss).backward()
    expected = case.gradients()
    fused_loss, fused_values = run_fused(case, config, mask, distilled, size)
    (3.0 * fused_loss).backward()
    assert float(fused_loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-10)
    for result, reference in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0.0, atol=1e-10)
    if bool((mask.bool() & distilled.bool()).any()):
        assert {name: fused_values[name] for name in values} == pytest.approx(values, abs=1e-10)
    else:
        assert fused_values[metrics.NONFINITE_SAMPLES] == 0.0


# The distillation loss


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("level", LEVELS)
def test_value_gradients_and_metrics_equal_the_reference(level: str, clip: str) -> None:
    overrides = LEVELS[level] | CLIPS[clip]
    if level == "sampled token":
        overrides.pop("teacher_entropy_beta", None)
    config = SelfDistillationConfig(**overrides)
    for masks in MASKS.values():
        mask, distilled = (torch.tensor(values) for values in masks)
        for size in (1, 3, N, 50):
            assert_same_run(make_case(), config, mask, distilled, size)


@pytest.mark.parametrize("level", ["full, alpha=0.5", "tail, alpha=0.0", "sampled token"])
def test_head_shared_with_the_teacher_has_only_the_gradient_of_the_student(level: str) -> None:
    config = SelfDistillationConfig(**LEVELS[level])
    case = make_case(tied=True)
    assert case.teacher_head is case.head
    assert_same_run(case, config, torch.ones(N), torch.ones(N), 3)


def test_softcap_applies_before_the_temperature() -> None:
    case = replace(make_case(), softcap=1.5)
    for level in ("full, alpha=0.3", "tail, alpha=1.0", "sampled token"):
        assert_same_run(case, SelfDistillationConfig(**LEVELS[level]), torch.ones(N), torch.ones(N), 2)


@pytest.mark.parametrize("level", LEVELS)
def test_large_logits(level: str) -> None:
    """Most probabilities underflow even in float64, and exp of the logits would overflow.

    Logits of 3,000 have errors of 3,000 * 2^-53, and hidden states of 1,000 multiply them.
    """
    case = make_case()
    hidden, teacher_hidden = (1000.0 * h.detach() for h in (case.hidden, case.teacher_hidden))
    case = replace(case, hidden=hidden.requires_grad_(), teacher_hidden=teacher_hidden)
    assert float((hidden @ case.head.T).max().detach()) > 2000
    assert int((case.student().exp() == 0).sum()) > N * V // 2
    config = SelfDistillationConfig(**LEVELS[level], is_clip=None)
    loss, _ = run_reference(case, config, torch.ones(N), torch.ones(N))
    loss.backward()
    expected = case.gradients()
    fused_loss, _ = run_fused(case, config, torch.ones(N), torch.ones(N), 3)
    fused_loss.backward()
    assert float(fused_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    for result, reference in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-9)


def test_gradients_equal_finite_differences() -> None:
    """Jensen-Shannon divergence without clips, because the gradient stops at the factors of the clips."""
    case = replace(make_case(), softcap=2.0)
    config = SelfDistillationConfig(alpha=0.4, is_clip=None)

    def value(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        changed = replace(case, hidden=hidden, head=head, bias=bias)
        return run_fused(changed, config, torch.ones(N), torch.ones(N), 3)[0]

    assert torch.autograd.gradcheck(value, case.leaves(), atol=1e-8)


@pytest.mark.parametrize("level", ["full, alpha=0.0", "full, alpha=0.5", "full, alpha=1.0", "sampled token"])
def test_bfloat16_is_close_to_float32(level: str) -> None:
    """Logits of at most 12 have relative rounding errors of 2^-9, gradients errors of 2^-9 of the largest entry."""
    config = SelfDistillationConfig(**LEVELS[level])
    half = replace(make_case(torch.bfloat16, size=(70, 40, 16)), temperature=1.0)
    tensors = {name: value for name, value in vars(half).items() if isinstance(value, Tensor)}
    floats = {name: value.detach().float() for name, value in tensors.items() if value.dtype == torch.bfloat16}
    full_precision = replace(half, **floats)
    for leaf in full_precision.leaves():
        leaf.requires_grad_()
    mask = torch.ones(70)
    results = []
    for case in (full_precision, half):
        loss, _ = run_fused(case, config, mask, mask, 16)
        loss.backward()
        assert [leaf.grad.dtype for leaf in case.leaves() if leaf.grad is not None] == 3 * [case.head.dtype]
        results.append((float(loss.detach()), case.gradients()))
    (expected, gradients), (half_loss, half_gradients) = results
    assert half_loss == pytest.approx(expected, rel=0.02)
    for reference, result in zip(gradients, half_gradients, strict=True):
        assert float((result.float() - reference).norm() / reference.norm()) < 0.02


def test_no_tensor_has_the_size_of_all_logits() -> None:
    """64 tokens of 400 entries in chunks of 8: the largest tensor has the 8 * 400 logits of a chunk."""

    class SizeRecorder(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.numel = max([self.numel, *sizes])
            return result

    case = make_case(torch.float32, size=(64, 400, 3))
    mask = (torch.arange(64) % 5 > 0).int()
    for level in LEVELS:
        for clip in ("divergence clip", "teacher entropy"):
            overrides = LEVELS[level] | (CLIPS[clip] if level != "sampled token" else {})
            with SizeRecorder() as recorder:
                config = SelfDistillationConfig(**overrides, policy_loss_weight=0.5)
                run_fused(case, config, torch.ones(64), mask, 8, advantages=case.advantages)[0].backward()
            assert recorder.numel == 8 * 400, level


# The loss as the actors call it


def assert_equals_compute_loss(
    case: Case,
    config: SelfDistillationConfig,
    distilled: Tensor | None,
    size: int | None,
    trust: float = 0.0,
    **changes: Any,
) -> None:
    """Compare with compute_loss, with all kinds of weights; ``trust > 0`` mixes the logits of two models as teacher."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.rand(N, generator=generator, dtype=torch.float64)
        for name in ("policy_weights", "distillation_weights")
    }
    tokens = TokenBatch(
        sampled_ids=case.ids,
        old_log_probs=case.old,
        advantages=case.advantages,
        rollout_is_weights=case.rollout,
        distilled=distilled,
        distillation_coef=0.8,
        **weights,
    )
    tokens = replace(tokens, **changes)
    policy: list[LinearHead] = []
    teacher = None
    if distilled is not None and bool(distilled.any()):
        first = LinearHead(case.teacher_hidden[distilled], case.teacher_head, case.teacher_bias)
        second = LinearHead(case.hidden[distilled].flip(0), case.head, case.bias)
        policy = [replace(first, coefficient=1.0 - trust), replace(second, coefficient=trust)] if trust else [first]
        logits = sum(part.coefficient * (part.hidden @ part.weight.T + part.bias) for part in policy)
        teacher = (logits / case.temperature).log_softmax(-1).detach()
    distributions = read_distributions(case.student(), teacher, tokens, config)
    expected = compute_loss(tokens, distributions, config)
    expected.loss.backward()
    gradients = case.gradients()
    student = LinearHead(case.hidden, case.head, case.bias)
    outputs = fused_linear_sdpo_loss(student, policy, tokens, config, temperature=case.temperature, chunk_size=size)
    outputs.loss.backward()
    tolerances = {"rtol": 0.0, "atol": 1e-10}
    torch.testing.assert_close(outputs.loss, expected.loss, **tolerances)
    torch.testing.assert_close(outputs.token_losses, expected.token_losses.detach(), **tolerances)
    torch.testing.assert_close(outputs.student_log_probs, distributions.student_log_probs.detach(), **tolerances)
    if distributions.teacher_log_probs is not None:
        torch.testing.assert_close(outputs.teacher_log_probs, distributions.teacher_log_probs, **tolerances)
    for result, reference in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(result, reference, **tolerances)
    assert outputs.sums.keys() == expected.sums.keys()
    for name, (total, count) in expected.sums.items():
        assert float(outputs.sums[name][0]) == pytest.approx(float(total), abs=1e-10), name
        assert int(outputs.sums[name][1]) == int(count), name


@pytest.mark.parametrize("policy_loss_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", LEVELS)
def test_grpo_and_sdpo_equal_compute_loss(level: str, policy_loss_weight: float) -> None:
    config = SelfDistillationConfig(
        **LEVELS[level], policy_loss_weight=policy_loss_weight, is_clip=1.1, divergence_clip=0.1
    )
    partly_distilled = torch.tensor([True, False, True, True, False, True, True])
    for distilled in (partly_distilled, torch.ones(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool), None):
        for size in (1, 3, N, 50):
            assert_equals_compute_loss(make_case(), config, distilled, size)


@pytest.mark.parametrize("policy_loss_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", LEVELS)
def test_kl_to_a_reference_and_entropy_equal_compute_loss(level: str, policy_loss_weight: float) -> None:
    config = SelfDistillationConfig(
        **LEVELS[level], policy_loss_weight=policy_loss_weight, is_clip=1.1, divergence_clip=0.1
    )
    partly_distilled = torch.tensor([True, False, True, True, False, True, True])
    case = make_case()
    reference = case.old + 0.5 * case.advantages
    for terms in (
        Regularization(0.3, "low_var_kl", 0.2),
        Regularization(0.3, "k1+", 0.0),
        Regularization(None, "kl", 0.2),
    ):
        changes = {"regularization": terms, "ref_log_probs": reference if terms.kl_loss_coef is not None else None}
        for distilled in (partly_distilled, torch.ones(N, dtype=torch.bool), None):
            for size in (3, 50):
                assert_equals_compute_loss(case, config, distilled, size, **changes)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2])
def test_result_does_not_depend_on_the_block_size(level: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdpo.kernels.chunked_log_probs.BLOCK_BYTES", rows * V * 8)
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.3, divergence_clip=0.1)
    partly_distilled = torch.tensor([True, False, True, True, True, True, True])
    for size in (3, N):
        assert_equals_compute_loss(make_case(), config, partly_distilled, size)
    assert_same_run(replace(make_case(), softcap=1.5), config, partly_distilled, torch.ones(N), N)


@pytest.mark.parametrize("level", ["full, alpha=0.0", "renormalised, alpha=0.5", "sampled token"])
def test_teacher_of_two_models(level: str) -> None:
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.2)
    partly_distilled = torch.tensor([True, False, True, True, False, True, True])
    assert_equals_compute_loss(make_case(), config, partly_distilled, 2, trust=0.35)


@pytest.mark.parametrize("level", ["full, alpha=0.5", "tail, alpha=1.0", "sampled token"])
def test_rollout_weights_computed_by_the_loss_are_truncated_ratios(level: str) -> None:
    case, partly_distilled = make_case(), torch.tensor([True, False, True, True, False, True, True])
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.3)
    log_probs = case.student().detach().gather(-1, case.ids[:, None])[:, 0]
    ratios = torch.tensor([0.4, 0.9, 1.5, 0.7, 30.0, 1.9, 1.0], dtype=torch.float64)
    computed = {"rollout_is_weights": None, "rollout_log_probs": log_probs - ratios.log(), "rollout_is_threshold": 1.7}
    on_policy_weights = torch.tensor([0.4, 0.9, 1.5, 0.7, 1.7, 1.7, 1.0], dtype=torch.float64)
    off_policy_weights = ((case.old - log_probs).exp() * ratios).clamp(max=1.7)
    assert not torch.allclose(on_policy_weights, off_policy_weights)
    for old, weights in ((None, on_policy_weights), (case.old, off_policy_weights)):
        assert_equals_compute_loss(case, config, partly_distilled, 2, old_log_probs=old, **computed)
        results = []
        # Given weights take precedence over computed weights.
        for changes in (computed, {"rollout_is_weights": weights}, computed | {"rollout_is_weights": weights}):
            tokens = TokenBatch(
                case.ids,
                old_log_probs=old,
                policy_weights=torch.ones(N),
                advantages=case.advantages,
                distilled=partly_distilled,
                distillation_weights=torch.ones(N),
            )
            outputs = fused_linear_sdpo_loss(
                LinearHead(case.hidden, case.head, case.bias),
                [LinearHead(case.teacher_hidden[partly_distilled], case.teacher_head, case.teacher_bias)],
                replace(tokens, **changes),
                config,
                temperature=case.temperature,
            )
            outputs.loss.backward()
            results.append((outputs.token_losses, *case.gradients()))
        for computed_result, given, both in zip(*results, strict=True):
            torch.testing.assert_close(computed_result, given, rtol=0.0, atol=1e-10)
            assert torch.equal(both, given)


@pytest.mark.parametrize("size", [1, 3, N, None])
def test_score_tokens(size: int | None) -> None:
    case = replace(make_case(), softcap=1.5)
    student = LinearHead(case.hidden, case.head, case.bias, case.softcap)
    result, entropies = score_tokens(student, case.ids, temperature=case.temperature, chunk_size=size)
    distributions = case.student().detach()
    reference = distributions.gather(-1, case.ids[:, None])[:, 0]
    torch.testing.assert_close(result, reference, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(entropies, -(distributions.exp() * distributions).sum(-1), rtol=0.0, atol=1e-12)
    assert not result.requires_grad
    none, _ = score_tokens(LinearHead(case.hidden[:0], case.head), case.ids[:0])
    assert none.shape == (0,)
    half = LinearHead(case.hidden.bfloat16(), case.head.bfloat16(), case.bias.bfloat16())
    assert score_tokens(half, case.ids, chunk_size=size)[0].dtype == torch.float32


def test_public_loss_averages_each_part_over_its_tokens() -> None:
    case = make_case()
    mask, distilled = (torch.tensor(values, dtype=torch.bool) for values in MASKS["some"])
    both = mask & distilled
    results = {}
    for coef in (0.0, 0.3, 1.0):
        config = SelfDistillationConfig(alpha=0.5, policy_loss_weight=coef)
        loss, values = run_fused(case, config, mask, distilled, 2, advantages=case.advantages)
        loss.backward()
        results[coef] = float(loss.detach()), case.gradients(), values
    without_advantages, _ = run_fused(
        case, SelfDistillationConfig(alpha=0.5, policy_loss_weight=0.3), mask, distilled, 2
    )
    assert results[0.0][0] == pytest.approx(float(without_advantages.detach()), abs=1e-14)
    # PPO loss: the ratios of make_case, clipped to 0.8 and 1.2, at the tokens of the mask.
    ratio = torch.tensor([0.5, 1.05, 2.5, 0.6, 3.0, 0.95, 1.5], dtype=torch.float64)
    policy_losses = torch.maximum(-case.advantages * ratio, -case.advantages * ratio.clamp(0.8, 1.2)) * case.rollout
    assert results[1.0][0] == pytest.approx(float(policy_losses[mask].mean()), abs=1e-12)
    assert results[0.3][0] == pytest.approx(0.3 * results[1.0][0] + 0.7 * results[0.0][0], abs=1e-12)
    for mixed, grpo, sdpo in zip(results[0.3][1], results[1.0][1], results[0.0][1], strict=True):
        torch.testing.assert_close(mixed, 0.3 * grpo + 0.7 * sdpo, rtol=0.0, atol=1e-12)
    assert int(both.sum()) != int(mask.sum())
    assert results[0.3][2][metrics.ADVANTAGES_MEAN] == pytest.approx(float(case.advantages[mask].mean()))


@pytest.mark.parametrize("advantages", [True, False])
def test_public_terms_for_kl_and_entropy_are_averaged_over_the_response_mask(advantages: bool) -> None:
    """The reference is 0.3 KL - 0.2 H from the distributions, averaged over the mask, not over distilled tokens."""
    case = make_case()
    mask, distilled = (torch.tensor(values, dtype=torch.bool) for values in MASKS["some"])
    reference = case.old + 0.5 * case.advantages
    terms = {"ref_log_probs": reference, "kl_loss_coef": 0.3, "kl_loss_type": "k3", "entropy_coeff": 0.2}
    given = {"advantages": case.advantages} if advantages else {}
    config = SelfDistillationConfig(alpha=0.5, policy_loss_weight=0.4)
    student = case.student()
    log_ratio = student.gather(-1, case.ids[:, None])[:, 0] - reference
    kl = (torch.exp(-log_ratio) - 1.0 + log_ratio)[mask].mean()
    entropy = -(student.exp() * student).sum(-1)[mask].mean()
    (0.3 * kl - 0.2 * entropy).backward()
    expected = case.gradients()
    base, _ = run_fused(case, config, mask, distilled, 2, **given)
    base.backward()
    expected = [term + rest for term, rest in zip(expected, case.gradients(), strict=True)]
    loss, values = run_fused(case, config, mask, distilled, 2, **given, **terms)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float((base + 0.3 * kl - 0.2 * entropy).detach()), abs=1e-12)
    for result, expected_gradient in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(result, expected_gradient, rtol=0.0, atol=1e-12)
    assert values[metrics.KL_LOSS] == pytest.approx(float(kl.detach()), abs=1e-12)
    assert values[metrics.ENTROPY] == pytest.approx(float(entropy.detach()), abs=1e-12)


def test_kl_needs_ref_log_probs_and_drops_nonfinite_tokens() -> None:
    case, mask = make_case(), torch.ones(N)
    with pytest.raises(ValueError, match=r"ref_log_probs is required by kl_loss_coef=0\.3"):
        run_fused(case, SelfDistillationConfig(), mask, mask, 3, kl_loss_coef=0.3)
    reference = case.old.clone()
    reference[2] = torch.nan
    _, values = run_fused(case, SelfDistillationConfig(), mask, mask, 3, kl_loss_coef=0.3, ref_log_probs=reference)
    assert values[metrics.NONFINITE_SAMPLES] == 1.0
    _, values = run_fused(case, SelfDistillationConfig(), mask, mask, 3, ref_log_probs=reference)
    assert values[metrics.NONFINITE_SAMPLES] == 0.0, "without the term, its log-probs must not be read"


# Non-finite, unused and missing values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["hidden", "teacher_hidden", "old", "rollout"])
def test_nonfinite_token_is_dropped_and_counted(field: str, value: float) -> None:
    config = SelfDistillationConfig(alpha=0.5)
    case, mask = make_case(), torch.ones(N)
    changed = getattr(case, field).detach().clone()
    changed[2] = value
    nonfinite = replace(case, **{field: changed.requires_grad_(field == "hidden")})
    mask_without = mask.clone()
    mask_without[2] = 0
    loss, values = run_fused(nonfinite, config, mask, mask, 3)
    loss.backward()
    gradients = nonfinite.gradients()
    reference, reference_values = run_fused(case, config, mask_without, mask, 3)
    reference.backward()
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), abs=1e-14)
    for result, expected in zip(gradients, case.gradients(), strict=True):
        torch.testing.assert_close(result, expected, rtol=0.0, atol=1e-14)
    assert values == pytest.approx(reference_values | {metrics.NONFINITE_SAMPLES: 1.0}, abs=1e-14)
    # A masked token is not counted.
    assert run_fused(nonfinite, config, mask_without, mask, 3)[1] == pytest.approx(reference_values, abs=1e-14)


def test_sampled_token_of_teacher_probability_zero_is_dropped() -> None:
    case = make_case()
    case.teacher_bias[case.ids[2]] = -torch.inf
    num_dropped = int((case.ids == case.ids[2]).sum())
    mask = torch.ones(N)
    assert_same_run(case, SelfDistillationConfig(alpha=0.0), mask, mask, 3)
    _, values = run_fused(case, SelfDistillationConfig(alpha=0.0), mask, mask, 3)
    assert values[metrics.NONFINITE_SAMPLES] == num_dropped < N


def test_nonfinite_token_has_a_nonfinite_token_loss() -> None:
    case = make_case()
    hidden = case.hidden.detach().clone()
    hidden[4] = float("nan")
    tokens = TokenBatch(case.ids, distilled=torch.ones(N, dtype=torch.bool), distillation_weights=torch.ones(N))
    teacher = [LinearHead(case.teacher_hidden, case.teacher_head)]
    outputs = fused_linear_sdpo_loss(
        LinearHead(hidden, case.head), teacher, tokens, SelfDistillationConfig(is_clip=None), chunk_size=3
    )
    assert torch.isfinite(outputs.token_losses).tolist() == [True] * 4 + [False] + [True] * 2


def test_gradients_only_for_tensors_that_require_them() -> None:
    config, mask = SelfDistillationConfig(alpha=0.5), torch.ones(N)
    case = make_case()
    run_fused(case, config, mask, mask, 3)[0].backward()
    grad_hidden, grad_head, grad_bias = case.gradients()
    case.head.requires_grad_(False)
    run_fused(case, config, mask, mask, 3, student_bias=case.bias.detach())[0].backward()
    assert (case.head.grad, case.bias.grad) == (None, None)
    assert torch.equal(case.gradients()[0], grad_hidden)
    case.head.requires_grad_(True)
    case.hidden.requires_grad_(False)
    run_fused(case, config, mask, mask, 3)[0].backward()
    assert case.hidden.grad is None
    assert torch.equal(case.gradients()[1], grad_head)
    with torch.no_grad():
        loss, _ = run_fused(case, config, mask, mask, 3)
    assert not loss.requires_grad
    assert grad_bias.abs().sum() > 0


def test_backward_pass_can_be_repeated() -> None:
    case, mask = make_case(), torch.ones(N)
    loss, _ = run_fused(case, SelfDistillationConfig(), mask, mask, 3)
    loss.backward(retain_graph=True)
    first = case.gradients()
    (2.0 * loss).backward()
    for once, twice in zip(first, case.gradients(), strict=True):
        torch.testing.assert_close(2.0 * once, twice, rtol=1e-15, atol=0.0)


def test_is_clip_needs_old_log_probs() -> None:
    with pytest.raises(ValueError, match="old_log_probs is required"):
        run_fused(make_case(), SelfDistillationConfig(), torch.ones(N), torch.ones(N), 3, old_log_probs=None)
    loss, _ = run_fused(
        make_case(), SelfDistillationConfig(is_clip=None), torch.ones(N), torch.ones(N), 3, old_log_probs=None
    )
    assert float(loss.detach()) > 0


def test_default_chunk_keeps_the_student_logits_below_156_megabytes() -> None:
    assert choose_chunk_size(151_936, torch.bfloat16) == 513  # 513 * 151,936 * 2 bytes = 155.9 MB
    assert choose_chunk_size(151_936, torch.float32) == 256
    assert choose_chunk_size(10**9, torch.float32) == 1
    assert choose_chunk_size(151_936, torch.bfloat16, torch.device("cpu")) == 513


def test_default_chunk_on_cuda_takes_at_most_an_eighth_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10**12
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**8)
    device = torch.device("cuda", 0)
    assert choose_chunk_size(151_936, torch.bfloat16, device) == 921  # 280 MB
    free = 10**9
    assert choose_chunk_size(100_000, torch.bfloat16, device) == 750  # (1 GB + 0.2 GB in the allocator's cache) / 8


# Chunk sizes and precision


@pytest.mark.parametrize("size", [1, 4, 63, 64, 65, 640])
def test_slices_have_equal_round_lengths(size: int) -> None:
    slices = list(cut_slice(640, size))
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(640))
    lengths = [s.stop - s.start for s in slices]
    number = -(-640 // size)
    assert len(set(lengths[:number])) == 1
    assert lengths == {63: [56] * 11 + [24]}.get(size, [640 // number] * number)
    assert list(cut_slice(0, size)) == []


def test_rest_of_an_odd_length_has_few_slices() -> None:
    assert [s.stop - s.start for s in cut_slice(1999, 512)] == [480, 480, 480, 480, 72, 7]
    assert max(len(list(cut_slice(length, 4096))) for length in range(1, 4097)) == 3


# Without top k, because rounding changes the kept entries.
@pytest.mark.parametrize("level", [level for level in LEVELS if "full" in level or level == "sampled token"])
def test_bfloat16_with_small_blocks_is_close_to_float64(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's gradient is computed in blocks of 3 of 40 rows, two blocks per part, from the same bfloat16 inputs.

    bfloat16 has 8 bits, so relative errors of at most 2^-9: in the logits, with a size of about 8, and hence in the
    probabilities; then in the gradient by the logits, and in its products.
    """
    monkeypatch.setattr("sdpo.kernels.head_grad.PIECE_BYTES", 3 * 16 * 4)
    monkeypatch.setattr("sdpo.kernels.head_grad.PART_PIECES", 2)
    config = SelfDistillationConfig(**LEVELS[level], is_clip=None)
    half = replace(make_case(torch.bfloat16, size=(70, 40, 16)), temperature=1.0)
    tensors = {name: value for name, value in vars(half).items() if isinstance(value, Tensor)}
    full_precision = replace(half, **{n: v.detach().double() for n, v in tensors.items() if v.dtype == torch.bfloat16})
    for leaf in full_precision.leaves():
        leaf.requires_grad_()
    mask = torch.ones(70)
    for size in (16, 70):
        results = []
        for case in (full_precision, half):
            loss, _ = run_fused(case, config, mask, mask, size)
            loss.backward()
            assert [leaf.grad.dtype for leaf in case.leaves() if leaf.grad is not None] == 3 * [case.head.dtype]
            results.append((float(loss.detach()), case.gradients()))
        (expected, gradients), (half_loss, half_gradients) = results
        assert half_loss == pytest.approx(expected, rel=0.01)
        for reference, result in zip(gradients, half_gradients, strict=True):
            assert float((result.double() - reference).norm() / reference.norm()) < 0.015


def test_bfloat16_gradients_of_many_chunks_are_summed_in_float32() -> None:
    """2,048 equal tokens in chunks of 8: a bfloat16 sum stops growing when a chunk is 2^-9 of the sum."""
    case = replace(make_case(torch.bfloat16, size=(7, 40, 16)), temperature=1.0)
    hidden_states = {name: getattr(case, name).detach()[:1].repeat(2048, 1) for name in ("hidden", "teacher_hidden")}
    ids, old, rollout = (getattr(case, name)[:1].repeat(2048) for name in ("ids", "old", "rollout"))
    case = replace(case, ids=ids, old=old, rollout=rollout, **hidden_states)
    mask = torch.ones(2048)
    gradients = []
    for size in (8, 2048):
        run_fused(case, SelfDistillationConfig(alpha=0.5), mask, mask, size)[0].backward()
        gradients.append(case.gradients()[1].float())
    torch.testing.assert_close(*gradients, rtol=0.01, atol=1e-6)
    assert float(gradients[1].abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", ["full, alpha=0.0", "full, alpha=0.5", "tail, alpha=1.0", "sampled token"])
def test_memory_does_not_grow_with_the_number_of_tokens(
    level: str, dtype: torch.dtype, count_peak: Callable[[Callable[[], Any]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """V = 2,000, H = 4, chunks of 32, blocks of 4; each token adds its gradient and a few scalars."""
    monkeypatch.setattr("sdpo.kernels.chunked_log_probs.BLOCK_BYTES", 4 * 2000 * 4)
    config = SelfDistillationConfig(**LEVELS[level])
    peaks = {}
    for number in (96, 288):
        case = make_case(dtype, size=(number, 2000, 4))
        mask = torch.ones(number)

        def run(case: Case = case, mask: Tensor = mask) -> None:
            run_fused(case, config, mask, mask, 32)[0].backward()

        peaks[number] = count_peak(run)
    # The student's logits, the teacher's, ten blocks in float32, gradients of head and bias.
    logits = 32 * 2000 * dtype.itemsize
    copies = 2.0 if dtype == torch.float32 else 1.25
    assert peaks[96] < copies * logits + 10 * 4 * 2000 * 4 + 3 * 2000 * 5 * 4 + 96 * 300
    assert peaks[288] - peaks[96] < 192 * 300 < logits
