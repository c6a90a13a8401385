"""Tokens that the sampler never draws, so that the actor assigns them no probability either."""

from __future__ import annotations

from typing import Any

from verl.utils.tokenizer import get_processor_token_id

MODALITIES = ("image", "video", "audio")


def find_placeholders(processor: Any) -> list[int]:
    """Return the placeholder token ids of images, videos and audio; empty for a processor that is None."""
    ids = (get_processor_token_id(processor, modality) for modality in MODALITIES)
    return [token_id for token_id in ids if token_id is not None]


def find_forbidden_ids(tokenizer: Any, processor: Any, vocab_size: int) -> list[int]:
    """Return the ids that verl's vLLM server masks (``monkey_patch_compute_logits``): placeholders, and ids beyond the
    tokenizer.

    Args:
        tokenizer: of the policy.
        processor: of the policy; None for a model that reads text only.
        vocab_size: rows of the output layer.
    """
    placeholders = [token_id for token_id in find_placeholders(processor) if token_id < vocab_size]
    return [*placeholders, *range(len(tokenizer), vocab_size)]
