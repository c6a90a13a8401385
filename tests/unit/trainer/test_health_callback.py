"""Actions of failed health checks on actor and run, and the recorded events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdpo.config.monitoring import HealthConfig
from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.observability import metrics
from sdpo.observability.health import HealthMonitor
from sdpo.observability.health_callback import HealthCallback
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.actor.health_actions import ActorHealthActions
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.trainer import SDPOTrainer

MakeRun = Callable[..., SDPOConfig]
MakeSamples = Callable[..., list[TrainingSample]]
ACCURACY = metrics.val_name("digits", "mean@1")


def record_in(folder: Path) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that appends events to health_events.jsonl, like the run folder."""

    def record(event: Mapping[str, Any]) -> None:
        with (folder / "health_events.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")

    return record


def build_callback(actor: Actor, folder: Path, **actions: str) -> HealthCallback:
    config = HealthConfig(window=1, min_z_score=0.0, **actions)
    return HealthCallback(HealthMonitor(config), ActorHealthActions(actor, config), record_in(folder))


def report_score_drop(health_callback: HealthCallback) -> dict[str, float]:
    """Report a lower score in the second step; return the values of this step."""
    assert health_callback.watch(1, {metrics.SCORE_MEAN: 1.0})[metrics.NUM_WARNINGS] == 0
    return health_callback.watch(2, {metrics.SCORE_MEAN: 0.5})


def copy_weights(module: nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in module.parameters()]


def have_equal_weights(one: nn.Module | list[torch.Tensor], other: nn.Module | list[torch.Tensor]) -> bool:
    pairs = zip(*(list(x.parameters()) if isinstance(x, nn.Module) else x for x in (one, other)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_reduce_weight_halves_the_coefficient_down_to_its_minimum(
    model: Any, make_run: MakeRun, make_samples: MakeSamples, tmp_path: Path
) -> None:
    run = make_run(self_distillation__distillation_coef_start=0.8, self_distillation__distillation_coef_end=0.8)
    actor = build_actor(model, run, 0)
    samples = make_samples()
    assert actor.update_policy(samples)[metrics.DISTILLATION_COEF] == pytest.approx(0.8)
    report_score_drop(build_callback(actor, tmp_path, score_collapse="reduce_weight"))
    assert actor.update_policy(samples)[metrics.DISTILLATION_COEF] == pytest.approx(0.4)
    for _ in range(5):
        ActorHealthActions(actor, run.health).reduce_distillation()
    assert actor.update_policy(samples)[metrics.DISTILLATION_COEF] == pytest.approx(0.8 * 0.1)


def test_reduced_weight_scales_the_gradient(
    make_model: Callable[..., Any], make_run: MakeRun, make_samples: MakeSamples
) -> None:
    norms = []
    for is_reduced in (False, True):
        actor = build_actor(make_model(), make_run(), 0)
        if is_reduced:
            ActorHealthActions(actor, HealthConfig()).reduce_distillation()
        norms.append(actor.update_policy(make_samples())[metrics.GRAD_NORM])
    assert norms[1] == pytest.approx(0.5 * norms[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["ema", "snapshot"])
def test_frozen_teacher_keeps_its_weights(
    kind: str, model: Any, make_run: MakeRun, make_samples: MakeSamples, tmp_path: Path
) -> None:
    run = make_run(
        self_distillation__teacher_regularization=kind,
        self_distillation__teacher_sync_steps=1,
        health__score_collapse="freeze_teacher",
    )
    actor = build_actor(model, run, 0)
    assert actor.teacher is not None and actor.teacher.module is not None
    initial = copy_weights(actor.teacher.module)
    actor.update_policy(make_samples())
    updated = copy_weights(actor.teacher.module)
    assert not have_equal_weights(initial, updated)
    values = report_score_drop(build_callback(actor, tmp_path, score_collapse="freeze_teacher"))
    assert (values[metrics.NUM_WARNINGS], values[metrics.TEACHER_FROZEN]) == (1, 1)
    before = copy_weights(actor.student)
    actor.update_policy(make_samples())
    assert have_equal_weights(actor.teacher.module, updated)
    assert not have_equal_weights(actor.student, before)


def test_freezing_a_trust_region_teacher_leaves_the_reference_model(model: Any, make_run: MakeRun) -> None:
    actor = build_actor(model, make_run(self_distillation__teacher_regularization="trust-region"), 0)
    assert actor.teacher is not None
    assert len(actor.teacher.policy(actor.student)) == 2
    ActorHealthActions(actor, HealthConfig()).freeze_teacher()
    assert list(actor.teacher.policy(actor.student)) == [(actor.teacher.module, 1.0)]


def test_freezing_a_live_teacher_uses_the_reference_model_and_restores_the_best_student(
    model: Any, make_run: MakeRun, make_samples: MakeSamples, tmp_path: Path
) -> None:
    actor = build_actor(
        model, make_run(self_distillation__teacher_regularization="live", health__score_collapse="freeze_teacher"), 0
    )
    health_callback = build_callback(actor, tmp_path, score_collapse="freeze_teacher")
    assert actor.teacher is not None
    initial = copy_weights(actor.student)
    health_callback.watch(1, {metrics.SCORE_MEAN: 1.0, ACCURACY: 0.8})
    actor.update_policy(make_samples())
    health_callback.watch(2, {metrics.SCORE_MEAN: 1.0, ACCURACY: 0.9})
    best = copy_weights(actor.student)
    actor.update_policy(make_samples())
    health_callback.watch(3, {metrics.SCORE_MEAN: 1.0, ACCURACY: 0.9})  # equal, but later
    assert actor.teacher.policy(actor.student)[0][0] is actor.student
    health_callback.watch(4, {metrics.SCORE_MEAN: 0.5})
    ((module, coefficient),) = actor.teacher.policy(actor.student)
    assert coefficient == 1.0 and have_equal_weights(module, initial) and not have_equal_weights(best, initial)
    assert have_equal_weights(actor.student, best)
    actor.update_policy(make_samples())
    assert have_equal_weights(module, initial) and not have_equal_weights(actor.student, best)


def test_student_keeps_its_weights_without_an_evaluation(
    model: Any, make_run: MakeRun, make_samples: MakeSamples, tmp_path: Path
) -> None:
    actor = build_actor(
        model, make_run(self_distillation__teacher_regularization="live", health__score_collapse="freeze_teacher"), 0
    )
    actor.update_policy(make_samples())
    before = copy_weights(actor.student)
    report_score_drop(build_callback(actor, tmp_path, score_collapse="freeze_teacher"))
    assert have_equal_weights(actor.student, before)
    assert actor.teacher is not None and actor.teacher.module is actor.initial


def test_failed_check_is_logged_and_recorded(
    model: Any, make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = HealthMonitor(HealthConfig(window=1, min_z_score=0.0, score_collapse="stop"))
    actions = ActorHealthActions(build_actor(model, make_run(), 0), HealthConfig())
    health_callback = HealthCallback(monitor, actions, record_in(tmp_path))
    report_score_drop(health_callback)
    reason = "training score fell from 1 to 0.5 (means of 1 steps)"
    assert caplog.messages == [f"step 2: health.score_collapse=stop: {reason}; stopping the run after this step"]
    assert json.loads((tmp_path / "health_events.jsonl").read_text()) == {
        "step": 2,
        "rule": "score_collapse",
        "action": "stop",
        "reason": reason,
        "values": {f"{metrics.SCORE_MEAN}/before": 1.0, metrics.SCORE_MEAN: 0.5},
    }
    assert health_callback.stop_event is not None and health_callback.stop_event.rule == "score_collapse"


def test_callback_resumes_from_its_state(model: Any, make_run: MakeRun, tmp_path: Path) -> None:
    actor = build_actor(model, make_run(), 0)
    first, second = (build_callback(actor, tmp_path) for _ in range(2))
    first.watch(1, {metrics.SCORE_MEAN: 1.0, ACCURACY: 0.7})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.best_accuracy == 0.7
    assert second.watch(2, {metrics.SCORE_MEAN: 0.5})[metrics.NUM_WARNINGS] == 1


def read_rows(run: SDPOConfig) -> list[Mapping[str, float]]:
    return [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_stop_ends_the_run_like_a_complete_run(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 1.0, 0.2, 0.2, 0.2])
    summarize = "sdpo.trainer.trainer.summarize_samples"
    from sdpo.trainer.data.samples import summarize_samples

    monkeypatch.setattr(summarize, lambda *a: summarize_samples(*a) | {metrics.SCORE_MEAN: next(scores)})
    run = make_task_run(max_steps=5, health__window=1, health__min_z_score=0.0, health__score_collapse="stop")
    result = SDPOTrainer(run).train()
    assert result.stop_reason == "score_collapse: training score fell from 1 to 0.2 (means of 1 steps)"
    rows = read_rows(run)
    assert [row[metrics.STEP] for row in rows] == [0, 1, 2, 3]
    assert any(name.startswith("val-core/") for name in rows[-1])  # evaluated like the last step
    assert (Path(run.output_dir) / "checkpoints" / "step_3").is_dir()
    assert result.metrics[metrics.NUM_WARNINGS] == 1 and not result.interrupt_signal


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"self_distillation__policy_loss_weight": 1.0, "health__entropy_collapse": "reduce_weight"},
            "health.entropy_collapse=reduce_weight",
        ),
        (
            {
                "self_distillation__teacher_regularization": "frozen",
                "health__teacher_underperforms_student": "freeze_teacher",
            },
            "health.teacher_underperforms_student=freeze_teacher",
        ),
    ],
)
def test_action_without_effect_is_refused(settings: dict[str, Any], message: str, make_run: MakeRun) -> None:
    with pytest.raises(SDPOError, match=message):
        make_run(**settings)
