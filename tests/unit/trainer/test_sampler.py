"""Both samplers return equal rollouts; the sampler process reports errors and always ends."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo.config.model import ModelConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.errors import SDPOError
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.trainer.rollout.build import ENGINES
from sdpo.trainer.rollout.hf_engine import TransformersEngine
from sdpo.trainer.rollout.local import LocalSampler
from sdpo.trainer.rollout.process import ProcessSampler

MakeModel = Callable[..., Any]
PROMPTS = [TokenPrompt(ids) for ids in ([5, 6, 7], [9, 3], [8, 8, 8, 8])]
SAMPLING_PARAMS = SamplingParams(
    n=3, max_new_tokens=8, temperature=0.8, top_p=1.0, batch_size=4, stop_token_ids=[2], pad_token_id=0
)


def build_engine_of(config: ModelConfig) -> Callable[[], TransformersEngine]:
    return partial(
        TransformersEngine.from_config,
        RolloutConfig(),
        config,
        SAMPLING_PARAMS,
        torch.device("cpu"),
        max_length=100,
        max_pixels=10**6,
    )


def test_engines_are_the_choices_of_the_config() -> None:
    (choices,) = (f.metadata["choices"] for f in fields(RolloutConfig) if f.name == "engine")
    assert list(ENGINES) == list(choices)


def test_local_sampler_uses_the_student(make_model: MakeModel) -> None:
    student = make_model()
    sampler = LocalSampler(TransformersEngine(student, SAMPLING_PARAMS))
    sampler.load_weights(student, 3)
    sampler.submit(PROMPTS, 7)
    rollouts = sampler.collect()
    assert rollouts.responses == sample_responses([(student, 1.0)], PROMPTS, SAMPLING_PARAMS, 7)
    assert rollouts.policy_version == 3
    assert rollouts.seconds > 0


def test_local_copy_keeps_the_synced_weights(make_model: MakeModel) -> None:
    student, copy = make_model(), make_model(seed=1)
    sampler = LocalSampler(TransformersEngine(copy, SAMPLING_PARAMS))
    sampler.load_weights(student, 0)
    expected = sample_responses([(student, 1.0)], PROMPTS, SAMPLING_PARAMS, 7)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    sampler.submit(PROMPTS, 7)
    assert sampler.collect().responses == expected
    sampler.load_weights(student, 1)
    sampler.submit(PROMPTS, 7)
    rollouts = sampler.collect()
    assert rollouts.policy_version == 1
    assert rollouts.responses == sample_responses([(student, 1.0)], PROMPTS, SAMPLING_PARAMS, 7) != expected


@pytest.fixture
def start(make_model: MakeModel, tmp_path: Path) -> Iterator[Callable[[], ProcessSampler]]:
    started: list[ProcessSampler] = []
    make_model(seed=1).save_pretrained(tmp_path)

    def start(**settings: Any) -> ProcessSampler:
        """Start a sampler; the weights on the disk are not the student's."""
        config = ModelConfig(path=str(tmp_path))
        build_engine = build_engine_of(config)
        started.append(ProcessSampler(make_model(), build_engine, 1, **settings))
        return started[-1]

    yield start
    for sampler in started:
        sampler.close()


def assert_close(actual: list[list[Completion]], expected: list[list[Completion]]) -> None:
    """Compare tokens exactly and log-probs up to rounding, which depends on memory alignment."""
    for one, two in zip(chain(*actual), chain(*expected), strict=True):
        assert (one.token_ids, one.finished) == (two.token_ids, two.finished)
        assert one.log_probs == pytest.approx(two.log_probs, abs=1e-5)


@pytest.mark.slow
def test_process_samples_with_the_synced_weights_and_reports_errors(
    start: Callable[[], ProcessSampler], make_model: MakeModel
) -> None:
    sampler = start()
    # First the weights of the start, then synced ones.
    for version, seed in ((0, 0), (1, 2)):
        student = make_model(seed=seed)
        if version:
            sampler.load_weights(student, version)
        sampler.submit(PROMPTS, 7)
        with torch.no_grad():
            student.lm_head.weight.zero_()  # training continues while the process samples
        rollouts = sampler.collect()
        assert rollouts.policy_version == version
        expected = sample_responses([(make_model(seed=seed), 1.0)], PROMPTS, SAMPLING_PARAMS, 7)
        assert_close(rollouts.responses, expected)

    sampler.submit([TokenPrompt([99])], 7)
    sampler._process.join(60)
    with pytest.raises(RuntimeError, match=r"the sampling process failed:\nTraceback[\s\S]*IndexError: index out"):
        sampler.load_weights(make_model(), 2)
    with pytest.raises(RuntimeError, match="the sampling process ended with exit code 0"):
        sampler.collect()
    sampler.close()
    assert not sampler._process.is_alive()


@pytest.mark.slow
def test_killed_process_is_reported_and_closed_process_ends_silently(
    start: Callable[[], ProcessSampler], make_model: MakeModel, capfd: pytest.CaptureFixture[str]
) -> None:
    killed, closed = start(), start()
    closed.submit(PROMPTS, 7)
    closed.collect()
    closed.submit(PROMPTS * 10, 7)
    before = time.monotonic()
    closed.close()  # while it samples
    assert not closed._process.is_alive()
    assert time.monotonic() - before < 5
    assert capfd.readouterr().err == ""

    pid = killed._process.pid
    assert pid is not None
    killed.submit(PROMPTS, 7)
    killed.collect()
    killed.submit(PROMPTS * 100_000, 7)
    os.kill(pid, signal.SIGKILL)
    for call in (
        killed.collect,
        lambda: killed.submit(PROMPTS, 7),
        lambda: killed.load_weights(make_model(), 1),
    ):
        with pytest.raises(
            SDPOError, match=r"^rollout\.max_restarts=0: the sampling process was killed by SIGKILL and no restart is"
        ):
            call()


@pytest.mark.slow
def test_killed_process_is_restarted_and_returns_equal_rollouts(
    start: Callable[..., ProcessSampler], make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = start(max_restarts=2)
    student = make_model(seed=2)
    sampler.load_weights(student, 5)
    with torch.no_grad():
        student.lm_head.weight.zero_()  # a restart uses the weights of the last sync
    expected = sample_responses([(make_model(seed=2), 1.0)], PROMPTS, SAMPLING_PARAMS, 7)

    def kill() -> None:
        os.kill(sampler._process.pid or 0, signal.SIGKILL)

    kill()
    sampler._process.join()
    sampler.submit(PROMPTS, 7)  # idle when it was killed
    kill()  # working when it was killed
    rollouts = sampler.collect()
    assert rollouts is not None
    assert rollouts.policy_version == 5
    assert_close(rollouts.responses, expected)
    assert caplog.messages == [
        "the sampling process was killed by SIGKILL; restart 1 of at most 2",
        "the sampling process was killed by SIGKILL; restart 2 of at most 2",
    ]
    kill()
    sampler._process.join()
    with pytest.raises(SDPOError, match="killed by SIGKILL and no restart is left"):
        sampler.load_weights(student, 6)


@pytest.mark.slow
def test_user_error_in_the_process_is_raised_as_such(make_model: MakeModel) -> None:
    config = ModelConfig(path="/nowhere")
    build_engine = build_engine_of(config)
    sampler = ProcessSampler(make_model(), build_engine, 1)
    with pytest.raises(SDPOError, match=r"^model\.path: /nowhere: no such folder$"):
        sampler.collect()
    sampler.close()


LOGGING_ENGINE = """
import logging

logger = logging.getLogger("sdpo.engine")

class LoggingEngine:
    def __init__(self):
        logger.info("loading %s", "weights")

    def sample(self, prompts, seed):
        logger.debug("a detail")
        logger.warning("seed %d", seed)
        return [[] for _ in prompts]

    def load(self, parameters, checksum):
        pass
"""


@pytest.mark.slow
def test_log_records_of_the_process_reach_the_parent(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "logging_engine.py").write_text(LOGGING_ENGINE)
    monkeypatch.syspath_prepend(tmp_path)  # also for the new process
    engine_class = importlib.import_module("logging_engine").LoggingEngine
    caplog.set_level(logging.INFO, logger="sdpo")
    sampler = ProcessSampler(make_model(), engine_class, 1)
    try:
        sampler.submit(PROMPTS, 7)
        rollouts = sampler.collect()
    finally:
        sampler.close()
    assert rollouts is not None and rollouts.responses == [[], [], []]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "loading weights"),
        ("WARNING", "seed 7"),
    ]
    assert "seed 7" not in capfd.readouterr().err
