"""Removal of reasoning from a text, so that a demonstration shows the answer and not the way to it."""

from __future__ import annotations

import re
from collections import Counter

_TAG = re.compile(r"<(/?)(think|thinking|thought|reasoning)\s*>", re.IGNORECASE | re.ASCII)


def remove_thinking(text: str) -> str:
    """The text without its reasoning, and without white space at its two ends.

    Reasoning stands between ``<think>`` and ``</think>``; ``thinking``, ``thought`` and ``reasoning`` are tags too, in
    any letter case. Blocks may be several, and nested; what stands between the kept parts is joined as it is. A text
    without tags is only stripped at its ends. Where tags do not match, nothing that may be reasoning is kept:

    - a closing tag without its opening one (which then stood in the generation prompt): all before it is reasoning;
    - an opening tag without its closing one (the response was cut off): all after it is reasoning. So a block that
      mentions its own opening tag loses the answer behind it, too;
    - an opening tag inside a block ends with the block.

    Time is linear in the length of the text. The official code (lasgroup/SDPO) removes well-formed ``<think>`` blocks
    only, and leaves prefilled and unclosed reasoning in the demonstration.
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
