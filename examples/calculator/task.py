"""A toy task with a tool, on verl: multiply two numbers, which the model cannot do without a calculator.

The tiny model is pretrained to call the calculator in 10 % of its responses and to guess in the others, to answer with
the tool's output, and to imitate a solution in its context. If one of the n responses to a prompt calls the calculator
and is right, it becomes the demonstration for the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.observability.progress import ProgressCallback
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.tokenization import encode_prompt, encode_teacher_prompt
from sdpo.rewards.base import RewardOutput, Row
from sdpo.rewards.toy import base
from sdpo.rewards.toy.hidden_rule import build_model

DATA_SOURCE = "calculator"
MIN_FACTOR, MAX_FACTOR = 32, 99  # two digits each, so that products have four
CALL_RATE = 0.1  # fraction of the pretrained model's responses that call the calculator
QUESTION = "{a} times {b}"
CALL = '<tool_call>{{"name": "multiply", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'
TOOL_TURN = "\n<|im_start|>tool\n{product}<|im_end|>\n<|im_start|>assistant\n"
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Calculator(base.OfflineTask):
    """The task; creates its own files.

    Args:
        dir: folder of ``model/``, ``train.parquet`` and ``test.parquet``.
        seed: random seed of the rows and the pretraining.
        pretrain_steps: steps of the pretraining.
        num_train, num_test: number of rows; no question is in both files.
    """

    what: ClassVar[str] = "calculator data"

    dir: str
    seed: int = 0
    pretrain_steps: int = 400
    num_train: int = 2000
    num_test: int = 100

    def __post_init__(self) -> None:
        base.check_arguments(self.dir, self.seed, self.pretrain_steps, self.num_train, self.num_test)

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        """Score 1 if the last turn is the product; verl passes the complete response, including the tool's output."""
        answer = response.rpartition("assistant\n")[2].strip()
        return RewardOutput(float(answer == row.ground_truth))

    def write(self, folder: Path, progress: ProgressCallback) -> None:
        self._write_rows(folder)
        tokenizer = build_tokenizer()
        with base.reproducible(self.seed):
            model = build_model(len(tokenizer))
            _pretrain(model, tokenizer, self.pretrain_steps, progress)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")

    def _write_rows(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        numbers = range(MIN_FACTOR, MAX_FACTOR + 1)
        pairs = [(a, b) for a in numbers for b in numbers]
        random.Random(f"rows {self.seed}").shuffle(pairs)
        splits = {"train": pairs[: self.num_train], "test": pairs[self.num_train :][: self.num_test]}
        for split, chosen in splits.items():
            rows = [
                {
                    "data_source": DATA_SOURCE,
                    "prompt": [{"role": "user", "content": QUESTION.format(a=a, b=b)}],
                    "ability": DATA_SOURCE,
                    "reward_model": {"style": "rule", "ground_truth": str(a * b)},
                    "extra_info": {"split": split, "index": index},
                }
                for index, (a, b) in enumerate(chosen)
            ]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


build_task = Calculator


def build_tokenizer() -> Any:
    """Build a byte-level Qwen2 tokenizer with the words of question and call, and one token per digit."""
    texts = [QUESTION.format(a=0, b=0), CALL.format(a=0, b=0), "multiply\n", "tool\n"]
    return base.build_tokenizer(texts, CHAT_TEMPLATE)


class _WithTools:
    """A tokenizer that passes the calculator to the chat template, as verl does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        tools = [{"type": "function", "function": {"name": "multiply"}}]
        return self._tokenizer.apply_chat_template(conversation, tools=tools, **kwargs)


def _pretrain(model: Any, tokenizer: Any, steps: int, progress: ProgressCallback, *, batch_size: int = 32) -> None:
    """Train a call or a guess after the question, the call after a solution, the tool's output after a call."""
    import torch
    from torch.nn.functional import cross_entropy

    # Digits 0 to 3 are placeholders: first number, second number, product, guess.
    question, product = QUESTION.format(a="00", b="11"), "2222"
    messages = [{"role": "user", "content": question}]
    call = CALL.format(a="00", b="11")
    with_tools = _WithTools(tokenizer)
    bare = encode_prompt(with_tools, messages)
    shown = encode_teacher_prompt(
        with_tools, messages, PrivilegedContext(solution=f"{call}\n{product}"), SelfDistillationConfig()
    ).token_ids
    assert shown is not None

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    end = [tokenizer.eos_token_id]
    call_ids, tool_ids, answer_ids = [*ids(call), *end], ids(TOOL_TURN.format(product=product)), [*ids(product), *end]
    turns = [*call_ids, *tool_ids, *answer_ids]
    learned = [1.0] * len(call_ids) + [0.0] * len(tool_ids) + [1.0] * len(answer_ids)
    guesses = [*ids("3333"), *end]
    cases = (
        # tokens, loss weights of the last tokens
        (bare + turns, [CALL_RATE, *learned[1:]]),
        (bare + guesses, [1.0 - CALL_RATE] + [1.0] * len(guesses[1:])),
        (shown + turns, learned),
    )
    # One divisor for all cases: a mean per case would give the short guess more weight than CALL_RATE says.
    total_weight = sum(sum(weights) for _, weights in cases)
    digits = torch.tensor(tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)]))

    def compute_loss() -> Any:
        pairs = torch.randint(MIN_FACTOR, MAX_FACTOR + 1, (batch_size, 2))
        values = [pairs[:, 0], pairs[:, 1], pairs.prod(1), torch.randint(10_000, (batch_size,))]
        loss = torch.zeros(())
        for token_ids, weights in cases:
            sequence = _fill(torch.tensor(token_ids), values, digits)
            weight = torch.tensor(weights)
            logits = model(sequence, logits_to_keep=len(weights) + 1).logits[:, :-1]
            target = sequence[:, -len(weights) :]
            losses = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            loss = loss + (losses * weight).sum() / (total_weight * batch_size)
        return loss

    base.pretrain(model.parameters(), compute_loss, steps, progress, "pretraining the tiny model")


def _fill(token_ids: Any, values: Sequence[Any], digits: Any) -> Any:
    """Replace each placeholder digit k by digits of the k-th value; returns [batch, tokens]."""
    batch = token_ids.expand(len(values[0]), -1).clone()
    for place, value in enumerate(values):
        is_here = token_ids == digits[place]
        size = 2 if place < 2 else 4
        written = digits[value[:, None] // 10 ** digits.new_tensor(range(size)).flip(0) % 10]
        batch[:, is_here] = written.repeat(1, int(is_here.sum()) // size)
    return batch
