"""The metrics by which one sees that a training is not well, against distributions written out in float64."""

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
def distributions(module: nn.Module, prompt: Sequence[int], sample: TrainingSample, run: SDPOConfig) -> Tensor:
    """[T, V] log-probabilities."""
    ids = torch.tensor([[*prompt, *sample.response.token_ids]])
    return (module(input_ids=ids).logits[0, len(prompt) - 1 : -1] / run.rollout.temperature).log_softmax(-1)


def sampled(rows: Tensor, sample: TrainingSample) -> Tensor:
    return rows.gather(-1, torch.tensor(sample.response.token_ids)[:, None])[:, 0]


def gaps_of(
    module: nn.Module, samples: Sequence[TrainingSample], run: SDPOConfig
) -> list[tuple[TrainingSample, Tensor]]:
    """At the first step, where the teacher's weights are the student's."""
    gaps = []
    for sample in samples:
        if sample.teacher_prompt.token_ids is not None:
            theirs = sampled(distributions(module, sample.teacher_prompt.token_ids, sample, run), sample)
            gaps.append((sample, theirs - sampled(distributions(module, sample.prompt.token_ids, sample, run), sample)))
    return gaps


def test_gap_by_sign(student: Any, make_run: MakeRun, make_samples: MakeSamples) -> None:
    run, samples = make_run(), make_samples()
    gaps = torch.cat([gap for _, gap in gaps_of(student, samples, run)])
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
def test_intervals_of_entropy_and_gap_are_over_prompts(
    max_tokens_per_micro_batch: int, student: Any, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    run, samples = make_run(actor__max_tokens_per_micro_batch=max_tokens_per_micro_batch), make_samples()
    entropy, gap = ClusteredMean(), ClusteredMean()
    for sample in samples:
        rows = distributions(student, sample.prompt.token_ids, sample, run)
        entropy.add(id(sample.prompt), float(-(rows.exp() * rows).sum()), len(rows))
    for sample, values in gaps_of(student, samples, run):
        gap.add(id(sample.prompt), float(values.sum()), len(values))
    assert entropy.num_clusters == run.data.train_batch_size
    values = build_actor(student, run, 0).update_policy(samples)
    for name, expected in ((metrics.ENTROPY, entropy), (metrics.LOGPROB_DIFF_MEAN, gap)):
        assert values[name] == pytest.approx(expected.mean, **PRECISE)
        ends = [values[end] for end in metrics.ci95_names(name)]
        assert ends == pytest.approx(expected.normal_interval(), **PRECISE)
        assert ends[0] < values[name] < ends[1]


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_kl_to_the_initial_model_is_that_of_the_sampled_tokens(
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
        ours, theirs = (
            sampled(distributions(m, sample.prompt.token_ids, sample, run), sample) for m in (student, initial)
        )
        expected.add(id(sample.prompt), float((ours - theirs).sum()), len(ours))
    second = actor.update_policy(samples)
    assert second[metrics.REF_KL] == pytest.approx(expected.mean, **PRECISE)
    assert second[metrics.REF_KL] != 0.0
    ends = [second[end] for end in metrics.ci95_names(metrics.REF_KL)]
    assert ends == pytest.approx(expected.normal_interval(), **PRECISE)
    assert metrics.REF_KL not in actor.update_policy(samples)


def test_no_copy_is_kept_where_it_is_not_compared_with(student: Any, make_run: MakeRun) -> None:
    assert build_actor(student, make_run(), 0).initial is None


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234
        ([7] * 8, 4 / 5),
        ([1, 2, 3, 4, 5], 0),
        ([1, 2, 3, 4], 0),
        ([1, 2, 3], None),
        ([], None),
    ],
)
def test_repeated_4grams_by_hand(token_ids: list[int], share: float | None) -> None:
    assert compute_repetition(token_ids) == (None if share is None else pytest.approx(share))


def test_intervals_of_what_the_rollouts_tell(make_run: MakeRun, make_samples: MakeSamples) -> None:
    run, samples = make_run(), make_samples()
    values = summarize_samples(samples, run.self_distillation)
    prompts = [id(s.prompt) for s in samples]
    for name, numbers in (
        (metrics.SCORE_MEAN, [s.reward.score for s in samples]),
        (metrics.RESPONSE_LENGTH_MEAN, [float(len(s.response.token_ids)) for s in samples]),
    ):
        assert [values[end] for end in metrics.ci95_names(name)] == pytest.approx(
            ClusteredMean.of(numbers, prompts).normal_interval()
        )
    for name in (metrics.RESPONSE_LENGTH_CLIP_RATIO, metrics.REPROMPT_FRACTION, metrics.SUCCESS_GROUP_FRACTION):
        assert [values[end] for end in metrics.ci95_names(name)] == pytest.approx(
            compute_wilson_interval(values[name], len(set(prompts)))
        )
