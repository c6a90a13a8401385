"""Health metrics of the actor compared with values computed in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdpo.config.root import SDPOConfig
from sdpo.observability import metrics
from sdpo.observability.confidence import ClusteredMean, compute_wilson_interval
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.data.samples import TrainingSample, compute_repetition, summarize_samples

MakeRun = Callable[..., SDPOConfig]
MakeSamples = Callable[..., list[TrainingSample]]
PRECISE = {"rel": 1e-9, "abs": 1e-12}


@pytest.fixture
def student(make_model: Callable[..., Any]) -> Any:
    return make_model(dtype=torch.float64)


@torch.no_grad()
def compute_log_probs(module: nn.Module, prompt: Sequence[int], sample: TrainingSample, run: SDPOConfig) -> Tensor:
    """Log-probabilities [T, V]."""
    ids = torch.tensor([[*prompt, *sample.response.token_ids]])
    return (module(input_ids=ids).logits[0, len(prompt) - 1 : -1] / run.rollout.temperature).log_softmax(-1)


def select_sampled(rows: Tensor, sample: TrainingSample) -> Tensor:
    return rows.gather(-1, torch.tensor(sample.response.token_ids)[:, None])[:, 0]


def compute_gaps(
    module: nn.Module, samples: Sequence[TrainingSample], run: SDPOConfig
) -> list[tuple[TrainingSample, Tensor]]:
    """Teacher minus student log-probs at the first step, where both have the same weights."""
    gaps = []
    for sample in samples:
        if sample.teacher_prompt.token_ids is not None:
            teacher, student = (
                select_sampled(compute_log_probs(module, prompt.token_ids, sample, run), sample)
                for prompt in (sample.teacher_prompt, sample.prompt)
            )
            gaps.append((sample, teacher - student))
    return gaps


def test_log_prob_gap_by_sign(student: Any, make_run: MakeRun, make_samples: MakeSamples) -> None:
    run, samples = make_run(), make_samples()
    gaps = torch.cat([gap for _, gap in compute_gaps(student, samples, run)])
    assert 0 < int((gaps > 0).sum()) < len(gaps)
    values = build_actor(student, run, 0).update_policy(samples)
    positive_fraction = float((gaps > 0).double().mean())
    assert values[metrics.LOGPROB_DIFF_POSITIVE_FRACTION] == pytest.approx(positive_fraction, **PRECISE)
    assert values[metrics.LOGPROB_DIFF_POSITIVE_PART] == pytest.approx(
        float(gaps[gaps > 0].sum()) / len(gaps), **PRECISE
    )
    assert values[metrics.LOGPROB_DIFF_NEGATIVE_PART] == pytest.approx(
        float(gaps[gaps < 0].sum()) / len(gaps), **PRECISE
    )
    parts = values[metrics.LOGPROB_DIFF_POSITIVE_PART] + values[metrics.LOGPROB_DIFF_NEGATIVE_PART]
    assert parts == pytest.approx(values[metrics.LOGPROB_DIFF_MEAN], **PRECISE)


@pytest.mark.parametrize("max_tokens_per_micro_batch", [1, 60, 100_000])
def test_intervals_of_entropy_and_gap_cluster_by_prompt(
    max_tokens_per_micro_batch: int, student: Any, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    run, samples = make_run(actor__max_tokens_per_micro_batch=max_tokens_per_micro_batch), make_samples()
    entropy, gap = ClusteredMean(), ClusteredMean()
    for sample in samples:
        rows = compute_log_probs(student, sample.prompt.token_ids, sample, run)
        entropy.add(id(sample.prompt), float(-(rows.exp() * rows).sum()), len(rows))
    for sample, values in compute_gaps(student, samples, run):
        gap.add(id(sample.prompt), float(values.sum()), len(values))
    assert entropy.num_clusters == run.data.train_batch_size
    values = build_actor(student, run, 0).update_policy(samples)
    for name, expected in ((metrics.ENTROPY, entropy), (metrics.LOGPROB_DIFF_MEAN, gap)):
        assert values[name] == pytest.approx(expected.mean, **PRECISE)
        ends = [values[end] for end in metrics.ci95_names(name)]
        assert ends == pytest.approx(expected.normal_interval(), **PRECISE)
        assert ends[0] < values[name] < ends[1]


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_reference_kl_is_estimated_from_the_sampled_tokens(
    kind: str, make_model: Callable[..., Any], make_run: MakeRun, make_samples: MakeSamples
) -> None:
    initial, student = (make_model(dtype=torch.float64) for _ in range(2))
    run = make_run(self_distillation__teacher_regularization=kind, health__ref_kl_interval=2)
    actor, samples = build_actor(student, run, 0), make_samples()
    assert (actor.initial is actor.teacher.module) == (kind == "frozen")  # type: ignore[union-attr]
    first = actor.update_policy(samples)
    assert first[metrics.REF_KL] == 0.0
    expected = ClusteredMean()
    for sample in samples:
        new, initial_log_probs = (
            select_sampled(compute_log_probs(m, sample.prompt.token_ids, sample, run), sample)
            for m in (student, initial)
        )
        expected.add(id(sample.prompt), float((new - initial_log_probs).sum()), len(new))
    second = actor.update_policy(samples)
    assert second[metrics.REF_KL] == pytest.approx(expected.mean, **PRECISE)
    assert second[metrics.REF_KL] != 0.0
    ends = [second[end] for end in metrics.ci95_names(metrics.REF_KL)]
    assert ends == pytest.approx(expected.normal_interval(), **PRECISE)
    assert metrics.REF_KL not in actor.update_policy(samples)


def test_no_reference_model_is_kept_without_a_use(student: Any, make_run: MakeRun) -> None:
    assert build_actor(student, make_run(), 0).initial is None


@pytest.mark.parametrize(
    ("token_ids", "fraction"),
    [
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234
        ([7] * 8, 4 / 5),
        ([1, 2, 3, 4, 5], 0),
        ([1, 2, 3, 4], 0),
        ([1, 2, 3], None),
        ([], None),
    ],
)
def test_fraction_of_repeated_4grams(token_ids: list[int], fraction: float | None) -> None:
    assert compute_repetition(token_ids) == (None if fraction is None else pytest.approx(fraction))


def test_intervals_of_rollout_metrics(make_run: MakeRun, make_samples: MakeSamples) -> None:
    run, samples = make_run(), make_samples()
    values = summarize_samples(samples, run.self_distillation)
    prompts = [id(s.prompt) for s in samples]
    for name, numbers in (
        (metrics.SCORE_MEAN, [s.rollout.score for s in samples]),
        (metrics.RESPONSE_LENGTH_MEAN, [float(len(s.response.token_ids)) for s in samples]),
    ):
        assert [values[end] for end in metrics.ci95_names(name)] == pytest.approx(
            ClusteredMean.of(numbers, prompts).normal_interval()
        )
    for name in (metrics.RESPONSE_LENGTH_CLIP_RATIO, metrics.REPROMPT_FRACTION, metrics.SUCCESS_GROUP_FRACTION):
        assert [values[end] for end in metrics.ci95_names(name)] == pytest.approx(
            compute_wilson_interval(values[name], len(set(prompts)))
        )
