"""Whether a run goes on from an earlier one in its folder, and from which checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.config.loader import load_config
from sdpo.config.root import SDPOConfig, get_setting, iterate_settings
from sdpo.errors import CheckpointError
from sdpo.observability.progress import ProgressCallback
from sdpo.trainer.checkpoint.manager import find_newest
from sdpo.trainer.checkpoint.state import TrainingState

# What concerns this call, and not the run.
NON_FINGERPRINT_KEYS = ("resume_mode", "output_dir", "verl")


@dataclass(frozen=True)
class ResumeState:
    """A whole checkpoint, and what is in it beside the models."""

    checkpoint: Path
    state: TrainingState

    @property
    def step(self) -> int:
        return int(self.state.actor["version"])


def find_resumption(run: SDPOConfig, observer: ProgressCallback) -> ResumeState | None:
    """The newest whole checkpoint in ``output_dir``, as ``run.resume_mode`` has it; None if the run begins anew.

    Raises:
        CheckpointError: there is none and ``resume_mode=required``; a fixed setting differs; or it has had more steps
            than ``max_steps``.
    """
    folder = Path(run.output_dir)
    if run.resume_mode == "disable":
        return None
    checkpoint = find_newest(folder / "checkpoints", observer.message)
    if checkpoint is None:
        if run.resume_mode == "required":
            raise CheckpointError(
                f"output_dir: {folder}: holds no whole checkpoint to go on from; start without --resume"
            )
        return None
    state = TrainingState.load(checkpoint)
    step = int(state.actor["version"])
    if step > run.max_steps:
        raise CheckpointError(
            f"output_dir: {folder}: its run has had {step} steps, more than max_steps={run.max_steps}"
        )
    _compare(load_config(folder / "run.yaml"), run, observer)
    observer.message(f"going on after step {step} from {checkpoint}")
    return ResumeState(checkpoint, state)


def _compare(earlier: SDPOConfig, run: SDPOConfig, observer: ProgressCallback) -> None:
    changed = {key: (old, new) for key, old, new in _find_changes(earlier, run) if key not in NON_FINGERPRINT_KEYS}
    fixed = {key for key, field in iterate_settings() if field.metadata["fixed"]}
    config = run.self_distillation
    if run.optim.lr_scheduler_type != "constant" or config.distillation_coef_start != config.distillation_coef_end:
        fixed.add("max_steps")  # by which the learning rate or the weight is scheduled
    for key in sorted(changed.keys() & fixed):
        old, new = changed[key]
        raise CheckpointError(
            f"{key}={new!r} was {old!r} when the run began, and with it the run would be another one; "
            "restore it or begin in another output_dir"
        )
    for key, (old, new) in changed.items():
        observer.message(f"{key}={new!r} from here on, was {old!r}")


def _find_changes(earlier: SDPOConfig, run: SDPOConfig) -> list[tuple[str, Any, Any]]:
    return [
        (key, old, new)
        for key, _ in iterate_settings()
        if (old := get_setting(earlier, key)) != (new := get_setting(run, key))
    ]
