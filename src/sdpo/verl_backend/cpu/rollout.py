"""A rollout replica that samples with transformers, in place of vLLM."""

from __future__ import annotations

import asyncio
import os
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from sdpo.config.model import ModelConfig
from sdpo.models.generation.sampling import Completion, SamplingParams, sample_responses
from sdpo.models.loading import get_stop_token_ids, load_model, load_tokenizer
from sdpo.models.multimodal.processor import TokenPrompt, encode_png, load_reader
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.verl_backend.config.schema import CPU_SAMPLER

NUMBERED = "det-"  # prefix of verl's request ids with full_determinism


@dataclass(frozen=True)
class _Request:
    prompt: TokenPrompt
    params: dict[str, Any]
    seed: int
    answer: asyncio.Future[tuple[Completion, int]]


class Server:
    """One model that serves requests; requests that wait at the same time form a batch.

    A request's seed is a hash of the run's seed, the weights' version, the prompt and the request's number; a batch's
    seed is a hash of its requests' seeds. The number comes from verl with ``rollout.full_determinism``; otherwise it is
    the count of equal requests so far, which depends on their order of arrival. Batches depend on it too unless
    ``rollout.max_num_seqs`` is 1. With both settings a resumed run samples bit for bit what the first run would have
    sampled.
    """

    def __init__(self, model: ModelConfig, max_batch: int, max_tokens: int, seed: int) -> None:
        torch.set_num_threads(1)
        tokenizer = load_tokenizer(model)
        self.model = load_model(model, torch.device("cpu"))
        # Requests bring resized images and their tokens.
        reader = load_reader(model, max_pixels=sys.maxsize)
        self.vision = VisionAdapter(self.model, reader) if reader is not None else None
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        placeholders = self.vision.placeholder_ids if self.vision is not None else ()
        self.suppress_tokens = [*placeholders, *range(len(tokenizer), vocab_size)]  # as in verl's vLLM server
        self.stop_token_ids = get_stop_token_ids(self.model, tokenizer)
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.max_batch, self.max_tokens, self.seed = max_batch, max_tokens, seed
        self.version = -1
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.waiting: list[_Request] = []
        self.is_busy = False
        self.weights_in_use = asyncio.Lock()

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: Sequence[Any] | None = None,
        **_: Any,
    ) -> TokenOutput:
        images = tuple(encode_png(image) for image in image_data or ())
        key = (*prompt_ids, *map(zlib.crc32, images))
        self.seen[key] += 1
        is_numbered = request_id.startswith(NUMBERED)
        place = int(request_id.removeprefix(NUMBERED)) if is_numbered else self.seen[key]
        seed = hash((self.seed, self.version, key, place))  # a hash of numbers alone is the same in every process
        answer: asyncio.Future[tuple[Completion, int]] = asyncio.get_running_loop().create_future()
        self.waiting.append(_Request(TokenPrompt(prompt_ids, images), sampling_params, seed, answer))
        if not self.is_busy:
            self.is_busy = True
            asyncio.get_running_loop().create_task(self._work())
        response, version = await answer
        return TokenOutput(
            token_ids=response.token_ids,
            log_probs=response.log_probs,
            stop_reason="completed",
            num_preempted=0,
            extra_fields={"global_steps": version},
        )

    async def load(self, state: dict[str, torch.Tensor], version: int) -> None:
        async with self.weights_in_use:
            self.model.load_state_dict(state)
            self.version = version
            self.seen.clear()

    async def idle(self) -> None:
        """Do nothing: verl calls these methods of a sampler that shares its GPU."""

    wake_up = sleep = resume_generation = clear_kv_cache = release_kv_cache = resume_kv_cache = idle

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Do nothing: new weights wait for the current batch."""

    async def _work(self) -> None:
        try:
            await asyncio.sleep(0.02)  # a step's requests arrive one by one
            while self.waiting:
                params = self.waiting[0].params
                batch = [request for request in self.waiting if request.params == params][: self.max_batch]
                self.waiting = [request for request in self.waiting if not any(request is taken for taken in batch)]
                async with self.weights_in_use:
                    responses = await asyncio.to_thread(self._sample, batch, params)
                    for request, response in zip(batch, responses, strict=True):
                        request.answer.set_result((response, self.version))
        finally:
            self.is_busy = False

    def _sample(self, batch: list[_Request], params: dict[str, Any]) -> list[Completion]:
        decoding = SamplingParams(
            n=1,
            max_new_tokens=params.get("max_tokens") or self.max_tokens,
            temperature=params.get("temperature", 1.0),
            top_p=params.get("top_p", 1.0),
            batch_size=len(batch),
            # Some tool parsers add stop tokens.
            stop_token_ids=sorted({*self.stop_token_ids, *(params.get("stop_token_ids") or ())}),
            pad_token_id=self.pad_token_id,
            suppress_tokens=self.suppress_tokens,
        )
        seed = hash(tuple(request.seed for request in batch)) % (1 << 63)
        prompts = [request.prompt for request in batch]
        sampled = sample_responses([(self.model, 1.0)], prompts, decoding, seed, self.vision)
        return [responses[0] for responses in sampled]


class TransformersReplica(RolloutReplica):  # type: ignore[misc]
    """One ``Server`` as a Ray actor."""

    async def launch_servers(self) -> None:
        model = ModelConfig(path=self.model_config.path, trust_remote_code=self.model_config.trust_remote_code)
        server = (
            ray.remote(Server)
            .options(name=_server_name(self.replica_rank), num_cpus=1, max_concurrency=self.max_concurrency)
            .remote(model, self.config.max_num_seqs, self.config.response_length, self.config.seed)
        )
        await server.idle.remote()  # raises if the model could not be loaded
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"{CPU_SAMPLER}:{self.replica_rank}"


class ServerAdapter(base.BaseRollout):  # type: ignore[misc]
    """Passes received weights to the replica's server."""

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int | None = None, **_: Any
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        # In a training worker (one pool of GPUs) verl passes no rank; every worker has a separate replica there.
        self.replica_rank = int(os.environ["RANK"]) if replica_rank is None else replica_rank
        self.is_leader_rank = True

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        state = {name: tensor async for name, tensor in ensure_async_iterator(weights)}
        server = ray.get_actor(_server_name(self.replica_rank))
        await server.load.remote(state, -1 if global_steps is None else global_steps)


def _server_name(replica_rank: int) -> str:
    return f"sdpo_transformers_server_{replica_rank}"


RolloutReplicaRegistry.register(CPU_SAMPLER, lambda: TransformersReplica)
base._ROLLOUT_REGISTRY[CPU_SAMPLER, "async"] = f"{__name__}.{ServerAdapter.__name__}"
