"""``sdpo verl``: create the task's files and the run's folder, then start verl with the translated config."""

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
from sdpo.observability.health_callback import HEALTH_EVENTS_FILE
from sdpo.observability.progress import NullCallback, ProgressCallback
from sdpo.rewards.base import load_task, prepare_task
from sdpo.verl_backend.config.to_verl import VerlOverrides
from sdpo.verl_backend.entrypoint.main import CPU, METRICS_PATH, main

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Command:
    """Arguments and environment of a start of verl; ``str`` gives a shell command."""

    environment: dict[str, str]
    arguments: list[str]
    notes: list[str]

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join(
            [*variables, shlex.join(["python", "-m", "sdpo.verl_backend.entrypoint.main", *self.arguments])]
        )


def build_command(translated: VerlOverrides, output_dir: str | Path, overrides: Sequence[str] = ()) -> Command:
    """Build the start of verl; ``overrides`` go to Hydra unchanged, after the translated ones."""
    arguments = ["--config-name", translated.config_name]
    notes = []
    if not torch.cuda.is_available():
        arguments.append(CPU)
        notes.append("no CUDA device: Ray gets placeholder GPUs, and transformers samples instead of vLLM")
    if translated.unused:
        notes.append(f"no effect on verl: {', '.join(translated.unused)}")
    environment = {METRICS_PATH: str(Path(output_dir).absolute() / METRICS)}
    return Command(environment, [*arguments, *translated.overrides, *overrides], notes)


def launch(config: SDPOConfig, command: Command, progress: ProgressCallback | None = None) -> None:
    """Train until the end. A run with checkpoints resumes from the last one.

    Raises:
        ConfigError: a setting or file is wrong; Ray has not been started.
    """
    prepare_task(load_task(config.data.task, config.data.task_args), progress or NullCallback())
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "run.yaml")
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: cannot be written ({error.strerror}); name another folder") from error
    _move_aside(folder / METRICS)
    if config.resume_mode == "disable":
        _move_aside(folder / HEALTH_EVENTS_FILE)
    os.environ.update(command.environment)
    main(command.arguments)


def _move_aside(path: Path) -> None:
    """Rename an earlier run's file to the next free number, since this run starts the file from the beginning."""
    number = 1
    while path.with_suffix(f".{number}.jsonl").exists():
        number += 1
    if path.exists():
        path.rename(path.with_suffix(f".{number}.jsonl"))
