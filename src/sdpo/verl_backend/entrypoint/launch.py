"""``sdpo verl``: make a task's files, prepare the run's folder, start verl with the translated run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdpo.config.loader import save_config
from sdpo.config.root import SDPOConfig
from sdpo.errors import ConfigError
from sdpo.observability.health_callback import ALARMS_FILE
from sdpo.observability.progress import NullCallback, ProgressCallback
from sdpo.rewards.base import load_task, prepare_task
from sdpo.verl_backend.config.to_verl import translate
from sdpo.verl_backend.entrypoint.main import CPU, main

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Command:
    """How verl is started; as text, the line for a shell."""

    environment: dict[str, str]
    arguments: list[str]
    notes: list[str]

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join(
            [*variables, shlex.join(["python", "-m", "sdpo.verl_backend.entrypoint.main", *self.arguments])]
        )


def build_command(run: SDPOConfig, overrides: Sequence[str] = ()) -> Command:
    """Translate the run; ``overrides`` go to Hydra as they are, after the run's own.

    Raises:
        ConfigError: see ``translate``.
    """
    translated = translate(run)
    arguments = ["--config-name", translated.config_name]
    notes = []
    if not torch.cuda.is_available():
        arguments.append(CPU)
        notes.append("no CUDA device: Ray's GPUs are made up, transformers samples instead of vLLM")
    if translated.unused:
        notes.append(f"without effect on verl: {', '.join(translated.unused)}")
    environment = {"VERL_FILE_LOGGER_PATH": str(Path(run.output_dir).absolute() / METRICS)}
    return Command(environment, [*arguments, *translated.overrides, *overrides], notes)


def launch(run: SDPOConfig, command: Command, observer: ProgressCallback | None = None) -> None:
    """Start the run and wait for its end. A run that has checkpoints goes on from the last one.

    Raises:
        ConfigError: something the person gave us is wrong; Ray has not been started.
    """
    prepare_task(load_task(run.data.task, run.data.task_args), observer or NullCallback())
    folder = Path(run.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(run, folder / "run.yaml")
    except OSError as error:
        raise ConfigError(f"output_dir: {folder}: cannot be written ({error.strerror})") from error
    _keep(folder / METRICS)
    if run.resume_mode == "disable":
        _keep(folder / ALARMS_FILE)
    os.environ.update(command.environment)
    main(command.arguments)


def _keep(path: Path) -> None:
    """The run begins this file anew; what an earlier one wrote stays beside it."""
    number = 1
    while path.with_suffix(f".{number}.jsonl").exists():
        number += 1
    if path.exists():
        path.rename(path.with_suffix(f".{number}.jsonl"))
