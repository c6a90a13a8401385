"""The loss from hidden states against the one from next-token distributions: value, gradients, metrics, memory."""

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
    """N tokens of a student and a teacher that see other prompts; ``shared`` is the student's head as the teacher's."""

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
    taken = case.student().detach().double().gather(-1, case.ids[:, None])[:, 0]
    ratios = torch.tensor([0.5, 1.05, 2.5, 0.6, 3.0, 0.95, 1.5], dtype=torch.float64).repeat(n // 7 + 1)[:n]
    return replace(case, old=taken - ratios.log())


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


def run_materialised(
    case: Case, config: SelfDistillationConfig, mask: Tensor, distilled: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The official function, on N samples of one token each."""
    student, teacher = case.student(), case.teacher()
    kept: dict[str, Tensor] = {}
    if config.distillation_topk is not None:
        student_kept, indices = student.topk(config.distillation_topk, dim=-1)
        kept = {"student_topk_log_probs": student_kept[:, None]}
        kept |= {"teacher_topk_log_probs": teacher.gather(-1, indices)[:, None]}
    elif config.full_logit_distillation:
        kept = {"student_all_log_probs": student[:, None], "teacher_all_log_probs": teacher[:, None]}
    return compute_self_distillation_loss(
        student.gather(-1, case.ids[:, None]),
        teacher.gather(-1, case.ids[:, None]),
        mask[:, None],
        config,
        old_log_probs=case.old[:, None],
        self_distillation_mask=distilled,
        rollout_is_weights=case.rollout[:, None],
        **kept,
    )


def assert_same_run(case: Case, config: SelfDistillationConfig, mask: Tensor, distilled: Tensor, size: Any) -> None:
    loss, values = run_materialised(case, config, mask, distilled)
    (3.0 * loss).backward()
    expected = case.gradients()
    fused_loss, fused_values = run_fused(case, config, mask, distilled, size)
    (3.0 * fused_loss).backward()
    assert float(fused_loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-10)
    for result, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0.0, atol=1e-10)
    if bool((mask.bool() & distilled.bool()).any()):
        assert {name: fused_values[name] for name in values} == pytest.approx(values, abs=1e-10)
    else:
        assert fused_values[metrics.NONFINITE_SAMPLES] == 0.0


# The distillation loss


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("level", LEVELS)
def test_value_gradients_and_metrics_are_the_materialised_ones(level: str, clip: str) -> None:
    chosen = LEVELS[level] | CLIPS[clip]
    if level == "sampled token":
        chosen.pop("teacher_entropy_beta", None)
    config = SelfDistillationConfig(**chosen)
    for masks in MASKS.values():
        mask, distilled = (torch.tensor(values) for values in masks)
        for size in (1, 3, N, 50):
            assert_same_run(make_case(), config, mask, distilled, size)


@pytest.mark.parametrize("level", ["full, alpha=0.5", "tail, alpha=0.0", "sampled token"])
def test_a_head_shared_with_the_teacher_learns_as_the_student_s_alone(level: str) -> None:
    config = SelfDistillationConfig(**LEVELS[level])
    case = make_case(tied=True)
    assert case.teacher_head is case.head
    assert_same_run(case, config, torch.ones(N), torch.ones(N), 3)


def test_softcap_bounds_the_logits_before_the_temperature() -> None:
    case = replace(make_case(), softcap=1.5)
    for level in ("full, alpha=0.3", "tail, alpha=1.0", "sampled token"):
        assert_same_run(case, SelfDistillationConfig(**LEVELS[level]), torch.ones(N), torch.ones(N), 2)


@pytest.mark.parametrize("level", LEVELS)
def test_logits_of_thousands(level: str) -> None:
    """Most probabilities underflow, in float64 too; exp of the logits themselves would overflow.

    Logits of 3,000 are off by 3,000 * 2^-53, and hidden states of 1,000 multiply that.
    """
    case = make_case()
    hidden, teacher_hidden = (1000.0 * h.detach() for h in (case.hidden, case.teacher_hidden))
    case = replace(case, hidden=hidden.requires_grad_(), teacher_hidden=teacher_hidden)
    assert float((hidden @ case.head.T).max().detach()) > 2000
    assert int((case.student().exp() == 0).sum()) > N * V // 2
    config = SelfDistillationConfig(**LEVELS[level], is_clip=None)
    loss, _ = run_materialised(case, config, torch.ones(N), torch.ones(N))
    loss.backward()
    expected = case.gradients()
    fused_loss, _ = run_fused(case, config, torch.ones(N), torch.ones(N), 3)
    fused_loss.backward()
    assert float(fused_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    for result, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-9)


def test_gradients_by_finite_differences() -> None:
    """The Jensen-Shannon divergence with both clips off, since those scale by what is held constant."""
    case = replace(make_case(), softcap=2.0)
    config = SelfDistillationConfig(alpha=0.4, is_clip=None)

    def value(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        moved = replace(case, hidden=hidden, head=head, bias=bias)
        return run_fused(moved, config, torch.ones(N), torch.ones(N), 3)[0]

    assert torch.autograd.gradcheck(value, case.leaves(), atol=1e-8)


@pytest.mark.parametrize("level", ["full, alpha=0.0", "full, alpha=0.5", "full, alpha=1.0", "sampled token"])
def test_bfloat16_is_float32_within_its_rounding(level: str) -> None:
    """Logits of size 12 at most are rounded by 2^-9 of that each, gradients by 2^-9 of their largest entry's size."""
    config = SelfDistillationConfig(**LEVELS[level])
    half = replace(make_case(torch.bfloat16, size=(70, 40, 16)), temperature=1.0)
    tensors = {name: value for name, value in vars(half).items() if isinstance(value, Tensor)}
    floats = {name: value.detach().float() for name, value in tensors.items() if value.dtype == torch.bfloat16}
    whole = replace(half, **floats)
    for leaf in whole.leaves():
        leaf.requires_grad_()
    mask = torch.ones(70)
    results = []
    for case in (whole, half):
        loss, _ = run_fused(case, config, mask, mask, 16)
        loss.backward()
        assert [leaf.grad.dtype for leaf in case.leaves() if leaf.grad is not None] == 3 * [case.head.dtype]
        results.append((float(loss.detach()), case.gradients()))
    (expected, gradients), (loss_in_half, half_gradients) = results
    assert loss_in_half == pytest.approx(expected, rel=0.02)
    for wanted, result in zip(gradients, half_gradients, strict=True):
        assert float((result.float() - wanted).norm() / wanted.norm()) < 0.02


def test_no_tensor_is_as_large_as_all_tokens_times_the_vocabulary() -> None:
    """64 tokens of 400 entries in chunks of 8: the largest is a chunk's 8 * 400, the head having 400 * 3 only."""

    class Largest(TorchDispatchMode):
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
            chosen = LEVELS[level] | (CLIPS[clip] if level != "sampled token" else {})
            with Largest() as largest:
                config = SelfDistillationConfig(**chosen, policy_loss_weight=0.5)
                run_fused(case, config, torch.ones(64), mask, 8, advantages=case.advantages)[0].backward()
            assert largest.numel == 8 * 400, level


# The blend, in the form of the engines


def run_engine_form(
    case: Case,
    config: SelfDistillationConfig,
    distilled: Tensor | None,
    size: int | None,
    trust: float = 0.0,
    **changes: Any,
) -> None:
    """Weights of every kind, tokens of which some are distilled; trust > 0: a teacher of two models' logits."""
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
    read = read_distributions(case.student(), teacher, tokens, config)
    expected = compute_loss(tokens, read, config)
    expected.loss.backward()
    gradients = case.gradients()
    student = LinearHead(case.hidden, case.head, case.bias)
    outputs = fused_linear_sdpo_loss(student, policy, tokens, config, temperature=case.temperature, chunk_size=size)
    outputs.loss.backward()
    close = {"rtol": 0.0, "atol": 1e-10}
    torch.testing.assert_close(outputs.loss, expected.loss, **close)
    torch.testing.assert_close(outputs.token_losses, expected.token_losses.detach(), **close)
    torch.testing.assert_close(outputs.student_log_probs, read.student_log_probs.detach(), **close)
    if read.teacher_log_probs is not None:
        torch.testing.assert_close(outputs.teacher_log_probs, read.teacher_log_probs, **close)
    for result, wanted in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(result, wanted, **close)
    assert outputs.sums.keys() == expected.sums.keys()
    for name, (total, count) in expected.sums.items():
        assert float(outputs.sums[name][0]) == pytest.approx(float(total), abs=1e-10), name
        assert int(outputs.sums[name][1]) == int(count), name


@pytest.mark.parametrize("policy_loss_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", LEVELS)
def test_the_blend_is_that_of_compute_loss(level: str, policy_loss_weight: float) -> None:
    config = SelfDistillationConfig(
        **LEVELS[level], policy_loss_weight=policy_loss_weight, is_clip=1.1, divergence_clip=0.1
    )
    some = torch.tensor([True, False, True, True, False, True, True])
    for distilled in (some, torch.ones(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool), None):
        for size in (1, 3, N, 50):
            run_engine_form(make_case(), config, distilled, size)


@pytest.mark.parametrize("policy_loss_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", LEVELS)
def test_kl_to_a_reference_and_entropy_are_those_of_compute_loss(level: str, policy_loss_weight: float) -> None:
    config = SelfDistillationConfig(
        **LEVELS[level], policy_loss_weight=policy_loss_weight, is_clip=1.1, divergence_clip=0.1
    )
    some = torch.tensor([True, False, True, True, False, True, True])
    case = make_case()
    reference = case.old + 0.5 * case.advantages
    for terms in (
        Regularization(0.3, "low_var_kl", 0.2),
        Regularization(0.3, "k1+", 0.0),
        Regularization(None, "kl", 0.2),
    ):
        changes = {"regularization": terms, "ref_log_probs": reference if terms.kl_loss_coef is not None else None}
        for distilled in (some, torch.ones(N, dtype=torch.bool), None):
            for size in (3, 50):
                run_engine_form(case, config, distilled, size, **changes)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_within_a_chunk_change_nothing(level: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdpo.kernels.chunked_log_probs.BLOCK_BYTES", rows * V * 8)
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.3, divergence_clip=0.1)
    some = torch.tensor([True, False, True, True, True, True, True])
    for size in (3, N):
        run_engine_form(make_case(), config, some, size)
    assert_same_run(replace(make_case(), softcap=1.5), config, some, torch.ones(N), N)


@pytest.mark.parametrize("level", ["full, alpha=0.0", "renormalised, alpha=0.5", "sampled token"])
def test_a_teacher_of_two_models_logits(level: str) -> None:
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.2)
    some = torch.tensor([True, False, True, True, False, True, True])
    run_engine_form(make_case(), config, some, 2, trust=0.35)


@pytest.mark.parametrize("level", ["full, alpha=0.5", "tail, alpha=1.0", "sampled token"])
def test_rollout_weights_made_in_the_pass_are_the_truncated_ratios_by_token(level: str) -> None:
    case, some = make_case(), torch.tensor([True, False, True, True, False, True, True])
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.3)
    own = case.student().detach().gather(-1, case.ids[:, None])[:, 0]
    ratios = torch.tensor([0.4, 0.9, 1.5, 0.7, 30.0, 1.9, 1.0], dtype=torch.float64)
    made = {"rollout_is_weights": None, "rollout_log_probs": own - ratios.log(), "rollout_is_threshold": 1.7}
    by_own = torch.tensor([0.4, 0.9, 1.5, 0.7, 1.7, 1.7, 1.0], dtype=torch.float64)
    by_old = ((case.old - own).exp() * ratios).clamp(max=1.7)
    assert not torch.allclose(by_own, by_old)
    for old, weights in ((None, by_own), (case.old, by_old)):
        run_engine_form(case, config, some, 2, old_log_probs=old, **made)
        results = []
        # Weights that are given win over those that could be made.
        for changes in (made, {"rollout_is_weights": weights}, made | {"rollout_is_weights": weights}):
            tokens = TokenBatch(
                case.ids,
                old_log_probs=old,
                policy_weights=torch.ones(N),
                advantages=case.advantages,
                distilled=some,
                distillation_weights=torch.ones(N),
            )
            outputs = fused_linear_sdpo_loss(
                LinearHead(case.hidden, case.head, case.bias),
                [LinearHead(case.teacher_hidden[some], case.teacher_head, case.teacher_bias)],
                replace(tokens, **changes),
                config,
                temperature=case.temperature,
            )
            outputs.loss.backward()
            results.append((outputs.token_losses, *case.gradients()))
        for made_in_pass, given, both in zip(*results, strict=True):
            torch.testing.assert_close(made_in_pass, given, rtol=0.0, atol=1e-10)
            assert torch.equal(both, given)


@pytest.mark.parametrize("size", [1, 3, N, None])
def test_log_probabilities_of_the_sampled_tokens_and_entropies(size: int | None) -> None:
    case = replace(make_case(), softcap=1.5)
    student = LinearHead(case.hidden, case.head, case.bias, case.softcap)
    result, entropies = score_tokens(student, case.ids, temperature=case.temperature, chunk_size=size)
    distributions = case.student().detach()
    wanted = distributions.gather(-1, case.ids[:, None])[:, 0]
    torch.testing.assert_close(result, wanted, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(entropies, -(distributions.exp() * distributions).sum(-1), rtol=0.0, atol=1e-12)
    assert not result.requires_grad
    none, _ = score_tokens(LinearHead(case.hidden[:0], case.head), case.ids[:0])
    assert none.shape == (0,)
    half = LinearHead(case.hidden.bfloat16(), case.head.bfloat16(), case.bias.bfloat16())
    assert score_tokens(half, case.ids, chunk_size=size)[0].dtype == torch.float32


def test_the_public_blend_averages_each_part_over_its_own_tokens() -> None:
    case = make_case()
    mask, distilled = (torch.tensor(values, dtype=torch.bool) for values in MASKS["some"])
    both = mask & distilled
    results = {}
    for coef in (0.0, 0.3, 1.0):
        config = SelfDistillationConfig(alpha=0.5, policy_loss_weight=coef)
        loss, values = run_fused(case, config, mask, distilled, 2, advantages=case.advantages)
        loss.backward()
        results[coef] = float(loss.detach()), case.gradients(), values
    alone, _ = run_fused(case, SelfDistillationConfig(alpha=0.5, policy_loss_weight=0.3), mask, distilled, 2)
    assert results[0.0][0] == pytest.approx(float(alone.detach()), abs=1e-14)
    # PPO by hand: ratio 1 / what made old from it, bounds 0.8 and 1.2, at the tokens of the mask.
    ratio = torch.tensor([0.5, 1.05, 2.5, 0.6, 3.0, 0.95, 1.5], dtype=torch.float64)
    worse = torch.maximum(-case.advantages * ratio, -case.advantages * ratio.clamp(0.8, 1.2)) * case.rollout
    assert results[1.0][0] == pytest.approx(float(worse[mask].mean()), abs=1e-12)
    assert results[0.3][0] == pytest.approx(0.3 * results[1.0][0] + 0.7 * results[0.0][0], abs=1e-12)
    for blend, grpo, sdpo in zip(results[0.3][1], results[1.0][1], results[0.0][1], strict=True):
        torch.testing.assert_close(blend, 0.3 * grpo + 0.7 * sdpo, rtol=0.0, atol=1e-12)
    assert int(both.sum()) != int(mask.sum())
    assert results[0.3][2][metrics.ADVANTAGES_MEAN] == pytest.approx(float(case.advantages[mask].mean()))


@pytest.mark.parametrize("advantages", [True, False])
def test_the_public_terms_for_kl_and_entropy_are_averaged_over_all_counted_tokens(advantages: bool) -> None:
    """Alone, from the distributions: 0.3 KL - 0.2 H, over the mask and not only over distilled tokens."""
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
    for result, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0.0, atol=1e-12)
    assert values[metrics.KL_LOSS] == pytest.approx(float(kl.detach()), abs=1e-12)
    assert values[metrics.ENTROPY] == pytest.approx(float(entropy.detach()), abs=1e-12)


def test_kl_needs_the_reference_s_log_probabilities_and_drops_tokens_without_one() -> None:
    case, mask = make_case(), torch.ones(N)
    with pytest.raises(ValueError, match=r"ref_log_probs is required by kl_loss_coef=0\.3"):
        run_fused(case, SelfDistillationConfig(), mask, mask, 3, kl_loss_coef=0.3)
    reference = case.old.clone()
    reference[2] = torch.nan
    _, values = run_fused(case, SelfDistillationConfig(), mask, mask, 3, kl_loss_coef=0.3, ref_log_probs=reference)
    assert values[metrics.NONFINITE_SAMPLES] == 1.0
    _, values = run_fused(case, SelfDistillationConfig(), mask, mask, 3, ref_log_probs=reference)
    assert values[metrics.NONFINITE_SAMPLES] == 0.0, "without the term its values are not read"


# What is not finite, not needed, not given


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["hidden", "teacher_hidden", "old", "rollout"])
def test_a_token_that_is_not_finite_is_left_out_and_counted(place: str, value: float) -> None:
    config = SelfDistillationConfig(alpha=0.5)
    case, mask = make_case(), torch.ones(N)
    broken = getattr(case, place).detach().clone()
    broken[2] = value
    bad = replace(case, **{place: broken.requires_grad_(place == "hidden")})
    mask_without = mask.clone()
    mask_without[2] = 0
    loss, values = run_fused(bad, config, mask, mask, 3)
    loss.backward()
    gradients = bad.gradients()
    wanted, wanted_values = run_fused(case, config, mask_without, mask, 3)
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-14)
    for result, expected in zip(gradients, case.gradients(), strict=True):
        torch.testing.assert_close(result, expected, rtol=0.0, atol=1e-14)
    assert values == pytest.approx(wanted_values | {metrics.NONFINITE_SAMPLES: 1.0}, abs=1e-14)
    # Where the mask leaves it out already, it is no finding.
    assert run_fused(bad, config, mask_without, mask, 3)[1] == pytest.approx(wanted_values, abs=1e-14)


def test_a_sampled_token_that_the_teacher_rules_out_is_left_out_as_in_the_official_function() -> None:
    case = make_case()
    case.teacher_bias[case.ids[2]] = -torch.inf
    num_broken = int((case.ids == case.ids[2]).sum())
    mask = torch.ones(N)
    assert_same_run(case, SelfDistillationConfig(alpha=0.0), mask, mask, 3)
    _, values = run_fused(case, SelfDistillationConfig(alpha=0.0), mask, mask, 3)
    assert values[metrics.NONFINITE_SAMPLES] == num_broken < N


def test_a_token_that_is_not_finite_stands_in_the_token_losses() -> None:
    case = make_case()
    hidden = case.hidden.detach().clone()
    hidden[4] = float("nan")
    tokens = TokenBatch(case.ids, distilled=torch.ones(N, dtype=torch.bool), distillation_weights=torch.ones(N))
    teacher = [LinearHead(case.teacher_hidden, case.teacher_head)]
    outputs = fused_linear_sdpo_loss(
        LinearHead(hidden, case.head), teacher, tokens, SelfDistillationConfig(is_clip=None), chunk_size=3
    )
    assert torch.isfinite(outputs.token_losses).tolist() == [True] * 4 + [False] + [True] * 2


def test_only_what_requires_a_gradient_gets_one() -> None:
    config, mask = SelfDistillationConfig(alpha=0.5), torch.ones(N)
    case = make_case()
    run_fused(case, config, mask, mask, 3)[0].backward()
    grad_hidden, by_head, grad_bias = case.gradients()
    case.head.requires_grad_(False)
    run_fused(case, config, mask, mask, 3, student_bias=case.bias.detach())[0].backward()
    assert (case.head.grad, case.bias.grad) == (None, None)
    assert torch.equal(case.gradients()[0], grad_hidden)
    case.head.requires_grad_(True)
    case.hidden.requires_grad_(False)
    run_fused(case, config, mask, mask, 3)[0].backward()
    assert case.hidden.grad is None
    assert torch.equal(case.gradients()[1], by_head)
    with torch.no_grad():
        loss, _ = run_fused(case, config, mask, mask, 3)
    assert not loss.requires_grad
    assert grad_bias.abs().sum() > 0


def test_a_backward_pass_may_be_repeated() -> None:
    case, mask = make_case(), torch.ones(N)
    loss, _ = run_fused(case, SelfDistillationConfig(), mask, mask, 3)
    loss.backward(retain_graph=True)
    first = case.gradients()
    (2.0 * loss).backward()
    for once, twice in zip(first, case.gradients(), strict=True):
        torch.testing.assert_close(2.0 * once, twice, rtol=1e-15, atol=0.0)


def test_a_ratio_needs_the_old_policy() -> None:
    with pytest.raises(ValueError, match="old_log_probs is required"):
        run_fused(make_case(), SelfDistillationConfig(), torch.ones(N), torch.ones(N), 3, old_log_probs=None)
    loss, _ = run_fused(
        make_case(), SelfDistillationConfig(is_clip=None), torch.ones(N), torch.ones(N), 3, old_log_probs=None
    )
    assert float(loss.detach()) > 0


def test_the_default_chunk_keeps_the_student_s_logits_below_156_megabytes() -> None:
    assert choose_chunk_size(151_936, torch.bfloat16) == 513  # 513 * 151,936 * 2 bytes = 155.9 MB
    assert choose_chunk_size(151_936, torch.float32) == 256
    assert choose_chunk_size(10**9, torch.float32) == 1
    assert choose_chunk_size(151_936, torch.bfloat16, torch.device("cpu")) == 513


def test_on_cuda_the_default_chunk_takes_an_eighth_of_the_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10**12
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**8)
    device = torch.device("cuda", 0)
    assert choose_chunk_size(151_936, torch.bfloat16, device) == 921  # 280 MB
    free = 10**9
    assert choose_chunk_size(100_000, torch.bfloat16, device) == 750  # (1 GB + 0.2 GB that the cache holds) / 8


# Sizes, pieces, precision


@pytest.mark.parametrize("size", [1, 4, 63, 64, 65, 640])
def test_slices_are_as_equal_as_round_lengths_can_be(size: int) -> None:
    slices = list(cut_slice(640, size))
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(640))
    lengths = [s.stop - s.start for s in slices]
    number = -(-640 // size)
    assert len(set(lengths[:number])) == 1
    assert lengths == {63: [56] * 11 + [24]}.get(size, [640 // number] * number)
    assert list(cut_slice(0, size)) == []


def test_what_is_left_of_an_odd_length_is_cut_into_few() -> None:
    assert [s.stop - s.start for s in cut_slice(1999, 512)] == [480, 480, 480, 480, 72, 7]
    assert max(len(list(cut_slice(length, 4096))) for length in range(1, 4097)) == 3


# Not the top k: rounding exchanges which entries are kept.
@pytest.mark.parametrize("level", [level for level in LEVELS if "full" in level or level == "sampled token"])
def test_bfloat16_is_within_its_rounding_of_float64_in_any_pieces(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's gradient in pieces of 3 of 40 rows, two pieces a part. What is exact is taken from the same numbers.

    A bfloat16 has 8 bits, so it is off by 2^-9 of itself at most: logits, and so probabilities by as much as their size
    (about 8); then the gradient by the logits, and its products.
    """
    monkeypatch.setattr("sdpo.kernels.head_grad.PIECE_BYTES", 3 * 16 * 4)
    monkeypatch.setattr("sdpo.kernels.head_grad.PART_PIECES", 2)
    config = SelfDistillationConfig(**LEVELS[level], is_clip=None)
    half = replace(make_case(torch.bfloat16, size=(70, 40, 16)), temperature=1.0)
    tensors = {name: value for name, value in vars(half).items() if isinstance(value, Tensor)}
    whole = replace(half, **{n: v.detach().double() for n, v in tensors.items() if v.dtype == torch.bfloat16})
    for leaf in whole.leaves():
        leaf.requires_grad_()
    mask = torch.ones(70)
    for size in (16, 70):
        results = []
        for case in (whole, half):
            loss, _ = run_fused(case, config, mask, mask, size)
            loss.backward()
            assert [leaf.grad.dtype for leaf in case.leaves() if leaf.grad is not None] == 3 * [case.head.dtype]
            results.append((float(loss.detach()), case.gradients()))
        (expected, gradients), (loss_in_half, half_gradients) = results
        assert loss_in_half == pytest.approx(expected, rel=0.01)
        for wanted, result in zip(gradients, half_gradients, strict=True):
            assert float((result.double() - wanted).norm() / wanted.norm()) < 0.015


def test_in_bfloat16_many_chunks_are_summed_up_in_float32() -> None:
    """2,048 equal tokens in chunks of 8: a sum in bfloat16 stands still when a chunk is 2^-9 of it."""
    case = replace(make_case(torch.bfloat16, size=(7, 40, 16)), temperature=1.0)
    many = {name: getattr(case, name).detach()[:1].repeat(2048, 1) for name in ("hidden", "teacher_hidden")}
    ids, old, rollout = (getattr(case, name)[:1].repeat(2048) for name in ("ids", "old", "rollout"))
    case = replace(case, ids=ids, old=old, rollout=rollout, **many)
    mask = torch.ones(2048)
    gradients = []
    for size in (8, 2048):
        run_fused(case, SelfDistillationConfig(alpha=0.5), mask, mask, size)[0].backward()
        gradients.append(case.gradients()[1].float())
    torch.testing.assert_close(*gradients, rtol=0.01, atol=1e-6)
    assert float(gradients[1].abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", ["full, alpha=0.0", "full, alpha=0.5", "tail, alpha=1.0", "sampled token"])
def test_memory_does_not_grow_with_the_tokens(
    level: str, dtype: torch.dtype, count_peak: Callable[[Callable[[], Any]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """V = 2,000, H = 4, chunks of 32, blocks of 4. A token itself costs its gradient and some numbers."""
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
    both = 2.0 if dtype == torch.float32 else 1.25
    assert peaks[96] < both * logits + 10 * 4 * 2000 * 4 + 3 * 2000 * 5 * 4 + 96 * 300
    assert peaks[288] - peaks[96] < 192 * 300 < logits
