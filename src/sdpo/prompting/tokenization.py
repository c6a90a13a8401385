"""Token ids of the student's and the teacher's prompt; the teacher's is trimmed to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import DataError
from sdpo.prompting.demonstrations import PrivilegedContext, is_blank
from sdpo.prompting.templates import Message, build_teacher_messages


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers.

    Anything that has these will do. For messages with images, one whose ``apply_chat_template`` writes as many tokens
    for an image as the model makes features of it: ``MultimodalProcessor`` in ``models/multimodal/processor.py``.
    """

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class TeacherPrompt:
    """One sample's teacher prompt.

    Attributes:
        token_ids: the prompt with the generation header, or None if the sample is not distilled: there is nothing to
            show, or it does not fit.
        messages: the messages that the ids encode; the student's where there are no ids.
        truncated: whether the texts shown had to be cut; to nothing, if there are no ids.
    """

    token_ids: list[int] | None
    messages: list[Message]
    truncated: bool

    @property
    def overlong(self) -> bool:
        """Whether there was something to show, but no room for any of it."""
        return self.token_ids is None and self.truncated


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages by the tokenizer's chat template, with the header that starts the model's answer.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "model.path: its tokenizer has no chat template; use an instruction-tuned model, or put a "
            "chat_template.jinja beside the tokenizer's files"
        )
    return _token_ids(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def encode_teacher_prompt(
    tokenizer: Tokenizer,
    prompt_messages: Sequence[Message],
    demonstration: PrivilegedContext,
    config: SelfDistillationConfig,
    *,
    max_length: int | None = None,
) -> TeacherPrompt:
    """Token ids of the teacher's prompt, in at most ``max_reprompt_len`` tokens and at most ``max_length``.

    ``max_length`` is the model's window minus the response. The caller appends the ids of the student's response
    unchanged: decoded and tokenised again, they could come out as other tokens than the student sampled.

    A prompt that is too long loses the ends of the demonstration and of the feedback, and nothing else: question,
    instruction, other messages and generation header stay whole. The two texts share the room equally; what a short
    one does not need goes to the other. If even their first tokens do not fit together, the feedback is left out. If
    the solution's (or the only text's) first token does not fit either, the sample has no teacher prompt. A cut text
    is always a verbatim beginning of the original; every result is measured whole, after the cut. It may stay a few
    tokens below the limit, and takes a few encodings.

    The official code (lasgroup/SDPO) truncates the encoded prompt as a whole instead, which loses the instruction and
    the generation header.

    Raises:
        DataError: as ``build_teacher_messages`` and ``encode_prompt`` do.
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

    def cut(num_kept: int) -> tuple[PrivilegedContext, list[Message]]:
        num_solution, num_feedback = _share(num_kept, len(solution_ids), len(feedback_ids))
        shown = PrivilegedContext(
            _head(tokenizer, demonstration.solution, solution_ids, num_solution),
            _head(tokenizer, demonstration.feedback, feedback_ids, num_feedback),
        )
        return shown, build_teacher_messages(prompt_messages, shown, config)

    least = bool(solution_ids) + bool(feedback_ids)
    shown, messages = cut(least)
    shortest = len(encode_prompt(tokenizer, messages))
    if shortest > limit:
        return None
    num_kept, margin = len(solution_ids) + len(feedback_ids), 0
    while len(token_ids) > limit:
        # Interpolated, because a template may show a text twice, and a text's tokens alone and in its place differ by
        # a few. The margin's doubling bounds the number of encodings by a logarithm, whatever the tokenizer.
        room = (num_kept - least) * (limit - shortest) // (len(token_ids) - shortest)
        num_kept = least + max(0, room - margin)
        margin = 2 * margin or 1
        shown, messages = cut(num_kept)
        token_ids = encode_prompt(tokenizer, messages)
    return None if shown.is_empty else TeacherPrompt(token_ids, messages, truncated=True)


def _share(num_kept: int, num_first: int, num_second: int) -> tuple[int, int]:
    """Equal shares of ``num_kept`` tokens; what a short text does not need goes to the other."""
    kept_first = min(num_first, max(num_kept - num_second, (num_kept + 1) // 2))
    return kept_first, num_kept - kept_first


def _head(tokenizer: Tokenizer, text: str | None, token_ids: Sequence[int], num_tokens: int) -> str | None:
    """About the first ``num_tokens`` tokens of a text, as a verbatim beginning of it."""
    if text is None or num_tokens >= len(token_ids):
        return text
    decoded = tokenizer.decode(token_ids[:num_tokens], clean_up_tokenization_spaces=False)
    # Half a character decodes to U+FFFD. Only the length is taken, since decoding may not give back the same text.
    return text[: len(decoded.rstrip("\ufffd"))]


def _encode_text(tokenizer: Tokenizer, text: str | None) -> list[int]:
    return [] if text is None or is_blank(text) else _token_ids(tokenizer(text=text, add_special_tokens=False))


def _token_ids(encoding: Any) -> list[int]:
    # Tokenizers return ids or a mapping by version, and processors a batch of one.
    token_ids = encoding["input_ids"] if isinstance(encoding, Mapping) else encoding
    return list(token_ids[0] if token_ids and isinstance(token_ids[0], Sequence) else token_ids)
