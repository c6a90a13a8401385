from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import SDPOError
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.templates import build_teacher_messages

CONFIG = SelfDistillationConfig()
INSTRUCTION = "\n\nCorrectly solve the original question.\n"


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def rewritten(content: Any, demonstration: PrivilegedContext, config: SelfDistillationConfig = CONFIG) -> Any:
    [message] = build_teacher_messages(user(content), demonstration, config)
    assert message["role"] == "user"
    return message["content"]


def test_default_templates_give_the_official_prompt() -> None:
    assert rewritten("2+2?", PrivilegedContext("4", "5 is wrong")) == (
        "2+2?"
        "\nCorrect solution:\n\n4\n\n"
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n5 is wrong\n\n"
        "\n\nCorrectly solve the original question.\n"
    )


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_blank_text_removes_its_section(blank: str | None) -> None:
    assert rewritten("2+2?", PrivilegedContext("4", blank)) == f"2+2?\nCorrect solution:\n\n4\n\n{INSTRUCTION}"
    assert rewritten("2+2?", PrivilegedContext(blank, "no")) == (
        f"2+2?\nThe following is feedback from your unsuccessful earlier attempt:\n\nno\n\n{INSTRUCTION}"
    )
    assert rewritten("2+2?", PrivilegedContext(blank, blank)) == "2+2?"


def test_only_the_last_user_message_is_rewritten() -> None:
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?", "name": "ann"},
        {"role": "assistant", "content": "Let me use a tool."},
        {"role": "tool", "content": "4"},
    ]
    before = copy.deepcopy(prompt)
    messages = build_teacher_messages(prompt, PrivilegedContext("4"), CONFIG)
    expected = copy.deepcopy(prompt)
    expected[3]["content"] = f"2+2?\nCorrect solution:\n\n4\n\n{INSTRUCTION}"
    assert messages == expected
    assert prompt == before


def test_empty_demonstration_leaves_the_messages_unchanged() -> None:
    for prompt in (user("2+2?"), [{"role": "system", "content": "no user"}], []):
        assert build_teacher_messages(prompt, PrivilegedContext(), CONFIG) == prompt


def test_images_keep_their_positions() -> None:
    image, other = {"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}
    content = [{"type": "text", "text": "Compare"}, image, {"type": "text", "text": "and {solution}"}, other]
    section = {"type": "text", "text": f"\nCorrect solution:\n\n4\n\n{INSTRUCTION}"}
    assert rewritten(content, PrivilegedContext("4")) == [*content, section]
    config = SelfDistillationConfig(
        reprompt_template="Know {solution}; {prompt}{feedback}", solution_template="{successful_previous_attempt}"
    )
    assert rewritten(content, PrivilegedContext("4"), config) == [{"type": "text", "text": "Know 4; "}, *content]
    assert rewritten((image,), PrivilegedContext("4")) == [image, section]


def test_braces_are_text() -> None:
    texts = [
        "{x}",
        "{}",
        "{{prompt}}",
        "{solution}",
        "{feedback}",
        "{successful_previous_attempt}",
        "{0!r:>{w}}",
        r"\1\g<0>",
    ]
    for prompt in texts:
        for solution in texts:
            for feedback in texts:
                assert rewritten(prompt, PrivilegedContext(solution, feedback)) == (
                    f"{prompt}\nCorrect solution:\n\n{solution}\n\n\nThe following is feedback from your unsuccessful "
                    f"earlier attempt:\n\n{feedback}\n\n{INSTRUCTION}"
                )


def test_other_braces_of_a_template_are_unchanged() -> None:
    config = SelfDistillationConfig(
        reprompt_template="{{ {x} {prompt}|{solution}|{feedback}|{feedback} }}",
        solution_template="{feedback_raw}{prompt}{successful_previous_attempt}",
        feedback_template=r"\n{feedback_raw} {solution}",
    )
    assert rewritten("P", PrivilegedContext("S", "F"), config) == (
        r"{{ {x} P|{feedback_raw}{prompt}S|\nF {solution}|\nF {solution} }}"
    )


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(), solution=st.text(), feedback=st.text())
def test_texts_are_inserted_verbatim(prompt: str, solution: str, feedback: str) -> None:
    config = SelfDistillationConfig(
        reprompt_template="\0{feedback}\0{prompt}\0{solution}\0",
        solution_template="s{successful_previous_attempt}",
        feedback_template="f{feedback_raw}",
    )
    demonstration = PrivilegedContext(solution, feedback)
    shown = [f"f{feedback}" if feedback.strip() else "", prompt, f"s{solution}" if solution.strip() else ""]
    expected = prompt if demonstration.is_empty else "\0" + "\0".join(shown) + "\0"
    assert rewritten(prompt, demonstration, config) == expected


def test_repeated_prompt_contains_only_text() -> None:
    config = SelfDistillationConfig(reprompt_template="{prompt} {prompt}{solution}{feedback}")
    assert rewritten("Q", PrivilegedContext("4"), config) == "Q Q\nCorrect solution:\n\n4\n\n"
    with pytest.raises(SDPOError, match=r"repeats \{prompt\}"):
        rewritten([{"type": "image"}], PrivilegedContext("4"), config)


@pytest.mark.parametrize("prompt", [[], [{"role": "system", "content": "s"}], [{"role": "assistant", "content": "a"}]])
def test_no_user_message(prompt: list[dict[str, Any]]) -> None:
    with pytest.raises(SDPOError, match="no user message") as caught:
        build_teacher_messages(prompt, PrivilegedContext("4"), CONFIG)
    assert "\n" not in str(caught.value)


def test_content_of_another_kind() -> None:
    with pytest.raises(SDPOError, match="string or a list of parts, got None"):
        rewritten(None, PrivilegedContext("4"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reprompt_template", "{prompt}{solution}{feedback}"),
        ("solution_template", "{successful_previous_attempt}"),
        ("feedback_template", "{feedback_raw}"),
    ],
)
def test_every_template_changes_the_prompt(name: str, value: Any) -> None:
    demonstration = PrivilegedContext("4", "no")
    assert rewritten("Q", demonstration) != rewritten("Q", demonstration, SelfDistillationConfig(**{name: value}))
