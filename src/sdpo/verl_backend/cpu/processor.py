"""Processors without torchvision, which transformers needs for video processors."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor

from sdpo.models.multimodal.processor import load_without_videos


def fall_back_without_torchvision() -> None:
    """Make ``AutoProcessor`` fall back to a processor without videos, in this process.

    https://github.com/huggingface/transformers/issues/43986
    """
    load = AutoProcessor.from_pretrained

    def from_pretrained(path: str, **options: Any) -> Any:
        try:
            return load(path, **options)
        except ImportError:
            return load_without_videos(path, trust_remote_code=options.get("trust_remote_code", False))

    AutoProcessor.from_pretrained = from_pretrained
