"""Build the sampler of the native trainer."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo.config.model import ModelConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.models.generation.sampling import SamplingParams
from sdpo.models.loading import find_unknown_ids, get_stop_token_ids
from sdpo.models.multimodal.vision_tower import VisionAdapter
from sdpo.trainer.rollout.base import Engine, Sampler
from sdpo.trainer.rollout.hf_engine import TransformersEngine
from sdpo.trainer.rollout.local import LocalSampler
from sdpo.trainer.rollout.process import ProcessSampler
from sdpo.trainer.rollout.vllm_engine import VllmEngine

# By the name in rollout.engine.
ENGINES: dict[str, type[Engine]] = {"transformers": TransformersEngine, "vllm": VllmEngine}


def build_sampling_params(
    config: RolloutConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vision: VisionAdapter | None,
    dtype: str | None,
) -> SamplingParams:
    """Sampling parameters of the rollouts.

    Args:
        dtype: name of the data type for sampling; None for the student's.
    """
    return SamplingParams(
        n=config.n,
        max_new_tokens=config.max_response_length,
        temperature=config.temperature,
        top_p=config.top_p,
        batch_size=config.max_num_seqs,
        stop_token_ids=get_stop_token_ids(student, tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
        suppress_tokens=(
            *(vision.placeholder_ids if vision is not None else ()),
            *find_unknown_ids(tokenizer, len(student.get_output_embeddings().weight)),
        ),
        dtype=getattr(torch, dtype) if dtype is not None else None,
    )


def build_sampler(
    config: RolloutConfig,
    model: ModelConfig,
    student: PreTrainedModel,
    sampling: SamplingParams,
    device: torch.device,
    vision: VisionAdapter | None,
    *,
    max_length: int,
    max_pixels: int,
    overlaps: bool,
) -> Sampler:
    """Build the sampler.

    It runs in a second process if sampling overlaps with training. It uses the student's weights without a copy if it
    runs in this process, on the student's device, and with transformers.

    Args:
        model: with the data type for sampling.
        max_length: of prompt and response, in tokens.
    """
    engine = ENGINES[config.engine]
    build_engine = partial(
        engine.from_config, config, model, sampling, device, max_length=max_length, max_pixels=max_pixels
    )
    if overlaps:
        return ProcessSampler(
            student,
            build_engine,
            config.num_threads,
            verify_weights=engine.verify_weights,
            max_restarts=config.max_restarts,
        )
    if engine is TransformersEngine and device == student.device:
        return LocalSampler(TransformersEngine(student, sampling, vision, is_student=True))
    return LocalSampler(build_engine(), verify_weights=engine.verify_weights)
