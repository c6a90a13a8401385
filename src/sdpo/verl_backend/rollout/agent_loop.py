"""verl's agent loops, single turn and with tools, without image tokens in responses.

Both are also registered under verl's own names, which a column ``agent_name`` of the data may have.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop

from sdpo.errors import DataError
from sdpo.verl_backend.config.schema import AGENT_LOOPS, SINGLE_TURN, TOOL_TURNS
from sdpo.verl_backend.driver.vocabulary import find_placeholders

MIN_BIAS = -100.0  # the lowest bias that vLLM accepts


class _WithoutImageTokens:
    """Excludes image placeholder tokens from responses, since no model could read such a response.

    Raises:
        RuntimeError: the sampler drew an image token in spite of the bias.
        DataError: a tool's output contains an image token.
    """

    processor: Any

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        placeholders = set(find_placeholders(self.processor))
        if not placeholders:
            return await super().run(sampling_params, **kwargs)  # type: ignore[misc]
        biased = {**sampling_params, "logit_bias": dict.fromkeys(placeholders, MIN_BIAS)}
        output = await super().run(biased, **kwargs)  # type: ignore[misc]
        for token_id, is_sampled in zip(output.response_ids, output.response_mask, strict=True):
            if token_id not in placeholders:
                continue
            if is_sampled:
                raise RuntimeError(
                    f"the sampler drew image token {token_id} in spite of its logit_bias; use a sampler that supports "
                    "logit_bias"
                )
            raise DataError(f"the text of a tool's output contains image token {token_id}; remove it in the tool")
        return output


@register(AGENT_LOOPS[SINGLE_TURN])
@register(SINGLE_TURN)
class ImageFreeResponses(_WithoutImageTokens, SingleTurnAgentLoop):  # type: ignore[misc]
    """One turn: a response to a prompt."""


@register(AGENT_LOOPS[TOOL_TURNS])
@register(TOOL_TURNS)
class TextTools(_WithoutImageTokens, ToolAgentLoop):  # type: ignore[misc]
    """Turns of the policy with tools' outputs between them, as one response.

    verl's ``response_mask`` is 0 for tokens that the policy did not sample. Tools may return text only: the teacher's
    positions and pixels are computed from the prompt's images.
    """

    async def _call_tool(self, tool_call: Any, tools_kwargs: dict[str, Any], agent_data: Any) -> Any:
        result = await super()._call_tool(tool_call, tools_kwargs, agent_data)
        if result[0].image or result[0].video:
            raise DataError(
                f"tool {tool_call.name} returned an image or a video, which loss_mode=sdpo does not support: the "
                "teacher's positions are computed from the prompt's images only; return text"
            )
        return result
