"""verl's agent loops, single turn and with tools, with the teacher's encoding of prompts.

Both are also registered under verl's own names, which a column ``agent_name`` of the data may have.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop

from sdpo.errors import DataError
from sdpo.models.generation.sampling import MIN_BIAS
from sdpo.models.multimodal.processor import MultimodalProcessor
from sdpo.prompting.control_tokens import cut_control_tokens, encode_pieces
from sdpo.prompting.tokenization import encode_prompt
from sdpo.verl_backend.config.schema import AGENT_LOOPS, SINGLE_TURN, TOOL_TURNS
from sdpo.verl_backend.driver.tools import PromptTokenizer
from sdpo.verl_backend.driver.vocabulary import find_placeholders


class _SharedEncoding:
    """Encodes prompts as the teacher's are, and excludes image placeholder tokens from responses.

    verl's own encoding lets control tokens in a text open turns, and begins another turn after a prompt that ends with
    the beginning of the answer. No upstream issue found (2026-11).

    No model could read a response with placeholders of images.

    Raises:
        RuntimeError: the sampler drew an image token in spite of the bias.
        DataError: a tool's output contains an image token.
    """

    tokenizer: Any
    processor: Any
    data_config: Any
    apply_chat_template_kwargs: Any
    continuous_token_builder: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        builder = self.continuous_token_builder
        builder.build_initial_tokens = self._encode_prompt
        if self.processor is None:
            builder._render_tokens = self._render_tokens  # also of the messages with tools' outputs

    def _encode_prompt(self, messages: list[dict[str, Any]], tools: Any = None, **_: Any) -> list[int]:
        reader = self.tokenizer
        if self.processor is not None:
            reader = _build_reader(self.processor, self.data_config.max_pixels)
        return encode_prompt(PromptTokenizer(reader, tools or (), self.apply_chat_template_kwargs), messages)

    def _render_tokens(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, tools: Any = None
    ) -> list[int]:
        tokenizer = PromptTokenizer(self.tokenizer, tools or (), self.apply_chat_template_kwargs)
        cut = cut_control_tokens(messages, tokenizer)
        text = tokenizer.apply_chat_template(cut, tokenize=False, add_generation_prompt=add_generation_prompt)
        return encode_pieces(self.tokenizer, text)

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


@lru_cache(maxsize=2)
def _build_reader(processor: Any, max_pixels: int) -> MultimodalProcessor:
    """One per process, because it caches images; verl makes an agent loop per prompt."""
    return MultimodalProcessor(processor, max_pixels)


@register(AGENT_LOOPS[SINGLE_TURN])
@register(SINGLE_TURN)
class ImageFreeResponses(_SharedEncoding, SingleTurnAgentLoop):  # type: ignore[misc]
    """One turn: a response to a prompt."""


@register(AGENT_LOOPS[TOOL_TURNS])
@register(TOOL_TURNS)
class TextTools(_SharedEncoding, ToolAgentLoop):  # type: ignore[misc]
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
