"""Text tools of a run on verl: checked before Ray starts, and listed in the teacher's prompt as in the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.experimental.agent_loop.tool_parser import ToolParser
from verl.tools.tool_registry import load_all_tools

from sdpo.errors import ConfigError
from sdpo.prompting.tokenization import Tokenizer
from sdpo.verl_backend.config.schema import MULTI_TURN, TOOL_PATHS


def load_tool_schemas(rollout: DictConfig) -> list[dict[str, Any]]:
    """Load the tools' schemas in OpenAI's format, which verl's tool agent loop passes to the chat template.

    Raises:
        ConfigError: a file is missing or cannot be imported, or verl has no parser named ``multi_turn.format``.
    """
    turns = rollout.multi_turn
    if not turns.enable:
        return []
    if turns.format not in ToolParser._registry:
        raise ConfigError(
            f"{MULTI_TURN}.format={turns.format}: verl has no such parser of tool calls; "
            f"use one of {', '.join(ToolParser._registry)}"
        )
    try:
        tools = load_all_tools(**{name: turns[name] for name in TOOL_PATHS})
    except Exception as error:  # a user's file may raise anything
        places = ", ".join(f"{MULTI_TURN}.{name}={turns[name]}" for name in TOOL_PATHS if turns[name])
        reason = " ".join(str(error).split())
        raise ConfigError(f"{places}: the tools cannot be loaded ({type(error).__name__}: {reason:.300})") from error
    if not tools:
        raise ConfigError(f"{MULTI_TURN}: the files define no tool; decorate a function with verl's @function_tool")
    return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]


class PromptTokenizer:
    """A tokenizer that passes verl's arguments for the student's prompt to the chat template.

    Args:
        tokenizer: of the policy, or a ``MultimodalProcessor``.
        tools: their schemas; with none, the template gets no argument ``tools``.
        settings: ``data.apply_chat_template_kwargs``.
    """

    def __init__(
        self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] = (), settings: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template: Any = tokenizer.chat_template
        self.encodes_pieces = getattr(tokenizer, "encodes_pieces", False)
        self._settings: dict[str, Any] = {**(settings or {}), **({"tools": list(tools)} if tools else {})}

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        return self.tokenizer(text=text, **kwargs)

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        return self.tokenizer.decode(token_ids, **kwargs)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        return self.tokenizer.apply_chat_template(conversation, **{**self._settings, **kwargs})


def read_chat_settings(data: DictConfig) -> dict[str, Any]:
    """Return ``data.apply_chat_template_kwargs``, such as ``enable_thinking``."""
    settings: Any = OmegaConf.to_container(OmegaConf.create(data.get("apply_chat_template_kwargs") or {}), resolve=True)
    return settings
