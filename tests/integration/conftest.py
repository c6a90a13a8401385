"""Fixtures of the integration tests: the offline task with an untrained model, and a config file for a short run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdpo.rewards.toy.hidden_rule import HiddenRule

ARGUMENTS = {"pretrain_steps": 0, "num_train": 40, "num_test": 8}


@pytest.fixture(scope="session")
def hidden_rule_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task") / "hidden_rule"
    HiddenRule(str(folder), **ARGUMENTS).prepare()
    return folder


@pytest.fixture
def write_config_file(hidden_rule_dir: Path, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that writes ``run.yaml`` with the run folder ``run`` in the same folder."""

    def write() -> Path:
        arguments = "".join(f"    {name}: {value}\n" for name, value in ARGUMENTS.items())
        text = (
            f"output_dir: {tmp_path}/run\n"
            "max_steps: 2\n"
            "model:\n"
            "  path: ${data.task_args.dir}/model\n"
            "data:\n"
            "  task: hidden_rule\n"
            "  task_args:\n"
            f"    dir: {hidden_rule_dir}\n{arguments}"
            '  train_files: ["${data.task_args.dir}/train.parquet"]\n'
            '  val_files: ["${data.task_args.dir}/test.parquet"]\n'
            "  train_batch_size: 4\n"
            "rollout:\n"
            "  n: 2\n"
            "  max_response_length: 8\n"
            "actor:\n"
            "  num_threads: 1\n"
            "self_distillation:\n"
            "  demonstration_source: none\n"
            "  include_environment_feedback: true\n"
        )
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return write
