"""Encode the student's and the teacher's prompts; the teacher's is truncated to a maximum length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import DataError
from sdpo.prompting.control_tokens import cut_control_tokens, encode_pieces, get_tokenizer
from sdpo.prompting.demonstrations import PrivilegedContext, is_blank
from sdpo.prompting.run_date import template_settings
from sdpo.prompting.templates import Message, build_teacher_messages


class Tokenizer(Protocol):
    """The interface of a transformers tokenizer that this module uses.

    For messages with images, ``apply_chat_template`` must return one token per image feature of the model, as
    ``MultimodalProcessor`` in ``models/multimodal/processor.py`` does.
    """

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class TeacherPrompt:
    """A sample's teacher prompt.

    Attributes:
        token_ids: the prompt with the generation header; None if the sample is not distilled, because its demonstration
            is empty or does not fit.
        messages: the encoded messages; the student's if ``token_ids`` is None.
        truncated: whether the demonstration or the feedback was truncated, or left out for lack of room.
    """

    token_ids: list[int] | None
    messages: list[Message]
    truncated: bool

    @property
    def overlong(self) -> bool:
        """Whether a demonstration exists, but no part of it fits."""
        return self.token_ids is None and self.truncated


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Encode messages with the tokenizer's chat template, with the header that starts the model's answer.

    A last message of the assistant is the beginning of the answer, which the model continues. Control tokens that a
    content spells are ordinary text.

    Raises:
        DataError: the tokenizer has no chat template, or the last message is a tool call.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "model.path: its tokenizer has no chat template; use an instruction-tuned model, or put a "
            "chat_template.jinja into its folder"
        )
    messages = list(messages)
    settings: dict[str, Any] = {"add_generation_prompt": True, **template_settings(tokenizer.chat_template)}
    if messages and messages[-1]["role"] == "assistant":
        if messages[-1].get("tool_calls") or not isinstance(messages[-1]["content"], str):
            raise DataError("prompt: a last message of the assistant must be text; after a tool call, add its answer")
        if is_blank(messages[-1]["content"]):
            messages.pop()
        else:
            settings |= {"add_generation_prompt": False, "continue_final_message": True}
    cut = cut_control_tokens(messages, tokenizer)
    if cut == messages or getattr(tokenizer, "encodes_pieces", False):
        return _token_ids(tokenizer.apply_chat_template(cut, tokenize=True, return_dict=False, **settings))
    return encode_pieces(get_tokenizer(tokenizer), tokenizer.apply_chat_template(cut, tokenize=False, **settings))


def encode_teacher_prompt(
    tokenizer: Tokenizer,
    prompt_messages: Sequence[Message],
    demonstration: PrivilegedContext,
    config: SelfDistillationConfig,
    *,
    max_length: int | None = None,
) -> TeacherPrompt:
    """Encode the teacher's prompt in at most ``max_reprompt_len`` and at most ``max_length`` tokens.

    The caller appends the token ids of the student's response unchanged, since decoding and encoding the response again
    could give other tokens than the student sampled.

    If a prompt is too long, only the demonstration and the feedback are truncated, at their ends; question,
    instruction, other messages and generation header stay complete. Both texts get equal room, and a short text's
    unused room goes to the other text. If not even the first token of both fits, the feedback is left out. If the first
    token of the solution, or of the only text, does not fit either, the sample has no teacher prompt. A truncated text
    is a verbatim prefix of the original. The result may be a few tokens shorter than the limit.

    The official code (lasgroup/SDPO) truncates the encoded prompt instead, which loses the instruction and the
    generation header.

    Args:
        max_length: the model's window minus the response; None for no limit.

    Raises:
        DataError: from ``build_teacher_messages`` or ``encode_prompt``.
    """
    if demonstration.is_empty:
        return TeacherPrompt(None, list(prompt_messages), truncated=False)
    limit = config.max_reprompt_len if max_length is None else min(config.max_reprompt_len, max_length)
    fitted = _fit(tokenizer, prompt_messages, demonstration, config, limit)
    if fitted is None and not is_blank(demonstration.solution) and not is_blank(demonstration.feedback):
        fitted = _fit(tokenizer, prompt_messages, replace(demonstration, feedback=None), config, limit)
        fitted = fitted and replace(fitted, truncated=True)
    return fitted or TeacherPrompt(None, list(prompt_messages), truncated=True)


def _fit(
    tokenizer: Tokenizer,
    prompt_messages: Sequence[Message],
    demonstration: PrivilegedContext,
    config: SelfDistillationConfig,
    limit: int,
) -> TeacherPrompt | None:
    messages = build_teacher_messages(prompt_messages, demonstration, config)
    token_ids = encode_prompt(tokenizer, messages)
    if len(token_ids) <= limit:
        return TeacherPrompt(token_ids, messages, truncated=False)

    solution_ids = _encode_text(tokenizer, demonstration.solution)
    feedback_ids = _encode_text(tokenizer, demonstration.feedback)

    def truncate(num_kept: int) -> tuple[PrivilegedContext, list[Message]]:
        num_solution, num_feedback = _split_room(num_kept, len(solution_ids), len(feedback_ids))
        shown = PrivilegedContext(
            _head(tokenizer, demonstration.solution, solution_ids, num_solution),
            _head(tokenizer, demonstration.feedback, feedback_ids, num_feedback),
        )
        return shown, build_teacher_messages(prompt_messages, shown, config)

    minimum = bool(solution_ids) + bool(feedback_ids)
    shown, messages = truncate(minimum)
    shortest = len(encode_prompt(tokenizer, messages))
    if shortest > limit:
        return None
    num_kept, margin = len(solution_ids) + len(feedback_ids), 0
    while len(token_ids) > limit:
        # Interpolate: a template may contain a text twice, and a text has slightly other tokens inside the prompt.
        # Doubling the margin bounds the number of encodings by a logarithm for every tokenizer.
        room = (num_kept - minimum) * (limit - shortest) // (len(token_ids) - shortest)
        num_kept = minimum + max(0, room - margin)
        margin = 2 * margin or 1
        shown, messages = truncate(num_kept)
        token_ids = encode_prompt(tokenizer, messages)
    return None if shown.is_empty else TeacherPrompt(token_ids, messages, truncated=True)


def _split_room(num_kept: int, num_first: int, num_second: int) -> tuple[int, int]:
    """Split ``num_kept`` tokens equally; the unused part of a short text goes to the other text."""
    kept_first = min(num_first, max(num_kept - num_second, (num_kept + 1) // 2))
    return kept_first, num_kept - kept_first


def _head(tokenizer: Tokenizer, text: str | None, token_ids: Sequence[int], num_tokens: int) -> str | None:
    """The verbatim prefix of a text of about ``num_tokens`` tokens."""
    if text is None or num_tokens >= len(token_ids):
        return text
    decoded = tokenizer.decode(token_ids[:num_tokens], clean_up_tokenization_spaces=False)
    # Half a character decodes to U+FFFD. Only the length is used, since decoding may not return the same text.
    return text[: len(decoded.rstrip("\ufffd"))]


def _encode_text(tokenizer: Tokenizer, text: str | None) -> list[int]:
    return [] if text is None or is_blank(text) else _token_ids(tokenizer(text=text, add_special_tokens=False))


def _token_ids(encoding: Any) -> list[int]:
    # Depending on the version, tokenizers return ids or a mapping; processors return a batch of one.
    token_ids = encoding["input_ids"] if isinstance(encoding, Mapping) else encoding
    return list(token_ids[0] if token_ids and isinstance(token_ids[0], Sequence) else token_ids)
