"""The public loss function on padded batches: values, gradients, masks, clips, aggregation, non-finite values."""

from __future__ import annotations

import inspect
import json
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
from numpy_reference import LEVELS, Batch, make_batch
from torch import Tensor

import sdpo
from sdpo import SelfDistillationConfig
from sdpo.algorithm.aggregation import compute_token_weights
from sdpo.observability import metrics

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
NAN, INF = float("nan"), float("inf")

FULL = {"alpha": 0.5}
TOPK = {"alpha": 1.0, "distillation_topk": 3}
SAMPLED = LEVELS["sampled token"]

# Each differs from the defaults in one setting or a few.
OPTIONS: dict[str, dict[str, Any]] = {
    "no ratio": {"is_clip": None},
    "low clip": {"is_clip": 0.7},
    "high clip": {"is_clip": 1e9},
    "divergence clip": {"alpha": 0.5, "divergence_clip": 0.1},
    "divergence clip, top-k": {"alpha": 1.0, "distillation_topk": 3, "divergence_clip": 0.3},
    "divergence clip, sampled token": {**SAMPLED, "divergence_clip": 0.8},
    "teacher entropy": {"teacher_entropy_beta": 0.7},
    "teacher entropy, tail": {"teacher_entropy_beta": 0.7, "distillation_topk": 2, "alpha": 0.3},
    "teacher entropy, renormalised": {
        "teacher_entropy_beta": 0.7,
        "distillation_topk": 2,
        "distillation_add_tail": False,
    },
    "all": {
        "alpha": 0.3,
        "distillation_topk": 3,
        "divergence_clip": 0.2,
        "teacher_entropy_beta": 0.4,
        "is_clip": 1.2,
    },
}


def build_arguments(batch: Batch, config: SelfDistillationConfig, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """The student's logits as a leaf, and the arguments of the loss function for the batch."""

    def tensor(values: Any) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(dtype)

    logits = tensor(batch.student_logits).requires_grad_()
    student, teacher = logits.log_softmax(-1), tensor(batch.teacher_logits).log_softmax(-1)
    tokens = torch.from_numpy(batch.tokens)[..., None]
    arguments = {
        "student_log_probs": student.gather(-1, tokens)[..., 0],
        "teacher_log_probs": teacher.gather(-1, tokens)[..., 0],
        "response_mask": tensor(batch.response_mask),
        "self_distillation_config": config,
        "old_log_probs": tensor(batch.old_log_probs),
        "self_distillation_mask": tensor(batch.self_distillation_mask),
        "rollout_is_weights": tensor(batch.rollout_is_weights),
    }
    if config.full_logit_distillation and config.distillation_topk is None:
        arguments |= {"student_all_log_probs": student, "teacher_all_log_probs": teacher}
    elif config.full_logit_distillation:
        topk_log_probs, indices = student.topk(config.distillation_topk, dim=-1)
        arguments |= {"student_topk_log_probs": topk_log_probs, "teacher_topk_log_probs": teacher.gather(-1, indices)}
    return logits, arguments


def run(
    batch: Batch,
    overrides: Mapping[str, Any],
    mode: str = "token-mean",
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> tuple[float, np.ndarray[Any, Any], dict[str, float]]:
    """Return the loss, the gradient by the student's logits, and the metrics."""
    logits, arguments = build_arguments(batch, SelfDistillationConfig(**overrides), dtype)
    loss, values = sdpo.compute_self_distillation_loss(**(arguments | changes), loss_agg_mode=mode)
    assert loss.shape == ()
    loss.backward()
    assert logits.grad is not None
    return float(loss.detach()), logits.grad.numpy(), values


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...], tolerance: float = 1e-13) -> None:
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    np.testing.assert_allclose(one[1], other[1], atol=tolerance)


def test_signature_equals_the_official_one() -> None:
    parameters = inspect.signature(sdpo.compute_self_distillation_loss).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "student_log_probs": inspect.Parameter.empty,
        "teacher_log_probs": inspect.Parameter.empty,
        "response_mask": inspect.Parameter.empty,
        "self_distillation_config": inspect.Parameter.empty,
        "old_log_probs": None,
        "student_all_log_probs": None,
        "teacher_all_log_probs": None,
        "student_topk_log_probs": None,
        "teacher_topk_log_probs": None,
        "self_distillation_mask": None,
        "loss_agg_mode": "token-mean",
        "rollout_is_weights": None,
    }


# Values and gradients


def test_loss_of_one_token() -> None:
    """Student (1/2 1/4 1/4), teacher (1/4 1/4 1/2), sampled token 0: log-ratio log 2, both KLs 1/4 log 2."""
    student, teacher = (torch.tensor([[p]], dtype=torch.float64).log() for p in ((0.5, 0.25, 0.25), (0.25, 0.25, 0.5)))
    log2 = math.log(2)

    def value(old: float, overrides: Mapping[str, Any], weight: float | None = None) -> float:
        loss, _ = sdpo.compute_self_distillation_loss(
            student[..., 0],
            teacher[..., 0],
            torch.ones(1, 1),
            SelfDistillationConfig(**overrides),
            old_log_probs=torch.full((1, 1), math.log(old), dtype=torch.float64),
            student_all_log_probs=student,
            teacher_all_log_probs=teacher,
            rollout_is_weights=None if weight is None else torch.full((1, 1), weight),
        )
        return float(loss)

    for alpha in (0.0, 1.0):
        assert value(0.5, {"alpha": alpha}) == pytest.approx(log2 / 4, abs=1e-15)
        assert value(0.4, {"alpha": alpha}) == pytest.approx(log2 / 4 * 0.5 / 0.4, abs=1e-15)  # ratio 1.25
        assert value(0.1, {"alpha": alpha}) == pytest.approx(log2 / 4 * 2.0, abs=1e-15)  # ratio 5, clipped at 2
        assert value(0.1, {"alpha": alpha, "is_clip": 7.0}) == pytest.approx(log2 / 4 * 5.0, abs=1e-15)
        assert value(0.1, {"alpha": alpha, "is_clip": None}) == pytest.approx(log2 / 4, abs=1e-15)
        assert value(0.1, {"alpha": alpha}, weight=0.5) == pytest.approx(log2 / 4 * 2.0 * 0.5, abs=1e-15)
    assert value(0.4, SAMPLED) == pytest.approx(-log2 * log2 * 1.25, abs=1e-15)


@pytest.mark.parametrize("case", json.loads(reference.GOLDEN_FILE.read_text())["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_golden_values(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    stored = json.loads(reference.GOLDEN_FILE.read_text())["batch"]
    batch = Batch(**{name: np.array(values) for name, values in stored.items()})
    expected = case["loss"], np.array(case["grad_logits"])
    assert_same(run(batch, case["settings"], dtype=dtype), expected, tolerance)


@pytest.mark.parametrize("name", [*LEVELS, *OPTIONS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_equal_the_reference(name: str, dtype: torch.dtype, tolerance: float) -> None:
    overrides = (LEVELS | OPTIONS)[name]
    batch = make_batch(seed=3)
    expected = reference.loss(batch, overrides), reference.gradient(batch, overrides)
    assert_same(run(batch, overrides, dtype=dtype), expected, tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_loss(name: str) -> None:
    overrides = OPTIONS[name]
    batch = make_batch(seed=3)
    for option in set(overrides) - {"alpha", "full_logit_distillation", "distillation_topk"}:
        without = {key: value for key, value in overrides.items() if key != option}
        assert run(batch, overrides)[0] != pytest.approx(run(batch, without)[0], rel=1e-6), option


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overrides", [FULL, TOPK, SAMPLED], ids=["full", "top-k", "sampled token"])
def test_aggregation(mode: str, overrides: dict[str, Any]) -> None:
    batch = make_batch(num_samples=4, seed=5)
    expected = reference.loss(batch, overrides, mode), reference.gradient(batch, overrides, mode)
    assert_same(run(batch, overrides, mode), expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_aggregation_keeps_float64_precision(mode: str) -> None:
    # 1/3 has an error of 1e-8 in float32.
    batch = make_batch(num_samples=3, num_tokens=3, seed=6)
    batch = replace(batch, self_distillation_mask=np.ones(3))
    assert run(batch, {}, mode)[0] == pytest.approx(reference.loss(batch, {}, mode), rel=1e-14)


def test_aggregation_of_two_samples() -> None:
    """All tokens have loss log 2 / 4: three in sample 0 (weights 1, 2, 3), one in sample 1 (weight 5); 2 is masked."""
    student = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log().expand(3, 4, 3)
    teacher = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log().expand(3, 4, 3)
    expected = {
        "token-mean": (1 + 2 + 3 + 5) / 4,
        "seq-mean-token-sum": (6 + 5) / 2,
        "seq-mean-token-mean": (2 + 5) / 2,
        "seq-mean-token-sum-norm": (6 + 5) / 2 / 4,
    }
    for mode, value in expected.items():
        for distilled, in_sample_2 in (([1, 1, 0], 4), ([1, 1, 1], 0)):
            loss, _ = sdpo.compute_self_distillation_loss(
                student[..., 0],
                teacher[..., 0],
                torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [int(t < in_sample_2) for t in range(4)]]),
                SelfDistillationConfig(is_clip=None),
                student_all_log_probs=student,
                teacher_all_log_probs=teacher,
                self_distillation_mask=torch.tensor(distilled),
                loss_agg_mode=mode,
                rollout_is_weights=torch.tensor([[1, 2, 3, 9], [5, 9, 9, 9], [9, 9, 9, 9]], dtype=torch.float64),
            )
            assert float(loss) == pytest.approx(value * math.log(2) / 4, abs=1e-15), mode


def test_token_weights() -> None:
    counts = torch.tensor([3, 0, 1])
    assert compute_token_weights(counts, "token-mean").tolist() == [0.25, 0.0, 0.25]
    assert compute_token_weights(counts, "seq-mean-token-sum").tolist() == [0.5, 0.0, 0.5]
    assert compute_token_weights(counts, "seq-mean-token-mean").tolist() == pytest.approx([1 / 6, 0.0, 1 / 2])
    assert compute_token_weights(counts, "seq-mean-token-sum-norm", horizon=8).tolist() == [1 / 16, 0.0, 1 / 16]
    assert compute_token_weights(counts.double(), "seq-mean-token-mean").tolist() == [1 / 6, 0.0, 1 / 2]
    for mode in MODES:
        assert compute_token_weights(torch.tensor([0, 0]), mode, horizon=8).tolist() == [0.0, 0.0]
    # Large token counts keep full precision.
    weights = compute_token_weights(torch.tensor([70_001, 2]), "token-mean")
    assert float(weights[0]) == pytest.approx(1 / 70_003, rel=1e-7)


def test_invalid_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a horizon"):
        compute_token_weights(torch.tensor([1]), "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="unknown loss_agg_mode 'mean'"):
        run(make_batch(), FULL, "mean")


# Importance ratios


@pytest.mark.parametrize("overrides", [FULL, SAMPLED], ids=["full", "sampled token"])
def test_exponents_are_clamped_at_20(overrides: dict[str, Any]) -> None:
    batch = make_batch(num_samples=1, num_tokens=1, seed=2)
    log_prob = reference.log_softmax(batch.student_logits[0, 0])[batch.tokens[0, 0]]
    unclipped = run(batch, overrides | {"is_clip": None})
    for difference, ratio in (
        (-50.0, math.exp(-20)),
        (-19.5, math.exp(-19.5)),
        (19.5, math.exp(19.5)),
        (50.0, 485165195.4097903),
    ):
        shifted = replace(batch, old_log_probs=np.full((1, 1), log_prob - difference))
        loss, gradient, values = run(shifted, overrides | {"is_clip": 1e12})
        assert loss == pytest.approx(unclipped[0] * ratio, rel=1e-11)
        np.testing.assert_allclose(gradient, unclipped[1] * ratio, rtol=1e-11)
        assert values[metrics.IS_RATIO_MEAN] == pytest.approx(ratio, rel=1e-11)
        assert values[metrics.IS_CLIP_FRACTION] == 0.0
        clipped = run(shifted, overrides | {"is_clip": 2.0})
        assert clipped[0] == pytest.approx(unclipped[0] * min(ratio, 2.0), rel=1e-11)
        assert clipped[2][metrics.IS_CLIP_FRACTION] == float(ratio > 2)


def test_importance_ratio_has_no_gradient() -> None:
    batch = make_batch(seed=3)
    _, arguments = build_arguments(batch, SelfDistillationConfig(alpha=0.5), torch.float64)
    names = ("student_log_probs", "old_log_probs", "rollout_is_weights", "teacher_log_probs", "teacher_all_log_probs")
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    loss, _ = sdpo.compute_self_distillation_loss(**(arguments | leaves))
    loss.backward()
    assert leaves["student_log_probs"].grad is None or leaves["student_log_probs"].grad.eq(0).all()
    for name in names[1:]:
        assert leaves[name].grad is None, name


@pytest.mark.parametrize("name", [*LEVELS, *OPTIONS])
def test_metrics(name: str) -> None:
    overrides = (LEVELS | OPTIONS)[name]
    batch = make_batch(seed=3)
    loss, _, values = run(batch, overrides)
    unclipped_settings = overrides | {"is_clip": None, "divergence_clip": None, "teacher_entropy_beta": 0.0}
    divergences, gaps, ratios = [], [], []
    for b, t in zip(*np.nonzero(batch.response_mask * batch.self_distillation_mask[:, None]), strict=True):
        student, teacher = (reference.log_softmax(x[b, t]) for x in (batch.student_logits, batch.teacher_logits))
        token = batch.tokens[b, t]
        gaps.append(teacher[token] - student[token])
        # With the sampled token alone, the log-ratio estimates the divergence.
        sampled = not overrides.get("full_logit_distillation", True)
        divergences.append(
            -gaps[-1] if sampled else reference.token_loss(student, teacher, token, 0.0, 1.0, unclipped_settings)
        )
        ratios.append(math.exp(student[token] - batch.old_log_probs[b, t]))
    expected = {
        metrics.DISTILLATION_LOSS: loss,
        metrics.DIVERGENCE: np.mean(divergences),
        metrics.LOGPROB_DIFF_MEAN: np.mean(gaps),
        metrics.LOGPROB_DIFF_POSITIVE_FRACTION: np.mean(np.array(gaps) > 0),
        metrics.LOGPROB_DIFF_POSITIVE_PART: np.mean(np.maximum(gaps, 0)),
        metrics.LOGPROB_DIFF_NEGATIVE_PART: np.mean(np.minimum(gaps, 0)),
        metrics.NONFINITE_SAMPLES: 0.0,
    }
    clip = overrides.get("is_clip", 2.0)
    if clip is not None:
        expected[metrics.IS_RATIO_MEAN] = np.mean(np.minimum(ratios, clip))
        expected[metrics.IS_CLIP_FRACTION] = np.mean(np.array(ratios) > clip)
    assert values == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in values.values())


def test_divergence_clip_scales_the_gradient() -> None:
    batch = replace(make_batch(num_samples=1, num_tokens=1, seed=2), rollout_is_weights=np.ones((1, 1)))
    unclipped = run(batch, {"alpha": 1.0, "is_clip": None})
    limit = unclipped[0] / 3
    clipped = run(batch, {"alpha": 1.0, "is_clip": None, "divergence_clip": limit})
    assert clipped[0] == pytest.approx(limit, rel=1e-13)
    np.testing.assert_allclose(clipped[1], unclipped[1] / 3, rtol=1e-12)
    below_limit = run(batch, {"alpha": 1.0, "is_clip": None, "divergence_clip": unclipped[0] * 1.01})
    assert_same(below_limit, unclipped)


@pytest.mark.parametrize("teacher_prefers", [True, False])
def test_divergence_clip_limits_the_log_ratio_of_a_sampled_token_in_both_directions(teacher_prefers: bool) -> None:
    logits = np.array([[[0.0, 4.0], [0.0, -4.0]]])
    batch = replace(
        make_batch(num_samples=1, num_tokens=1, vocab_size=2, seed=1),
        student_logits=logits[:, int(teacher_prefers)][:, None],
        teacher_logits=logits[:, int(not teacher_prefers)][:, None],
        tokens=np.array([[1]]),
        rollout_is_weights=np.ones((1, 1)),
    )
    student, teacher = (reference.log_softmax(x[0, 0])[1] for x in (batch.student_logits, batch.teacher_logits))
    assert student - teacher == pytest.approx(-4.0 if teacher_prefers else 4.0)
    loss, gradient, _ = run(batch, SAMPLED | {"is_clip": None, "divergence_clip": 1.0})
    sign = -1.0 if teacher_prefers else 1.0
    assert loss == pytest.approx(sign * student, rel=1e-13)
    # d log p_1 / d logits = (-p_0, p_0)
    p0 = 1 - math.exp(student)
    np.testing.assert_allclose(gradient[0, 0], [-sign * p0, sign * p0], rtol=1e-12)


# Masks


def fill_masked(arguments: dict[str, Any], mask: Tensor, value: float) -> dict[str, Any]:
    """Replace the arguments by leaves that have ``value`` at every masked position."""
    leaves = {}
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and "mask" not in name:
            position = ~mask.unsqueeze(-1) if tensor.ndim == 3 else ~mask
            leaves[name] = tensor.detach().masked_fill(position, value).requires_grad_()
    return arguments | leaves


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30, 0.0])
@pytest.mark.parametrize("name", ["full vocabulary, alpha=0.3", "top-k with tail, alpha=1.0", "sampled token"])
@pytest.mark.parametrize("mode", MODES)
def test_values_at_masked_positions_do_not_matter(value: float, name: str, mode: str) -> None:
    batch = make_batch(num_samples=4, seed=5)
    expected = reference.loss(batch, LEVELS[name], mode)
    _, arguments = build_arguments(batch, SelfDistillationConfig(**LEVELS[name]), torch.float64)
    mask = torch.from_numpy(batch.response_mask * batch.self_distillation_mask[:, None]).bool()
    filled = fill_masked(arguments, mask, value)
    complete = fill_masked(arguments, torch.ones_like(mask), value)
    for call in (filled, complete):
        loss, values = sdpo.compute_self_distillation_loss(**call, loss_agg_mode=mode)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
        assert values[metrics.NONFINITE_SAMPLES] == 0
        loss.backward()
    for key in (key for key in filled if key.startswith("student")):
        assert filled[key].grad[~mask].eq(0).all()
        assert torch.equal(filled[key].grad, complete[key].grad)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    batch = make_batch()
    masks = {
        "response_mask": torch.from_numpy(batch.response_mask).to(dtype),
        "self_distillation_mask": torch.from_numpy(batch.self_distillation_mask).to(dtype),
    }
    assert_same(run(batch, FULL, **masks), run(batch, FULL))


def test_all_samples_are_distilled_without_a_mask() -> None:
    batch = make_batch()
    unmasked = replace(batch, self_distillation_mask=np.ones(3))
    assert_same(run(batch, FULL, self_distillation_mask=None), run(unmasked, FULL))
    assert run(unmasked, FULL)[0] != run(batch, FULL)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["full vocabulary, alpha=0.0", "top-k with tail, alpha=0.5", "sampled token"])
def test_loss_without_distilled_samples_is_zero(name: str, mode: str) -> None:
    batch = make_batch()
    loss, gradient, values = run(batch, LEVELS[name], mode, self_distillation_mask=torch.zeros(3))
    assert loss == 0.0
    assert (gradient == 0.0).all()
    assert set(values.values()) == {0.0}


# Batches


@PROPERTY
@given(
    order=st.permutations(range(4)),
    seed=st.integers(0, 99),
    mode=st.sampled_from(MODES),
    name=st.sampled_from([*LEVELS]),
)
def test_loss_does_not_depend_on_the_order_of_the_samples(order: list[int], seed: int, mode: str, name: str) -> None:
    batch = make_batch(num_samples=4, num_tokens=3, seed=seed)
    loss, gradient, _ = run(batch, LEVELS[name], mode)
    assert_same(run(batch.select(np.array(order)), LEVELS[name], mode), (loss, gradient[order]))


@PROPERTY
@given(seed=st.integers(0, 99), mode=st.sampled_from(MODES), by_response=st.booleans(), name=st.sampled_from([*LEVELS]))
def test_masked_samples_do_not_change_the_loss(seed: int, mode: str, by_response: bool, name: str) -> None:
    batch = make_batch(num_samples=2, num_tokens=3, seed=seed)
    more = batch.select(np.array([1, 0, 0, 1]))
    if by_response:
        more = replace(more, response_mask=more.response_mask * np.array([[0], [1], [0], [1]]))
    else:
        more = replace(more, self_distillation_mask=np.array([0.0, 1.0, 0.0, 1.0]))
    loss, gradient, values = run(more, LEVELS[name], mode)
    assert_same((loss, gradient[[1, 3]]), run(batch.select(np.array([0, 1])), LEVELS[name], mode))
    assert (gradient[[0, 2]] == 0.0).all()
    assert values[metrics.NONFINITE_SAMPLES] == 0


@PROPERTY
@given(seed=st.integers(0, 99), extra=st.integers(1, 3), name=st.sampled_from([*LEVELS]), mode=st.sampled_from(MODES))
def test_padding_does_not_change_the_loss(seed: int, extra: int, name: str, mode: str) -> None:
    batch = make_batch(num_samples=3, num_tokens=3, seed=seed)
    padding = {
        key: np.repeat(np.zeros_like(values[:, :1]), extra, axis=1)
        for key, values in vars(batch).items()
        if values.ndim > 1
    }
    longer = replace(
        batch, **{key: np.concatenate([getattr(batch, key), more], axis=1) for key, more in padding.items()}
    )
    loss, gradient, _ = run(longer, LEVELS[name], mode)
    # This mode divides by the padded length, as verl does.
    scale = 3 / (3 + extra) if mode == "seq-mean-token-sum-norm" else 1.0
    expected = run(batch, LEVELS[name], mode)
    assert_same((loss, gradient[:, :3]), (expected[0] * scale, expected[1] * scale))
    assert (gradient[:, 3:] == 0.0).all()


@PROPERTY
@given(seed=st.integers(0, 99), cut=st.integers(1, 3), name=st.sampled_from([*LEVELS]))
def test_token_means_of_parts_combine_by_token_count(seed: int, cut: int, name: str) -> None:
    batch = make_batch(num_samples=4, num_tokens=3, seed=seed)
    parts = [batch.select(np.arange(4) < cut), batch.select(np.arange(4) >= cut)]
    counts = [(p.response_mask * p.self_distillation_mask[:, None]).sum() for p in parts]
    runs = [run(p, LEVELS[name]) for p in parts]
    fractions = [count / sum(counts) for count in counts]
    combined = sum(fraction * r[0] for fraction, r in zip(fractions, runs, strict=True))
    gradient = np.concatenate([fraction * r[1] for fraction, r in zip(fractions, runs, strict=True)])
    assert_same(run(batch, LEVELS[name]), (combined, gradient))


@PROPERTY
@given(seed=st.integers(0, 99), name=st.sampled_from([*LEVELS]), shift=st.floats(-30, 30))
def test_loss_does_not_depend_on_a_shift_of_the_logits(seed: int, name: str, shift: float) -> None:
    batch = make_batch(num_samples=2, num_tokens=2, seed=seed)
    shifted = replace(batch, student_logits=batch.student_logits + shift, teacher_logits=batch.teacher_logits - shift)
    assert_same(run(shifted, LEVELS[name]), run(batch, LEVELS[name]), 1e-12)


@PROPERTY
@given(seed=st.integers(0, 999), name=st.sampled_from([name for name in LEVELS if name != "sampled token"]))
def test_loss_is_positive_and_zero_for_equal_policies(seed: int, name: str) -> None:
    batch = make_batch(num_samples=2, num_tokens=2, seed=seed)
    assert run(batch, LEVELS[name])[0] > 0.0
    loss, gradient, _ = run(replace(batch, teacher_logits=batch.student_logits), LEVELS[name])
    assert abs(loss) < 1e-14
    assert np.abs(gradient).max() < 1e-9


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_the_full_vocabulary_equals_the_full_loss(alpha: float, tail: bool) -> None:
    """The minimum of 1e-7 of both tails cancels; test_divergence.py derives the bounds."""
    batch = make_batch(seed=4)
    overrides = {"alpha": alpha, "distillation_topk": 5, "distillation_add_tail": tail}
    assert_same(run(batch, overrides), run(batch, {"alpha": alpha}), 1e-13)
    assert_same(run(batch, overrides, dtype=torch.float32), run(batch, {"alpha": alpha}), 1e-5)


# Non-finite values

TOKENWISE = ("student_log_probs", "teacher_log_probs", "old_log_probs", "rollout_is_weights")
LEVEL_INPUTS = {
    "full vocabulary, alpha=0.0": ("student_all_log_probs", "teacher_all_log_probs"),
    "full vocabulary, alpha=0.5": ("student_all_log_probs", "teacher_all_log_probs"),
    "full vocabulary, alpha=1.0": ("student_all_log_probs", "teacher_all_log_probs"),
    "top-k with tail, alpha=0.5": ("student_topk_log_probs", "teacher_topk_log_probs"),
    "top-k renormalised, alpha=1.0": ("student_topk_log_probs", "teacher_topk_log_probs"),
    "sampled token": (),
}
NONFINITE = [
    (name, key, value)
    for name, more in LEVEL_INPUTS.items()
    for key in TOKENWISE + more
    for value in (NAN, INF, -INF)
    if not (value == -INF and key in more)  # -inf in a distribution is a token of probability 0; another test covers it
]


@pytest.mark.parametrize(("name", "key", "value"), NONFINITE)
@pytest.mark.parametrize("is_clip", [2.0, None])
def test_sample_with_a_nonfinite_value_is_dropped(name: str, key: str, value: float, is_clip: Any) -> None:
    batch = replace(make_batch(num_samples=3, num_tokens=3, seed=8), self_distillation_mask=np.ones(3))
    overrides = LEVELS[name] | {"is_clip": is_clip}
    config = SelfDistillationConfig(**overrides)
    all_tokens = torch.ones(3, 3, dtype=torch.bool)
    for mode in ("token-mean", "seq-mean-token-mean"):
        call = fill_masked(build_arguments(batch, config, torch.float64)[1], all_tokens, 0.0)
        with torch.no_grad():
            call[key][(1, 0, 0) if call[key].ndim == 3 else (1, 0)] = value
        loss, values = sdpo.compute_self_distillation_loss(**call, loss_agg_mode=mode)
        loss.backward()
        rest = batch.select(np.array([0, 2]))
        other = fill_masked(build_arguments(rest, config, torch.float64)[1], all_tokens[:2], 0.0)
        expected, expected_values = sdpo.compute_self_distillation_loss(**other, loss_agg_mode=mode)
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-15)
        assert float(loss.detach()) == pytest.approx(reference.loss(rest, overrides, mode), abs=1e-13)
        assert values == pytest.approx(expected_values | {metrics.NONFINITE_SAMPLES: 1.0}, abs=1e-14)
        for leaf in (leaf for leaf in call if leaf.startswith("student")):
            assert call[leaf].grad[1].eq(0).all(), leaf
            torch.testing.assert_close(call[leaf].grad[[0, 2]], other[leaf].grad, atol=1e-14, rtol=0)


@pytest.mark.parametrize("value", [NAN, INF])
def test_nonfinite_value_at_a_token_of_teacher_probability_zero_is_detected(value: float) -> None:
    """The forward KL has no term for this token, and would be finite."""
    batch = replace(make_batch(num_samples=2, seed=8), self_distillation_mask=np.ones(2))
    other = (batch.tokens[1, 0] + 1) % 5
    batch.teacher_logits[1, 0, other] = -INF
    call = build_arguments(batch, SelfDistillationConfig(), torch.float64)[1]
    student = call["student_all_log_probs"].detach().clone()
    student[1, 0, other] = value
    loss, values = sdpo.compute_self_distillation_loss(**(call | {"student_all_log_probs": student}))
    assert float(loss.detach()) == pytest.approx(reference.loss(batch.select(np.array([0])), {}), abs=1e-13)
    assert values[metrics.NONFINITE_SAMPLES] == 1.0


@pytest.mark.parametrize("name", ["full vocabulary, alpha=0.0", "full vocabulary, alpha=1.0"])
def test_sample_with_an_infinite_divergence_is_dropped(name: str) -> None:
    batch = replace(make_batch(seed=8), self_distillation_mask=np.ones(3))
    side = "student_logits" if name.endswith("0.0") else "teacher_logits"
    # Another token than the sampled one, so that every token log-probability is finite.
    other = (batch.tokens[2, 0] + 1) % 5
    getattr(batch, side)[2, 0, other] = -INF
    loss, gradient, values = run(batch, LEVELS[name])
    assert loss == pytest.approx(reference.loss(batch.select(np.array([0, 1])), LEVELS[name]), abs=1e-13)
    assert (gradient[2] == 0.0).all()
    assert np.isfinite(gradient).all()
    assert values[metrics.NONFINITE_SAMPLES] == 1.0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "extra", [{}, {"distillation_topk": 3}, {"distillation_topk": 3, "distillation_add_tail": False}]
)
@pytest.mark.parametrize("sides", [("student_logits", "teacher_logits"), ("student_logits",), ("teacher_logits",)])
def test_sample_with_tokens_of_probability_zero_stays_if_the_divergence_is_finite(
    alpha: float, extra: dict[str, Any], sides: tuple[str, ...]
) -> None:
    batch = make_batch(num_samples=2, num_tokens=2, vocab_size=6, seed=9)
    for side in sides:
        for position in np.ndindex(2, 2):
            getattr(batch, side)[(*position, (batch.tokens[position] + 1) % 6)] = -INF
    overrides = {"alpha": alpha} | extra
    with np.errstate(all="ignore"):
        expected = reference.loss(batch, overrides)
    loss, gradient, values = run(batch, overrides)
    assert np.isfinite(gradient).all()
    if np.isfinite(expected):
        assert loss == pytest.approx(expected, abs=1e-12)
        assert values[metrics.NONFINITE_SAMPLES] == 0.0
        assert np.abs(gradient).max() > 0.0
    else:
        # Infinite: forward KL with 0 for the student alone, reverse KL with 0 for the teacher alone.
        assert (alpha, sides) in ((0.0, ("student_logits",)), (1.0, ("teacher_logits",)))


@pytest.mark.parametrize("name", LEVEL_INPUTS)
@pytest.mark.parametrize("mode", MODES)
def test_loss_of_nonfinite_samples_is_zero(name: str, mode: str) -> None:
    batch = replace(make_batch(num_samples=3, seed=8), self_distillation_mask=np.ones(3))
    config = SelfDistillationConfig(**LEVELS[name])
    call = fill_masked(build_arguments(batch, config, torch.float64)[1], torch.ones(3, 4, dtype=torch.bool), 0.0)
    with torch.no_grad():
        call["student_log_probs"][0, 0] = NAN
        call["old_log_probs"][1, 0] = NAN
        call["rollout_is_weights"][2, 0] = INF
    loss, values = sdpo.compute_self_distillation_loss(**call, loss_agg_mode=mode)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert values.pop(metrics.NONFINITE_SAMPLES) == 3.0
    assert set(values.values()) == {0.0}
    for leaf in (leaf for leaf in call if leaf.startswith("student")):
        assert call[leaf].grad is None or call[leaf].grad.eq(0).all()


def test_masked_nonfinite_sample_is_not_counted() -> None:
    batch = make_batch(seed=8)
    assert batch.self_distillation_mask[2] == 0
    nonfinite = replace(batch, old_log_probs=batch.old_log_probs.copy())
    nonfinite.old_log_probs[2] = NAN
    one, other = run(nonfinite, FULL), run(batch, FULL)
    assert_same(one, other)
    assert one[2] == other[2]


# Missing arguments


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        ({}, "student_all_log_probs"),
        ({}, "teacher_all_log_probs"),
        ({}, "old_log_probs"),
        ({"distillation_topk": 2}, "student_topk_log_probs"),
        ({"distillation_topk": 2}, "teacher_topk_log_probs"),
        (SAMPLED, "old_log_probs"),
    ],
)
def test_missing_tensor_is_reported(overrides: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        run(make_batch(), overrides, **{missing: None})


def test_unused_tensors_may_be_missing() -> None:
    batch = make_batch()
    assert_same(run(batch, {"is_clip": None}, old_log_probs=None), run(batch, {"is_clip": None}))
    ones = replace(batch, rollout_is_weights=np.ones_like(batch.rollout_is_weights))
    assert_same(run(batch, FULL, rollout_is_weights=None), run(ones, FULL))


def test_loss_function_ignores_grpo_and_schedule_settings() -> None:
    batch = make_batch()
    more = {"policy_loss_weight": 0.3, "distillation_coef_start": 5.0, "distillation_coef_end": 5.0}
    assert_same(run(batch, FULL | more), run(batch, FULL))
