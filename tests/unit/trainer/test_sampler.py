"""Both samplers give the same rollouts; the one in a process of its own fails loudly and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo.config.model import ModelConfig
from sdpo.errors import SDPOError
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.trainer.rollout.sampler import LocalSampler, ProcessSampler, TransformersEngine

MakeModel = Callable[..., Any]
PROMPTS = [TokenPrompt(ids) for ids in ([5, 6, 7], [9, 3], [8, 8, 8, 8])]
DECODING = SamplingParams(
    n=3, max_new_tokens=8, temperature=0.8, top_p=1.0, batch_size=4, stop_token_ids=[2], pad_token_id=0
)


def test_the_local_sampler_samples_with_the_student_itself(make_model: MakeModel) -> None:
    student = make_model()
    sampler = LocalSampler(TransformersEngine(student, DECODING))
    sampler.load_weights(student, 3)
    sampler.submit(PROMPTS, 7)
    rollouts = sampler.collect()
    assert rollouts.responses == sample_responses([(student, 1.0)], PROMPTS, DECODING, 7)
    assert rollouts.version == 3
    assert rollouts.seconds > 0


def test_a_local_copy_keeps_the_weights_that_it_was_given(make_model: MakeModel) -> None:
    student, copy = make_model(), make_model(seed=1)
    sampler = LocalSampler(TransformersEngine(copy, DECODING))
    sampler.load_weights(student, 0)
    expected = sample_responses([(student, 1.0)], PROMPTS, DECODING, 7)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    sampler.submit(PROMPTS, 7)
    assert sampler.collect().responses == expected
    sampler.load_weights(student, 1)
    sampler.submit(PROMPTS, 7)
    rollouts = sampler.collect()
    assert rollouts.version == 1
    assert rollouts.responses == sample_responses([(student, 1.0)], PROMPTS, DECODING, 7) != expected


@pytest.fixture
def start(make_model: MakeModel, tmp_path: Path) -> Iterator[Callable[[], ProcessSampler]]:
    started: list[ProcessSampler] = []
    make_model(seed=1).save_pretrained(tmp_path)

    def start(**how: Any) -> ProcessSampler:
        """With weights on the disk that are not the student's."""
        config = ModelConfig(path=str(tmp_path))
        build_engine = partial(TransformersEngine.from_config, config, DECODING, torch.device("cpu"), 10**6)
        started.append(ProcessSampler(make_model(), build_engine, 1, **how))
        return started[-1]

    yield start
    for sampler in started:
        sampler.close()


def assert_close(actual: list[list[Completion]], expected: list[list[Completion]]) -> None:
    """The same tokens; log-probabilities to the precision that another place in memory leaves."""
    for one, two in zip(chain(*actual), chain(*expected), strict=True):
        assert (one.token_ids, one.finished) == (two.token_ids, two.finished)
        assert one.log_probs == pytest.approx(two.log_probs, abs=1e-5)


@pytest.mark.slow
def test_a_process_samples_with_the_weights_of_its_version_and_tells_its_errors(
    start: Callable[[], ProcessSampler], make_model: MakeModel
) -> None:
    sampler = start()
    # First the weights that it was started with, then others.
    for version, seed in ((0, 0), (1, 2)):
        student = make_model(seed=seed)
        if version:
            sampler.load_weights(student, version)
        sampler.submit(PROMPTS, 7)
        with torch.no_grad():
            student.lm_head.weight.zero_()  # learning goes on while it samples
        rollouts = sampler.collect()
        assert rollouts.version == version
        expected = sample_responses([(make_model(seed=seed), 1.0)], PROMPTS, DECODING, 7)
        assert_close(rollouts.responses, expected)

    sampler.submit([TokenPrompt([99])], 7)
    sampler._process.join(60)
    with pytest.raises(RuntimeError, match=r"the sampler failed:\nTraceback[\s\S]*IndexError: index out of range"):
        sampler.load_weights(make_model(), 2)
    with pytest.raises(RuntimeError, match="the sampler's process ended with exit code 0"):
        sampler.collect()
    sampler.close()
    assert not sampler._process.is_alive()


@pytest.mark.slow
def test_a_process_that_is_killed_is_reported_and_one_that_is_closed_goes_quietly(
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
    for ask in (
        killed.collect,
        lambda: killed.submit(PROMPTS, 7),
        lambda: killed.load_weights(make_model(), 1),
    ):
        with pytest.raises(
            SDPOError, match=r"^sampler: the sampler's process was killed by SIGKILL, and may not be st"
        ):
            ask()


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again_and_samples_the_same(
    start: Callable[..., ProcessSampler], make_model: MakeModel
) -> None:
    told: list[str] = []
    sampler = start(max_restarts=2, tell=told.append)
    student = make_model(seed=2)
    sampler.load_weights(student, 5)
    with torch.no_grad():
        student.lm_head.weight.zero_()  # what it is started with are the weights handed over, not those of now
    expected = sample_responses([(make_model(seed=2), 1.0)], PROMPTS, DECODING, 7)

    def kill() -> None:
        os.kill(sampler._process.pid or 0, signal.SIGKILL)

    kill()
    sampler._process.join()
    sampler.submit(PROMPTS, 7)  # idle when it was killed
    kill()  # working when it was killed
    rollouts = sampler.collect()
    assert rollouts is not None
    assert rollouts.version == 5
    assert_close(rollouts.responses, expected)
    assert told == [
        "the sampler's process was killed by SIGKILL; it is started again, 1 more times at most",
        "the sampler's process was killed by SIGKILL; it is started again, 0 more times at most",
    ]
    kill()
    sampler._process.join()
    with pytest.raises(SDPOError, match="killed by SIGKILL, and may not be started again"):
        sampler.load_weights(student, 6)


@pytest.mark.slow
def test_a_persons_mistake_that_the_process_finds_stays_one(make_model: MakeModel) -> None:
    config = ModelConfig(path="/nowhere")
    build_engine = partial(TransformersEngine.from_config, config, DECODING, torch.device("cpu"), 10**6)
    sampler = ProcessSampler(make_model(), build_engine, 1)
    with pytest.raises(SDPOError, match=r"^model\.path: /nowhere: no such folder$"):
        sampler.collect()
    sampler.close()
