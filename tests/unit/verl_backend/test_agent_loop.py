"""No response has a token that stands for an image."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from sdpo.verl_backend.agent_loop import ImageFreeResponses


def ask(monkeypatch: pytest.MonkeyPatch, processor: Any, response: list[int]) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    async def run(_: Any, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        asked.update(sampling_params)
        return SimpleNamespace(response_ids=response)

    monkeypatch.setattr(SingleTurnAgentLoop, "run", run)
    loop = object.__new__(ImageFreeResponses)
    loop.processor = processor
    asyncio.run(loop.run({"temperature": 1.0}, raw_prompt=[]))
    return asked


def test_the_sampler_is_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = SimpleNamespace(image_token_id=5, video_token_id=6)
    assert ask(monkeypatch, processor, [7, 8]) == {"temperature": 1.0, "logit_bias": {5: -100.0, 6: -100.0}}
    assert ask(monkeypatch, None, [5]) == {"temperature": 1.0}


def test_one_that_comes_all_the_same_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="drew token 6, which stands for an image"):
        ask(monkeypatch, SimpleNamespace(image_token_id=5, video_token_id=6), [7, 6])
