"""Build the teacher's messages: the student's prompt with the demonstration and the feedback inserted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import DataError
from sdpo.prompting.demonstrations import PrivilegedContext, is_blank

Message: TypeAlias = dict[str, Any]
"""``role`` and ``content``; the content is a string, or a list of parts such as ``{"type": "text", "text": ...}`` and
``{"type": "image", ...}``."""


def build_teacher_messages(
    prompt: Sequence[Message], demonstration: PrivilegedContext, config: SelfDistillationConfig
) -> list[Message]:
    """Build the messages of the teacher's prompt.

    The last user message is replaced by ``reprompt_template``, in which ``{prompt}`` is the message's original content;
    all other messages stay the same. Content in parts stays in parts: the template's text before ``{prompt}``, the
    original parts in order, images included, and the text after. A section is left out if its solution or feedback is
    missing or blank. An empty demonstration leaves the messages unchanged.

    Placeholders are replaced in a single pass over the template, so braces in a prompt, a solution or feedback have no
    meaning. Other braces of a template have none either (``{{`` is two braces).

    The arguments are not modified. The messages equal those of the official code (lasgroup/SDPO), except that it keeps
    no other messages than system messages, formats with ``str.format`` and rejects content in parts.

    Raises:
        DataError: there is no user message, or its content is neither a string nor a list, or the template repeats
            ``{prompt}`` for content in parts, whose images must not be repeated.
    """
    messages = list(prompt)
    if demonstration.is_empty:
        return messages
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last_user is None:
        raise DataError(
            "prompt: has no user message that could contain the teacher's demonstration; add one with role 'user'"
        )
    content = _rewrite(messages[last_user]["content"], demonstration, config)
    messages[last_user] = {**messages[last_user], "content": content}
    return messages


def _rewrite(content: Any, demonstration: PrivilegedContext, config: SelfDistillationConfig) -> str | list[Any]:
    sections = {
        "solution": _section(config.solution_template, "successful_previous_attempt", demonstration.solution),
        "feedback": _section(config.feedback_template, "feedback_raw", demonstration.feedback),
    }
    texts = [_substitute(text, sections) for text in config.reprompt_template.split("{prompt}")]
    if isinstance(content, str):
        return content.join(texts)
    if not isinstance(content, (list, tuple)):
        raise DataError(f"prompt: a message's content must be a string or a list of parts, got {content!r}")
    if len(texts) > 2:
        raise DataError(
            "self_distillation.reprompt_template repeats {prompt}, which would repeat the images of a prompt; keep one"
        )
    before, after = ([{"type": "text", "text": text}] if text else [] for text in texts)
    return [*before, *content, *after]


def _section(template: str, placeholder: str, text: str | None) -> str:
    return "" if text is None or is_blank(text) else _substitute(template, {placeholder: text})


def _substitute(template: str, values: Mapping[str, str]) -> str:
    # One pass: a value that contains another placeholder is inserted unchanged.
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match.group(1)], template)
