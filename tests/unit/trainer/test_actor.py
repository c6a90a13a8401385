"""The actor compared with a reference step: one sample per forward pass, padded tensors, the public loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from sdpo import compute_self_distillation_loss
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distributions import TokenDistributions
from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.kernels import fused_linear_loss
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.observability import metrics
from sdpo.trainer.actor import micro_batch_loss
from sdpo.trainer.actor.actor import Actor, LogProbs
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.data.samples import TrainingSample

MakeModel = Callable[..., Any]
MakeRun = Callable[..., SDPOConfig]
MakeSamples = Callable[..., list[TrainingSample]]
HORIZON = 8


@dataclass
class OptimizerStep:
    """Weights, clipped gradients and learning rate before an optimizer step."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    lr: float


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def record_steps(actor: Actor) -> list[OptimizerStep]:
    steps: list[OptimizerStep] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = {name: p.grad.clone() for name, p in actor.student.named_parameters() if p.grad is not None}
        steps.append(OptimizerStep(copy_weights(actor.student), gradients, optimizer.param_groups[0]["lr"]))

    actor.optimizer.register_step_pre_hook(before)
    return steps


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Compare relative to the largest entry: a sum whose terms cancel has no relative precision."""
    assert actual.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            atol=tolerance * largest,
            rtol=10 * tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_same_weights(actual: nn.Module, expected: nn.Module, tolerance: float = 0.0) -> None:
    for (name, one), two in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


# --- the reference step


def reference_log_probs(
    policy: Sequence[tuple[nn.Module, float]], prompt: Sequence[int], sample: TrainingSample, run: SDPOConfig
) -> Tensor:
    """Log-probabilities [T, V] with gradient."""
    ids = torch.tensor([[*prompt, *sample.response.token_ids]])
    logits = sum(coefficient * module(input_ids=ids).logits[0, len(prompt) - 1 : -1] for module, coefficient in policy)
    return (logits / run.rollout.temperature).log_softmax(-1)


def pad(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([nn.functional.pad(row, [0, 0] * (row.dim() - 1) + [0, HORIZON - len(row)]) for row in rows])


def select_sampled(log_probs: Tensor, sample: TrainingSample) -> Tensor:
    return log_probs.gather(-1, torch.tensor(sample.response.token_ids)[:, None])[:, 0]


def reference_old_log_probs(student: nn.Module, samples: Sequence[TrainingSample], run: SDPOConfig) -> list[Tensor]:
    with torch.no_grad():
        return [select_sampled(reference_log_probs([(student, 1.0)], s.prompt.token_ids, s, run), s) for s in samples]


def reference_rollout_weights(old: Tensor, sample: TrainingSample, run: SDPOConfig) -> Tensor:
    log_ratio = old - torch.tensor(sample.response.log_probs)
    if run.rollout_correction.rollout_is == "none":
        return torch.ones_like(old)
    if run.rollout_correction.rollout_is == "sequence":
        log_ratio = log_ratio.sum().expand_as(log_ratio)
    return log_ratio.exp().clamp(max=run.rollout_correction.rollout_is_threshold)


def reference_loss(
    student: nn.Module,
    teacher: nn.Module,
    samples: Sequence[TrainingSample],
    run: SDPOConfig,
    old: Sequence[Tensor] | None = None,
) -> Tensor:
    config = run.self_distillation
    rows = [reference_log_probs([(student, 1.0)], s.prompt.token_ids, s, run) for s in samples]
    policy = {
        "trust-region": [(teacher, 1 - config.ema_update_rate), (student, config.ema_update_rate)],
        "live": [(student, 1.0)],
    }.get(config.teacher_regularization, [(teacher, 1.0)])
    with torch.no_grad():
        teacher_prompts = [s.teacher_prompt.token_ids or s.prompt.token_ids for s in samples]
        teacher_rows = [
            reference_log_probs(policy, ids, s, run) for ids, s in zip(teacher_prompts, samples, strict=True)
        ]
    student_log_probs = [select_sampled(row, s) for row, s in zip(rows, samples, strict=True)]
    old = [lp.detach() for lp in student_log_probs] if old is None else old
    rollout_weights = [reference_rollout_weights(o, s, run) for o, s in zip(old, samples, strict=True)]
    mask = pad([torch.ones(len(row)) for row in rows])
    total = torch.zeros(())
    if config.distills:
        topk_ids = [row.topk(config.distillation_topk).indices for row in rows] if config.distillation_topk else None
        student_part, teacher_part = rows, teacher_rows
        if topk_ids is not None:
            student_part = [row.gather(-1, k) for row, k in zip(rows, topk_ids, strict=True)]
            teacher_part = [row.gather(-1, k) for row, k in zip(teacher_rows, topk_ids, strict=True)]
        level = "topk" if topk_ids is not None else "all"
        # The public loss has no weights per sample; weights on a sample's tokens are equivalent.
        token_weights = [w * s.distillation_weight for w, s in zip(rollout_weights, samples, strict=True)]
        loss, _ = compute_self_distillation_loss(
            pad(student_log_probs),
            pad([select_sampled(row, s) for row, s in zip(teacher_rows, samples, strict=True)]),
            mask,
            config,
            old_log_probs=pad(old),
            **{f"student_{level}_log_probs": pad(student_part), f"teacher_{level}_log_probs": pad(teacher_part)},
            self_distillation_mask=torch.tensor([float(s.is_distilled) for s in samples]),
            loss_agg_mode=run.actor.loss_agg_mode,
            rollout_is_weights=pad(token_weights),
        )
        total = total + (1 - config.policy_loss_weight) * loss
    if config.policy_loss_weight:
        token_losses = []
        for s, new, before, weight in zip(samples, student_log_probs, old, rollout_weights, strict=True):
            ratio = (new - before).exp()
            clipped = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
            token_losses.append(-torch.minimum(s.advantage * ratio, s.advantage * clipped) * weight)
        total = total + config.policy_loss_weight * {
            "token-mean": lambda rows: torch.cat(rows).mean(),
            "seq-mean-token-sum": lambda rows: torch.stack([row.sum() for row in rows]).mean(),
            "seq-mean-token-mean": lambda rows: torch.stack([row.mean() for row in rows]).mean(),
            "seq-mean-token-sum-norm": lambda rows: torch.stack([row.sum() / HORIZON for row in rows]).mean(),
        }[run.actor.loss_agg_mode](token_losses)
    return total


SETTINGS: dict[str, dict[str, Any]] = {
    "sdpo": {},
    "reverse": {"self_distillation__alpha": 1.0},
    "jensen-shannon": {"self_distillation__alpha": 0.3, "rollout__temperature": 0.7},
    "top-k": {"self_distillation__distillation_topk": 3},
    "top-k, renormalised": {
        "self_distillation__distillation_topk": 3,
        "self_distillation__distillation_add_tail": False,
        "self_distillation__alpha": 1.0,
    },
    "sampled token": {"self_distillation__full_logit_distillation": False, "self_distillation__alpha": 1.0},
    "no ratio": {"self_distillation__is_clip": None, "rollout_correction__rollout_is": "none"},
    "ratio": {"self_distillation__is_clip": 1.01, "rollout_correction__rollout_is": "sequence"},
    "trust region": {
        "self_distillation__teacher_regularization": "trust-region",
        "self_distillation__ema_update_rate": 0.3,
    },
    "live": {"self_distillation__teacher_regularization": "live"},
    "options": {
        "self_distillation__divergence_clip": 0.5,
        "self_distillation__teacher_entropy_beta": 0.7,
    },
    "grpo": {"self_distillation__policy_loss_weight": 1.0},
    "blend": {"self_distillation__policy_loss_weight": 0.4, "self_distillation__clip_ratio_high": 0.05},
    "clipped gradient": {"optim__max_grad_norm": 0.01},
    **{f"sdpo, {m}": {"actor__loss_agg_mode": m} for m in ("seq-mean-token-sum", "seq-mean-token-mean")},
    "blend, sum-norm": {
        "actor__loss_agg_mode": "seq-mean-token-sum-norm",
        "self_distillation__policy_loss_weight": 0.4,
    },
    "grpo, seq-mean-token-mean": {
        "actor__loss_agg_mode": "seq-mean-token-mean",
        "self_distillation__policy_loss_weight": 1.0,
    },
}


@pytest.mark.parametrize("mini_batch_size", [2, 1], ids=["one mini-batch", "two mini-batches"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_and_loss_match_the_reference_step(
    model: Any, make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples, settings: Any, mini_batch_size: int
) -> None:
    run = make_run(actor__mini_batch_size=mini_batch_size, actor__max_tokens_per_micro_batch=60, **settings)
    samples = make_samples(undistilled=(1, 5) if run.self_distillation.distills else range(6))
    actor = build_actor(model, run, 0)
    teacher = make_model(seed=0)
    if actor.teacher is not None and actor.teacher.module is not None:
        # The teacher differs from the student from the start, so that no term is zero.
        teacher = make_model(seed=1)
        actor.teacher.module.load_state_dict(teacher.state_dict())
    steps = record_steps(actor)
    old = reference_old_log_probs(model, samples, run)
    values = actor.update_policy(samples)

    size = 3 * mini_batch_size
    starts = range(0, len(samples), size)
    assert len(steps) == len(starts)
    losses, norms = [], []
    for start, step in zip(starts, steps, strict=True):
        reference = make_model()
        reference.load_state_dict(step.weights)
        loss = reference_loss(reference, teacher, samples[start : start + size], run, old[start : start + size])
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
        scale = min(1.0, run.optim.max_grad_norm / float(norm))
        assert_same_gradients(step.gradients, {n: scale * p.grad for n, p in reference.named_parameters()})
        losses.append(loss.item())
        norms.append(float(norm))
    assert values[metrics.LOSS] == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-6)
    assert values[metrics.GRAD_NORM] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert values[metrics.NONFINITE_SAMPLES] == values[metrics.SKIPPED_UPDATES] == 0


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_do_not_depend_on_the_micro_batch_size(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples, settings: Any
) -> None:
    results = []
    for budget in (1, 40, 10**6):
        run = make_run(actor__max_tokens_per_micro_batch=budget, **settings)
        samples = make_samples(undistilled=(1, 5) if run.self_distillation.distills else range(6))
        actor = build_actor(make_model(), run, 0)
        if actor.teacher is not None and actor.teacher.module is not None:
            actor.teacher.module.load_state_dict(make_model(seed=1).state_dict())
        steps = record_steps(actor)
        values = actor.update_policy(samples)
        results.append((steps[0].gradients, values, len(actor.collator.split(samples, budget))))
    assert results[0][2] == 6 and 1 < results[1][2] < 6 and results[2][2] == 1
    for gradients, values, _ in results[1:]:
        assert_same_gradients(gradients, results[0][0], 2e-6)
        assert values == pytest.approx(results[0][1], rel=1e-4, abs=1e-6)


# --- old and rollout log-probs


def capture_inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TokenBatch, Tensor]]:
    """Record each completed micro-batch of the loss with the student's log-probabilities."""
    captured: list[tuple[TokenBatch, Tensor]] = []
    compute = fused_linear_loss.compute_loss

    def capture(batch: TokenBatch, tokens: TokenDistributions, config: Any) -> Any:
        captured.append((batch.complete(tokens.student_log_probs), tokens.student_log_probs))
        return compute(batch, tokens, config)

    monkeypatch.setattr(fused_linear_loss, "compute_loss", capture)
    return captured


def test_old_log_probs_come_from_the_student_at_the_start_of_the_step(
    model: Any, make_run: MakeRun, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = capture_inputs(monkeypatch)
    run = make_run(actor__mini_batch_size=1, self_distillation__is_clip=100.0)
    samples = make_samples(undistilled=())
    actor = build_actor(model, run, 0)
    for _ in range(2):
        captured.clear()
        before = copy.deepcopy(model)
        actor.update_policy(samples)
        minis = [samples[:3], samples[3:]]
        assert len(captured) == 2
        for (batch, _), mini in zip(captured, minis, strict=True):
            expected = torch.cat(reference_old_log_probs(before, mini, run))
            torch.testing.assert_close(batch.old_log_probs, expected, atol=1e-5, rtol=1e-5)
        first, second = ((new - batch.old_log_probs).exp() for batch, new in captured)
        torch.testing.assert_close(first, torch.ones_like(first), atol=1e-5, rtol=0)
        assert (second - 1).abs().max() > 1e-2


def test_importance_ratio_is_exactly_one_with_one_mini_batch(
    model: Any, make_run: MakeRun, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = capture_inputs(monkeypatch)
    actor = build_actor(model, make_run(), 0)
    for _ in range(2):
        values = actor.update_policy(make_samples())
        assert values[metrics.IS_RATIO_MEAN] == 1.0
        assert values[metrics.PPO_KL] == 0.0
    for batch, new in captured:
        assert batch.old_log_probs is not None
        assert torch.equal(new, batch.old_log_probs)
        assert not batch.old_log_probs.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence", "none"])
@pytest.mark.parametrize("threshold", [1.2, 1000.0])
def test_rollout_weights_are_the_truncated_ratio_of_old_to_rollout_policy(
    model: Any,
    make_run: MakeRun,
    make_samples: MakeSamples,
    monkeypatch: pytest.MonkeyPatch,
    level: str,
    threshold: float,
) -> None:
    captured = capture_inputs(monkeypatch)
    run = make_run(
        rollout_correction__rollout_is=level,
        rollout_correction__rollout_is_threshold=threshold,
        actor__max_tokens_per_micro_batch=80,
    )
    samples = make_samples(seed=7, undistilled=())
    old = reference_old_log_probs(model, samples, run)
    values = build_actor(model, run, 0).update_policy(samples)
    assert len(captured) > 1
    expected = torch.cat([reference_rollout_weights(o, s, run) for o, s in zip(old, samples, strict=True)])
    gap = torch.cat([torch.tensor(s.response.log_probs) - o for o, s in zip(old, samples, strict=True)])
    assert values[metrics.ROLLOUT_KL] == pytest.approx(float(gap.mean()), rel=1e-4)
    if level == "none":
        assert all(batch.rollout_is_weights is None for batch, _ in captured)
        assert metrics.ROLLOUT_IS_MEAN not in values
        return
    actual = torch.cat([batch.rollout_is_weights for batch, _ in captured if batch.rollout_is_weights is not None])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert values[metrics.ROLLOUT_IS_MEAN] == pytest.approx(float(expected.mean()), rel=1e-4)
    truncated = (expected >= threshold).float().mean()
    assert values[metrics.ROLLOUT_IS_CLIP_FRACTION] == pytest.approx(float(truncated))
    assert (truncated > 0) == (threshold == 1.2)


def test_sampler_and_actor_compute_equal_log_probs(
    model: Any, make_run: MakeRun, make_sample: Callable[..., TrainingSample]
) -> None:
    """Cached decoding and a padded forward pass use the same weights, so every rollout weight is 1."""
    run = make_run(rollout__temperature=0.6)
    prompts = [[5, 6, 7, 8, 9, 3, 4], [4, 4, 5]]
    sampling_params = SamplingParams(3, HORIZON, 0.6, 1.0, 100, [2], 0)
    responses_by_prompt = sample_responses(
        [(model, 1.0)], [TokenPrompt(ids) for ids in prompts], sampling_params, seed=0
    )
    samples = [
        make_sample(prompt, response.token_ids, [3, *prompt], log_probs=response.log_probs)
        for prompt, responses in zip(prompts, responses_by_prompt, strict=True)
        for response in responses
    ]
    values = build_actor(model, run, 0).update_policy(samples)
    assert values[metrics.ROLLOUT_IS_MEAN] == pytest.approx(1.0, abs=1e-5)
    assert values[metrics.ROLLOUT_KL] == pytest.approx(0.0, abs=1e-5)


# --- teacher and optimizer


def test_teacher_is_updated_once_per_step_by_the_ema_formula(
    model: Any, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    actor = build_actor(model, make_run(actor__mini_batch_size=1, self_distillation__ema_update_rate=0.2), 0)
    assert actor.teacher is not None and actor.teacher.module is not None
    expected = copy_weights(model)
    for _ in range(3):
        actor.update_policy(make_samples())
        expected = {name: 0.8 * expected[name] + 0.2 * param for name, param in copy_weights(model).items()}
        for name, param in actor.teacher.module.named_parameters():
            torch.testing.assert_close(param, expected[name], atol=1e-6, rtol=0)
    change = max(float((p - expected[n]).abs().max()) for n, p in copy_weights(model).items())
    assert change > 1e-3, "the teacher must differ from the student"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_updates_match_adamw_with_the_scheduled_learning_rates(
    model: Any, make_run: MakeRun, make_samples: MakeSamples, schedule: str
) -> None:
    run = make_run(
        max_steps=5,
        actor__mini_batch_size=1,
        optim__lr_scheduler_type=schedule,
        optim__warmup_steps=3,
        optim__weight_decay=0.1,
        optim__betas=[0.8, 0.95],
        optim__max_grad_norm=0.02,
    )
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)
    actor = build_actor(model, run, 0)
    steps = record_steps(actor)
    rates: list[float] = []
    for _ in range(5):
        values = actor.update_policy(make_samples())
        for step in steps[-2:]:
            for param, gradient in zip(reference.parameters(), step.gradients.values(), strict=True):
                param.grad = gradient.clone()
            # transformers' scheduler begins with 0, and the first update would change nothing.
            rates.append(1e-2 * (len(rates) + 1) / 3 if len(rates) < 3 else scheduler.get_last_lr()[0])
            optimizer.param_groups[0]["lr"] = rates[-1]
            assert step.lr == pytest.approx(rates[-1])
            norm = torch.stack([g.norm() for g in step.gradients.values()]).norm()
            assert norm == pytest.approx(0.02, rel=1e-3)
            optimizer.step()
            scheduler.step()
        assert values[metrics.LR] == pytest.approx(rates[-1])
        assert_same_weights(model, reference, 1e-7)
    assert len(rates) == 10
    assert rates[:4] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    after = rates[3:]
    assert len(set(after)) == 1 if schedule == "constant" else all(a > b > 0 for a, b in pairwise(after))


def test_distillation_coefficient_follows_its_schedule(
    model: Any, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    run = make_run(
        max_steps=3,
        optim__lr=1e-12,
        self_distillation__distillation_coef_start=1.0,
        self_distillation__distillation_coef_end=0.5,
        self_distillation__teacher_regularization="frozen",
    )
    actor = build_actor(model, run, 0)
    values = [actor.update_policy(make_samples()) for _ in range(3)]
    assert [v[metrics.DISTILLATION_COEF] for v in values] == [1.0, 0.75, 0.5]
    losses = [v[metrics.LOSS] for v in values]
    assert losses == pytest.approx([losses[0], 0.75 * losses[0], 0.5 * losses[0]], rel=1e-4)
    assert [v[metrics.DISTILLATION_LOSS] for v in values] == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_scaling_of_logits_in_the_model_is_part_of_the_policy(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    scaled_head, scaled_logits = make_model(), make_model()
    with torch.no_grad():
        scaled_head.lm_head.weight.mul_(-2.0)
    unscaled_forward = scaled_logits.forward

    def forward(**inputs: Any) -> Any:
        output = unscaled_forward(**inputs)
        output.logits = -2.0 * output.logits
        return output

    scaled_logits.forward = forward
    results = [
        build_actor(model, make_run(), 0).update_policy(make_samples()) for model in (scaled_head, scaled_logits)
    ]
    for metric in (metrics.LOSS, metrics.ENTROPY, metrics.ROLLOUT_KL):
        assert results[0][metric] == pytest.approx(results[1][metric], rel=1e-4)


def test_grpo_has_no_teacher(model: Any, make_run: MakeRun, make_samples: MakeSamples) -> None:
    actor = build_actor(model, make_run(self_distillation__policy_loss_weight=1.0), 0)
    values = actor.update_policy(make_samples(undistilled=range(6)))
    assert actor.teacher is None
    assert metrics.PG_LOSS in values
    assert metrics.DISTILLATION_LOSS not in values and metrics.DISTILLATION_COEF not in values


# --- non-finite values


def make_nonfinite(sample: TrainingSample, part: str) -> TrainingSample:
    if part == "rollout":
        values = [*sample.response.log_probs[:-1], math.nan]
        return replace(sample, response=replace(sample.response, log_probs=values))
    if part == "advantage":
        return replace(sample, advantage=math.nan)
    if part == "student":
        ids = [11, *sample.response.token_ids[1:]]
        return replace(sample, response=replace(sample.response, token_ids=ids))
    ids = [11, *(sample.teacher_prompt.token_ids or [])]
    prompt = replace(sample.teacher_prompt, token_ids=ids)
    return replace(sample, context=replace(sample.context, prompt=prompt))


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize("part", ["rollout", "advantage", "student", "teacher"])
def test_nonfinite_sample_is_dropped(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples, part: str, budget: int
) -> None:
    """The embedding of token 11 is NaN, so that logits after it are NaN."""
    run = make_run(
        self_distillation__policy_loss_weight=0.3, actor__max_tokens_per_micro_batch=budget, actor__mini_batch_size=1
    )
    samples = make_samples()
    results = []
    for batch in ([*samples[:4], make_nonfinite(samples[4], part), samples[5]], [*samples[:4], samples[5]]):
        model = make_model()
        with torch.no_grad():
            model.get_input_embeddings().weight[11] = math.nan
        values = build_actor(model, run, 0).update_policy(batch)
        results.append((model, values))
    (complete, values), (without, expected) = results
    assert values.pop(metrics.NONFINITE_SAMPLES) == 1
    assert expected.pop(metrics.NONFINITE_SAMPLES) == 0
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # Tolerance of a thousandth of a step: the gradient of a key bias is rounding error, which AdamW amplifies.
    assert_same_weights(complete, without, 1e-3 * run.optim.lr)
    assert torch.isfinite(complete.lm_head.weight).all()


def test_dropped_samples_of_all_mini_batches_are_counted(
    model: Any, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    samples = [make_nonfinite(s, "rollout") if i in (0, 2, 5) else s for i, s in enumerate(make_samples())]
    values = build_actor(model, make_run(actor__mini_batch_size=1), 0).update_policy(samples)
    assert values[metrics.NONFINITE_SAMPLES] == 3
    assert all(math.isfinite(v) for v in values.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("minis", [None, 1])
@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_unscored_sample_is_dropped(
    mode: str, minis: int | None, coef: float, make_model: Any, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    """Gradients and loss equal those of the step without the sample; no other sample moves into its mini-batch."""
    run = make_run(
        actor__loss_agg_mode=mode,
        actor__mini_batch_size=minis,
        self_distillation__policy_loss_weight=coef,
        rollout__n=3,
    )
    samples = make_samples(undistilled=(1,))
    failed = list(samples)
    failed[1] = replace(failed[1], rollout=replace(failed[1].rollout, score=math.nan), advantage=0.0)
    complete, without = build_actor(make_model(), run, 0), build_actor(make_model(), run, 0)
    steps, expected_steps = record_steps(complete), record_steps(without)
    values = complete.update_policy(failed)
    expected = [
        without._train_mini_batch(list(mini), LogProbs(list(old) if old else None, None), 1.0, None, lambda: None)
        for mini, old in drop_sample(without, samples, 1, minis)
    ]
    assert len(steps) == len(expected_steps) == (1 if minis is None else 2)
    for step, expected_step in zip(steps, expected_steps, strict=True):
        assert_same_gradients(step.gradients, expected_step.gradients)
    losses = [values[metrics.LOSS] for values in expected]
    assert values[metrics.LOSS] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert values[metrics.NONFINITE_SAMPLES] == 0


def drop_sample(actor: Actor, samples: list[TrainingSample], dropped: int, minis: int | None) -> Any:
    """Mini-batches of the two prompts without one sample; with old log-probabilities if there is more than one."""
    old = actor.compute_log_probs(samples)
    mini_batches = [range(6)] if minis is None else [range(3), range(3, 6)]
    for mini in mini_batches:
        kept = [i for i in mini if i != dropped]
        yield [samples[i] for i in kept], None if minis is None else [old[i] for i in kept]


def test_batch_of_nonfinite_samples_changes_no_weights(
    model: Any, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    before = copy.deepcopy(model)
    values = build_actor(model, make_run(), 0).update_policy([make_nonfinite(s, "rollout") for s in make_samples()])
    assert all(math.isfinite(v) for v in values.values())
    assert values[metrics.NONFINITE_SAMPLES] == 6
    assert_same_weights(model, before)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_batch_without_distilled_samples_changes_no_weights(
    model: Any, make_run: MakeRun, make_samples: MakeSamples, budget: int
) -> None:
    before = copy.deepcopy(model)
    run = make_run(actor__max_tokens_per_micro_batch=budget, optim__weight_decay=0.0)
    values = build_actor(model, run, 0).update_policy(make_samples(undistilled=range(6)))
    assert values[metrics.LOSS] == 0
    assert_same_weights(model, before)


def test_update_with_a_nonfinite_gradient_is_skipped(model: Any, make_run: MakeRun, make_samples: MakeSamples) -> None:
    actor = build_actor(model, make_run(), 0)
    before = copy.deepcopy(model)
    handle = model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    values = actor.update_policy(make_samples())
    assert values[metrics.SKIPPED_UPDATES] == 1
    assert_same_weights(model, before)
    handle.remove()
    values = actor.update_policy(make_samples())
    assert values[metrics.SKIPPED_UPDATES] == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


# --- memory and precision


def test_gradient_checkpointing_recomputes_and_gives_equal_gradients(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    results = []
    for checkpointing in (False, True):
        model = make_model(attention_dropout=0.5)  # of transformers' training mode, which no pass uses
        actor = build_actor(model, make_run(actor__gradient_checkpointing=checkpointing), 0)
        calls: list[bool] = []
        actor.student.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(True))
        steps = record_steps(actor)
        actor.update_policy(make_samples())
        results.append((steps[0].gradients, len(calls)))
    assert [calls for _, calls in results] == [1, 2]
    assert_same_gradients(results[1][0], results[0][0], 1e-6)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = micro_batch_loss.fused_linear_sdpo_loss
    results = []
    for autocast in (False, True):
        actor = build_actor(make_model(), make_run(actor__autocast=autocast), 0)
        dtypes: list[torch.dtype] = []
        actor.student.model.layers[1].mlp.down_proj.register_forward_hook(
            lambda *args, dtypes=dtypes: dtypes.append(args[2].dtype)
        )

        def record_dtypes(student: Any, teacher: Any, *args: Any, dtypes: Any = dtypes, **settings: Any) -> Any:
            dtypes += [student.hidden.dtype, *(part.hidden.dtype for part in teacher)]
            return compute(student, teacher, *args, **settings)

        monkeypatch.setattr(micro_batch_loss, "fused_linear_sdpo_loss", record_dtypes)
        values = actor.update_policy(make_samples())
        assert {p.dtype for p in actor.student.parameters()} == {torch.float32}
        results.append((values[metrics.LOSS], set(dtypes)))
    assert [dtypes for _, dtypes in results] == [{torch.float32}, {torch.bfloat16}]
    assert results[1][0] != results[0][0]
    assert results[1][0] == pytest.approx(results[0][0], rel=0.1)


def test_teacher_of_a_bfloat16_student_is_averaged_in_float32(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples
) -> None:
    """At this rate, an average in bfloat16 would round to no change."""
    model = make_model(dtype=torch.bfloat16)
    actor = build_actor(model, make_run(optim__lr=2e-3, self_distillation__ema_update_rate=0.01), 0)
    assert actor.teacher is not None and actor.teacher.module is not None
    expected = {name: param.float() for name, param in copy_weights(model).items()}
    for _ in range(6):
        actor.update_policy(make_samples())
        expected = {name: 0.99 * expected[name] + 0.01 * param.float() for name, param in copy_weights(model).items()}
    for name, param in actor.teacher.module.named_parameters():
        assert param.dtype == torch.bfloat16
        torch.testing.assert_close(param, expected[name].bfloat16(), atol=0, rtol=0.01)


def test_top_k_above_the_vocabulary_size_is_refused(model: Any, make_run: MakeRun) -> None:
    with pytest.raises(SDPOError, match=r"distillation_topk=13: .* vocabulary of 12"):
        build_actor(model, make_run(self_distillation__distillation_topk=13), 0)
