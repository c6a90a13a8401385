"""Remove reasoning from a text, so that a demonstration contains the answer without the derivation."""

from __future__ import annotations

import re
from collections import Counter

_TAG = re.compile(r"<(/?)(think|thinking|thought|reasoning)\s*>", re.IGNORECASE | re.ASCII)


def remove_thinking(text: str) -> str:
    """Remove the reasoning from a text, and white space at both ends.

    Reasoning is the text between ``<think>`` and ``</think>``, or between tags ``thinking``, ``thought`` or
    ``reasoning``, in any letter case. A text may have several blocks, and nested blocks; the remaining parts are joined
    without a separator. If tags do not match, all text that may be reasoning is removed:

    - a closing tag without an opening tag (which was in the generation prompt): all text before it is reasoning;
    - an opening tag without a closing tag (the response was truncated): all text after it is reasoning. So if a block
      mentions its own opening tag, the answer after it is removed too;
    - an unclosed opening tag inside a block ends with the block.

    Time is linear in the length of the text. The official code (lasgroup/SDPO) removes only well-formed ``<think>``
    blocks, and leaves prefilled and unclosed reasoning in the demonstration.
    """
    kept: list[str] = []
    open_tags: list[str] = []
    num_open: Counter[str] = Counter()  # a search through open_tags would make deep nesting quadratic
    position = 0
    for tag in _TAG.finditer(text):
        name = tag.group(2).lower()
        if not tag.group(1):
            if not open_tags:
                kept.append(text[position : tag.start()])
            open_tags.append(name)
            num_open[name] += 1
        elif num_open[name]:
            closed = None
            while closed != name:
                closed = open_tags.pop()
                num_open[closed] -= 1
        else:
            kept.clear()
        position = tag.end()
    if not open_tags:
        kept.append(text[position:])
    return "".join(kept).strip()
