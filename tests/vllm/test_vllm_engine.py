"""An engine of vLLM samples like transformers, with the weights of the last sync; run by ``make test-vllm``."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from sdpo import SDPOError
from sdpo.config.model import ModelConfig
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.observability import metrics
from sdpo.rewards.toy import hidden_rule
from sdpo.trainer.rollout import vllm_engine
from sdpo.trainer.rollout.local import LocalSampler
from sdpo.trainer.rollout.vllm_engine import VllmEngine

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM; make test-vllm installs it"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:vllm"),
]

ROOT = Path(__file__).parents[2]
# The last prompt is longer than a block of vLLM's prefix cache, which must not be used after a weight sync.
PROMPTS = [TokenPrompt(ids) for ids in [[5, 6, 7], [9, 3], [8, 8, 8, 8], [40, 1] * 70]]
STOP_TOKENS = [2, 11, 30]
SAMPLING_PARAMS = SamplingParams(
    n=3, max_new_tokens=12, temperature=0.8, top_p=1.0, batch_size=8, stop_token_ids=STOP_TOKENS, pad_token_id=0
)
CPU = torch.device("cpu")

Start = Callable[..., VllmEngine]


def make_model(seed: int, tied: bool = False, num_attention_heads: int = 2) -> PreTrainedModel:
    """Build a random Qwen2 with sharp distributions, and heads of 32, the minimum of vLLM on a CPU."""
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=STOP_TOKENS[0],
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" not in name:
                    param.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start an engine whose weights on the disk differ from the students' weights."""
    started: list[VllmEngine] = []

    def start(
        sampling_params: SamplingParams = SAMPLING_PARAMS, kv_cache_memory_gib: float = 0.01, **shape: Any
    ) -> VllmEngine:
        make_model(seed=99, **shape).save_pretrained(tmp_path)
        config = ModelConfig(path=str(tmp_path))
        started.append(
            VllmEngine(config, sampling_params, CPU, max_length=160, kv_cache_memory_gib=kv_cache_memory_gib)
        )
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@torch.no_grad()
def compute_max_difference(
    student: PreTrainedModel, sampled: Sequence[Sequence[Completion]], sampling_params: SamplingParams
) -> float:
    """Maximum difference between the log-probs of the responses and those of a forward pass of the student."""
    maximum = 0.0
    for prompt, responses in zip(PROMPTS, sampled, strict=True):
        for response in responses:
            token_ids = torch.tensor([*prompt.token_ids, *response.token_ids])
            logits = student(input_ids=token_ids[None]).logits[0, len(prompt.token_ids) - 1 : -1]
            log_probs = (logits.float() / sampling_params.temperature).log_softmax(-1)
            expected = log_probs.gather(-1, token_ids[len(prompt.token_ids) :, None])[:, 0]
            maximum = max(maximum, (expected - torch.tensor(response.log_probs)).abs().max().item())
    return maximum


@pytest.mark.parametrize(("tied", "top_p"), [(False, 1.0), (True, 1.0), (True, 0.8)])
def test_log_probs_equal_the_students_after_every_weight_sync(start: Start, tied: bool, top_p: float) -> None:
    temperature = SAMPLING_PARAMS.temperature if top_p == 1 else 1.0
    sampling_params = replace(SAMPLING_PARAMS, top_p=top_p, temperature=temperature)
    sampler = LocalSampler(start(sampling_params, tied=tied), verify_weights=True)
    student, generator = make_model(seed=0, tied=tied), torch.Generator().manual_seed(0)
    for version in range(4):
        sampler.load_weights(student, version)
        sampler.submit(PROMPTS, seed=version)
        rollouts = sampler.collect()
        assert rollouts.policy_version == version
        assert compute_max_difference(student, rollouts.responses, sampling_params) < 1e-4
        with torch.no_grad():
            for param in student.parameters():
                param.add_(0.05 * torch.randn(param.shape, generator=generator))
        assert compute_max_difference(student, rollouts.responses, sampling_params) > 0.1


def test_incomplete_weight_sync_is_detected(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = LocalSampler(start(tied=True), verify_weights=True)
    sampler.load_weights(make_model(seed=0, tied=True), 0)
    monkeypatch.setattr(vllm_engine, "_repack_tied_head", lambda model: None)
    message = (
        r"^after a weight sync, vLLM's log-probs differ from the student's by [\d.]+ nats on average, more than 0.01 "
    )
    with pytest.raises(RuntimeError, match=message):
        sampler.load_weights(make_model(seed=1, tied=True), 1)


def test_equal_seeds_give_equal_responses(start: Start) -> None:
    sampler, student = LocalSampler(start(), verify_weights=True), make_model(seed=0)

    def sample(seed: int, prompts: Sequence[TokenPrompt] = PROMPTS) -> list[list[Completion]]:
        sampler.load_weights(student, 0)
        sampler.submit(prompts, seed)
        return sampler.collect().responses

    first = sample(7)
    assert sample(7) == first
    assert sample(8) != first
    # All responses have different random numbers, also those of equal prompts.
    twice = list(chain(*sample(7, [PROMPTS[0], PROMPTS[0]])))
    assert len({tuple(response.token_ids) for response in twice}) == 2 * SAMPLING_PARAMS.n


def test_responses_end_like_those_of_transformers(start: Start) -> None:
    nearly_greedy = replace(SAMPLING_PARAMS, temperature=0.02, n=2)  # so that both sample the same tokens
    student = make_model(seed=0)
    sampler = LocalSampler(start(nearly_greedy), verify_weights=True)
    sampler.load_weights(student, 0)
    sampler.submit(PROMPTS, 0)
    vllm_responses = list(chain(*sampler.collect().responses))
    hf_responses = list(chain(*sample_responses([(student, 1.0)], PROMPTS, nearly_greedy, seed=0)))
    assert [(r.token_ids, r.finished) for r in vllm_responses] == [(r.token_ids, r.finished) for r in hf_responses]
    assert {r.finished for r in vllm_responses} == {True, False}
    assert {r.token_ids[-1] for r in vllm_responses if r.finished} - {STOP_TOKENS[0]}, "an additional stop token"


def test_cache_has_the_configured_size_or_the_engine_does_not_start(start: Start) -> None:
    def num_blocks(engine: VllmEngine) -> int:
        return engine._llm.llm_engine.vllm_config.cache_config.num_gpu_blocks

    small, large = (num_blocks(start(kv_cache_memory_gib=size)) for size in (0.01, 0.02))
    assert large == pytest.approx(2 * small, rel=0.1)
    with pytest.raises(
        SDPOError, match=r"^rollout\.engine=vllm: vLLM cannot sample from .* with rollout\.kv_cache_memory_gib=1e-06 "
    ):
        start(kv_cache_memory_gib=1e-6)


def test_engine_does_not_change_threads_and_generators_of_the_process(start: Start) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.random.get_rng_state(), random.getstate()
    try:
        start()
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.random.get_rng_state(), expected[0]) and random.getstate() == expected[1]
        torch.set_num_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def task_args(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of the hidden rule with an untrained model of two heads of 32, because vLLM needs heads of at least 32.

    The weights are large enough for the teacher context to have an effect.
    """
    args = {"dir": str(tmp_path_factory.mktemp("task") / "data"), "pretrain_steps": 0, "num_train": 200, "num_test": 10}
    build_hidden_rule_model = hidden_rule.build_model

    def build_model(vocab_size: int) -> PreTrainedModel:
        config = build_hidden_rule_model(vocab_size).config
        config.num_attention_heads = config.num_key_value_heads = 2
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(4.0 if param.dim() == 2 else 1.0)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden_rule, "build_model", build_model)
        hidden_rule.HiddenRule(**args).prepare()
    return args


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_run_trains_on_rollouts_of_vllm(task_args: dict[str, Any], tmp_path: Path, max_staleness: int) -> None:
    overrides = {
        **{f"data.task_args.{name}": value for name, value in task_args.items()},
        "output_dir": tmp_path / "run",
        "rollout.engine": "vllm",
        "rollout.kv_cache_memory_gib": 0.05,
        "rollout.num_threads": 1,
        "max_staleness": max_staleness,
        "max_steps": 8,
        "eval.val_before_train": False,
        "optim.warmup_steps": 0,
        "optim.lr_scheduler_type": "constant",
    }
    command = [sys.executable, "-m", "sdpo.cli", "train", str(ROOT / "configs" / "hidden_rule.yaml")]
    done = subprocess.run(
        [*command, *(f"{key}={value}" for key, value in overrides.items())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row[metrics.STALENESS] for row in rows] == [0, *[max_staleness] * 7]
    assert rows[-1][metrics.LOSS] < 0.8 * rows[0][metrics.LOSS]
    differences = [abs(row[metrics.ROLLOUT_KL]) for row in rows]
    if max_staleness == 0:
        assert max(differences) < 1e-5
    else:
        assert differences[0] < 1e-5 < min(differences[1:])


def test_model_that_vllm_does_not_support_is_refused(start: Start) -> None:
    with pytest.raises(SDPOError, match=r"^rollout\.engine=vllm: vLLM cannot sample from .*head_dim=16"):
        start(num_attention_heads=4)
