from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo.prompting.reasoning import remove_thinking

TAGS = ["think", "thinking", "thought", "reasoning", "THINK", "Reasoning"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>b", "b"),
        ("<think>\na\n</think>\n\nThe answer is 4.\n", "The answer is 4."),
        ("b <think>a</think> c", "b  c"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<think>a<reasoning>b</reasoning>c</think>d", "d"),
        ("<think>a</thinking>b</think>c", "c"),  # one tag does not close another
        ("<think>a<reasoning>b</think>c", "c"),  # an unclosed inner block ends with the outer one
        ("<think >a</think\n>b", "b"),
        ("<think></think>", ""),
        ("", ""),
    ],
)
def test_blocks_are_removed(text: str, expected: str) -> None:
    assert remove_thinking(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a</think>b", "b"),
        ("a</think>b</think>c", "c"),
        ("a<think>b</think>c</think>d", "d"),  # a block inside prefilled reasoning
        ("a</think>b<think>c</think>d", "bd"),
        ("a</think>", ""),
        ("</THINKING>b", "b"),
    ],
)
def test_prefilled_opening_tag_removes_everything_up_to_the_last_such_closing_tag(text: str, expected: str) -> None:
    assert remove_thinking(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<think>b", "a"),
        ("<think>b", ""),
        ("<think>a</think>b<think>c", "b"),
        ("<think>a<think>b</think>c", ""),  # the outer block is still open: c may be reasoning
        ("a<reasoning>b</think>c", ""),  # prefilled, and an unclosed mention of another tag: never a leak
    ],
)
def test_unclosed_opening_tag_removes_everything_after_it(text: str, expected: str) -> None:
    assert remove_thinking(text) == expected


@pytest.mark.parametrize("tag", TAGS)
def test_tags_are_case_insensitive(tag: str) -> None:
    assert remove_thinking(f"x <{tag}>a</{tag.lower()}> y") == "x  y"
    assert remove_thinking(f"a</{tag}>b") == "b"
    assert remove_thinking(f"a<{tag}>b") == "a"


@pytest.mark.parametrize("text", ["a < b", "<thinker>a</thinker>", "<b>think</b>", "< think>", "<think", "think>"])
def test_other_text_is_unchanged(text: str) -> None:
    assert remove_thinking(f"  {text}\n") == text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="<")))
def test_text_without_tags_is_only_stripped(text: str) -> None:
    assert remove_thinking(text) == text.strip()


def _reference(pieces: list[str]) -> str:
    """Reference in quadratic time: remove text in a block, after an unclosed tag or before a stray closing tag."""
    open_tags: list[tuple[str, int]] = []
    removed: set[int] = set()
    for i, piece in enumerate(pieces):
        name = piece.strip("</>").lower()
        if piece.startswith("</") and name in [tag for tag, _ in open_tags]:
            while open_tags[-1][0] != name:
                open_tags.pop()
            removed.update(range(open_tags.pop()[1], i + 1))
        elif piece.startswith("</"):
            removed.update(range(i + 1))
        elif piece.startswith("<"):
            open_tags.append((name, i))
    for _, start in open_tags:
        removed.update(range(start, len(pieces)))
    return "".join(piece for i, piece in enumerate(pieces) if i not in removed)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["text", *(f"<{t}>" for t in TAGS), *(f"</{t}>" for t in TAGS)]), max_size=12))
def test_random_sequences_of_tags(pieces: list[str]) -> None:
    pieces = [str(i) if piece == "text" else piece for i, piece in enumerate(pieces)]
    assert remove_thinking("".join(pieces)) == _reference(pieces)


def test_adversarial_tags_take_linear_time() -> None:
    n = 1 << 17
    assert remove_thinking("<think>" * n) == ""
    assert remove_thinking("<think>" * n + "</think>" * n + "b") == "b"
    assert remove_thinking("<think>" * n + "</reasoning>" * n) == ""
    assert remove_thinking("</think>" * n + "b") == "b"
    assert remove_thinking("x<think>a</think>" * n) == "x" * n
    assert remove_thinking("<think" + " " * 8 * n) == "<think"
    assert remove_thinking("<" * 8 * n) == "<" * 8 * n
