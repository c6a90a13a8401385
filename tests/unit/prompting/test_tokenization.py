from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import SDPOError
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.tokenization import TeacherPrompt, encode_prompt, encode_teacher_prompt

SYSTEM = "Be brief."
SOLUTION_HEADING = "\nCorrect solution:\n\n"
FEEDBACK_HEADING = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
ENDING = "\n\nCorrectly solve the original question.\n<|im_end|>\n<|im_start|>assistant\n"

texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=120)
words = st.lists(st.sampled_from(["the ", "answer ", "is ", "sum", "\n", "数学", "👩‍🔬", "é", "55 "]), max_size=60).map(
    "".join
)


def chat(question: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def beginning(question: str) -> str:
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}"


def encode(
    tokenizer: Any, demonstration: PrivilegedContext, limit: int, question: str = "What is 2+2?", **kwargs: Any
) -> TeacherPrompt:
    config = SelfDistillationConfig(max_reprompt_len=limit)
    return encode_teacher_prompt(tokenizer, chat(question), demonstration, config, **kwargs)


def num_tokens(prompt: TeacherPrompt) -> int:
    assert prompt.token_ids is not None
    return len(prompt.token_ids)


def shown_texts(tokenizer: Any, prompt: TeacherPrompt, question: str = "What is 2+2?") -> tuple[str, str]:
    """Extract solution and feedback from the encoded prompt, and check the text around them."""
    assert prompt.token_ids is not None
    text = tokenizer.decode(prompt.token_ids)
    assert text.startswith(beginning(question))
    assert text.endswith(ENDING)
    middle = text[len(beginning(question)) : len(text) - len(ENDING)]
    solution, _, feedback = middle.partition(FEEDBACK_HEADING)
    if solution:
        assert solution.startswith(SOLUTION_HEADING) and solution.endswith("\n\n")
        solution = solution[len(SOLUTION_HEADING) : -2]
    if feedback:
        assert feedback.endswith("\n\n")
        feedback = feedback[:-2]
    return solution, feedback


class Counting:
    """Count the prompts that a tokenizer encodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.num_prompts = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        self.num_prompts += 1
        return self.tokenizer.apply_chat_template(*args, **kwargs)


def test_encode_prompt_has_the_generation_header(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(tokenizer, chat("What is 2+2?"))
    assert tokenizer.decode(ids) == beginning("What is 2+2?") + "<|im_end|>\n<|im_start|>assistant\n"
    assert all(type(i) is int for i in ids)


def test_encode_prompt_accepts_every_form_of_ids() -> None:
    class Returning:
        chat_template = "a template"

        def __init__(self, value: Any) -> None:
            self.value = value

        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            return self.value

        def __call__(self, *_: Any, **__: Any) -> Mapping[str, Any]:
            raise NotImplementedError

        def decode(self, *_: Any, **__: Any) -> str:
            raise NotImplementedError

    for value in ([1, 2], [[1, 2]], {"input_ids": [1, 2]}, {"input_ids": [[1, 2]]}):
        assert encode_prompt(Returning(value), []) == [1, 2]
    assert encode_prompt(Returning([]), []) == []


def test_tokenizer_without_a_chat_template(tokenizer_without_chat_template: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SDPOError, match=r"no chat template; use .* or put a chat_template\.jinja") as caught:
        encode_prompt(tokenizer_without_chat_template, chat("Q"))
    assert "\n" not in str(caught.value)


def test_prompt_within_the_limit_is_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    counting = Counting(tokenizer)
    prompt = encode(counting, PrivilegedContext("It is 4.", "5 is wrong."), 10_000)
    assert tokenizer.decode(prompt.token_ids) == (
        beginning("What is 2+2?") + f"{SOLUTION_HEADING}It is 4.\n\n{FEEDBACK_HEADING}5 is wrong.\n\n" + ENDING
    )
    assert (prompt.truncated, prompt.overlong, counting.num_prompts) == (False, False, 1)
    assert prompt.token_ids == encode_prompt(tokenizer, prompt.messages)


def test_empty_context_is_not_encoded(tokenizer_without_chat_template: PreTrainedTokenizerFast) -> None:
    prompt = encode(tokenizer_without_chat_template, PrivilegedContext(" ", None), 10)
    assert prompt == TeacherPrompt(None, chat("What is 2+2?"), truncated=False)
    assert not prompt.overlong


def test_truncated_prompt_has_exactly_the_maximum_length(tokenizer: PreTrainedTokenizerFast) -> None:
    demonstration = PrivilegedContext("It is 4.", "5 is wrong.")
    whole = encode(tokenizer, demonstration, 10_000)
    length = num_tokens(whole)
    assert encode(tokenizer, demonstration, length) == whole
    shorter = encode(tokenizer, demonstration, length - 1)
    assert shorter.truncated and num_tokens(shorter) < length


def test_smaller_limit_applies(tokenizer: PreTrainedTokenizerFast) -> None:
    demonstration = PrivilegedContext("7" * 400)
    for limit, max_length, expected in ((200, None, 200), (200, 300, 200), (300, 200, 200), (300, 300, 300)):
        assert num_tokens(encode(tokenizer, demonstration, limit, max_length=max_length)) == expected
    assert encode(tokenizer, demonstration, 300, max_length=-5).overlong


def test_only_the_end_of_the_demonstration_is_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    solution = " ".join(str(i) for i in range(1000))
    prompt = encode(tokenizer, PrivilegedContext(solution), 200)
    shown, _ = shown_texts(tokenizer, prompt)
    assert prompt.truncated and not prompt.overlong
    assert solution.startswith(shown) and len(shown) > 100
    assert 195 <= num_tokens(prompt) <= 200
    assert prompt.token_ids == encode_prompt(tokenizer, prompt.messages)


def test_earlier_turns_and_images_are_never_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "A long question. " * 10},
        {"role": "assistant", "content": "A long answer. " * 10},
        {"role": "user", "content": content},
    ]
    config = SelfDistillationConfig(max_reprompt_len=350)
    prompt = encode_teacher_prompt(tokenizer, messages, PrivilegedContext("4" * 1000), config)
    text = tokenizer.decode(prompt.token_ids)
    assert text.startswith(
        f"<|im_start|>user\n{messages[0]['content']}<|im_end|>\n"
        f"<|im_start|>assistant\n{messages[1]['content']}<|im_end|>\n"
        f"<|im_start|>user\n<|image|>What is shown?{SOLUTION_HEADING}44"
    )
    assert text.endswith("44\n\n" + ENDING)
    assert prompt.messages[:2] == messages[:2] and prompt.messages[2]["content"][:2] == content
    assert num_tokens(prompt) == 350


def test_text_that_appears_twice_is_truncated_no_more_than_needed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = SelfDistillationConfig(max_reprompt_len=600, reprompt_template="{solution}{prompt}{solution}{feedback}")
    prompt = encode_teacher_prompt(tokenizer, chat("What is 2+2?"), PrivilegedContext("7" * 1000), config)
    text = tokenizer.decode(prompt.token_ids)
    assert 595 <= num_tokens(prompt) <= 600
    assert text.count(SOLUTION_HEADING) == 2 and text.count("7") % 2 == 0


@pytest.mark.parametrize(
    ("num_solution", "num_feedback", "room", "expected"),
    [
        (300, 300, 100, (50, 50)),
        (300, 20, 100, (80, 20)),
        (20, 300, 100, (20, 80)),
        (300, 60, 100, (50, 50)),
        (300, 300, 101, (51, 50)),
        (300, 300, 2, (1, 1)),
    ],
)
def test_solution_and_feedback_share_the_space(
    tokenizer: PreTrainedTokenizerFast, num_solution: int, num_feedback: int, room: int, expected: tuple[int, int]
) -> None:
    # digits are a token each, since no merge contains them
    frame = num_tokens(encode(tokenizer, PrivilegedContext("7", "8"), 10_000)) - 2
    prompt = encode(tokenizer, PrivilegedContext("7" * num_solution, "8" * num_feedback), frame + room)
    solution, feedback = shown_texts(tokenizer, prompt)
    assert (solution, feedback) == ("7" * expected[0], "8" * expected[1])
    assert num_tokens(prompt) == frame + room


def test_feedback_is_dropped_without_space_for_both(tokenizer: PreTrainedTokenizerFast) -> None:
    both = num_tokens(encode(tokenizer, PrivilegedContext("7", "8"), 10_000))
    one = num_tokens(encode(tokenizer, PrivilegedContext("7"), 10_000))
    prompt = encode(tokenizer, PrivilegedContext("7" * 500, "8" * 500), both - 1)
    assert shown_texts(tokenizer, prompt) == ("7" * (both - one), "")
    assert prompt.truncated
    # the solution is complete, the feedback is dropped
    prompt = encode(tokenizer, PrivilegedContext("7", "8" * 500), both - 1)
    assert shown_texts(tokenizer, prompt) == ("7", "")
    assert prompt.truncated


def test_prompt_is_overlong_if_no_token_of_the_demonstration_fits(tokenizer: PreTrainedTokenizerFast) -> None:
    one = num_tokens(encode(tokenizer, PrivilegedContext("7"), 10_000))
    assert shown_texts(tokenizer, encode(tokenizer, PrivilegedContext("7" * 50, "8" * 50), one)) == ("7", "")
    for demonstration in (PrivilegedContext("7" * 50, "8" * 50), PrivilegedContext("7" * 50), PrivilegedContext("7")):
        for limit in (one - 1, 1):
            prompt = encode(tokenizer, demonstration, limit)
            assert prompt == TeacherPrompt(None, chat("What is 2+2?"), truncated=True)
            assert prompt.overlong
    # a solution truncated to white space is no demonstration
    assert encode(tokenizer, PrivilegedContext(" \n" * 50 + "7" * 50), one + 10).overlong


@settings(max_examples=100, deadline=None)
@given(question=texts, solution=texts | words, feedback=texts | words, limit=st.integers(1, 320))
def test_truncation_removes_only_the_ends_of_the_texts(
    tokenizer: PreTrainedTokenizerFast, question: str, solution: str, feedback: str, limit: int
) -> None:
    counting = Counting(tokenizer)
    demonstration = PrivilegedContext(solution, feedback)
    prompt = encode(counting, demonstration, limit, question)
    assert counting.num_prompts <= 12
    if prompt.token_ids is None:
        assert prompt.messages == chat(question)
        assert prompt.overlong is not demonstration.is_empty
        return
    assert num_tokens(prompt) <= limit
    shown_solution, shown_feedback = shown_texts(tokenizer, prompt, question)
    assert solution.startswith(shown_solution) and feedback.startswith(shown_feedback)
    assert shown_solution.strip() or shown_feedback.strip()
    whole = PrivilegedContext(shown_solution, shown_feedback) == PrivilegedContext(
        solution if solution.strip() else "", feedback if feedback.strip() else ""
    )
    assert prompt.truncated is not whole


@settings(max_examples=60, deadline=None)
@given(solution=st.text(alphabet="é数👩🔬a ", min_size=200, max_size=300), limit=st.integers(100, 250))
def test_no_character_is_split(tokenizer: PreTrainedTokenizerFast, solution: str, limit: int) -> None:
    prompt = encode(tokenizer, PrivilegedContext("x" + solution), limit)
    shown, _ = shown_texts(tokenizer, prompt)
    assert "\ufffd" not in tokenizer.decode(prompt.token_ids)
    assert ("x" + solution).startswith(shown)
    # a character has at most four bytes; more if the text merges differently inside the prompt
    assert prompt.truncated and limit - num_tokens(prompt) <= 12


@pytest.mark.parametrize("limit", [200, 201, 202, 203])
def test_partial_character_is_removed(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    counting = Counting(tokenizer)
    prompt = encode(counting, PrivilegedContext("x" + "👩" * 200), limit)
    assert 0 <= limit - num_tokens(prompt) < 4  # a token per byte
    assert counting.num_prompts == 3


def test_replacement_character_of_the_text_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    solution = "a\ufffdb" + "7" * 500
    shown, _ = shown_texts(tokenizer, encode(tokenizer, PrivilegedContext(solution), 200))
    assert shown.startswith("a\ufffdb77")


class Unaccountable:
    """A tokenizer of one token per character, with prompt lengths given by a function of the shown characters."""

    chat_template = "a template"

    def __init__(self, length: Callable[[int], int]) -> None:
        self.length, self.num_prompts = length, 0

    def apply_chat_template(self, conversation: Any, **_: Any) -> list[int]:
        self.num_prompts += 1
        return [0] * self.length(conversation[-1]["content"].count("7"))

    def __call__(self, text: str, **_: Any) -> Mapping[str, Any]:
        return {"input_ids": list(range(len(text)))}

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "7" * len(token_ids)


@pytest.mark.parametrize("tokens_per_character", [1, 2, 7, 50])
def test_few_encodings_for_characters_of_many_tokens(tokens_per_character: int) -> None:
    tokenizer = Unaccountable(lambda shown: 10 + tokens_per_character * shown)
    prompt = encode(tokenizer, PrivilegedContext("7" * 10_000, "7" * 10_000), 5_000)
    assert 5_000 - 10 * tokens_per_character <= num_tokens(prompt) <= 5_000
    assert tokenizer.num_prompts <= 8


@pytest.mark.parametrize("num_fitting", [2, 3, 100])
def test_logarithmic_number_of_encodings_for_non_monotonic_lengths(num_fitting: int) -> None:
    tokenizer = Unaccountable(lambda shown: 5_001 if shown > num_fitting else 10)
    prompt = encode(tokenizer, PrivilegedContext("7" * 10_000, "7" * 10_000), 5_000)
    assert num_tokens(prompt) == 10
    assert 2 <= prompt.messages[-1]["content"].count("7") <= num_fitting
    assert tokenizer.num_prompts <= 20


def test_few_encodings_if_nothing_fits() -> None:
    tokenizer = Unaccountable(lambda shown: 5_001)
    assert encode(tokenizer, PrivilegedContext("7" * 10_000, "7" * 10_000), 5_000).overlong
    assert tokenizer.num_prompts == 4
