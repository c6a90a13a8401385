"""Health checks, their actions, and the retention of checkpoints, on the driver.

A step is checked after its update and before it is saved, so that the checkpoint has the state after an action. verl
evaluates after saving, so the accuracy is written into the checkpoint afterwards, and this module decides which
checkpoints stay. verl's tracker file, from which a run resumes, names a checkpoint only when it is complete.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from sdpo.config.monitoring import HealthConfig
from sdpo.observability import metrics
from sdpo.observability.health import HealthMonitor
from sdpo.observability.health_callback import HealthCallback, drop_events_after
from sdpo.observability.json_lines import append_json_line
from sdpo.retention import select_kept
from sdpo.verl_backend.config.schema import read_health, read_self_distillation
from sdpo.verl_backend.driver.teacher_batch import TeacherBatchBuilder

STATE_FILE = "health.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"  # verl's


class RunHealth:
    """Health checks and checkpoint retention of one run, for all of verl's trainers.

    Args:
        config: verl's. ``trainer.max_actor_ckpt_to_keep`` is set to null: verl would also remove the best checkpoint,
            and forgets checkpoints when a run resumes (https://github.com/verl-project/verl/issues/7395).
        teacher_batch: sends the distillation coefficient with each batch; None if nothing is distilled.
        workers: the actor's worker group.
        resumed: the checkpoint that the run resumes from; None for a new run.
    """

    def __init__(
        self, config: DictConfig, teacher_batch: TeacherBatchBuilder | None, workers: Any, resumed: Path | None
    ) -> None:
        trainer = config.trainer
        self._folder = Path(trainer.default_local_dir)
        self._keep_last, self._keep_best = trainer.max_actor_ckpt_to_keep, trainer.save_best_limit
        trainer.max_actor_ckpt_to_keep = None
        self._events_file = Path(trainer.health_events_file)
        self._events_file.parent.mkdir(parents=True, exist_ok=True)
        health = read_health(config)
        settings = read_self_distillation(config.actor_rollout_ref.actor)
        is_live = settings is not None and settings.teacher_regularization == "live"
        self._actions = _HealthActions(health, teacher_batch, workers, may_restore=is_live and health.may_freeze)
        self._health_callback = HealthCallback(
            HealthMonitor(health), self._actions, partial(append_json_line, self._events_file)
        )
        self._scores: dict[int, float | None] = {}  # of this run's checkpoints; None if not evaluated
        if resumed is not None:
            self._load(resumed)
        drop_events_after(self._events_file, _read_step(resumed) if resumed is not None else 0)

    @property
    def is_stopped(self) -> bool:
        """Whether a health check ends the run."""
        return self._health_callback.stop_event is not None

    def describe_stop(self) -> str | None:
        """Return the check that ends the run, with its reason; None if there is none."""
        return self._health_callback.describe_stop()

    def check(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Check a step's metrics after its update, take the configured actions, and return the checks' metrics."""
        return self._health_callback.watch(step, values)

    def note_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the validation accuracy of the weights after a step."""
        self._actions.step = step
        self._health_callback.track_best(values)
        if step in self._scores:
            self._scores[step] = metrics.find_score(values)
            self._save(step)
            self._remove_old()

    def note_checkpoint(self, step: int) -> None:
        """Write the state of the health checks into a step's checkpoint; its validation may follow."""
        self._scores[step] = None
        self._save(step)

    def complete_checkpoint(self, step: int) -> None:
        """Name a step's complete checkpoint in the tracker file, and remove checkpoints beyond the limits."""
        _write_atomically(self._folder / TRACKER_FILE, str(step))
        self._remove_old()

    def _remove_old(self) -> None:
        if self._keep_last:
            for old in self._scores.keys() - select_kept(self._scores, self._keep_last, self._keep_best):
                shutil.rmtree(self._folder / f"global_step_{old}", ignore_errors=True)
                del self._scores[old]

    def _save(self, step: int) -> None:
        state = {
            "health_callback": self._health_callback.state_dict(),
            "actor": self._actions.state_dict(),
            "scores": list(self._scores.items()),
        }
        _write_atomically(self._folder / f"global_step_{step}" / STATE_FILE, json.dumps(state))

    def _load(self, checkpoint: Path) -> None:
        path, step = checkpoint / STATE_FILE, _read_step(checkpoint)
        if not path.is_file():
            print(f"{checkpoint}: has no {STATE_FILE}; the health checks start without history", flush=True)
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        self._health_callback.load_state_dict(state["health_callback"])
        self._actions.load_state_dict(state["actor"], step)
        self._scores = {step: score for step, score in state["scores"] if self._exists(step)}

    def _exists(self, step: int) -> bool:
        return (self._folder / f"global_step_{step}").is_dir()


class HealthChecksMixin:
    """Validation and checkpoint hooks of all trainers; each trainer calls ``RunHealth.check`` after its update."""

    config: Any
    health: RunHealth
    global_steps: int

    def _validate(self, *args: Any, **kwargs: Any) -> Any:
        values = super()._validate(*args, **kwargs)  # type: ignore[misc]
        self.health.note_evaluation(self.global_steps, values)
        return values

    def _save_checkpoint(self) -> None:
        with _without_tracker(self.config):
            super()._save_checkpoint()  # type: ignore[misc]
        self.health.note_checkpoint(self.global_steps)
        self._complete_checkpoint()

    def _complete_checkpoint(self) -> None:
        self.health.complete_checkpoint(self.global_steps)


@contextmanager
def _without_tracker(config: Any) -> Iterator[None]:
    """Keep verl's trainers from writing the tracker file, as they do for checkpoints written in the background."""
    settings = config.actor_rollout_ref.actor.checkpoint
    kept = settings.get("async_save", False)
    with open_dict(settings):
        settings.async_save = True
    try:
        yield
    finally:
        settings.async_save = kept


def _write_atomically(path: Path, text: str) -> None:
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)


def summarize_rollouts(scores: Sequence[float], lengths: Sequence[int], max_length: int) -> dict[str, float]:
    """Compute the rollout metrics that health checks read; verl computes them only after saving.

    Args:
        scores: NaN for a failed reward.
        lengths: of the responses, in tokens.
        max_length: at which the sampler truncates. verl's V1 trainers take the longest response of the batch instead:
            https://github.com/verl-project/verl/issues/7817.
    """
    scored = [score for score in scores if not math.isnan(score)]
    values = {
        metrics.RESPONSE_LENGTH_MEAN: sum(lengths) / len(lengths),
        metrics.RESPONSE_LENGTH_CLIP_RATIO: sum(length >= max_length for length in lengths) / len(lengths),
    }
    return values | ({metrics.SCORE_MEAN: sum(scored) / len(scored)} if scored else {})


class _HealthActions:
    """Health actions through the batch and the workers (the ``Actor`` of ``health_callback``).

    Attributes:
        step: the last step whose weights were evaluated.
    """

    def __init__(
        self, config: HealthConfig, teacher_batch: TeacherBatchBuilder | None, workers: Any, *, may_restore: bool
    ) -> None:
        self._config = config
        self._teacher_batch = teacher_batch
        self._workers = workers
        self._may_restore = may_restore
        self._best_step: int | None = None
        self.teacher_is_frozen = False
        self.step = 0

    def reduce_distillation(self) -> None:
        assert self._teacher_batch is not None, "refused where nothing is distilled"
        self._teacher_batch.factor = self._config.reduce(self._teacher_batch.factor)

    def snapshot_best(self) -> None:
        if self._may_restore and not self.teacher_is_frozen:
            self._workers.snapshot_best()
            self._best_step = self.step

    def freeze_teacher(self) -> None:
        self._workers.freeze_teacher()
        self.teacher_is_frozen, self._best_step = True, None

    def state_dict(self) -> dict[str, Any]:
        factor = self._teacher_batch.factor if self._teacher_batch is not None else 1.0
        return {"factor": factor, "teacher_is_frozen": self.teacher_is_frozen, "best_step": self._best_step}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Resume after the workers have loaded the checkpoint of ``step``."""
        if self._teacher_batch is not None:
            self._teacher_batch.factor = state["factor"]
        self.teacher_is_frozen, self._best_step = state["teacher_is_frozen"], state["best_step"]
        if self._best_step == step:  # evaluated after it was saved, so the workers' checkpoint lacks it
            self._workers.snapshot_best()


def _read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("global_step_"))
