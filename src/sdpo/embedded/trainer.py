"""The loop. A step: sample, grade, choose what the teacher is shown, learn, hand the weights to the sampler.

    staleness 0     sample k | learn k | sample k+1 | learn k+1 | ...
    staleness 1     sample k | sample k+1 | sample k+2 | ...            the sampler's process
                             | learn k    | learn k+1  | ...            the learner's process

With staleness 1, batch k+1 is sampled by the weights that batch k is learned with: one update behind, once it is
learned itself.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sdpo import metrics
from sdpo.config import Run
from sdpo.embedded.checkpoint import save_checkpoint
from sdpo.embedded.samples import build_samples, summarize_samples
from sdpo.embedded.setup import Parts, build_parts
from sdpo.models.processing import TokenPrompt
from sdpo.observer import Observer, Silent


@dataclass(frozen=True)
class Result:
    """What a run came to: the last value of every metric, the run's folder, whether Ctrl-C cut it short, and the reason
    of the alarm that did, if one did."""

    metrics: dict[str, float]
    run_dir: Path
    interrupted: bool = False
    stopped_by: str | None = None


def train(run: Run, observer: Observer | None = None) -> Result:
    """Train as the run says; write the run folder; return the final metrics.

    Raises:
        UserError: something the person gave us is wrong; nothing has been trained yet.
    """
    parts = build_parts(run, observer or Silent())
    interrupted = False
    try:
        _train(run, parts)
    except KeyboardInterrupt:
        interrupted = True
        if not (parts.folder.checkpoints / f"step_{parts.learner.version}").exists():  # it may be half a step ahead
            save_checkpoint(parts.folder.checkpoints, parts.learner, parts.processing)
    finally:
        parts.sampler.close()
        parts.folder.close()
    alarm = parts.guard.stopped_by
    stopped_by = f"{alarm.rule}: {alarm.reason}" if alarm is not None else None
    return Result(dict(parts.folder.final), parts.folder.path, interrupted, stopped_by)


def _train(run: Run, parts: Parts) -> None:
    learner, sampler, folder = parts.learner, parts.sampler, parts.folder
    if run.eval.before_training:
        folder.log(0, _evaluate(parts))
    sampler.load_weights(learner.student, version=0)
    sampler.submit(*_request(run, parts, step=1))
    for step in range(1, run.total_steps + 1):
        started = time.perf_counter()
        rollouts = sampler.collect()
        values = {metrics.TIME_SAMPLE: rollouts.seconds, metrics.TIME_WAIT: time.perf_counter() - started}
        staleness = learner.version - rollouts.version
        if staleness > run.staleness:
            raise RuntimeError(f"step {step}: rollouts are {staleness} updates old, the bound is {run.staleness}")
        if run.staleness == 1:
            values |= _hand_over(run, parts, next_step=step + 1)

        prompts = parts.prompts_of(step)
        samples = build_samples(
            parts.task,
            parts.tokenizer,
            prompts,
            rollouts.responses,
            run.self_distillation,
            parts.window,
            random.Random(f"demonstrations {run.seed} {step}"),
        )
        folder.save_rollouts(step, samples)
        learning = time.perf_counter()
        values |= learner.learn(samples)
        values[metrics.TIME_LEARN] = time.perf_counter() - learning
        if run.staleness == 0:
            values |= _hand_over(run, parts, next_step=step + 1)

        values |= summarize_samples(samples, run.self_distillation)
        values |= {metrics.STALENESS: staleness, metrics.EPOCH: parts.order.epoch(step)}
        elapsed = time.perf_counter() - started
        values |= {metrics.TIME_STEP: elapsed, metrics.THROUGHPUT: values[metrics.TOKENS] / elapsed}
        last = step == run.total_steps
        evaluates = last or (run.eval_every > 0 and step % run.eval_every == 0)
        if evaluates:
            values |= _evaluate(parts)
        values |= parts.guard.watch(step, values)
        if parts.guard.stopped_by is not None:
            last = True
            values |= {} if evaluates else _evaluate(parts)
        if last or (run.save_every and step % run.save_every == 0):
            saving = time.perf_counter()
            save_checkpoint(folder.checkpoints, learner, parts.processing)
            values[metrics.TIME_SAVE] = time.perf_counter() - saving
        folder.log(step, values)
        if last:
            return


def _request(run: Run, parts: Parts, step: int) -> tuple[list[TokenPrompt], int]:
    """The step's prompts and the seed of its sampling."""
    seed = random.Random(f"sampling {run.seed} {step}").getrandbits(63)
    return [prompt.tokens for prompt in parts.prompts_of(step)], seed


def _hand_over(run: Run, parts: Parts, next_step: int) -> dict[str, float]:
    """Give the sampler the student's weights as they are and ask for the next rollouts, unless there are none."""
    if next_step > run.total_steps:
        return {}
    started = time.perf_counter()
    parts.sampler.load_weights(parts.learner.student, parts.learner.version)
    seconds = time.perf_counter() - started
    parts.sampler.submit(*_request(run, parts, next_step))
    return {metrics.TIME_WEIGHTS: seconds}


def _evaluate(parts: Parts) -> dict[str, float]:
    started = time.perf_counter()
    with torch.inference_mode():
        values = parts.evaluator.evaluate(parts.learner.student, parts.learner.teacher)
    return values | {metrics.TIME_EVAL: time.perf_counter() - started}
