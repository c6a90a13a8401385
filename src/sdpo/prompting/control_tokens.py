"""Text that spells a control token, in a message's content, stays text.

Otherwise ``<|im_end|>`` in a data row, a peer's response or feedback would end the turn in which it stands, and an
image token would stand for an image that does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

# Cuts a control token in two. A noncharacter of Unicode, which no text contains.
CUT = "\ufdd0"
# Values of these keys are names that a template compares, and encoded images.
_UNTOUCHED = ("type", "image")
_EXAMPLE = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]


def cut_control_tokens(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Insert ``CUT`` after the first character of each control token in the texts of messages.

    A template renders the messages as before. ``encode_pieces`` then encodes what is between the cuts.
    """
    pattern = _find_pattern(get_tokenizer(tokenizer))
    if pattern is None:
        return [dict(message) for message in messages]

    def cut(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0] + CUT, value)
        if isinstance(value, Mapping):
            return {key: inner if key in _UNTOUCHED else cut(inner) for key, inner in value.items()}
        return [cut(each) for each in value] if isinstance(value, (list, tuple)) else value

    return [cut(message) for message in messages]


def encode_pieces(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a rendered prompt, piece by piece between its cuts; without a cut, of the whole text."""
    token_ids: list[int] = []
    for number, piece in enumerate(text.split(CUT)):
        encoding = tokenizer(piece, add_special_tokens=add_special_tokens and number == 0)
        token_ids.extend(encoding["input_ids"] if piece else ())
    return token_ids


def get_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer in wrappers around it, such as a processor."""
    while hasattr(tokenizer, "tokenizer"):
        tokenizer = tokenizer.tokenizer
    return tokenizer


@lru_cache(maxsize=16)
def _find_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches the first character of every control token: the special ones, and all that the chat template writes.

    Others, such as Qwen3's ``<think>`` and ``<tool_call>``, are ordinary content.
    """
    added = [token for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.content]
    if not added:
        return None
    try:
        rendered = tokenizer.apply_chat_template(_EXAMPLE, tokenize=False)
    except Exception:  # no template, or one that accepts other conversations only
        rendered = ""
    texts = {token.content for token in added if token.special or token.content in rendered}
    if not texts:
        return None
    return re.compile(f"(?={'|'.join(map(re.escape, sorted(texts)))}).", re.DOTALL)
