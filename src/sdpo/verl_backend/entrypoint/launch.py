"""``sdpo verl``: create the task's files and the run's folder, then start verl with the translated config."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from sdpo.config.loader import to_yaml
from sdpo.config.root import UNWEIGHTED_SAMPLES, SDPOConfig
from sdpo.errors import CheckpointError, ConfigError
from sdpo.observability.progress import NullCallback, ProgressCallback
from sdpo.observability.run_folder import CONFIG_FILE, lock_folder, move_earlier_run, require_idle
from sdpo.prompting.run_date import RUN_DATE, begin_run
from sdpo.rewards.base import load_task, prepare_task
from sdpo.verl_backend.config.to_verl import VerlOverrides
from sdpo.verl_backend.entrypoint.main import CPU, METRICS_PATH, main

METRICS = "metrics.jsonl"
DATE = "date.txt"  # at which the run began


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
    """Train until the end; ``resume_mode`` does what it does on the native trainer.

    Raises:
        ConfigError: a setting or file is wrong, or another run is writing to the folder; Ray has not been started.
        CheckpointError: ``resume_mode=required`` and there is no checkpoint; Ray has not been started.
    """
    if config.trains_without_weights:
        print(UNWEIGHTED_SAMPLES, flush=True)
    prepare_task(load_task(config.data.task, config.data.task_args), progress or NullCallback())
    os.environ.update(command.environment)
    date = Path(config.output_dir) / DATE
    begin_run(date.read_text(encoding="utf-8").strip() if config.resume_mode != "disable" and date.is_file() else None)
    folder, resume_mode, text = Path(config.output_dir), config.resume_mode, to_yaml(config)
    with contextlib.ExitStack() as locks:
        main(
            command.arguments,
            lambda composed: locks.enter_context(open_folder(folder, resume_mode, text, composed.trainer)),
        )


def open_folder(
    folder: Path, resume_mode: str, config_text: str, trainer: DictConfig
) -> contextlib.AbstractContextManager[object]:
    """Create and lock the run's folder; move an earlier run aside unless this run resumes it.

    Args:
        config_text: the run's config as YAML, saved in the folder.
        trainer: verl's section, in which an override may select another checkpoint.

    Returns:
        The lock, which ends when it is closed.

    Raises:
        ConfigError, CheckpointError: see ``launch``.
    """
    resumes = _has_checkpoint(trainer)
    if resume_mode == "required" and not resumes:
        raise CheckpointError(
            f"output_dir={folder}: has no complete checkpoint to resume from; start with resume_mode=auto"
        )
    try:
        require_idle(folder)
        moved = None if resumes else move_earlier_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(config_text, encoding="utf-8")
        if RUN_DATE in os.environ:
            (folder / DATE).write_text(os.environ[RUN_DATE], encoding="utf-8")
        _move_aside(folder / METRICS)
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: cannot be written ({error.strerror}); name another folder") from error
    if moved is not None:
        print(f"output_dir={folder}: moved the earlier run to {moved}", flush=True)
    try:
        return lock_folder(folder)
    except OSError:  # some network file systems have no locks
        return contextlib.nullcontext()


def _has_checkpoint(trainer: DictConfig) -> bool:
    """Whether verl will resume from a checkpoint."""
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    if trainer.resume_mode == "auto":
        return find_latest_ckpt_path(trainer.default_local_dir) is not None
    return bool(trainer.resume_mode == "resume_path")


def _move_aside(path: Path) -> None:
    """Rename a resumed run's file to the next free number, since this start writes the file from the beginning."""
    number = 1
    while path.with_suffix(f".{number}.jsonl").exists():
        number += 1
    if path.exists():
        path.rename(path.with_suffix(f".{number}.jsonl"))
