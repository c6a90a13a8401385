"""verl's single-turn agent loop, for models whose vocabulary has tokens that stand for images."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from sdpo.verl_backend.vocabulary import find_placeholders

NAME = "sdpo_single_turn"
NEVER = -100.0  # the least that vLLM takes as a bias


@register(NAME)
class ImageFreeResponses(SingleTurnAgentLoop):  # type: ignore[misc]
    """Asks the sampler for responses without tokens that stand for images: no model could read one with them again.

    Raises:
        RuntimeError: the sampler drew one nevertheless.
    """

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        placeholders = set(find_placeholders(self.processor))
        if not placeholders:
            return await super().run(sampling_params, **kwargs)
        biased = {**sampling_params, "logit_bias": dict.fromkeys(placeholders, NEVER)}
        output = await super().run(biased, **kwargs)
        drawn = placeholders.intersection(output.response_ids)
        if drawn:
            raise RuntimeError(
                f"the sampler drew token {min(drawn)}, which stands for an image, although a bias forbids it; "
                "use a sampler that knows logit_bias"
            )
        return output
