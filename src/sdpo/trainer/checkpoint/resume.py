"""Resuming: find the checkpoint in the output folder and compare its config with the new one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.config.loader import load_config
from sdpo.config.root import SDPOConfig, iterate_settings
from sdpo.errors import CheckpointError
from sdpo.observability.run_folder import CONFIG_FILE
from sdpo.trainer.checkpoint.manager import find_newest
from sdpo.trainer.checkpoint.state import TrainingState

logger = logging.getLogger(__name__)

# Settings that may differ from the resumed run's, since they have no effect on training.
NON_FINGERPRINT_KEYS = ("resume_mode", "output_dir", "verl")


@dataclass(frozen=True)
class ResumeState:
    """A complete checkpoint and its training state."""

    checkpoint: Path
    state: TrainingState

    @property
    def step(self) -> int:
        return int(self.state.actor["version"])


def find_resume_state(config: SDPOConfig) -> ResumeState | None:
    """Load the state of the newest complete checkpoint in ``output_dir``; None if ``resume_mode`` starts a new run.

    Raises:
        CheckpointError: ``resume_mode=required`` and there is no checkpoint; a fixed setting differs; or the checkpoint
            is beyond ``max_steps``.
    """
    folder = Path(config.output_dir)
    if config.resume_mode == "disable":
        return None
    checkpoint = find_newest(folder / "checkpoints")
    if checkpoint is None:
        if config.resume_mode == "required":
            raise CheckpointError(
                f"output_dir={folder}: has no complete checkpoint to resume from; start without --resume"
            )
        return None
    state = TrainingState.load(checkpoint)
    step = int(state.actor["version"])
    if step > config.max_steps:
        raise CheckpointError(
            f"max_steps={config.max_steps}: the run in output_dir={folder} has trained {step} steps already; raise it"
        )
    fixed = {key for key, field in iterate_settings() if field.metadata["fixed"]}
    loss = config.self_distillation
    if config.optim.lr_scheduler_type != "constant" or loss.distillation_coef_start != loss.distillation_coef_end:
        fixed.add("max_steps")  # the schedules of learning rate and distillation weight depend on it
    _check_changes(config.find_changes(load_config(folder / CONFIG_FILE)), fixed)
    logger.info(f"resuming after step {step} from {checkpoint}")
    return ResumeState(checkpoint, state)


def _check_changes(changes: Mapping[str, tuple[Any, Any]], fixed: AbstractSet[str]) -> None:
    """Log the settings that differ from the checkpoint's; refuse changes of fixed ones."""
    changed = {key: values for key, values in changes.items() if key not in NON_FINGERPRINT_KEYS}
    for key in sorted(changed.keys() & fixed):
        old, new = changed[key]
        raise CheckpointError(
            f"{key}={new!r}: was {old!r} when the run started and must not change; "
            "restore it or start a new run in another output_dir"
        )
    for key, (old, new) in changed.items():
        logger.info(f"{key}={new!r} from now on; was {old!r}")
