"""The loop. A step: sample, grade, choose what the teacher is shown, learn, hand the weights to the sampler.

    staleness 0     sample k | learn k | sample k+1 | learn k+1 | ...
    staleness 1     sample k | sample k+1 | sample k+2 | ...            the sampler's process
                             | learn k    | learn k+1  | ...            the actor's process

With staleness 1, batch k+1 is sampled by the weights that batch k is learned with: one update behind, once it is
learned itself.
"""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sdpo.config.root import SDPOConfig
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.observability import metrics
from sdpo.observability.progress import NullCallback, ProgressCallback
from sdpo.trainer.build import Parts, build_parts
from sdpo.trainer.checkpoint.manager import prune_checkpoints, save_checkpoint
from sdpo.trainer.checkpoint.state import TrainingState, save_models
from sdpo.trainer.data.samples import build_samples, summarize_samples
from sdpo.trainer.rollout.base import RolloutBatch
from sdpo.trainer.signals import Interruption


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        metrics: the last value of every metric.
        output_dir: the run's folder.
        interrupted: the signal that cut it short (SIGINT is Ctrl-C); None if none did.
        stopped_by: the alarm that cut it short and its reason; None if none did.
    """

    metrics: dict[str, float]
    output_dir: Path
    interrupted: str | None = None
    stopped_by: str | None = None


def train(run: SDPOConfig, observer: ProgressCallback | None = None) -> Result:
    """Train as the run says, from its beginning or from a checkpoint; write the run folder; return the final metrics.

    Raises:
        ConfigError: something the person gave us is wrong, or the machine is at its end (disk, memory); a run that had
            begun is saved as of its last whole step.
    """
    with Interruption() as interruption:
        parts = build_parts(run, observer or NullCallback())
        training = _Training(run, parts, interruption)
        interrupted = None
        try:
            training.run_to_end()
        except KeyboardInterrupt:
            interrupted = interruption.name or "SIGINT"
            training._emergency_save(run.shutdown_timeout)
        except Exception:
            with contextlib.suppress(Exception):  # what stopped the run is what has to be said
                training._emergency_save(wait=0.0)
            raise
        finally:
            parts.sampler.close()
            parts.folder.close()
    return Result(dict(parts.folder.final), parts.folder.path, interrupted, parts.health_callback.describe_stop())


class _Training:
    """A run between its first and its last step.

    ``rollouts`` are those of the next step once they are there; ``row`` has the metrics of the last one.
    """

    def __init__(self, run: SDPOConfig, parts: Parts, interruption: Interruption) -> None:
        self.run = run
        self.parts = parts
        self.actor = parts.actor
        self.interruption = interruption
        state = parts.resumption.state if parts.resumption else None
        self.rollouts: RolloutBatch | None = state.rollouts if state else None
        self.row: dict[str, float] = state.row if state else {}
        self.health_checked = state.health_checked if state else False
        self.saved_step = parts.resumption.step if parts.resumption else None
        self.is_sampling = False

    def run_to_end(self) -> None:
        self._after_step()
        for step in range(self.actor.version + 1, self.run.max_steps + 1):
            self._train_step(step)
            self._after_step()
            if self.parts.health_callback.stop_event is not None:
                return

    def _train_step(self, step: int) -> None:
        run, actor, parts = self.run, self.actor, self.parts
        started = time.perf_counter()
        values: dict[str, float] = {}
        if self.rollouts is None:
            if not self.is_sampling:
                values |= self._sync_weights_and_submit(step)
            waiting = time.perf_counter()
            self.rollouts, self.is_sampling = parts.sampler.collect(), False
            values[metrics.TIME_WAIT] = time.perf_counter() - waiting
        rollouts = self.rollouts
        assert rollouts is not None
        values[metrics.TIME_SAMPLE] = rollouts.seconds
        staleness = actor.version - rollouts.policy_version
        if staleness > run.max_staleness:
            raise RuntimeError(f"step {step}: rollouts are {staleness} updates old, the bound is {run.max_staleness}")
        if run.max_staleness == 1:
            values |= self._sync_weights_and_submit(step + 1)

        samples = build_samples(
            parts.reward_manager,
            parts.tokenizer,
            parts.prompts_of(step),
            rollouts.responses,
            run.self_distillation,
            parts.window,
            random.Random(f"demonstrations {run.seed} {step}"),
        )
        parts.folder.save_rollouts(step, samples)
        learning = time.perf_counter()
        values |= actor.update_policy(samples, before_update=self.interruption.hold)
        values[metrics.TIME_LEARN] = time.perf_counter() - learning
        values |= summarize_samples(samples, run.self_distillation)
        values |= {metrics.STALENESS: staleness, metrics.EPOCH: parts.order.epoch(step)}
        self.row, self.health_checked, self.rollouts = values, False, None
        self.interruption.release()
        elapsed = time.perf_counter() - started
        values |= {metrics.TIME_STEP: elapsed, metrics.THROUGHPUT: values[metrics.TOKENS] / elapsed / parts.num_devices}

    def _after_step(self) -> None:
        """Evaluate, save and log the last step; step 0 is before training."""
        run, step = self.run, self.actor.version
        is_last = step == run.max_steps
        if not self.health_checked:
            evaluates = is_last or _is_due(step, run.eval_steps) if step else run.eval.val_before_train
            if evaluates:
                self.row |= self._evaluate()
            is_stopped = self._check()
            if is_stopped and not evaluates:
                self.row |= self._evaluate()
            is_last |= is_stopped
        if step != self.saved_step and (is_last or _is_due(step, run.save_steps)):
            saving = time.perf_counter()
            if self.is_sampling and run.max_staleness == 1:  # rollouts of weights that nobody has any more
                self.rollouts, self.is_sampling = self.parts.sampler.collect(), False
            self._save()
            self.row[metrics.TIME_SAVE] = time.perf_counter() - saving
        if self.row:
            self.parts.folder.log(step, self.row)

    def _check(self) -> bool:
        """Have the step's metrics looked at; gives whether the run is to stop. An alarm may change the weights."""
        if self.actor.version:
            self.interruption.hold()
            self.row |= self.parts.health_callback.watch(self.actor.version, self.row)
        self.health_checked = True
        self.interruption.release()
        return self.parts.health_callback.stop_event is not None

    def _emergency_save(self, wait: float) -> None:
        """Save the last whole step of a run that is stopped.

        Args:
            wait: seconds for the rollouts in flight; without them, the run's next ones come of newer weights.
        """
        tell = self.parts.observer.message
        if self.interruption.is_holding:
            tell(f"stopped between two steps: the newest checkpoint is that of step {self.saved_step or 0}")
            return
        if self.saved_step == self.actor.version:
            return
        if self.rollouts is None and self.is_sampling and self.run.max_staleness == 1:
            with contextlib.suppress(Exception):  # it may be the sampler that stopped the run
                self.rollouts = self.parts.sampler.collect(timeout=wait)
            if self.rollouts is None:
                tell("rollouts in flight are left out: resumed, the run will not be that which goes on now to the bit")
        self._save()

    def _save(self) -> None:
        parts, step = self.parts, self.actor.version
        parts.folder.sync()
        state = TrainingState(
            self.actor.state_dict(),
            parts.health_callback.state_dict(),
            self.row,
            self.health_checked,
            self.rollouts,
            parts.data,
        )

        def write(folder: Path) -> None:
            save_models(folder, self.actor, parts.processing)
            state.save(folder)

        save_checkpoint(parts.folder.checkpoints, step, metrics.find_score(self.row), write)
        self.saved_step = step
        prune_checkpoints(parts.folder.checkpoints, self.run.save_total_limit, self.run.save_best_limit)

    def _sync_weights_and_submit(self, next_step: int) -> dict[str, float]:
        """Give the sampler the student's weights as they are and ask for rollouts, unless there are no more to come."""
        if next_step > self.run.max_steps:
            return {}
        started = time.perf_counter()
        self.parts.sampler.load_weights(self.actor.student, self.actor.version)
        seconds = time.perf_counter() - started
        self.parts.sampler.submit(*_request(self.run, self.parts, next_step))
        self.is_sampling = True
        return {metrics.TIME_WEIGHTS: seconds}

    def _evaluate(self) -> dict[str, float]:
        started = time.perf_counter()
        with torch.inference_mode():
            values = self.parts.evaluator.evaluate(self.actor.student, self.actor.teacher)
        return values | {metrics.TIME_EVAL: time.perf_counter() - started}


def _is_due(step: int, every: int) -> bool:
    return bool(every and step and step % every == 0)


def _request(run: SDPOConfig, parts: Parts, step: int) -> tuple[list[TokenPrompt], int]:
    """The step's prompts and the seed of its sampling."""
    seed = random.Random(f"sampling {run.seed} {step}").getrandbits(63)
    return [prompt.tokens for prompt in parts.prompts_of(step)], seed
