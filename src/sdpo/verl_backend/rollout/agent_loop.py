"""verl's agent loops, single turn and with tools; a response holds nothing that student and teacher cannot read.

Both are registered under verl's own names too, which a column ``agent_name`` of the data may hold.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop

from sdpo.errors import DataError
from sdpo.verl_backend.config.schema import AGENT_LOOPS, SINGLE_TURN, TOOL_TURNS
from sdpo.verl_backend.driver.vocabulary import find_placeholders

NEVER = -100.0  # the least that vLLM takes as a bias


class _WithoutImageTokens:
    """Asks the sampler for responses without tokens that stand for images: no model could read one with them again.

    Raises:
        RuntimeError: the sampler drew one nevertheless.
        DataError: a tool's output holds one.
    """

    processor: Any

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        placeholders = set(find_placeholders(self.processor))
        if not placeholders:
            return await super().run(sampling_params, **kwargs)  # type: ignore[misc]
        biased = {**sampling_params, "logit_bias": dict.fromkeys(placeholders, NEVER)}
        output = await super().run(biased, **kwargs)  # type: ignore[misc]
        for token_id, is_sampled in zip(output.response_ids, output.response_mask, strict=True):
            if token_id not in placeholders:
                continue
            if is_sampled:
                raise RuntimeError(
                    f"the sampler drew token {token_id}, which stands for an image, although a bias forbids it; "
                    "use a sampler that knows logit_bias"
                )
            raise DataError(
                f"the text of a tool's output holds token {token_id}, which stands for an image; remove it in the tool"
            )
        return output


@register(AGENT_LOOPS[SINGLE_TURN])
@register(SINGLE_TURN)
class ImageFreeResponses(_WithoutImageTokens, SingleTurnAgentLoop):  # type: ignore[misc]
    """One response a prompt."""


@register(AGENT_LOOPS[TOOL_TURNS])
@register(TOOL_TURNS)
class TextTools(_WithoutImageTokens, ToolAgentLoop):  # type: ignore[misc]
    """Turns of the policy, with the outputs of the tools that it calls between them, as one response.

    verl's ``response_mask`` is 0 for what the policy did not sample. Tools may return texts only: the teacher's
    positions and pixels are those of the prompt's images.
    """

    async def _call_tool(self, tool_call: Any, tools_kwargs: dict[str, Any], agent_data: Any) -> Any:
        result = await super()._call_tool(tool_call, tools_kwargs, agent_data)
        if result[0].image or result[0].video:
            raise DataError(
                f"tool {tool_call.name} returned an image or a video, which is not supported with loss_mode=sdpo: the "
                "teacher's prompt is another, and its positions are computed of the prompt's images only; return text"
            )
        return result
