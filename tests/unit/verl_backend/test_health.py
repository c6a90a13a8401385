"""Health checks on verl: the same events as on the native trainer, and actions on the driver."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from sdpo.config.monitoring import HealthConfig
from sdpo.config.root import SDPOConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.observability import metrics
from sdpo.observability.health import HealthMonitor
from sdpo.observability.health_callback import HealthCallback
from sdpo.observability.progress import NullCallback
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.actor.health_actions import ActorHealthActions
from sdpo.trainer.checkpoint.manager import prune_checkpoints, save_checkpoint
from sdpo.trainer.data.samples import TrainingSample, summarize_samples
from sdpo.trainer.logging.run_dir import RunDir
from sdpo.verl_backend.driver.health import STATE_FILE, RunHealth, summarize_rollouts
from sdpo.verl_backend.driver.teacher_batch import Rollout, TeacherBatchBuilder
from sdpo.verl_backend.worker.packing import DISTILLATION_COEF

ACCURACY = metrics.val_name("digits", "mean@1")
TOKENIZER = build_tokenizer()


class Workers:
    """A worker group that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def freeze_teacher(self) -> None:
        self.calls.append("freeze_teacher")

    def snapshot_best(self) -> None:
        self.calls.append("keep")


def build_config(
    folder: Path, *, save_total_limit: int | None = 1, save_best_limit: int = 1, **settings: Any
) -> DictConfig:
    health = HealthConfig(**{"window": 1, "min_z_score": 0.0, **settings.pop("health", {})})
    return OmegaConf.create(
        {
            "trainer": {
                "default_local_dir": str(folder / "checkpoints"),
                "health_events_file": str(folder / "health_events.jsonl"),
                "max_actor_ckpt_to_keep": save_total_limit,
                "save_best_limit": save_best_limit,
            },
            "actor_rollout_ref": {
                "actor": {
                    "policy_loss": {"loss_mode": "sdpo"},
                    "self_distillation": OmegaConf.structured(SelfDistillationConfig(**settings)),
                }
            },
            "health": OmegaConf.structured(health),
        }
    )


def build_teacher_batch(**settings: Any) -> TeacherBatchBuilder:
    return TeacherBatchBuilder(SelfDistillationConfig(**settings), TOKENIZER, None, seed=0, max_steps=10)


def coef_of(batch: TeacherBatchBuilder, step: int = 1) -> float:
    rollout = Rollout("a", [{"role": "user", "content": "1"}], [3], [1], 0.0, None, "2")
    fields, values = batch.build([rollout], step)
    assert values[metrics.DISTILLATION_COEF] == pytest.approx(float(fields[DISTILLATION_COEF][0]))
    return float(fields[DISTILLATION_COEF][0])


def make_rows(seed: int, num_steps: int = 40) -> list[dict[str, float]]:
    """Return metrics of a run to which every rule applies."""
    draw = random.Random(seed)
    rows = []
    for step in range(1, num_steps + 1):
        late = step > num_steps // 2
        rows.append(
            {
                metrics.SCORE_MEAN: draw.uniform(0.6, 0.7) - 0.5 * late,
                metrics.ENTROPY: draw.uniform(1.0, 1.1) * (0.02 if late and seed % 2 else 3.0 if late else 1.0),
                metrics.TEACHER_ENTROPY: draw.uniform(0.5, 0.6) * (4 if late else 1),
                metrics.RESPONSE_LENGTH_MEAN: draw.uniform(20, 22) * (0.2 if late else 1),
                metrics.RESPONSE_LENGTH_CLIP_RATIO: 0.1 + 0.5 * late,
                metrics.REPROMPT_FRACTION: 0.0 if step % 10 > 6 else 0.5,
                metrics.ROLLOUT_SUCCESS_FRACTION: draw.uniform(0.1, 0.2),
            }
        )
    return rows


@pytest.mark.parametrize("seed", [0, 1])
def test_both_backends_log_the_same_health_events(
    seed: int, model: Any, make_run: Callable[..., SDPOConfig], tmp_path: Path
) -> None:
    health = {
        "window": 2,
        "min_z_score": 1.0,
        "entropy_explosion": "freeze_teacher",
        "length_collapse": "reduce_weight",
        "no_distillation_targets": "reduce_weight",
        "score_collapse": "stop",
    }
    run = make_run(output_dir=str(tmp_path / "native"), **{f"health__{name}": value for name, value in health.items()})
    actor, folder = build_actor(model, run, 0), RunDir(Path(run.output_dir), run.tracking, NullCallback())
    actions = ActorHealthActions(actor, run.health)
    health_callback = HealthCallback(HealthMonitor(run.health), actions, folder.log_health_event)
    batch, workers = build_teacher_batch(), Workers()
    on_verl = RunHealth(build_config(tmp_path / "verl", health=health), batch, workers, None)
    for step, row in enumerate(make_rows(seed), start=1):
        assert on_verl.check(step, row) == health_callback.watch(step, row)
        assert batch.factor == actor.distillation_scale
        assert ("freeze_teacher" in workers.calls) == actions.teacher_is_frozen
    folder.close()
    raised = (tmp_path / "verl" / "health_events.jsonl").read_text()
    assert raised == (tmp_path / "native" / "health_events.jsonl").read_text()
    found = {json.loads(line)["rule"] for line in raised.splitlines()}
    assert found >= {"score_collapse", "teacher_entropy_increase", "length_collapse", "no_distillation_targets"}
    assert ("entropy_collapse" if seed else "entropy_explosion") in found
    assert on_verl.describe_stop() == health_callback.describe_stop() and on_verl.is_stopped


def test_reduced_distillation_weight_applies_from_the_next_batch(tmp_path: Path) -> None:
    """Each warning halves the weight, down to ``min_scale`` of the configured weight."""
    settings = {"distillation_coef_start": 0.8, "distillation_coef_end": 0.8}
    batch = build_teacher_batch(**settings)
    config = build_config(tmp_path, health={"score_collapse": "reduce_weight", "min_scale": 0.3}, **settings)
    health = RunHealth(config, batch, Workers(), None)
    weights = [coef_of(batch)]
    for step, score in enumerate([1.0, 0.5, 1.0, 0.5, 1.0, 0.5], start=1):
        health.check(step, {metrics.SCORE_MEAN: score})
        weights.append(coef_of(batch, step + 1))
    assert weights == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.24, 0.24, 0.24])


def make_checkpoint(config: DictConfig, step: int) -> Path:
    folder = Path(config.trainer.default_local_dir) / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    return folder


SCORES: list[list[float | None]] = [
    [0.5, 0.9, None, 0.2, 0.9, 0.3, None, 0.1],
    [None, None, None],
    [0.9, 0.8, 0.7, 0.6],
    [0.1, 0.2, 0.3, 0.4],
]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("save_total_limit", "save_best_limit"), [(1, 1), (2, 1), (1, 0), (2, 2)])
def test_both_backends_keep_the_same_checkpoints(
    scores: list[float | None], save_total_limit: int, save_best_limit: int, tmp_path: Path
) -> None:
    config = build_config(tmp_path, save_total_limit=save_total_limit, save_best_limit=save_best_limit)
    health = RunHealth(config, None, Workers(), None)
    assert config.trainer.max_actor_ckpt_to_keep is None, "verl removes none"
    native = tmp_path / "native"
    for step, score in enumerate(scores, start=1):
        make_checkpoint(config, step)
        health.note_checkpoint(step)
        health.complete_checkpoint(step)
        if score is not None:
            health.note_evaluation(step, {ACCURACY: score})
        save_checkpoint(native, step, score, lambda _: None)
        prune_checkpoints(native, save_total_limit, save_best_limit)
    kept = {int(path.name.removeprefix("global_step_")) for path in (tmp_path / "checkpoints").glob("global_step_*")}
    assert kept == {int(path.name.removeprefix("step_")) for path in native.iterdir()}


def test_best_and_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    config = build_config(tmp_path, save_total_limit=2)
    health = RunHealth(config, None, Workers(), None)
    kept = []
    for step, score in enumerate([0.2, 0.7, 0.3, 0.7, 0.1, 0.1], start=1):
        make_checkpoint(config, step)
        health.note_checkpoint(step)
        health.complete_checkpoint(step)
        health.note_evaluation(step, {ACCURACY: score})
        kept.append(sorted(int(path.name[12:]) for path in (tmp_path / "checkpoints").glob("global_step_*")))
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6]]


def test_score_uses_samples_if_a_dataset_has_no_greedy_evaluation() -> None:
    both = {metrics.val_name("a", "mean@1"): 0.5, metrics.val_name("a", "mean@4"): 0.9}
    assert metrics.find_score(both) == 0.5
    assert metrics.find_score({metrics.val_name("a", "mean@4"): 0.9, metrics.val_name("b", "mean@1"): 0.4}) == 0.65
    assert metrics.find_score({metrics.SCORE_MEAN: 1.0}) is None


def test_all_checkpoints_are_kept_without_a_limit(tmp_path: Path) -> None:
    config = build_config(tmp_path, save_total_limit=None)
    health = RunHealth(config, None, Workers(), None)
    for step in (1, 2, 3):
        make_checkpoint(config, step)
        health.note_checkpoint(step)
        health.complete_checkpoint(step)
    assert len(list((tmp_path / "checkpoints").glob("global_step_*"))) == 3


def read_events(folder: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (folder / "health_events.jsonl").read_text().splitlines()]


def test_resumed_run_restores_the_health_state(tmp_path: Path) -> None:
    """A run resumed from step 4 keeps the events of step 4; a run resumed from step 1 drops and repeats them."""
    settings = {
        "health": {"window": 2, "score_collapse": "reduce_weight", "entropy_explosion": "freeze_teacher"},
        "save_total_limit": 2,
    }
    rows = [
        {metrics.SCORE_MEAN: score, metrics.ENTROPY: entropy}
        for score, entropy in zip([1.0, 1.0, 0.9, 0.1, 0.1, 0.1], [1.0, 1.0, 1.0, 9.0, 9.0, 9.0], strict=True)
    ]
    config, batch, workers = build_config(tmp_path, **settings), build_teacher_batch(), Workers()
    health = RunHealth(config, batch, workers, None)
    expected = []
    for step, row in enumerate(rows[:5], start=1):
        expected.append(health.check(step, row))
        folder = make_checkpoint(config, step)
        health.note_checkpoint(step)
        health.complete_checkpoint(step)
        health.note_evaluation(step, {ACCURACY: 1 / step})
    events = read_events(tmp_path)
    assert [(event["step"], event["rule"]) for event in events] == [(4, "score_collapse"), (4, "entropy_explosion")]
    assert (batch.factor, workers.calls) == (0.5, ["freeze_teacher"])
    assert sorted(path.name for path in folder.parent.glob("global_step_*")) == [
        f"global_step_{step}" for step in (1, 4, 5)
    ]

    again, workers = build_teacher_batch(), Workers()
    health = RunHealth(build_config(tmp_path, **settings), again, workers, folder.parent / "global_step_4")
    assert read_events(tmp_path) == events
    assert (again.factor, workers.calls) == (0.5, []), "the engine's checkpoint has the frozen teacher"
    values = health.check(5, rows[4])
    assert values == expected[4] == {metrics.NUM_WARNINGS: 0, metrics.TEACHER_FROZEN: 1}
    assert read_events(tmp_path) == events
    health.note_checkpoint(5)
    health.complete_checkpoint(5)
    assert sorted(path.name for path in folder.parent.glob("global_step_*")) == [
        f"global_step_{step}" for step in (1, 4, 5)
    ]

    again, workers = build_teacher_batch(), Workers()
    health = RunHealth(build_config(tmp_path, **settings), again, workers, folder.parent / "global_step_1")
    assert read_events(tmp_path) == [] and again.factor == 1.0
    assert [health.check(step, rows[step - 1]) for step in (2, 3, 4)] == expected[1:4]
    assert read_events(tmp_path) == events


def test_new_run_discards_the_events_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "health_events.jsonl").write_text('{"step": 3}\n{"step": 4, "ru')
    RunHealth(build_config(tmp_path), None, Workers(), None)
    assert read_events(tmp_path) == []


def test_checkpoint_without_health_state_starts_without_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build_config(tmp_path)
    folder = make_checkpoint(config, 3)
    RunHealth(config, None, Workers(), folder)
    assert f"{folder}: has no {STATE_FILE}; the health checks start without history" in capsys.readouterr().out


def test_best_student_is_kept_for_a_live_teacher(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher_regularization": "live", "health": {"score_collapse": "freeze_teacher"}}
    config, workers = build_config(tmp_path, save_total_limit=None, **settings), Workers()
    health = RunHealth(config, build_teacher_batch(), workers, None)
    for step, accuracy in enumerate([0.5, 0.7, 0.7, 0.6], start=1):
        health.check(step, {metrics.SCORE_MEAN: 1.0})
        make_checkpoint(config, step)
        health.note_checkpoint(step)
        health.complete_checkpoint(step)
        health.note_evaluation(step, {ACCURACY: accuracy})
    assert workers.calls == ["keep", "keep"]
    for step, calls in ((2, ["keep"]), (3, [])):  # the checkpoint of step 3 contains the best student
        workers = Workers()
        health = RunHealth(
            build_config(tmp_path, save_total_limit=None, **settings),
            build_teacher_batch(),
            workers,
            tmp_path / "checkpoints" / f"global_step_{step}",
        )
        assert workers.calls == calls
    assert health.check(4, {metrics.SCORE_MEAN: 0.0}) == {metrics.NUM_WARNINGS: 1, metrics.TEACHER_FROZEN: 1}
    health.note_evaluation(4, {ACCURACY: 0.9})
    assert workers.calls == ["freeze_teacher"]


@pytest.mark.parametrize(
    "settings",
    [{"teacher_regularization": "ema", "health": {"score_collapse": "freeze_teacher"}}, {}],
    ids=["ema", "warn"],
)
def test_best_student_is_not_kept_without_a_live_teacher_to_freeze(settings: dict[str, Any], tmp_path: Path) -> None:
    workers = Workers()
    RunHealth(build_config(tmp_path, **settings), build_teacher_batch(), workers, None).note_evaluation(
        1, {ACCURACY: 0.5}
    )
    assert workers.calls == []


def test_rollout_metrics_match_the_native_trainer(make_samples: Callable[..., list[TrainingSample]]) -> None:
    samples = make_samples()
    expected = summarize_samples(samples, SelfDistillationConfig())
    scores, lengths = [s.rollout.score for s in samples], [len(s.response.token_ids) for s in samples]
    values = summarize_rollouts(scores, lengths, max_length=max(lengths) + 1)
    assert values[metrics.SCORE_MEAN] == pytest.approx(expected[metrics.SCORE_MEAN])
    assert values[metrics.RESPONSE_LENGTH_MEAN] == pytest.approx(expected[metrics.RESPONSE_LENGTH_MEAN])
    assert values[metrics.RESPONSE_LENGTH_CLIP_RATIO] == 0
    values = summarize_rollouts([1.0, math.nan, 0.0, 0.5], [4, 8, 8, 2], max_length=8)
    assert values == {
        metrics.SCORE_MEAN: 0.5,
        metrics.RESPONSE_LENGTH_MEAN: 5.5,
        metrics.RESPONSE_LENGTH_CLIP_RATIO: 0.5,
    }
    assert metrics.SCORE_MEAN not in summarize_rollouts([math.nan], [1], max_length=8)
