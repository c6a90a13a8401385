"""Complete runs on verl on the CPU: Ray, verl's trainers, FSDP2 and the agent loop. Each takes a minute or more."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpo.rewards.toy.hidden_rule import HiddenRule

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "models"))  # vision_language.py

ARGUMENTS = {"pretrain_steps": 0, "num_train": 16, "num_test": 4}
SETTINGS = [
    "max_steps=2",
    "eval_steps=0",
    "data.train_batch_size=4",
    "rollout.n=2",
    "rollout.max_response_length=8",
    "optim.warmup_steps=0",
    "optim.lr=1e-3",
    "self_distillation.teacher_regularization=ema",
    *(f"data.task_args.{name}={value}" for name, value in ARGUMENTS.items()),
]
RUN_FILE = Path(__file__).parents[2] / "configs" / "hidden_rule.yaml"
LIMIT = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)


if importlib.util.find_spec("verl") is None:  # sdpo[verl] is not installed
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task") / "hidden_rule"
    HiddenRule(str(folder), **ARGUMENTS).prepare()
    return folder


class Running:
    """A command and all the processes that it starts."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        with log.open("ab") as output:
            self.process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def wait(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """Return the exit code, or None as soon as ``until`` holds."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            code = self.process.poll()
            if code is not None:
                return int(code)
            if until():
                return None
            time.sleep(0.02)
        raise TimeoutError(self.tail())

    def kill(self) -> None:
        family = [*self.process.children(recursive=True), self.process] if self.process.is_running() else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Return a function that starts a command; its remaining processes are killed when the test ends."""
    started: list[Running] = []

    def begin(*command: str) -> Running:
        started.append(Running(command, tmp_path / "output.log"))
        return started[-1]

    yield begin
    for running in started:
        running.kill()


@pytest.fixture
def train_on_verl(start: Callable[..., Running], task_dir: Path) -> Callable[..., Running]:
    """Return a function that starts ``sdpo verl`` with a small run in a given folder."""

    def train(output_dir: Path, *overrides: str) -> Running:
        settings = [f"output_dir={output_dir}", f"data.task_args.dir={task_dir}", *SETTINGS, *overrides]
        return start(sys.executable, "-m", "sdpo.cli", "verl", str(RUN_FILE), *settings)

    return train


def read_metrics(output_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics of all parts of a run, by step."""
    rows: dict[int, dict[str, Any]] = {}
    for file in sorted(output_dir.glob("metrics*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["step"], {}).update(row["data"])
    return rows


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], dict[int, dict[str, Any]]]:
    return read_metrics
