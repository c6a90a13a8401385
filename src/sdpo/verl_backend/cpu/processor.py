"""Processors where torchvision is missing: verl asks transformers for the stock one, and goes on without any."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor

from sdpo.models.multimodal.processor import load_without_videos


def stand_in() -> None:
    """Let ``AutoProcessor`` fall back, in this process, to a processor that does without videos."""
    load = AutoProcessor.from_pretrained

    def from_pretrained(path: str, **options: Any) -> Any:
        try:
            return load(path, **options)
        except ImportError:
            return load_without_videos(path, trust_remote_code=options.get("trust_remote_code", False))

    AutoProcessor.from_pretrained = from_pretrained
