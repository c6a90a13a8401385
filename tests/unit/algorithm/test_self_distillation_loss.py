"""The public loss function on padded batches: values, gradients, masks, clips, aggregation, what is not finite."""

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

# One setting away from the defaults each, and some together.
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


def tensors_of(batch: Batch, config: SelfDistillationConfig, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """The student's logits as a leaf, and what the loss function takes of the batch."""

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
        kept, indices = student.topk(config.distillation_topk, dim=-1)
        arguments |= {"student_topk_log_probs": kept, "teacher_topk_log_probs": teacher.gather(-1, indices)}
    return logits, arguments


def run(
    batch: Batch,
    chosen: Mapping[str, Any],
    mode: str = "token-mean",
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> tuple[float, np.ndarray[Any, Any], dict[str, float]]:
    """Loss, gradient by the student's logits, metrics."""
    logits, arguments = tensors_of(batch, SelfDistillationConfig(**chosen), dtype)
    loss, values = sdpo.compute_self_distillation_loss(**(arguments | changes), loss_agg_mode=mode)
    assert loss.shape == ()
    loss.backward()
    assert logits.grad is not None
    return float(loss.detach()), logits.grad.numpy(), values


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...], tolerance: float = 1e-13) -> None:
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    np.testing.assert_allclose(one[1], other[1], atol=tolerance)


def test_the_signature_is_the_official_one() -> None:
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


def test_one_token_by_hand() -> None:
    """Student (1/2 1/4 1/4), teacher (1/4 1/4 1/2), sampled token 0: log-ratio log 2, both KLs 1/4 log 2."""
    student, teacher = (torch.tensor([[p]], dtype=torch.float64).log() for p in ((0.5, 0.25, 0.25), (0.25, 0.25, 0.5)))
    log2 = math.log(2)

    def value(old: float, chosen: Mapping[str, Any], weight: float | None = None) -> float:
        loss, _ = sdpo.compute_self_distillation_loss(
            student[..., 0],
            teacher[..., 0],
            torch.ones(1, 1),
            SelfDistillationConfig(**chosen),
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
def test_stored_numbers(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    stored = json.loads(reference.GOLDEN_FILE.read_text())["batch"]
    batch = Batch(**{name: np.array(values) for name, values in stored.items()})
    expected = case["loss"], np.array(case["grad_logits"])
    assert_same(run(batch, case["settings"], dtype=dtype), expected, tolerance)


@pytest.mark.parametrize("name", [*LEVELS, *OPTIONS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_are_the_reference_s(name: str, dtype: torch.dtype, tolerance: float) -> None:
    chosen = (LEVELS | OPTIONS)[name]
    batch = make_batch(seed=3)
    expected = reference.loss(batch, chosen), reference.gradient(batch, chosen)
    assert_same(run(batch, chosen, dtype=dtype), expected, tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_loss(name: str) -> None:
    chosen = OPTIONS[name]
    batch = make_batch(seed=3)
    for option in set(chosen) - {"alpha", "full_logit_distillation", "distillation_topk"}:
        without = {key: value for key, value in chosen.items() if key != option}
        assert run(batch, chosen)[0] != pytest.approx(run(batch, without)[0], rel=1e-6), option


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chosen", [FULL, TOPK, SAMPLED], ids=["full", "top-k", "sampled token"])
def test_aggregation(mode: str, chosen: dict[str, Any]) -> None:
    batch = make_batch(num_samples=4, seed=5)
    expected = reference.loss(batch, chosen, mode), reference.gradient(batch, chosen, mode)
    assert_same(run(batch, chosen, mode), expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_aggregation_in_float64_is_of_float64_precision(mode: str) -> None:
    # 1/3 in float32 is wrong by 1e-8.
    batch = make_batch(num_samples=3, num_tokens=3, seed=6)
    batch = replace(batch, self_distillation_mask=np.ones(3))
    assert run(batch, {}, mode)[0] == pytest.approx(reference.loss(batch, {}, mode), rel=1e-14)


def test_aggregation_by_hand() -> None:
    """Three tokens of loss log 2 / 4 in sample 0 with weights 1 2 3, one in sample 1 with weight 5, sample 2 masked."""
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


def test_token_weights_by_hand() -> None:
    counts = torch.tensor([3, 0, 1])
    assert compute_token_weights(counts, "token-mean").tolist() == [0.25, 0.0, 0.25]
    assert compute_token_weights(counts, "seq-mean-token-sum").tolist() == [0.5, 0.0, 0.5]
    assert compute_token_weights(counts, "seq-mean-token-mean").tolist() == pytest.approx([1 / 6, 0.0, 1 / 2])
    assert compute_token_weights(counts, "seq-mean-token-sum-norm", horizon=8).tolist() == [1 / 16, 0.0, 1 / 16]
    assert compute_token_weights(counts.double(), "seq-mean-token-mean").tolist() == [1 / 6, 0.0, 1 / 2]
    for mode in MODES:
        assert compute_token_weights(torch.tensor([0, 0]), mode, horizon=8).tolist() == [0.0, 0.0]
    # Counts of many tokens do not lose their last digits.
    many = compute_token_weights(torch.tensor([70_001, 2]), "token-mean")
    assert float(many[0]) == pytest.approx(1 / 70_003, rel=1e-7)


def test_what_aggregation_refuses() -> None:
    with pytest.raises(ValueError, match="needs a horizon"):
        compute_token_weights(torch.tensor([1]), "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="unknown loss_agg_mode 'mean'"):
        run(make_batch(), FULL, "mean")


# Ratios


@pytest.mark.parametrize("chosen", [FULL, SAMPLED], ids=["full", "sampled token"])
def test_exponents_beyond_20_are_held_there(chosen: dict[str, Any]) -> None:
    batch = make_batch(num_samples=1, num_tokens=1, seed=2)
    taken = reference.log_softmax(batch.student_logits[0, 0])[batch.tokens[0, 0]]
    plain = run(batch, chosen | {"is_clip": None})
    for difference, ratio in (
        (-50.0, math.exp(-20)),
        (-19.5, math.exp(-19.5)),
        (19.5, math.exp(19.5)),
        (50.0, 485165195.4097903),
    ):
        moved = replace(batch, old_log_probs=np.full((1, 1), taken - difference))
        loss, gradient, values = run(moved, chosen | {"is_clip": 1e12})
        assert loss == pytest.approx(plain[0] * ratio, rel=1e-11)
        np.testing.assert_allclose(gradient, plain[1] * ratio, rtol=1e-11)
        assert values[metrics.IS_RATIO_MEAN] == pytest.approx(ratio, rel=1e-11)
        assert values[metrics.IS_CLIP_FRACTION] == 0.0
        clipped = run(moved, chosen | {"is_clip": 2.0})
        assert clipped[0] == pytest.approx(plain[0] * min(ratio, 2.0), rel=1e-11)
        assert clipped[2][metrics.IS_CLIP_FRACTION] == float(ratio > 2)


def test_the_ratio_is_a_factor_without_gradient() -> None:
    batch = make_batch(seed=3)
    _, arguments = tensors_of(batch, SelfDistillationConfig(alpha=0.5), torch.float64)
    names = ("student_log_probs", "old_log_probs", "rollout_is_weights", "teacher_log_probs", "teacher_all_log_probs")
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    loss, _ = sdpo.compute_self_distillation_loss(**(arguments | leaves))
    loss.backward()
    assert leaves["student_log_probs"].grad is None or leaves["student_log_probs"].grad.eq(0).all()
    for name in names[1:]:
        assert leaves[name].grad is None, name


@pytest.mark.parametrize("name", [*LEVELS, *OPTIONS])
def test_metrics(name: str) -> None:
    chosen = (LEVELS | OPTIONS)[name]
    batch = make_batch(seed=3)
    loss, _, values = run(batch, chosen)
    bare = chosen | {"is_clip": None, "divergence_clip": None, "teacher_entropy_beta": 0.0}
    divergences, gaps, ratios = [], [], []
    for b, t in zip(*np.nonzero(batch.response_mask * batch.self_distillation_mask[:, None]), strict=True):
        student, teacher = (reference.log_softmax(x[b, t]) for x in (batch.student_logits, batch.teacher_logits))
        token = batch.tokens[b, t]
        gaps.append(teacher[token] - student[token])
        # Of the sampled token alone, its log-ratio estimates the divergence.
        sampled = not chosen.get("full_logit_distillation", True)
        divergences.append(-gaps[-1] if sampled else reference.token_loss(student, teacher, token, 0.0, 1.0, bare))
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
    clip = chosen.get("is_clip", 2.0)
    if clip is not None:
        expected[metrics.IS_RATIO_MEAN] = np.mean(np.minimum(ratios, clip))
        expected[metrics.IS_CLIP_FRACTION] = np.mean(np.array(ratios) > clip)
    assert values == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in values.values())


def test_the_divergence_clip_scales_the_gradient_and_keeps_its_direction() -> None:
    batch = replace(make_batch(num_samples=1, num_tokens=1, seed=2), rollout_is_weights=np.ones((1, 1)))
    plain = run(batch, {"alpha": 1.0, "is_clip": None})
    limit = plain[0] / 3
    clipped = run(batch, {"alpha": 1.0, "is_clip": None, "divergence_clip": limit})
    assert clipped[0] == pytest.approx(limit, rel=1e-13)
    np.testing.assert_allclose(clipped[1], plain[1] / 3, rtol=1e-12)
    untouched = run(batch, {"alpha": 1.0, "is_clip": None, "divergence_clip": plain[0] * 1.01})
    assert_same(untouched, plain)


@pytest.mark.parametrize("teacher_prefers", [True, False])
def test_the_divergence_clip_of_a_sampled_token_holds_its_log_ratio_on_both_sides(teacher_prefers: bool) -> None:
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


def with_garbage(arguments: dict[str, Any], counts: Tensor, value: float) -> dict[str, Any]:
    """Leaves of what the function takes, with ``value`` at every place that does not count."""
    leaves = {}
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and "mask" not in name:
            place = ~counts.unsqueeze(-1) if tensor.ndim == 3 else ~counts
            leaves[name] = tensor.detach().masked_fill(place, value).requires_grad_()
    return arguments | leaves


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30, 0.0])
@pytest.mark.parametrize("name", ["full vocabulary, alpha=0.3", "top-k with tail, alpha=1.0", "sampled token"])
@pytest.mark.parametrize("mode", MODES)
def test_what_stands_at_masked_places_does_not_matter(garbage: float, name: str, mode: str) -> None:
    batch = make_batch(num_samples=4, seed=5)
    expected = reference.loss(batch, LEVELS[name], mode)
    _, arguments = tensors_of(batch, SelfDistillationConfig(**LEVELS[name]), torch.float64)
    counts = torch.from_numpy(batch.response_mask * batch.self_distillation_mask[:, None]).bool()
    filled = with_garbage(arguments, counts, garbage)
    clean = with_garbage(arguments, torch.ones_like(counts), garbage)
    for call in (filled, clean):
        loss, values = sdpo.compute_self_distillation_loss(**call, loss_agg_mode=mode)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
        assert values[metrics.NONFINITE_SAMPLES] == 0
        loss.backward()
    for key in (key for key in filled if key.startswith("student")):
        assert filled[key].grad[~counts].eq(0).all()
        assert torch.equal(filled[key].grad, clean[key].grad)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type(kind: torch.dtype) -> None:
    batch = make_batch()
    masks = {
        "response_mask": torch.from_numpy(batch.response_mask).to(kind),
        "self_distillation_mask": torch.from_numpy(batch.self_distillation_mask).to(kind),
    }
    assert_same(run(batch, FULL, **masks), run(batch, FULL))


def test_without_a_mask_of_samples_all_are_distilled() -> None:
    batch = make_batch()
    whole = replace(batch, self_distillation_mask=np.ones(3))
    assert_same(run(batch, FULL, self_distillation_mask=None), run(whole, FULL))
    assert run(whole, FULL)[0] != run(batch, FULL)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["full vocabulary, alpha=0.0", "top-k with tail, alpha=0.5", "sampled token"])
def test_nothing_distilled_gives_exactly_zero(name: str, mode: str) -> None:
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
def test_the_order_of_the_samples_does_not_matter(order: list[int], seed: int, mode: str, name: str) -> None:
    batch = make_batch(num_samples=4, num_tokens=3, seed=seed)
    loss, gradient, _ = run(batch, LEVELS[name], mode)
    assert_same(run(batch.where(np.array(order)), LEVELS[name], mode), (loss, gradient[order]))


@PROPERTY
@given(seed=st.integers(0, 99), mode=st.sampled_from(MODES), by_response=st.booleans(), name=st.sampled_from([*LEVELS]))
def test_fully_masked_samples_do_not_matter(seed: int, mode: str, by_response: bool, name: str) -> None:
    batch = make_batch(num_samples=2, num_tokens=3, seed=seed)
    more = batch.where(np.array([1, 0, 0, 1]))
    if by_response:
        more = replace(more, response_mask=more.response_mask * np.array([[0], [1], [0], [1]]))
    else:
        more = replace(more, self_distillation_mask=np.array([0.0, 1.0, 0.0, 1.0]))
    loss, gradient, values = run(more, LEVELS[name], mode)
    assert_same((loss, gradient[[1, 3]]), run(batch.where(np.array([0, 1])), LEVELS[name], mode))
    assert (gradient[[0, 2]] == 0.0).all()
    assert values[metrics.NONFINITE_SAMPLES] == 0


@PROPERTY
@given(seed=st.integers(0, 99), extra=st.integers(1, 3), name=st.sampled_from([*LEVELS]), mode=st.sampled_from(MODES))
def test_the_length_of_the_padding_does_not_matter(seed: int, extra: int, name: str, mode: str) -> None:
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
    # That mode alone divides by the padded length, as verl does.
    scale = 3 / (3 + extra) if mode == "seq-mean-token-sum-norm" else 1.0
    expected = run(batch, LEVELS[name], mode)
    assert_same((loss, gradient[:, :3]), (expected[0] * scale, expected[1] * scale))
    assert (gradient[:, 3:] == 0.0).all()


@PROPERTY
@given(seed=st.integers(0, 99), cut=st.integers(1, 3), name=st.sampled_from([*LEVELS]))
def test_token_means_of_parts_combine_by_their_tokens(seed: int, cut: int, name: str) -> None:
    batch = make_batch(num_samples=4, num_tokens=3, seed=seed)
    parts = [batch.where(np.arange(4) < cut), batch.where(np.arange(4) >= cut)]
    counts = [(p.response_mask * p.self_distillation_mask[:, None]).sum() for p in parts]
    runs = [run(p, LEVELS[name]) for p in parts]
    shares = [count / sum(counts) for count in counts]
    combined = sum(s * r[0] for s, r in zip(shares, runs, strict=True))
    gradient = np.concatenate([s * r[1] for s, r in zip(shares, runs, strict=True)])
    assert_same(run(batch, LEVELS[name]), (combined, gradient))


@PROPERTY
@given(seed=st.integers(0, 99), name=st.sampled_from([*LEVELS]), shift=st.floats(-30, 30))
def test_a_shift_of_the_logits_does_not_matter(seed: int, name: str, shift: float) -> None:
    batch = make_batch(num_samples=2, num_tokens=2, seed=seed)
    moved = replace(batch, student_logits=batch.student_logits + shift, teacher_logits=batch.teacher_logits - shift)
    assert_same(run(moved, LEVELS[name]), run(batch, LEVELS[name]), 1e-12)


@PROPERTY
@given(seed=st.integers(0, 999), name=st.sampled_from([name for name in LEVELS if name != "sampled token"]))
def test_never_negative_and_zero_where_the_teacher_is_the_student(seed: int, name: str) -> None:
    batch = make_batch(num_samples=2, num_tokens=2, seed=seed)
    assert run(batch, LEVELS[name])[0] > 0.0
    loss, gradient, _ = run(replace(batch, teacher_logits=batch.student_logits), LEVELS[name])
    assert abs(loss) < 1e-14
    assert np.abs(gradient).max() < 1e-9


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_the_whole_vocabulary_is_the_full_loss(alpha: float, tail: bool) -> None:
    """The tail's floor of 1e-7 stands on both sides and cancels (bounds: see the same test of the divergences)."""
    batch = make_batch(seed=4)
    chosen = {"alpha": alpha, "distillation_topk": 5, "distillation_add_tail": tail}
    assert_same(run(batch, chosen), run(batch, {"alpha": alpha}), 1e-13)
    assert_same(run(batch, chosen, dtype=torch.float32), run(batch, {"alpha": alpha}), 1e-5)


# What is not finite

TOKENWISE = ("student_log_probs", "teacher_log_probs", "old_log_probs", "rollout_is_weights")
LEVEL_INPUTS = {
    "full vocabulary, alpha=0.0": ("student_all_log_probs", "teacher_all_log_probs"),
    "full vocabulary, alpha=0.5": ("student_all_log_probs", "teacher_all_log_probs"),
    "full vocabulary, alpha=1.0": ("student_all_log_probs", "teacher_all_log_probs"),
    "top-k with tail, alpha=0.5": ("student_topk_log_probs", "teacher_topk_log_probs"),
    "top-k renormalised, alpha=1.0": ("student_topk_log_probs", "teacher_topk_log_probs"),
    "sampled token": (),
}
BROKEN = [
    (name, key, value)
    for name, more in LEVEL_INPUTS.items()
    for key in TOKENWISE + more
    for value in (NAN, INF, -INF)
    if not (value == -INF and key in more)  # in a distribution -inf is a ruled-out token; tested by itself
]


@pytest.mark.parametrize(("name", "key", "value"), BROKEN)
@pytest.mark.parametrize("is_clip", [2.0, None])
def test_a_sample_with_a_number_that_is_not_finite_is_left_out(name: str, key: str, value: float, is_clip: Any) -> None:
    batch = replace(make_batch(num_samples=3, num_tokens=3, seed=8), self_distillation_mask=np.ones(3))
    chosen = LEVELS[name] | {"is_clip": is_clip}
    config = SelfDistillationConfig(**chosen)
    everything = torch.ones(3, 3, dtype=torch.bool)
    for mode in ("token-mean", "seq-mean-token-mean"):
        call = with_garbage(tensors_of(batch, config, torch.float64)[1], everything, 0.0)
        with torch.no_grad():
            call[key][(1, 0, 0) if call[key].ndim == 3 else (1, 0)] = value
        loss, values = sdpo.compute_self_distillation_loss(**call, loss_agg_mode=mode)
        loss.backward()
        rest = batch.where(np.array([0, 2]))
        other = with_garbage(tensors_of(rest, config, torch.float64)[1], everything[:2], 0.0)
        expected, expected_values = sdpo.compute_self_distillation_loss(**other, loss_agg_mode=mode)
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-15)
        assert float(loss.detach()) == pytest.approx(reference.loss(rest, chosen, mode), abs=1e-13)
        assert values == pytest.approx(expected_values | {metrics.NONFINITE_SAMPLES: 1.0}, abs=1e-14)
        for leaf in (leaf for leaf in call if leaf.startswith("student")):
            assert call[leaf].grad[1].eq(0).all(), leaf
            torch.testing.assert_close(call[leaf].grad[[0, 2]], other[leaf].grad, atol=1e-14, rtol=0)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_number_is_seen_where_the_teacher_rules_its_token_out(value: float) -> None:
    """The forward KL does not look there, and alone would be finite."""
    batch = replace(make_batch(num_samples=2, seed=8), self_distillation_mask=np.ones(2))
    other = (batch.tokens[1, 0] + 1) % 5
    batch.teacher_logits[1, 0, other] = -INF
    call = tensors_of(batch, SelfDistillationConfig(), torch.float64)[1]
    student = call["student_all_log_probs"].detach().clone()
    student[1, 0, other] = value
    loss, values = sdpo.compute_self_distillation_loss(**(call | {"student_all_log_probs": student}))
    assert float(loss.detach()) == pytest.approx(reference.loss(batch.where(np.array([0])), {}), abs=1e-13)
    assert values[metrics.NONFINITE_SAMPLES] == 1.0


@pytest.mark.parametrize("name", ["full vocabulary, alpha=0.0", "full vocabulary, alpha=1.0"])
def test_an_infinite_divergence_leaves_its_sample_out(name: str) -> None:
    batch = replace(make_batch(seed=8), self_distillation_mask=np.ones(3))
    ruling = "student_logits" if name.endswith("0.0") else "teacher_logits"
    # Some token that is not the sampled one, so that no log-probability by token is infinite.
    other = (batch.tokens[2, 0] + 1) % 5
    getattr(batch, ruling)[2, 0, other] = -INF
    loss, gradient, values = run(batch, LEVELS[name])
    assert loss == pytest.approx(reference.loss(batch.where(np.array([0, 1])), LEVELS[name]), abs=1e-13)
    assert (gradient[2] == 0.0).all()
    assert np.isfinite(gradient).all()
    assert values[metrics.NONFINITE_SAMPLES] == 1.0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "extra", [{}, {"distillation_topk": 3}, {"distillation_topk": 3, "distillation_add_tail": False}]
)
@pytest.mark.parametrize("sides", [("student_logits", "teacher_logits"), ("student_logits",), ("teacher_logits",)])
def test_ruled_out_tokens_keep_their_sample_where_the_divergence_is_finite(
    alpha: float, extra: dict[str, Any], sides: tuple[str, ...]
) -> None:
    batch = make_batch(num_samples=2, num_tokens=2, vocab_size=6, seed=9)
    for side in sides:
        for place in np.ndindex(2, 2):
            getattr(batch, side)[(*place, (batch.tokens[place] + 1) % 6)] = -INF
    chosen = {"alpha": alpha} | extra
    with np.errstate(all="ignore"):
        expected = reference.loss(batch, chosen)
    loss, gradient, values = run(batch, chosen)
    assert np.isfinite(gradient).all()
    if np.isfinite(expected):
        assert loss == pytest.approx(expected, abs=1e-12)
        assert values[metrics.NONFINITE_SAMPLES] == 0.0
        assert np.abs(gradient).max() > 0.0
    else:
        # The forward KL where the student alone rules out, the reverse where the teacher alone does.
        assert (alpha, sides) in ((0.0, ("student_logits",)), (1.0, ("teacher_logits",)))


@pytest.mark.parametrize("name", LEVEL_INPUTS)
@pytest.mark.parametrize("mode", MODES)
def test_all_samples_broken_gives_zero(name: str, mode: str) -> None:
    batch = replace(make_batch(num_samples=3, seed=8), self_distillation_mask=np.ones(3))
    config = SelfDistillationConfig(**LEVELS[name])
    call = with_garbage(tensors_of(batch, config, torch.float64)[1], torch.ones(3, 4, dtype=torch.bool), 0.0)
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


def test_a_broken_sample_that_is_masked_is_not_counted() -> None:
    batch = make_batch(seed=8)
    assert batch.self_distillation_mask[2] == 0
    broken = replace(batch, old_log_probs=batch.old_log_probs.copy())
    broken.old_log_probs[2] = NAN
    one, other = run(broken, FULL), run(batch, FULL)
    assert_same(one, other)
    assert one[2] == other[2]


# What is missing


@pytest.mark.parametrize(
    ("chosen", "missing"),
    [
        ({}, "student_all_log_probs"),
        ({}, "teacher_all_log_probs"),
        ({}, "old_log_probs"),
        ({"distillation_topk": 2}, "student_topk_log_probs"),
        ({"distillation_topk": 2}, "teacher_topk_log_probs"),
        (SAMPLED, "old_log_probs"),
    ],
)
def test_a_missing_tensor_is_named(chosen: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        run(make_batch(), chosen, **{missing: None})


def test_what_the_settings_do_not_need_may_be_missing() -> None:
    batch = make_batch()
    assert_same(run(batch, {"is_clip": None}, old_log_probs=None), run(batch, {"is_clip": None}))
    ones = replace(batch, rollout_is_weights=np.ones_like(batch.rollout_is_weights))
    assert_same(run(batch, FULL, rollout_is_weights=None), run(ones, FULL))


def test_grpo_and_schedule_are_not_applied_here() -> None:
    batch = make_batch()
    more = {"policy_loss_weight": 0.3, "distillation_coef_start": 5.0, "distillation_coef_end": 5.0}
    assert_same(run(batch, FULL | more), run(batch, FULL))
