"""Generation with vLLM in this process, on a GPU or a CPU.

vLLM loads the model from its folder; later weights are copied in memory. After each weight sync, log-probs of a fixed
token sequence are compared with the student's, because a partial sync also changes the outputs.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdpo.config.model import ModelConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.errors import ConfigError, DataError
from sdpo.models.generation.sampling import MIN_BIAS, Completion, SamplingParams
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.trainer.rollout.weight_sync import WeightChecksum

# Largest mean difference of a checksum's log-probs, in nats, that rounding can explain. Parameters that a weight sync
# missed exceed it after a few steps, because their distance to the student's grows.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.3}

# Environment variables that vLLM reads on import. Its engine must run in this process, where the weights are.
REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Compilation needs a C++ compiler, takes minutes and is not faster on a CPU.
REQUIRED_ON_CPU = {"TORCHDYNAMO_DISABLE": "1"}
# Defaults that the environment may override: no usage reports, and only errors in the log.
PREFERRED = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def require_vllm(device: torch.device) -> None:
    """Check that vLLM is installed and supports the device, without importing it.

    Raises:
        DataError: it is not installed, or the device is neither the CPU nor the first visible GPU.
    """
    if device.type not in ("cpu", "cuda") or device.index:
        raise DataError(
            f"rollout.device={device}: rollout.engine=vllm samples on cpu or on the first visible GPU only; "
            "place the actor on another GPU (actor.device=cuda:1), or reorder them with CUDA_VISIBLE_DEVICES"
        )
    if importlib.util.find_spec("vllm") is None:
        command = "pip install vllm" if device.type == "cuda" else "pip install --no-deps -r requirements-vllm.txt"
        raise DataError(f"rollout.engine=vllm: vLLM is not installed; install it with: {command}")


class VllmEngine:
    """Samples with a vLLM engine in this process.

    Args:
        config: the model; the first weights are read from ``config.path``.
        decoding: ``batch_size`` is the maximum number of sequences that are decoded at once.
        device: ``cpu`` or the first GPU.
        max_length: maximum number of tokens of a prompt with its response.
        kv_cache_memory_gib: size of the key-value cache.

    Raises:
        DataError: vLLM cannot start with these arguments.
    """

    reads_images: ClassVar[bool] = False
    verify_weights: ClassVar[bool] = True

    @staticmethod
    def require(device: torch.device) -> None:
        require_vllm(device)

    @classmethod
    def from_config(
        cls,
        config: RolloutConfig,
        model: ModelConfig,
        sampling: SamplingParams,
        device: torch.device,
        *,
        max_length: int,
        max_pixels: int,
    ) -> VllmEngine:
        if sampling.top_p < 1 and sampling.temperature != 1:
            raise ConfigError(
                f"rollout.top_p={sampling.top_p:g} with rollout.engine=vllm: vLLM returns log-probabilities of all "
                f"tokens only before the temperature of {sampling.temperature:g}; set rollout.temperature=1 or "
                "rollout.engine=transformers"
            )
        return cls(model, sampling, device, max_length, config.kv_cache_memory_gib)

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
        with _preserve_torch_state():
            from vllm import LLM
            from vllm.platforms import current_platform

            if current_platform.device_type != device.type:
                raise DataError(
                    f"rollout.device={device}: the installed vLLM is built for {current_platform.device_type}; "
                    "change rollout.device or install another build of vLLM"
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
                    gpu_memory_utilization=0.01,  # minimum of free memory at start; the actor may use the rest
                    # Of all tokens, also with top-p.
                    logprobs_mode="processed_logprobs" if decoding.top_p >= 1 else "raw_logprobs",
                    enforce_eager=on_cpu,
                )
                self.compute_log_probs([0, 0])  # unsupported kernels may raise only in the first forward pass
            except (ValueError, RuntimeError) as error:
                raise DataError(
                    f"rollout.engine=vllm: vLLM cannot sample from {config.path} with "
                    f"rollout.kv_cache_memory_gib={kv_cache_memory_gib:g} and up to {max_length} tokens per sequence: "
                    + " ".join(str(error).split())
                ) from error

    def sample(self, prompts: Sequence[TokenPrompt], seed: int) -> list[list[Completion]]:
        """Sample ``decoding.n`` responses per prompt; deterministic for a seed."""
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
                logit_bias=dict.fromkeys(self._decoding.suppress_tokens, MIN_BIAS) or None,
                ignore_eos=True,  # stop_token_ids has all stop tokens, the model's EOS included if it is one
                seed=rng.getrandbits(62),
                logprobs=0,
                detokenize=False,
            )
            for _ in prompts
        ]
        outputs = self._generate([prompt.token_ids for prompt in prompts], params)
        return [[_to_completion(completion, stop_token_ids) for completion in output.outputs] for output in outputs]

    def load(self, parameters: Mapping[str, Tensor], checksum: WeightChecksum | None) -> None:
        """Copy these weights into vLLM and verify them by the checksum.

        Raises:
            RuntimeError: vLLM's log-probs differ from the student's.
        """
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(parameters.items())})
        self._llm.apply_model(_repack_tied_head)
        self._llm.reset_prefix_cache()
        if checksum is not None:
            self._verify(checksum)

    def close(self) -> None:
        """Stop the engine and destroy torch's process group, so that another engine can be started."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def compute_log_probs(self, token_ids: Sequence[int]) -> list[float]:
        """Compute the log-prob of every token but the first, given the tokens before it; at temperature 1."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        scored = self._generate([token_ids], [params])[0].prompt_logprobs
        return [scored[place][token_id].logprob for place, token_id in enumerate(token_ids) if place > 0]

    def _generate(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        return self._llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)

    def _verify(self, checksum: WeightChecksum) -> None:
        log_probs = self.compute_log_probs(checksum.token_ids)
        difference = fmean(abs(a - b) for a, b in zip(log_probs, checksum.log_probs, strict=True))
        tolerance = TOLERANCE[self._dtype]
        if not difference <= tolerance:  # also true for NaN
            raise RuntimeError(
                f"after a weight sync, vLLM's log-probs differ from the student's by {difference:.3g} nats on average, "
                f"more than {tolerance:g} for {self._dtype}: vLLM has not loaded all weights"
            )


def _to_completion(completion: Any, stop_token_ids: Sequence[int]) -> Completion:
    token_ids = list(completion.token_ids)
    log_probs = [scored[token_id].logprob for token_id, scored in zip(token_ids, completion.logprobs, strict=True)]
    return Completion(token_ids, log_probs, finished=token_ids[-1] in stop_token_ids)


def _repack_tied_head(model: Any) -> None:
    """Renew vLLM's packed copy of a tied output layer on a CPU, which ``reload_weights`` leaves unchanged."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, False)


@contextmanager
def _preserve_torch_state() -> Iterator[None]:
    """Restore ``torch.set_num_threads``, which vLLM replaces, and the random states, which it seeds."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
            random.setstate(python_state)
