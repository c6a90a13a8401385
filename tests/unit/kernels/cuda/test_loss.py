"""The CUDA loss compared with float64 references: compiled on a GPU, else in Triton's interpreter.

float32 has a precision of 6e-8; the losses and gradients here sum 75 entries and are at most 10.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from operation_counter import OperationCounter
from torch import Tensor

pytest.importorskip("triton", reason="has no wheel for this system")

from sdpo import SelfDistillationConfig, fused_self_distillation_loss
from sdpo.algorithm.batch import TokenBatch
from sdpo.kernels import chunked_log_probs, dispatch, fused_linear_loss
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.cpu.grouped_topk import topk_support
from sdpo.kernels.cuda import chunks, fused_loss
from sdpo.kernels.cuda.logits import Logits
from sdpo.kernels.cuda.row_statistics import compute_row_statistics
from sdpo.kernels.cuda.scaling import scale
from sdpo.kernels.cuda.top_k import select_top_ids
from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.observability import metrics

REFERENCE = Path(__file__).parents[2] / "algorithm" / "numpy_reference.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, V, H = 7, 75, 4
TOLERANCE = 1e-5
FULL = {f"full, alpha={alpha}": {"alpha": alpha} for alpha in (0.0, 0.3, 0.5, 1.0)}
TOP = {
    "tail, alpha=0.0": {"alpha": 0.0, "distillation_topk": 5},
    "tail, alpha=0.5": {"alpha": 0.5, "distillation_topk": 5},
    "renormalised, alpha=0.3": {"alpha": 0.3, "distillation_topk": 5, "distillation_add_tail": False},
    "renormalised, alpha=1.0": {"alpha": 1.0, "distillation_topk": 5, "distillation_add_tail": False},
}
SAMPLED = {"sampled token": {"alpha": 1.0, "full_logit_distillation": False}}
LEVELS: dict[str, dict[str, Any]] = {**FULL, **TOP, **SAMPLED}
CLIPS: dict[str, dict[str, Any]] = {
    "no clip": {"is_clip": None},
    "clips": {"is_clip": 1.1, "divergence_clip": 0.3},
    "teacher entropy": {"is_clip": 2.0, "teacher_entropy_beta": 0.6},
}


def load_reference() -> Any:
    spec = importlib.util.spec_from_file_location("numpy_reference", REFERENCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["numpy_reference"] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Case:
    """N tokens in float64, with a teacher of one or two models."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_bias: Tensor
    tokens: TokenBatch
    temperature: float = 0.7
    softcap: float | None = None
    num_teachers: int = 1
    has_bias: bool = True

    def run(
        self,
        compute: Callable[..., FusedOutputs],
        config: SelfDistillationConfig,
        dtype: torch.dtype,
        chunk_size: int | None = 3,
    ) -> tuple[FusedOutputs, list[Tensor]]:
        """Outputs of the loss, and gradients of three times the loss by hidden states, head and bias."""
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.head, self.bias)]
        student = LinearHead(leaves[0], leaves[1], leaves[2] if self.has_bias else None, self.softcap)
        float_dtype = dtype if dtype == torch.float64 else torch.float32
        tokens = replace(
            self.tokens,
            **{
                name: value.to(float_dtype)
                for name, value in vars(self.tokens).items()
                if isinstance(value, Tensor) and value.is_floating_point()
            },
        )
        teacher: list[LinearHead] = []
        if tokens.distilled is not None:
            hidden = self.teacher_hidden[tokens.distilled].to(dtype)
            bias = self.teacher_bias.to(dtype) if self.has_bias else None
            teacher = [LinearHead(hidden, self.teacher_head.to(dtype), bias, self.softcap)]
            if self.num_teachers == 2:
                teacher = [replace(teacher[0], coefficient=0.4)]
                teacher.append(LinearHead(0.5 * hidden, leaves[1], None, None, coefficient=0.6))
        outputs = compute(student, teacher, tokens, config, temperature=self.temperature, chunk_size=chunk_size)
        (3.0 * outputs.loss).backward()
        return outputs, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def make_case(num_tokens: int = N, vocab_size: int = V, hidden_size: int = H, distilled: Any = "some") -> Case:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE)

    def uniform() -> Tensor:
        return (torch.rand(num_tokens, generator=generator, dtype=torch.float64) + 0.3).to(DEVICE)

    hidden, head, bias = normal(num_tokens, hidden_size), normal(vocab_size, hidden_size), normal(vocab_size, scale=0.3)
    ids = torch.randint(vocab_size, (num_tokens,), generator=generator).to(DEVICE)
    log_probs, _ = chunked_log_probs.score_tokens(LinearHead(hidden, head, bias), ids, temperature=0.7)
    indices = torch.arange(num_tokens, device=DEVICE)
    masks = {"all": indices >= 0, "some": indices % 3 != 1, "none": None}
    tokens = TokenBatch(
        sampled_ids=ids,
        old_log_probs=log_probs - normal(num_tokens, scale=0.4),
        policy_weights=uniform() / num_tokens,
        advantages=normal(num_tokens),
        rollout_is_weights=uniform(),
        distilled=masks[distilled],
        distillation_weights=None if distilled == "none" else uniform() / num_tokens,
        distillation_coef=0.8,
    )
    return Case(
        hidden,
        head,
        bias,
        normal(num_tokens, hidden_size),
        normal(vocab_size, hidden_size),
        normal(vocab_size, scale=0.3),
        tokens,
    )


def assert_same(case: Case, config: SelfDistillationConfig, chunk_size: int | None = 3) -> None:
    """Compare outputs, gradients and metric sums in float32 with those of the portable loss in float64."""
    expected, expected_gradients = case.run(fused_linear_loss.fused_linear_sdpo_loss, config, torch.float64, chunk_size)
    result, gradients = case.run(fused_loss.fused_linear_sdpo_loss, config, torch.float32, chunk_size)
    for name in ("loss", "token_losses", "student_log_probs", "student_entropies", "teacher_log_probs"):
        torch.testing.assert_close(
            getattr(result, name).double(), getattr(expected, name), rtol=TOLERANCE, atol=TOLERANCE, msg=name
        )
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCE, atol=TOLERANCE)
    assert result.sums.keys() == expected.sums.keys()
    for name, (total, count) in expected.sums.items():
        assert float(result.sums[name][0]) == pytest.approx(float(total), rel=TOLERANCE, abs=TOLERANCE * N), name
        assert int(result.sums[name][1]) == int(count), name


# Comparison with the formulas and with the portable loss


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("level", LEVELS)
def test_value_and_gradient_equal_the_formulas(level: str, clip: str) -> None:
    """With the identity as head, hidden states are logits, and their gradient is the gradient by the logits."""
    settings = LEVELS[level] | CLIPS[clip]
    if level == "sampled token":
        settings.pop("teacher_entropy_beta", None)
    reference = load_reference()
    batch = reference.make_batch(num_samples=2, num_tokens=2, vocab_size=40)
    mask = torch.tensor(batch.response_mask, dtype=torch.bool)

    def pick(values: Any) -> Tensor:
        return torch.tensor(values)[mask].to(DEVICE)

    identity = torch.eye(40, device=DEVICE)
    hidden = pick(batch.student_logits).float().requires_grad_()
    number = int(mask.sum())
    tokens = TokenBatch(
        sampled_ids=pick(batch.tokens),
        old_log_probs=pick(batch.old_log_probs).float(),
        rollout_is_weights=pick(batch.rollout_is_weights).float(),
        distilled=torch.ones(number, dtype=torch.bool, device=DEVICE),
        distillation_weights=torch.full((number,), 1 / number, device=DEVICE),
    )
    teacher = LinearHead(pick(batch.teacher_logits).float(), identity)
    outputs = fused_loss.fused_linear_sdpo_loss(
        LinearHead(hidden, identity), [teacher], tokens, SelfDistillationConfig(**settings), chunk_size=2
    )
    outputs.loss.backward()
    assert float(outputs.loss.detach()) == pytest.approx(reference.loss(batch, settings), rel=TOLERANCE)
    assert hidden.grad is not None
    expected = torch.tensor(reference.gradient(batch, settings))[mask]
    torch.testing.assert_close(hidden.grad.double().cpu(), expected, rtol=TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("distilled", ["all", "some", "none"])
@pytest.mark.parametrize("level", LEVELS)
def test_loss_of_packed_tokens_equals_the_portable_loss(level: str, distilled: str) -> None:
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.3, divergence_clip=0.2)
    assert_same(make_case(distilled=distilled), config)


@pytest.mark.parametrize("level", ["full, alpha=0.0", "full, alpha=0.3", "tail, alpha=0.5", "sampled token"])
def test_softcap_temperature_and_missing_bias(level: str) -> None:
    config = SelfDistillationConfig(**LEVELS[level])
    assert_same(replace(make_case(), softcap=1.5, temperature=1.3), config)
    assert_same(replace(make_case(), has_bias=False, temperature=1.0), config)


@pytest.mark.parametrize("level", ["full, alpha=0.5", "renormalised, alpha=1.0", "sampled token"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_teacher_of_two_models(level: str, softcap: float | None) -> None:
    config = SelfDistillationConfig(**LEVELS[level], policy_loss_weight=0.2)
    assert_same(replace(make_case(), num_teachers=2, softcap=softcap), config)


@pytest.mark.parametrize("chunk_size", [1, 4, 50, None])
def test_result_does_not_depend_on_the_chunk_size(chunk_size: int | None) -> None:
    assert_same(make_case(), SelfDistillationConfig(alpha=0.5), chunk_size)


def test_rollout_weights_computed_by_the_loss() -> None:
    case = make_case()
    assert case.tokens.old_log_probs is not None
    tokens = replace(
        case.tokens,
        rollout_is_weights=None,
        rollout_log_probs=case.tokens.old_log_probs - 0.5,
        rollout_is_threshold=1.2,
    )
    for old in (None, case.tokens.old_log_probs):
        assert_same(replace(case, tokens=replace(tokens, old_log_probs=old)), SelfDistillationConfig(alpha=0.5))


def test_policy_loss_alone_with_an_unused_teacher() -> None:
    assert_same(make_case(), SelfDistillationConfig(policy_loss_weight=1.0))


@pytest.mark.parametrize("level", ["full, alpha=0.0", "full, alpha=0.5", "full, alpha=1.0"])
def test_large_logits(level: str) -> None:
    """Most probabilities underflow. In float32, logits of 3,000 have errors of 3,000 * 2^-24 = 2e-4.

    Log-ratios and gradients by the logits have the same error; hidden states of 1,000 multiply it in the head's.
    """
    case = make_case()
    case = replace(case, hidden=500 * case.hidden, teacher_hidden=500 * case.teacher_hidden)
    config = SelfDistillationConfig(**LEVELS[level], is_clip=None)
    expected, expected_gradients = case.run(fused_linear_loss.fused_linear_sdpo_loss, config, torch.float64)
    result, gradients = case.run(fused_loss.fused_linear_sdpo_loss, config, torch.float32)
    assert float(result.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    for one, other, multiplier in zip(gradients, expected_gradients, (1, 1000, 1), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=5e-4 * multiplier)


# Without top k, because rounding changes the kept entries.
@pytest.mark.parametrize("level", [*FULL, *SAMPLED])
def test_bfloat16_is_close_to_float64(level: str) -> None:
    """bfloat16 has relative errors of 2^-9, in logits of size 8, in the gradient by the logits and in its products."""
    case = make_case(num_tokens=20, hidden_size=16)
    config = SelfDistillationConfig(**LEVELS[level], is_clip=None)
    half = {name: x.bfloat16().double() for name, x in vars(case).items() if isinstance(x, Tensor)}
    case = replace(case, **half, temperature=1.0)
    expected, expected_gradients = case.run(fused_linear_loss.fused_linear_sdpo_loss, config, torch.float64)
    result, gradients = case.run(fused_loss.fused_linear_sdpo_loss, config, torch.bfloat16, chunk_size=8)
    assert float(result.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=0.01)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - other).norm() / other.norm()) < 0.015


def test_half_precision_hidden_states_with_a_float32_head() -> None:
    """As with autocast, the head's gradient has the head's dtype and is summed in this dtype."""
    case = make_case(num_tokens=12)
    tokens = replace(case.tokens, old_log_probs=None, rollout_is_weights=None, advantages=None)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        head = case.head.bfloat16().to(dtype).requires_grad_()
        hidden = case.hidden.bfloat16().requires_grad_()
        assert tokens.distilled is not None
        teacher = LinearHead(case.teacher_hidden[tokens.distilled].bfloat16(), case.teacher_head.to(dtype))
        fused_loss.fused_linear_sdpo_loss(
            LinearHead(hidden, head), [teacher], tokens, SelfDistillationConfig(alpha=0.5), chunk_size=12
        ).loss.backward()
        assert head.grad is not None and head.grad.dtype == dtype
        gradients.append(head.grad.float())
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 2**-8


# Parts of the loss


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_score_tokens(softcap: float | None) -> None:
    case = make_case()
    student = LinearHead(case.hidden, case.head, case.bias, softcap)
    expected = chunked_log_probs.score_tokens(student, case.tokens.sampled_ids, temperature=0.7)
    single = LinearHead(case.hidden.float(), case.head.float(), case.bias.float(), softcap)
    for size in (1, 3, None):
        result = fused_loss.score_tokens(single, case.tokens.sampled_ids, temperature=0.7, chunk_size=size)
        for one, other in zip(result, expected, strict=True):
            assert one.dtype == torch.float32 and not one.requires_grad
            torch.testing.assert_close(one.double(), other, rtol=TOLERANCE, atol=TOLERANCE)
    none = fused_loss.score_tokens(LinearHead(case.hidden[:0].float(), case.head.float()), case.tokens.sampled_ids[:0])
    assert [x.shape for x in none] == [(0,), (0,)]


@pytest.mark.parametrize("k", [1, 3, 40, V])
def test_top_k_are_the_largest_entries(k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(6, V, generator=generator)
    values[1, 3:] = -torch.inf  # fewer than k finite entries
    values[2] = values[2].round()  # equal entries
    values[3] = values[3].sort().values
    student = Logits(values.to(DEVICE), None, None, 0.5)
    ids = torch.zeros(6, dtype=torch.long, device=DEVICE)
    maxima = compute_row_statistics(student, None, ids, group_maxima=True).group_maxima
    assert maxima is not None
    top_ids = select_top_ids(student, maxima, k).cpu()
    assert top_ids.min() >= 0 and top_ids.max() < V
    assert all(len(set(row.tolist())) == k for row in top_ids)
    expected, _ = topk_support(values, k)
    assert torch.equal(values.gather(-1, top_ids).sort(descending=True).values, expected)


def test_top_k_includes_the_bias() -> None:
    values, bias = torch.zeros(1, V), torch.arange(V) % 7 * 1.0
    student = Logits(values.to(DEVICE), bias.to(DEVICE), None, 1.0)
    ids = torch.zeros(1, dtype=torch.long, device=DEVICE)
    maxima = compute_row_statistics(student, None, ids, group_maxima=True).group_maxima
    assert maxima is not None
    assert set(bias[select_top_ids(student, maxima, 10)[0].cpu()].tolist()) == {6.0}


# Non-finite values


def test_entries_of_probability_zero() -> None:
    """A bias of -inf on both sides adds nothing; on the teacher's side alone, the reverse KL is infinite."""
    case = make_case(distilled="all")
    sampled_ids = case.tokens.sampled_ids
    unsampled_id = next(i for i in range(V) if i not in sampled_ids.tolist())
    bias, teacher_bias = case.bias.clone(), case.teacher_bias.clone()
    bias[unsampled_id] = teacher_bias[unsampled_id] = -torch.inf
    both = replace(case, bias=bias, teacher_bias=teacher_bias)
    for level in ("full, alpha=0.0", "full, alpha=0.5", "full, alpha=1.0", "sampled token"):
        assert_same(both, SelfDistillationConfig(**LEVELS[level], is_clip=None))
    teacher_only = replace(case, teacher_bias=teacher_bias)
    assert_same(teacher_only, SelfDistillationConfig(alpha=0.5, is_clip=None))
    outputs, _ = teacher_only.run(fused_loss.fused_linear_sdpo_loss, SelfDistillationConfig(alpha=1.0), torch.float32)
    assert torch.isposinf(outputs.token_losses).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["hidden", "teacher_hidden"])
def test_nonfinite_token_has_a_nonfinite_token_loss(field: str, value: float) -> None:
    case = make_case(distilled="all")
    values = getattr(case, field).clone()
    values[4] = value
    outputs, _ = replace(case, **{field: values}).run(
        fused_loss.fused_linear_sdpo_loss, SelfDistillationConfig(alpha=0.5), torch.float32
    )
    assert torch.isfinite(outputs.token_losses).tolist() == [i != 4 for i in range(N)]


def test_empty_batch() -> None:
    case = make_case()
    hidden, head = case.hidden[:0].float().requires_grad_(), case.head.float().requires_grad_()
    none = case.tokens.select(slice(0, 0))
    teacher = LinearHead(hidden.detach(), head)
    outputs = fused_loss.fused_linear_sdpo_loss(LinearHead(hidden, head), [teacher], none, SelfDistillationConfig())
    outputs.loss.backward()
    assert float(outputs.loss.detach()) == 0.0
    assert head.grad is not None and not head.grad.any()


def test_loss_without_gradients() -> None:
    case = make_case()
    assert case.tokens.distilled is not None
    student = LinearHead(case.hidden.float(), case.head.float())
    teacher = LinearHead(case.teacher_hidden[case.tokens.distilled].float(), case.teacher_head.float())
    tokens = replace(case.tokens, old_log_probs=None, advantages=None)
    config = SelfDistillationConfig(alpha=0.5)
    outputs = fused_loss.fused_linear_sdpo_loss(student, [teacher], tokens, config, temperature=0.7)
    assert not outputs.loss.requires_grad
    with_grad = replace(student, weight=student.weight.clone().requires_grad_())
    other = fused_loss.fused_linear_sdpo_loss(with_grad, [teacher], tokens, config, temperature=0.7)
    other.loss.backward()
    assert torch.equal(other.loss.detach(), outputs.loss)
    assert with_grad.weight.grad is not None and with_grad.hidden.grad is None


# Operations and memory


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> OperationCounter:
    counter = OperationCounter()
    counter.leave_out_kernels(monkeypatch)
    return counter


@pytest.mark.parametrize(
    ("settings", "max_operations"),
    [
        ({"alpha": 0.0, "is_clip": None}, 39),
        ({"alpha": 0.5, "is_clip": None}, 39),
        ({"alpha": 0.5}, 55),
        ({"alpha": 0.5, "divergence_clip": 0.1, "teacher_entropy_beta": 0.5}, 75),
        ({"alpha": 0.5, "policy_loss_weight": 0.3}, 149),
        ({"alpha": 1.0, "full_logit_distillation": False}, 65),
        ({"alpha": 0.5, "distillation_topk": 5}, 207),
        ({"alpha": 0.5, "distillation_topk": 5, "distillation_add_tail": False}, 185),
    ],
)
def test_chunk_takes_few_operations_without_synchronization(
    settings: dict[str, Any], max_operations: int, counter: OperationCounter
) -> None:
    """A chunk of four tokens with the teacher in two halves: five operations per chunk, the others twice."""
    counts: dict[int, Counter[str]] = {}
    for number in (8, 12):
        case = make_case(num_tokens=number, distilled="all")
        student = LinearHead(case.hidden.float().requires_grad_(), case.head.float().requires_grad_())
        teacher = LinearHead(case.teacher_hidden.float(), case.teacher_head.float())
        floats = {
            name: x.float() for name, x in vars(case.tokens).items() if isinstance(x, Tensor) and x.is_floating_point()
        }
        if not settings.get("policy_loss_weight"):
            floats["advantages"] = floats["policy_weights"] = None
        tokens = replace(case.tokens, **floats)
        counter.counts.clear()
        with counter:
            fused_loss.fused_linear_sdpo_loss(
                student, [teacher], tokens, SelfDistillationConfig(**settings), chunk_size=4
            )
        counts[number] = Counter(counter.counts)
    per_chunk = counts[12] - counts[8]
    assert per_chunk.total() <= max_operations, per_chunk


def test_partly_distilled_tokens_are_sorted_without_synchronization(counter: OperationCounter) -> None:
    case = make_case()
    assert case.tokens.distilled is not None
    student = LinearHead(case.hidden.float().requires_grad_(), case.head.float().requires_grad_())
    teacher = LinearHead(case.teacher_hidden[case.tokens.distilled].float(), case.teacher_head.float())
    for topk in (None, 5):
        config = SelfDistillationConfig(alpha=0.5, policy_loss_weight=0.4, distillation_topk=topk)
        with counter:
            outputs = fused_loss.fused_linear_sdpo_loss(student, [teacher], case.tokens, config, chunk_size=3)
        assert torch.isfinite(outputs.token_losses).all()


@pytest.mark.parametrize("level", ["full, alpha=0.5", "tail, alpha=0.5", "sampled token"])
def test_no_tensor_has_the_size_of_all_logits(level: str, counter: OperationCounter) -> None:
    """20 tokens of 75 entries in chunks of 8; rows of the buffers have 80 entries, and the top k fewer candidates."""

    def compute(*args: Any, **kwargs: Any) -> FusedOutputs:
        with counter:
            return fused_loss.fused_linear_sdpo_loss(*args, **kwargs)

    make_case(num_tokens=20).run(compute, SelfDistillationConfig(**LEVELS[level]), torch.float32, 8)
    assert counter.largest <= 8 * 96


def test_chunks_are_even_and_multiples_of_tiles() -> None:
    cut_evenly = chunks.cut_evenly
    assert [(s.start, s.stop) for s in cut_evenly(0, 8192, 2048)] == [(i * 2048, (i + 1) * 2048) for i in range(4)]
    assert [s.stop - s.start for s in cut_evenly(5, 5 + 2100, 2048)] == [1152, 948]
    assert [s.stop - s.start for s in cut_evenly(0, 7, 3)] == [3, 3, 1]
    assert list(cut_evenly(4, 4, 3)) == []


def test_default_chunk_keeps_the_buffers_below_a_gigabyte() -> None:
    def choose(vocab_size: int, dtype: torch.dtype, buffers: float) -> int:
        head = LinearHead(torch.empty(0, 1, dtype=dtype), torch.empty(vocab_size, 1))
        return chunks.choose_chunk_size(head, buffers)

    assert choose(151_936, torch.bfloat16, 1.5) == 2048  # 1.5 * 2048 * 151,936 * 2 bytes = 933.5 MB
    assert choose(151_936, torch.bfloat16, 1) == 3072
    assert choose(151_936, torch.float32, 1.5) == 1024
    assert choose(262_144, torch.float32, 1.5) == 512
    assert choose(1000, torch.bfloat16, 1.5) == 4096
    assert choose(10**8, torch.float32, 1.5) == 128


# Dispatch by device


def test_cpu_uses_the_portable_loss() -> None:
    assert not dispatch.has_cuda_kernels(torch.empty(1, 1))
    assert not dispatch.has_cuda_kernels(torch.empty(1, 1, dtype=torch.float64, device=DEVICE))
    case = make_case(distilled="all").run
    config = SelfDistillationConfig(alpha=0.5)
    one, other = (
        case(f, config, torch.float64)[0]
        for f in (dispatch.fused_linear_sdpo_loss, fused_linear_loss.fused_linear_sdpo_loss)
    )
    assert torch.equal(one.token_losses, other.token_losses)


def test_public_loss_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_cuda_kernels", lambda hidden: True)
    case = make_case()
    assert case.tokens.distilled is not None
    mask = torch.ones(N, device=DEVICE)
    mask[2] = 0
    results = []
    for dtype, is_usable in ((torch.float64, False), (torch.float32, True)):
        monkeypatch.setattr(dispatch, "has_cuda_kernels", lambda hidden, is_usable=is_usable: is_usable)
        hidden, head = (x.to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.head))
        loss, values = fused_self_distillation_loss(
            hidden,
            head,
            case.teacher_hidden.to(dtype),
            case.teacher_head.to(dtype),
            case.tokens.sampled_ids,
            mask,
            SelfDistillationConfig(alpha=0.5, is_clip=None),
            self_distillation_mask=case.tokens.distilled,
        )
        loss.backward()
        assert hidden.grad is not None and head.grad is not None
        results.append((values, loss.detach().double(), hidden.grad.double(), head.grad.double()))
    assert results[1][0] == pytest.approx(results[0][0], rel=TOLERANCE, abs=TOLERANCE)
    assert results[1][0][metrics.NONFINITE_SAMPLES] == 0.0
    for one, other in zip(results[1][1:], results[0][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3, -2.0])
def test_scaling(dtype: torch.dtype, factor: float) -> None:
    values = torch.linspace(-1.0, 1.0, 8192 + 75, device=DEVICE).to(dtype)
    original, number = values.clone(), torch.tensor(factor, device=DEVICE)
    scaled = scale(values, number)
    assert scaled.dtype == dtype
    # The interpreter rounds towards zero.
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 1e-7
    torch.testing.assert_close(scaled, (values.float() * number).to(dtype), rtol=tolerance, atol=0.0)
    assert torch.equal(values, original)
