"""Reward functions that raise or hang, on each trainer: few failures are excluded, many end the run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpo import load_config
from sdpo.observability import metrics
from sdpo.verl_backend.config.to_verl import to_verl_overrides
from sdpo.verl_backend.entrypoint.launch import build_command

ROOT = Path(__file__).parents[2]

Metrics = Callable[[Path], dict[int, dict[str, Any]]]
Train = Callable[..., Any]

# In the first batch, scoring raises for a response of row 1 and hangs for a response of row 2.
# In later batches, scoring raises for every response.
REWARD_FUNCTION = """
import time
from pathlib import Path
from sdpo.rewards.toy.hidden_rule import HiddenRule

class build_task(HiddenRule):
    def compute_score(self, row, response):
        rank = int(row.extra_info["index"]) if row.extra_info["split"] == "train" else 3
        if rank > 3:
            raise ValueError("no score beyond the fourth row")
        calls = Path({calls!r}) / f"{{row.extra_info['split']}}{{row.extra_info['index']}}"
        with calls.open("a") as file:
            file.write("x")
        if calls.stat().st_size == 1 and rank == 1:
            raise ZeroDivisionError("division by zero")
        if calls.stat().st_size == 1 and rank == 2:
            time.sleep(600)
        return super().compute_score(row, response)
"""


@pytest.mark.parametrize("name", ["sdpo_trainer", "sdpo_sync", "sdpo_separate_async"])
def test_failed_rewards_are_counted_and_end_the_run_above_the_limit(
    name: str, start: Train, task_dir: Path, tmp_path: Path, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calls").mkdir()
    (tmp_path / "reward.py").write_text(REWARD_FUNCTION.format(calls=str(tmp_path / "calls")))
    overrides = {
        "data.task": tmp_path / "reward.py",
        "data.task_args.dir": task_dir,
        "data.task_args.num_train": 16,
        "data.task_args.num_test": 4,
        "data.task_args.pretrain_steps": 0,
        "data.shuffle": "false",
        "reward.timeout_s": 5.0,
        "reward.max_failure_fraction": 0.3,
        "output_dir": tmp_path / "run",
        "max_steps": 3,
        "max_staleness": 0 if name == "sdpo_sync" else 1,
        "eval_steps": 1,
        "data.train_batch_size": 4,
        "rollout.n": 2,
        "rollout.max_response_length": 8,
        "self_distillation.policy_loss_weight": 0.3,
    }
    run = load_config(ROOT / "configs" / "hidden_rule.yaml", [f"{key}={value}" for key, value in overrides.items()])
    command = build_command(to_verl_overrides(run), run.output_dir)
    for variable, value in command.environment.items():
        monkeypatch.setenv(variable, value)
    arguments = [name if argument.startswith("sdpo_") else argument for argument in command.arguments]
    running = start(sys.executable, "-m", "sdpo.verl_backend.entrypoint.main", *arguments)
    assert running.wait() == 2, running.tail()
    log = running.log.read_text(errors="replace")
    last = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(last) == 1 and re.fullmatch(
        r"error: data\.task: scoring failed for \d of 8 responses of step \d, more than "
        r"reward\.max_failure_fraction=0\.3; the last: hidden_rule: .*",
        last[0],
    ), last
    if name == "sdpo_separate_async":  # the order of prompts is random
        return
    assert "4 of 8 responses of step 2" in last[0] or "8 of 8 responses of step 2" in last[0]
    assert "scoring failed for 2 of 8 responses of step 1, which are left out; the last: " in log
    rows = metrics_of(tmp_path / "run")
    assert sorted(rows) == [0, 1]
    assert rows[1][metrics.REWARD_FAILURES] == 2
    assert rows[0][metrics.VAL_REWARD_FAILURES] == rows[1][metrics.VAL_REWARD_FAILURES] == 0
    assert rows[1][metrics.REPROMPT_FRACTION] == pytest.approx(6 / 8)
    assert rows[1][metrics.DISTILLATION_LOSS] > 0
