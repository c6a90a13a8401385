"""The calculator example on verl: responses of several turns with tool calls."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sdpo.observability import metrics
from sdpo.observability.progress import NullCallback
from sdpo.rewards.base import load_task, prepare_task

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "calculator"
ACCURACY = "val-core/calculator/acc/mean@1"
ARGUMENTS = {"num_train": 400, "num_test": 40}

Metrics = Callable[[Path], dict[int, dict[str, Any]]]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and pretrained model, made once for all test processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "calculator"
    with FileLock(f"{folder}.lock"):
        prepare_task(load_task(str(EXAMPLE / "task.py"), {"dir": str(folder), **ARGUMENTS}), NullCallback())
    return folder


@pytest.fixture
def train(
    start: Callable[..., Any], data: Path, tmp_path: Path, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[int, dict[str, Any]]]:
    """Return a function that trains with the shipped config file on fewer rows and returns the metrics by step."""
    monkeypatch.chdir(ROOT)

    def run(*overrides: str) -> dict[int, dict[str, Any]]:
        arguments = {"dir": data, **ARGUMENTS}
        settings = [f"output_dir={tmp_path / 'run'}", *(f"data.task_args.{k}={v}" for k, v in arguments.items())]
        running = start(
            sys.executable, "-m", "sdpo.cli", "verl", str(EXAMPLE / "run.yaml"), *settings, "save_steps=0", *overrides
        )
        assert running.wait() == 0, running.tail()
        return metrics_of(tmp_path / "run")

    return run


def test_policy_learns_to_call_the_tool(train: Callable[..., Any], tmp_path: Path) -> None:
    rows = train("tracking.log_completions_steps=1")
    last = max(rows)
    # At first, one response in ten calls the tool. verl counts two turns for prompt and response, and two per call.
    assert 2.05 <= rows[1]["num_turns/mean"] <= 2.3
    assert rows[0][ACCURACY] <= 0.25 and rows[0]["val-aux/num_turns/mean"] <= 2.5
    # The tiny model copies some digits wrongly.
    assert rows[last][ACCURACY] >= 0.7 and rows[last]["val-aux/num_turns/mean"] >= 3.5
    assert rows[1][metrics.REPROMPT_FRACTION] < rows[last][metrics.REPROMPT_FRACTION]
    written = (tmp_path / "run" / "rollouts" / f"{last}.jsonl").read_text().splitlines()
    outputs = [json.loads(line)["output"] for line in written]
    assert any("</tool_call>" in output and "tool\n" in output for output in outputs)


def test_responses_with_tool_calls_train_one_step_off_policy(train: Callable[..., Any]) -> None:
    rows = train("max_staleness=1", "max_steps=2", "eval_steps=0")
    # About 20 of the 256 responses call the tool, and about 10 of the calls are right.
    assert max(rows[step]["num_turns/max"] for step in (1, 2)) == 4
    assert max(rows[step].get(metrics.DISTILLATION_LOSS, 0.0) for step in (1, 2)) > 0.0
