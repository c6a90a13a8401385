"""Common parts of the toy tasks: arguments, scoring, output folder, tokenizer, pretraining."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import DataError
from sdpo.observability.progress import NullCallback, ProgressCallback
from sdpo.rewards.base import RewardOutput, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


FEEDBACK_TEXT = "Expected: "


def check_arguments(dir: Any, seed: Any, pretrain_steps: Any, num_train: Any, num_test: Any) -> None:
    """Check the arguments of a toy task; ``pretrain_steps`` may be None.

    Raises:
        DataError: ``dir`` is not a name, or another argument is not an integer or is too small.
    """
    if not isinstance(dir, str) or not dir:
        raise DataError(f"data.task_args.dir={dir!r}: must be the name of a folder")
    steps = 0 if pretrain_steps is None else pretrain_steps
    numbers = (("seed", seed, 0), ("pretrain_steps", steps, 0), ("num_train", num_train, 1), ("num_test", num_test, 1))
    for name, value, least in numbers:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(f"data.task_args.{name}={value!r}: must be an integer of at least {least}")


class OfflineTask:
    """Base class of toy tasks. Subclasses are frozen dataclasses; their files depend on all fields but ``dir``."""

    dir: str
    what: ClassVar[str]  # name of the data in error messages

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        """Score 1 for exactly the ground truth, else 0 with the ground truth as feedback."""
        expected = row.ground_truth or ""
        return RewardOutput(1.0) if response.strip() == expected else RewardOutput(0.0, FEEDBACK_TEXT + expected)

    def prepare(self, progress: ProgressCallback | None = None) -> None:
        """Create model and data, unless the folder already has them for the same arguments.

        Raises:
            DataError: the folder has other content, or cannot be created.
        """
        recipe = {name: value for name, value in vars(self).items() if name != "dir"}
        make_folder(self.dir, recipe, self.what, lambda folder: self.write(folder, progress or NullCallback()))

    def write(self, folder: Path, progress: ProgressCallback) -> None:
        """Write ``model/``, ``train.parquet`` and ``test.parquet`` into a new folder."""
        raise NotImplementedError


def format_digits(digits: Sequence[int]) -> str:
    """Format [1, 0, 7] as ``107``."""
    return "".join(map(str, digits))


def make_folder(name: str, recipe: Mapping[str, Any], what: str, write: Callable[[Path], None]) -> None:
    """Create a folder with ``write``, unless it exists with the same recipe.

    The content is written to a temporary folder and renamed, so that an interruption leaves no incomplete folder.

    Args:
        name: the folder; a leading ``~`` is expanded.
        recipe: all values on which the content depends; stored as ``recipe.json``.
        what: name of the data in error messages, such as "hidden-rule data".
        write: writes the content into the temporary folder.

    Raises:
        DataError: the folder has other content, or cannot be created.
    """
    target = Path(name).expanduser()
    if target.exists():
        made_with = target / "recipe.json"
        if not made_with.is_file():
            raise DataError(f"{target}: exists without {what}; name another folder")
        if json.loads(made_with.read_text()) != recipe:
            raise DataError(f"{target}: was created with {made_with.read_text()}; delete it or name another folder")
        return
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be created ({error.strerror}); name another folder") from error
    try:
        write(partial)
        (partial / "recipe.json").write_text(json.dumps(recipe))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def build_tokenizer(
    texts: Sequence[str], chat_template: str, vision_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Build a byte-level Qwen2 tokenizer with the words of the default templates and of the task's texts.

    The default templates take few tokens, and all other text can be tokenized. Characters outside of known words, such
    as digits, are one token each. Ids 0, 1 and 2 are ``<|endoftext|>``, ``<|im_start|>`` and ``<|im_end|>`` (the end
    of a response), followed by ``vision_tokens``.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision_tokens]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    split = Qwen2Tokenizer(vocab=vocabulary, merges=[]).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    defaults = SelfDistillationConfig()
    known = [
        defaults.reprompt_template.format(prompt="0", solution="0", feedback="0"),
        defaults.solution_template.format(successful_previous_attempt="0"),
        defaults.feedback_template.format(feedback_raw="0"),
        *texts,
        *("system\n", "user\n", "assistant\n"),
    ]
    merges: dict[tuple[str, str], None] = {}
    for piece in dict.fromkeys(piece for text in known for piece, _ in split(text)):
        for end in range(1, len(piece)):
            merges[piece[:end], piece[end]] = None
            vocabulary.setdefault(piece[: end + 1], len(vocabulary))
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=list(merges),
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", *vision_tokens],
        chat_template=chat_template,
    )


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Use one thread and a seeded generator inside the block; the order of summation changes the trained model."""
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def pretrain(
    parameters: Iterable[Any],
    compute_loss: Callable[[], Any],
    steps: int,
    progress: ProgressCallback,
    description: str,
    *,
    peak_lr: float = 2e-3,
    warmup: int = 100,
) -> None:
    """Train with AdamW; the learning rate rises over ``warmup`` steps, then falls linearly to 5 % of its peak.

    Args:
        parameters: trained parameters; gradients are clipped to a norm of 1.
        compute_loss: returns the loss of a new batch, a scalar tensor.
        description: label of the progress.
    """
    import torch

    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, peak_lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * max(0.05, 1 - step / max(1, steps))
    )
    for step in range(steps):
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        progress.on_progress(description, step + 1, steps)


def corrupt(answer: Any, num_symbols: int) -> Any:
    """Replace a random fraction of the symbols of answers [batch, symbols].

    A teacher, which is shown an answer, reads responses that differ from it.
    """
    import torch

    fraction = torch.rand(len(answer), 1)
    return torch.where(torch.rand(answer.shape) < fraction, torch.randint(num_symbols, answer.shape), answer)
