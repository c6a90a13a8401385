"""Health checks and the best checkpoint in complete runs on verl."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdpo.observability import metrics
from sdpo.verl_backend.driver.health import STATE_FILE
from sdpo.verl_backend.smoke.checks import load_weights

Metrics = Callable[[Path], dict[int, dict[str, Any]]]
Train = Callable[..., Any]

# Every response scores 1 until a checkpoint of step 4 or later exists, and 0 afterwards.
REWARD_FUNCTION = """
from pathlib import Path

def compute_score(row, response):
    steps = [int(folder.name.removeprefix("global_step_")) for folder in Path({checkpoints!r}).glob("global_step_*")]
    return float(max(steps, default=0) < 4)
"""


def read_events(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "health_events.jsonl").read_text().splitlines()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_health_check_stops_the_run_and_the_best_checkpoint_is_kept(
    start: Train, task_dir: Path, tmp_path: Path, metrics_of: Metrics
) -> None:
    """Sampling and training in turns. Steps 2 and 4 are saved and evaluated. The score falls at step 5."""
    output_dir = tmp_path / "run"
    (tmp_path / "reward.py").write_text(REWARD_FUNCTION.format(checkpoints=str(output_dir / "checkpoints")))
    (tmp_path / "run.yaml").write_text("output_dir: ???\nmax_steps: 9\n")
    settings = {
        "output_dir": output_dir,
        "model.path": task_dir / "model",
        "data.task": tmp_path / "reward.py",
        "data.train_files": f"[{task_dir / 'train.parquet'}]",
        "data.val_files": f"[{task_dir / 'test.parquet'}]",
        "data.train_batch_size": 4,
        "rollout.n": 2,
        "rollout.max_response_length": 8,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "save_steps": 2,
        "eval_steps": 2,
        "save_total_limit": 1,
        "health.window": 1,
        "health.min_z_score": 0,
        "health.score_collapse": "stop",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    running = start(sys.executable, "-m", "sdpo.cli", "verl", str(tmp_path / "run.yaml"), *overrides)
    assert running.wait() == 0, running.tail()
    reason = "training score fell from 1 to 0 (means of 1 steps)"
    assert f"stopped by a health check: score_collapse: {reason}\n" in running.log.read_text(errors="replace")
    message = f"step 5: health.score_collapse=stop: {reason}; stopping the run after this step"
    assert message in running.log.read_text(errors="replace")
    assert [(event["step"], event["rule"], event["action"]) for event in read_events(output_dir)] == [
        (5, "score_collapse", "stop")
    ]
    rows = metrics_of(output_dir)
    assert sorted(rows) == [0, 1, 2, 3, 4, 5]
    assert [rows[step][metrics.NUM_WARNINGS] for step in range(1, 6)] == [0, 0, 0, 0, 1]
    assert [rows[step][metrics.SCORE_MEAN] for step in range(1, 6)] == [1, 1, 1, 1, 0]
    assert {step: metrics.find_score(row) for step, row in rows.items()} == {0: 1, 1: None, 2: 1, 3: None, 4: 0, 5: 0}
    assert sorted(folder.name for folder in (output_dir / "checkpoints").glob("global_step_*")) == [
        "global_step_2",
        "global_step_5",
    ]
    load_weights(output_dir, 2), load_weights(output_dir, 5, teacher=True)


def test_health_check_freezes_the_teacher_and_a_resumed_run_keeps_it_frozen(
    train_on_verl: Train, tmp_path: Path, metrics_of: Metrics
) -> None:
    """One step off policy. From step 2, any change of the entropy fails a health check."""
    output_dir = tmp_path / "run"
    settings = [
        "max_staleness=1",
        "max_steps=3",
        "save_steps=1",
        "save_total_limit=9",
        "health.window=1",
        "health.min_z_score=0",
    ]
    settings += ["health.entropy_rise=1", "health.entropy_fall=1"]
    settings += [
        "health.entropy_explosion=freeze_teacher",
        "health.entropy_collapse=freeze_teacher",
        "health.score_collapse=reduce_weight",
    ]
    running = train_on_verl(output_dir, *settings)
    assert running.wait() == 0, running.tail()
    events = read_events(output_dir)
    assert [(event["step"], event["action"]) for event in events][:1] == [(2, "freeze_teacher")]
    state = json.loads((output_dir / "checkpoints/global_step_3" / STATE_FILE).read_text())
    assert state["actor"]["teacher_is_frozen"]

    # The run resumes from step 2, as after a kill before the checkpoint of step 3.
    (output_dir / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    running = train_on_verl(output_dir, *settings, "resume_mode=auto", "max_steps=4")
    assert running.wait() == 0, running.tail()
    again = read_events(output_dir)
    assert [event for event in again if event["step"] <= 2] == [event for event in events if event["step"] <= 2]
    rows = metrics_of(output_dir)
    assert [rows[step][metrics.TEACHER_FROZEN] for step in (1, 2, 3, 4)] == [0, 1, 1, 1]
    teachers = {step: load_weights(output_dir, step, teacher=True) for step in (1, 2, 3, 4)}
    assert not same(teachers[1], teachers[2])
    assert same(teachers[2], teachers[3]) and same(teachers[3], teachers[4])
    assert not same(load_weights(output_dir, 3), load_weights(output_dir, 4))
