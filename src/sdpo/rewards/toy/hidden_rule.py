"""A toy task: answer a string of digits by a permutation that the prompt does not state.

The tiny model is pretrained to copy a solution from its context and, without a solution, to apply a random rule. The
task is to learn a single rule, which the model observes through scores and feedback alone:

mode ``feedback`` (B): the rule is not pretrained, so almost no rollout succeeds and the score alone gives no signal;
    the feedback on a failure contains the expected answer, like the output of a failing unit test.
mode ``peers`` (A): the rule is pretrained, so some rollouts succeed and serve as demonstrations for others. Used to
    study which teachers are stable.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import DataError
from sdpo.observability.progress import ProgressCallback
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.tokenization import encode_prompt, encode_teacher_prompt
from sdpo.rewards.toy import base
from sdpo.rewards.toy.base import format_digits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DATA_SOURCE = "hidden_rule"
NUM_DIGITS = 10
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Mode:
    """Problem size: digits per prompt, number of permutations, and whether the target is pretrained."""

    length: int
    num_rules: int
    target_is_pretrained: bool
    pretrain_steps: int


MODES = {
    "feedback": Mode(length=8, num_rules=9, target_is_pretrained=False, pretrain_steps=600),
    "peers": Mode(length=5, num_rules=8, target_is_pretrained=True, pretrain_steps=800),
}


@dataclass(frozen=True)
class HiddenRule(base.OfflineTask):
    """The task; creates its own files.

    Args:
        dir: folder of ``model/``, ``train.parquet`` and ``test.parquet``.
        mode: ``feedback`` or ``peers``.
        seed: random seed of the rows and the pretraining.
        pretrain_steps: steps of the pretraining; None for the mode's default.
        num_train, num_test: number of rows; no prompt is in both files.
    """

    what: ClassVar[str] = "hidden-rule data"

    dir: str
    mode: str = "feedback"
    seed: int = 0
    pretrain_steps: int | None = None
    num_train: int = 3000
    num_test: int = 500

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DataError(f"data.task_args.mode={self.mode!r}: must be one of {', '.join(MODES)}")
        base.check_arguments(self.dir, self.seed, self.pretrain_steps, self.num_train, self.num_test)
        possible = NUM_DIGITS ** MODES[self.mode].length
        if self.num_train + self.num_test > possible:
            raise DataError(
                f"data.task_args: num_train + num_test exceeds the {possible} prompts of mode {self.mode}; lower one"
            )

    def write(self, folder: Path, progress: ProgressCallback) -> None:
        self._write_rows(folder)
        self._pretrain(progress, folder / "model")

    def _write_rows(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        length, target = MODES[self.mode].length, build_rules(self.mode)[0]
        rng = random.Random(f"rows {self.seed}")
        seen: set[tuple[int, ...]] = set()
        while len(seen) < self.num_train + self.num_test:
            seen.add(tuple(rng.randrange(NUM_DIGITS) for _ in range(length)))
        prompts = sorted(seen)
        rng.shuffle(prompts)
        for split, chosen in (("train", prompts[: self.num_train]), ("test", prompts[self.num_train :])):
            rows = [
                {
                    "data_source": DATA_SOURCE,
                    "prompt": [{"role": "user", "content": format_digits(digits)}],
                    "ability": "hidden_rule",
                    "reward_model": {
                        "style": "rule",
                        "ground_truth": format_digits([digits[i] for i in target]),
                    },
                    "extra_info": {"split": split, "index": index},
                }
                for index, digits in enumerate(chosen)
            ]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")

    def _pretrain(self, progress: ProgressCallback, folder: Path) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # the bar of save_pretrained would disturb the console's
        mode = MODES[self.mode]
        steps = mode.pretrain_steps if self.pretrain_steps is None else self.pretrain_steps
        rules = build_rules(self.mode)
        rules = rules if mode.target_is_pretrained else rules[1:]
        tokenizer = build_tokenizer()
        with base.reproducible(self.seed):
            model = build_model(len(tokenizer))
            _pretrain(model, tokenizer, self.mode, rules, steps, progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


build_task = HiddenRule


def build_rules(mode: str) -> list[list[int]]:
    """Build the permutations of a mode, the same for every seed; the first, reversal, is the target."""
    size = MODES[mode]
    rng = random.Random("rules 0")
    rules = [list(reversed(range(size.length)))]
    while len(rules) < size.num_rules:
        rule = rng.sample(range(size.length), size.length)
        if rule not in rules and rule != sorted(rule):
            rules.append(rule)
    return rules


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level Qwen2 tokenizer with digits and the words of the default templates."""
    return base.build_tokenizer([base.FEEDBACK_TEXT], CHAT_TEMPLATE)


def build_model(vocab_size: int) -> PreTrainedModel:
    """Build an untrained Qwen3 of about 160,000 parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,  # vLLM on CPU supports no smaller heads; its Qwen3 reads this setting, its Qwen2 does not
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def _pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    mode: str,
    rules: Sequence[Sequence[int]],
    steps: int,
    progress: ProgressCallback,
    *,
    batch_size: int = 64,
) -> None:
    """Train two behaviours: any rule after the plain prompt, and copying after a prompt with a solution.

    The model copies wrong solutions too. Copying is also trained after wrong tokens, because a teacher reads the
    student's mistakes.
    """
    import torch
    from torch.nn.functional import cross_entropy

    length = MODES[mode].length
    bare, shown = _build_skeletons(tokenizer, mode)
    rule_table = torch.tensor([list(rule) for rule in rules])
    digit_ids = torch.tensor(tokenizer.convert_tokens_to_ids([str(d) for d in range(NUM_DIGITS)]))
    eos = torch.full((batch_size, 1), tokenizer.eos_token_id)

    def compute_loss() -> Any:
        prompt = torch.randint(NUM_DIGITS, (batch_size, length))
        by_rule = prompt.gather(1, rule_table[torch.randint(len(rules), (batch_size,))])
        copied = torch.where(torch.rand(batch_size, 1) < 0.5, by_rule, torch.randint(NUM_DIGITS, (batch_size, length)))
        loss = torch.zeros(())
        for skeleton, answer in ((bare, by_rule), (shown, copied)):
            target = torch.cat([digit_ids[answer], eos], dim=1)
            context = skeleton.fill(digit_ids[prompt], digit_ids[answer])
            mistaken = skeleton is shown
            written = torch.cat([digit_ids[base.corrupt(answer, NUM_DIGITS)], eos], dim=1) if mistaken else target
            logits = model(torch.cat([context, written], dim=1), logits_to_keep=length + 2).logits[:, :-1]
            loss = loss + cross_entropy(logits.flatten(0, 1), target.flatten())
        return loss

    base.pretrain(model.parameters(), compute_loss, steps, progress, "pretraining the tiny model")


@dataclass(frozen=True)
class _Skeleton:
    """Tokens of a prompt from the default templates, with the positions of the prompt's and the answer's digits."""

    token_ids: Any  # tensor [tokens]
    is_prompt: Any  # bool tensor [tokens]
    is_answer: Any  # bool tensor [tokens]

    def fill(self, prompt: Any, answer: Any) -> Any:
        batch = self.token_ids.expand(len(prompt), -1).clone()
        batch[:, self.is_prompt] = prompt
        batch[:, self.is_answer] = answer[:, : int(self.is_answer.sum())]
        return batch


def _build_skeletons(tokenizer: PreTrainedTokenizerFast, mode: str) -> tuple[_Skeleton, _Skeleton]:
    import torch

    length = MODES[mode].length
    messages = [{"role": "user", "content": format_digits([0] * length)}]
    answer = format_digits([1] * length)
    shown = (
        PrivilegedContext(feedback=base.FEEDBACK_TEXT + answer)
        if mode == "feedback"
        else PrivilegedContext(solution=answer)
    )
    teacher = encode_teacher_prompt(tokenizer, messages, shown, SelfDistillationConfig()).token_ids
    assert teacher is not None
    skeletons = []
    for token_ids in (encode_prompt(tokenizer, messages), teacher):
        ids = torch.tensor(token_ids)
        zero, one = (tokenizer.convert_tokens_to_ids(str(d)) for d in (0, 1))
        skeletons.append(_Skeleton(ids, ids == zero, ids == one))
    return skeletons[0], skeletons[1]
