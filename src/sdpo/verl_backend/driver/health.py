"""On the driver: health checks, what alarms change, and the best checkpoints of a run on verl.

A step is checked after its update and before it is saved, so that a checkpoint has what an alarm changed. verl
evaluates after it has saved; so the accuracy is put down in the checkpoint afterwards, and which checkpoints stay is
decided here. verl's tracker file, from which a run is resumed, names a checkpoint once all of it is there: a process
killed at any moment leaves the older one named.
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
from sdpo.observability.progress import NullCallback
from sdpo.retention import select_kept
from sdpo.verl_backend.config.schema import read_health, read_self_distillation
from sdpo.verl_backend.driver.teacher_batch import TeacherBatchBuilder

STATE_FILE = "health.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"  # verl's


class RunHealth:
    """The health of one run, on any of verl's trainers.

    Args:
        config: verl's. Its ``trainer.max_actor_ckpt_to_keep`` is set to null: verl would remove the best one too.
        teacher_batch: sends the distillation weight with each batch; None where nothing is distilled.
        workers: the actor's worker group.
        resumed: the checkpoint that the run goes on from; None if it begins.
    """

    def __init__(
        self, config: DictConfig, teacher_batch: TeacherBatchBuilder | None, workers: Any, resumed: Path | None
    ) -> None:
        trainer = config.trainer
        self._folder = Path(trainer.default_local_dir)
        self._keep_last, self._keep_best = trainer.max_actor_ckpt_to_keep, trainer.save_best_limit
        trainer.max_actor_ckpt_to_keep = None
        self._alarms = Path(trainer.health_events_file)
        self._alarms.parent.mkdir(parents=True, exist_ok=True)
        health = read_health(config)
        settings = read_self_distillation(config.actor_rollout_ref.actor)
        is_live = settings is not None and settings.teacher_regularization == "live"
        self._actor = _VerlActor(health, teacher_batch, workers, may_go_back=is_live and health.may_freeze)
        self._health_callback = HealthCallback(
            HealthMonitor(health), self._actor, partial(append_json_line, self._alarms), _Printer()
        )
        self._scores: dict[int, float | None] = {}  # of this run's checkpoints, None without an evaluation
        if resumed is not None:
            self._load(resumed)
        drop_events_after(self._alarms, _read_step(resumed) if resumed is not None else 0)

    @property
    def is_stopped(self) -> bool:
        """Whether an alarm ends the run."""
        return self._health_callback.stop_event is not None

    def describe_stop(self) -> str | None:
        """That alarm and its reason, None if there is none."""
        return self._health_callback.describe_stop()

    def check(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Look at a step's metrics after its update, and act; gives metrics of its own."""
        return self._health_callback.watch(step, values)

    def note_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Take in the held-out accuracy of the weights after a step."""
        self._actor.step = step
        self._health_callback.track_best(values)
        if step in self._scores:
            self._scores[step] = metrics.find_score(values)
            self._save(step)
            self._remove_old()

    def note_checkpoint(self, step: int) -> None:
        """Write the state of the health rules into a step's checkpoint; its evaluation may follow."""
        self._scores[step] = None
        self._save(step)

    def complete_checkpoint(self, step: int) -> None:
        """Name a step's complete checkpoint as the one to resume from, and remove those not to be kept."""
        _write_at_once(self._folder / TRACKER_FILE, str(step))
        self._remove_old()

    def _remove_old(self) -> None:
        if self._keep_last:
            for old in self._scores.keys() - select_kept(self._scores, self._keep_last, self._keep_best):
                shutil.rmtree(self._folder / f"global_step_{old}", ignore_errors=True)
                del self._scores[old]

    def _save(self, step: int) -> None:
        state = {
            "health_callback": self._health_callback.state_dict(),
            "actor": self._actor.state_dict(),
            "scores": list(self._scores.items()),
        }
        _write_at_once(self._folder / f"global_step_{step}" / STATE_FILE, json.dumps(state))

    def _load(self, checkpoint: Path) -> None:
        path, step = checkpoint / STATE_FILE, _read_step(checkpoint)
        if not path.is_file():
            print(f"{checkpoint}: has no {STATE_FILE}; the health rules begin anew", flush=True)
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        self._health_callback.load_state_dict(state["health_callback"])
        self._actor.load_state_dict(state["actor"], step)
        self._scores = {step: score for step, score in state["scores"] if self._exists(step)}

    def _exists(self, step: int) -> bool:
        return (self._folder / f"global_step_{step}").is_dir()


class HealthChecksMixin:
    """The hooks of all trainers: evaluations and checkpoints are noted. Each trainer has ``check`` called itself."""

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
    """verl's trainers leave the tracker file alone where they take a checkpoint to be written in the background."""
    settings = config.actor_rollout_ref.actor.checkpoint
    kept = settings.get("async_save", False)
    with open_dict(settings):
        settings.async_save = True
    try:
        yield
    finally:
        settings.async_save = kept


def _write_at_once(path: Path, text: str) -> None:
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)


def summarize_rollouts(scores: Sequence[float], lengths: Sequence[int], longest: int) -> dict[str, float]:
    """What rules read of a step's rollouts, of which verl makes metrics only after it has saved.

    Args:
        scores: NaN where the grader failed.
        lengths: of the responses, in tokens.
        longest: at which the sampler cuts them off. (verl's V1 trainers take the longest of the batch for it.)
    """
    scored = [score for score in scores if not math.isnan(score)]
    values = {
        metrics.RESPONSE_LENGTH_MEAN: sum(lengths) / len(lengths),
        metrics.RESPONSE_LENGTH_CLIP_RATIO: sum(length >= longest for length in lengths) / len(lengths),
    }
    return values | ({metrics.SCORE_MEAN: sum(scored) / len(scored)} if scored else {})


class _VerlActor:
    """What actions change (``health_actions.Actor``), through the batch and the workers.

    ``step`` is the one whose weights have been evaluated last.
    """

    def __init__(
        self, config: HealthConfig, teacher_batch: TeacherBatchBuilder | None, workers: Any, *, may_go_back: bool
    ) -> None:
        self._config = config
        self._teacher_batch = teacher_batch
        self._workers = workers
        self._may_go_back = may_go_back
        self._best_step: int | None = None
        self.teacher_is_frozen = False
        self.step = 0

    def reduce_distillation(self) -> None:
        assert self._teacher_batch is not None, "refused where nothing is distilled"
        self._teacher_batch.factor = self._config.reduce(self._teacher_batch.factor)

    def snapshot_best(self) -> None:
        if self._may_go_back and not self.teacher_is_frozen:
            self._workers.snapshot_best()
            self._best_step = self.step

    def freeze_teacher(self) -> None:
        self._workers.freeze_teacher()
        self.teacher_is_frozen, self._best_step = True, None

    def state_dict(self) -> dict[str, Any]:
        factor = self._teacher_batch.factor if self._teacher_batch is not None else 1.0
        return {"factor": factor, "teacher_is_frozen": self.teacher_is_frozen, "best_step": self._best_step}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from there, the workers having loaded the checkpoint of that step."""
        if self._teacher_batch is not None:
            self._teacher_batch.factor = state["factor"]
        self.teacher_is_frozen, self._best_step = state["teacher_is_frozen"], state["best_step"]
        if self._best_step == step:  # evaluated after it had been saved
            self._workers.snapshot_best()


class _Printer(NullCallback):
    def message(self, text: str) -> None:
        print(text, flush=True)


def _read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("global_step_"))
