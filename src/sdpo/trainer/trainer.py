"""The training loop of the native trainer.

The functions of a step:

    _train_step                 _sync_weights_and_submit    student's weights -> sampler, prompts of the next batch
                                sampler.collect             rollouts
                                build_samples               scores, teacher contexts, advantages
                                actor.update_policy         loss, backward, optimizer, teacher
    _after_step                 _evaluate                   every eval_steps
                                _run_health_checks
                                _save                       every save_steps

    max_staleness 0   sample k | train k | sample k+1 | train k+1 | ...
    max_staleness 1   sample k | sample k+1 | sample k+2 | ...      sampling process
                               | train k    | train k+1  | ...      training process

With max_staleness 1, batch k+1 is sampled with the weights before update k: one update older than the weights that
train on it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sdpo.config.root import SDPOConfig
from sdpo.observability import metrics
from sdpo.observability.progress import NullCallback, ProgressCallback
from sdpo.trainer.build import build_components
from sdpo.trainer.checkpoint.manager import prune_checkpoints, save_checkpoint
from sdpo.trainer.checkpoint.state import TrainingState, save_models
from sdpo.trainer.data.samples import build_samples, summarize_samples
from sdpo.trainer.rollout.base import RolloutBatch
from sdpo.trainer.signals import SignalHandler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOutput:
    """Result of a run.

    Attributes:
        metrics: the last value of every metric.
        output_dir: the run's folder.
        interrupt_signal: name of the signal that stopped the run (SIGINT is Ctrl-C), or None.
        stop_reason: the health check that stopped the run and its reason, or None.
    """

    metrics: dict[str, float]
    output_dir: Path
    interrupt_signal: str | None = None
    stop_reason: str | None = None


class SDPOTrainer:
    """Trains a model by self-distillation policy optimization.

    Example:
        >>> SDPOTrainer(load_config("configs/hidden_rule.yaml", ["max_steps=100"])).train()

    Args:
        config: the settings of the run.
        progress: receives the progress and metrics of the run, for example the console of the command line.
    """

    def __init__(self, config: SDPOConfig, progress: ProgressCallback | None = None) -> None:
        self.config = config
        self._progress = progress or NullCallback()
        self._signals = SignalHandler()
        self._rollouts: RolloutBatch | None = None  # of the next step, once collected
        self._is_sampling = False
        self._row: dict[str, float] = {}  # metrics of the last step
        self._health_checked = False
        self._saved_step: int | None = None

    def train(self) -> TrainOutput:
        """Train from the start or from a checkpoint, and write the output folder.

        Raises:
            SDPOError: a mistake in config, data or checkpoint, or no memory or disk space is left. The last complete
                step is saved.
        """
        with self._signals:
            self.parts = build_components(self.config, self._progress)
            self.actor = self.parts.actor
            self._restore()
            interrupt_signal = None
            try:
                self._run_to_end()
            except KeyboardInterrupt:
                interrupt_signal = self._signals.name or "SIGINT"
                self._emergency_save(self.config.shutdown_timeout)
            except Exception:
                with contextlib.suppress(Exception):  # the first error is reported
                    self._emergency_save(wait=0.0)
                raise
            finally:
                self.parts.sampler.close()
                self.parts.folder.close()
        folder = self.parts.folder
        return TrainOutput(
            dict(folder.final), folder.path, interrupt_signal, self.parts.health_callback.describe_stop()
        )

    def _restore(self) -> None:
        if resumed := self.parts.resume_state:
            self._rollouts, self._row = resumed.state.rollouts, resumed.state.row
            self._health_checked, self._saved_step = resumed.state.health_checked, resumed.step

    def _run_to_end(self) -> None:
        self._after_step()
        for step in range(self.actor.version + 1, self.config.max_steps + 1):
            self._train_step(step)
            self._after_step()
            if self.parts.health_callback.stop_event is not None:
                return

    def _train_step(self, step: int) -> None:
        config, actor, parts = self.config, self.actor, self.parts
        started = time.perf_counter()
        values: dict[str, float] = {}
        if self._rollouts is None:
            if not self._is_sampling:
                values |= self._sync_weights_and_submit(step)
            waiting = time.perf_counter()
            self._rollouts, self._is_sampling = parts.sampler.collect(), False
            values[metrics.TIME_WAIT] = time.perf_counter() - waiting
        rollouts = self._rollouts
        assert rollouts is not None
        values[metrics.TIME_SAMPLE] = rollouts.seconds
        staleness = actor.version - rollouts.policy_version
        if staleness > config.max_staleness:
            raise RuntimeError(
                f"step {step}: rollouts are {staleness} updates old; max_staleness={config.max_staleness}"
            )
        if config.max_staleness == 1:
            values |= self._sync_weights_and_submit(step + 1)

        samples = build_samples(
            parts.reward_manager,
            parts.tokenizer,
            parts.prompts_of(step),
            rollouts.responses,
            config.self_distillation,
            parts.window,
            random.Random(f"demonstrations {config.seed} {step}"),
        )
        parts.folder.save_rollouts(step, samples)
        updating = time.perf_counter()
        values |= actor.update_policy(samples, before_update=self._signals.defer)
        values[metrics.TIME_LEARN] = time.perf_counter() - updating
        values |= summarize_samples(samples, config.self_distillation)
        values |= {metrics.STALENESS: staleness, metrics.EPOCH: parts.order.epoch(step)}
        self._row, self._health_checked, self._rollouts = values, False, None
        self._signals.deliver()
        elapsed = time.perf_counter() - started
        values |= {metrics.TIME_STEP: elapsed, metrics.THROUGHPUT: values[metrics.TOKENS] / elapsed / parts.num_devices}

    def _after_step(self) -> None:
        """Evaluate the last step, run the health checks, save and log; step 0 is before training."""
        config, step = self.config, self.actor.version
        is_last = step == config.max_steps
        if not self._health_checked:
            evaluates = is_last or _is_due(step, config.eval_steps) if step else config.eval.val_before_train
            if evaluates:
                self._row |= self._evaluate()
            is_stopped = self._run_health_checks()
            if is_stopped and not evaluates:
                self._row |= self._evaluate()
            is_last |= is_stopped
        if step != self._saved_step and (is_last or _is_due(step, config.save_steps)):
            saving = time.perf_counter()
            if self._is_sampling and config.max_staleness == 1:  # their policy's weights are not saved
                self._rollouts, self._is_sampling = self.parts.sampler.collect(), False
            self._save()
            self._row[metrics.TIME_SAVE] = time.perf_counter() - saving
        if self._row:
            self.parts.folder.log(step, self._row)

    def _run_health_checks(self) -> bool:
        """Run the health checks, whose actions may change the weights; return whether the run is to stop."""
        if self.actor.version:
            self._signals.defer()
            self._row |= self.parts.health_callback.watch(self.actor.version, self._row)
        self._health_checked = True
        self._signals.deliver()
        return self.parts.health_callback.stop_event is not None

    def _evaluate(self) -> dict[str, float]:
        started = time.perf_counter()
        with torch.inference_mode():
            values = self.parts.evaluator.evaluate(self.actor.student, self.actor.teacher)
        return values | {metrics.TIME_EVAL: time.perf_counter() - started}

    def _sync_weights_and_submit(self, next_step: int) -> dict[str, float]:
        """Sync the student's weights to the sampler and submit the prompts of a step, unless the run ends before."""
        if next_step > self.config.max_steps:
            return {}
        started = time.perf_counter()
        self.parts.sampler.load_weights(self.actor.student, self.actor.version)
        seconds = time.perf_counter() - started
        seed = random.Random(f"sampling {self.config.seed} {next_step}").getrandbits(63)
        self.parts.sampler.submit([prompt.tokens for prompt in self.parts.prompts_of(next_step)], seed)
        self._is_sampling = True
        return {metrics.TIME_WEIGHTS: seconds}

    def _save(self) -> None:
        parts, step = self.parts, self.actor.version
        parts.folder.sync()
        state = TrainingState(
            self.actor.state_dict(),
            parts.health_callback.state_dict(),
            self._row,
            self._health_checked,
            self._rollouts,
            parts.data,
            parts.health_actions.best_weights,
        )

        def write(folder: Path) -> None:
            save_models(folder, self.actor, parts.processing)
            state.save(folder)

        save_checkpoint(parts.folder.checkpoints, step, metrics.find_score(self._row), write)
        self._saved_step = step
        prune_checkpoints(parts.folder.checkpoints, self.config.save_total_limit, self.config.save_best_limit)

    def _emergency_save(self, wait: float) -> None:
        """Save the last complete step of a run that stops early.

        Args:
            wait: seconds to wait for in-flight rollouts; otherwise the resumed run samples their batch with newer
                weights.
        """
        if self._signals.is_deferring:
            logger.warning("stopped during an update; the latest checkpoint is of step %d", self._saved_step or 0)
            return
        if self._saved_step == self.actor.version:
            return
        if self._rollouts is None and self._is_sampling and self.config.max_staleness == 1:
            with contextlib.suppress(Exception):  # the sampler may have failed
                self._rollouts = self.parts.sampler.collect(timeout=wait)
            if self._rollouts is None:
                logger.warning("in-flight rollouts were discarded; the resumed run will not be bit-for-bit identical")
        self._save()


def _is_due(step: int, every: int) -> bool:
    return bool(every and step and step % every == 0)
