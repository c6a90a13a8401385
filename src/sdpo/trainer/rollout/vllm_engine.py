"""Rollouts from a vLLM engine in this process, on a GPU or on a CPU.

It loads the model by itself, and from then on gets its weights handed over, without a checkpoint. What it then says of
a few tokens is compared with what the student says: that its outputs changed does not show that all its weights did.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sdpo.config.model import ModelConfig
from sdpo.errors import DataError
from sdpo.models.generation.sampling import Completion, SamplingParams
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.trainer.rollout.weight_sync import WeightChecksum

# Mean difference of a probe's log-probs, in nats, that rounding in another order of operations can explain. Weights
# that were left behind differ more with every step, and so soon by more than this.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.3}

# Read when vLLM is imported. Its engine is to run in this process, where the weights are.
REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Compiling needs a C++ compiler and minutes, and wins nothing on a CPU.
REQUIRED_ON_CPU = {"TORCHDYNAMO_DISABLE": "1"}
# What a person may want otherwise: no reports on the use of vLLM, and of its log only the errors.
PREFERRED = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def require_vllm(device: torch.device) -> None:
    """Refuse what vLLM cannot do here, without importing it.

    Raises:
        DataError: it is not installed, or the device is not one that it samples on.
    """
    if device.type not in ("cpu", "cuda") or device.index:
        raise DataError(
            f"rollout.device={device}: rollout.engine=vllm samples on cpu or on the first visible GPU; "
            "give the actor another one (actor.device=cuda:1), or choose with CUDA_VISIBLE_DEVICES"
        )
    if importlib.util.find_spec("vllm") is None:
        command = "pip install vllm" if device.type == "cuda" else "pip install --no-deps -r requirements-vllm.txt"
        raise DataError(f"rollout.engine=vllm: vLLM is not installed; install it with: {command}")


class VllmEngine:
    """An engine of vLLM's with the weights that it was given last.

    Args:
        config: the model; its weights are read from ``config.path``.
        decoding: ``batch_size`` sequences are decoded side by side.
        device: ``cpu`` or the first GPU.
        max_length: most tokens of a prompt and its response together.
        kv_cache_memory_gib: size of the key-value cache.

    Raises:
        DataError: vLLM cannot start with these.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoding: SamplingParams,
        device: torch.device,
        max_length: int,
        kv_cache_memory_gib: float,
    ) -> None:
        self._decoding = decoding
        self._dtype = config.dtype
        on_cpu = device.type == "cpu"
        os.environ.update(REQUIRED | REQUIRED_ON_CPU if on_cpu else REQUIRED)
        os.environ.update(PREFERRED | os.environ)
        with _kept_as_it_is():
            from vllm import LLM
            from vllm.platforms import current_platform

            if current_platform.device_type != device.type:
                raise DataError(
                    f"rollout.device={device}: the vLLM that is installed samples on {current_platform.device_type}; "
                    "change rollout.device or install vLLM for it"
                )
            try:
                self._llm = LLM(
                    config.path,
                    dtype=config.dtype,
                    trust_remote_code=config.trust_remote_code,
                    skip_tokenizer_init=True,
                    use_tqdm_on_load=False,
                    max_model_len=max_length,
                    max_num_seqs=decoding.batch_size,
                    kv_cache_memory_bytes=int(kv_cache_memory_gib * 2**30),
                    gpu_memory_utilization=0.01,  # only what must be free at the start; the actor may be there too
                    logprobs_mode="processed_logprobs",
                    enforce_eager=on_cpu,
                )
                self.compute_log_probs([0, 0])  # some of what its kernels cannot do shows only now
            except (ValueError, RuntimeError) as error:
                raise DataError(
                    f"rollout.engine=vllm: vLLM cannot sample from {config.path} with rollout.kv_cache_memory_gib="
                    f"{kv_cache_memory_gib:g} and up to {max_length} tokens a sequence: {' '.join(str(error).split())}"
                ) from error

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Completion]]:
        """``decoding.n`` responses to each prompt; the same seed gives the same ones."""
        from vllm import SamplingParams

        rng = random.Random(seed)
        stop_token_ids = list(self._decoding.stop_token_ids)
        params = [
            SamplingParams(
                n=self._decoding.n,
                temperature=self._decoding.temperature,
                top_p=self._decoding.top_p,
                max_tokens=self._decoding.max_new_tokens,
                stop_token_ids=stop_token_ids,
                ignore_eos=True,  # it would be the model's alone; ours are among the stop tokens
                seed=rng.getrandbits(62),
                logprobs=0,
                detokenize=False,
            )
            for _ in prompts
        ]
        outputs = self._generate([prompt.token_ids for prompt in prompts], params)
        return [[_to_response(completion, stop_token_ids) for completion in output.outputs] for output in outputs]

    def load(self, parameters: Mapping[str, Tensor], probe: WeightChecksum | None) -> None:
        """Take these weights, and check them by the probe.

        Raises:
            RuntimeError: vLLM's log-probs are not the student's.
        """
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(parameters.items())})
        self._llm.apply_model(_repack_tied_head)
        self._llm.reset_prefix_cache()
        if probe is not None:
            self._check(probe)

    def close(self) -> None:
        """Stop the engine and leave torch's process group, which another engine would need to open."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def compute_log_probs(self, token_ids: Sequence[int]) -> list[float]:
        """Of every token but the first, given those before it; at temperature 1."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        scored = self._generate([token_ids], [params])[0].prompt_logprobs
        return [scored[place][token_id].logprob for place, token_id in enumerate(token_ids) if place > 0]

    def _generate(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        return self._llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)

    def _check(self, probe: WeightChecksum) -> None:
        ours = self.compute_log_probs(probe.token_ids)
        difference = fmean(abs(a - b) for a, b in zip(ours, probe.log_probs, strict=True))
        tolerance = TOLERANCE[self._dtype]
        if not difference <= tolerance:  # not a number is no agreement either
            raise RuntimeError(
                f"after the hand-over vLLM's log-probs differ from the student's by {difference:.3g} nats on average, "
                f"more than {tolerance:g} for {self._dtype}: it has not got all of the weights"
            )


def _to_response(completion: Any, stop_token_ids: Sequence[int]) -> Completion:
    token_ids = list(completion.token_ids)
    log_probs = [scored[token_id].logprob for token_id, scored in zip(token_ids, completion.logprobs, strict=True)]
    return Completion(token_ids, log_probs, finished=token_ids[-1] in stop_token_ids)


def _repack_tied_head(model: Any) -> None:
    """On a CPU vLLM multiplies with a packed copy of each weight, and does not renew that of a tied output layer."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, False)


@contextmanager
def _kept_as_it_is() -> Iterator[None]:
    """vLLM on a CPU makes ``torch.set_num_threads`` do nothing, and seeds everything; the actor lives here too."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
            random.setstate(python_state)
