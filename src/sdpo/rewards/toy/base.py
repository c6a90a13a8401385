"""What the offline tasks share: arguments, grading, a folder whole or not at all, a tokenizer, pretraining."""

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
    """Refuse arguments of a task that are no folder's name, or no whole numbers large enough; no steps are none given.

    Raises:
        DataError: names the argument.
    """
    if not isinstance(dir, str) or not dir:
        raise DataError(f"data.task_args.dir must be a folder's name, got {dir!r}")
    steps = 0 if pretrain_steps is None else pretrain_steps
    numbers = (("seed", seed, 0), ("pretrain_steps", steps, 0), ("num_train", num_train, 1), ("num_test", num_test, 1))
    for name, value, least in numbers:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(f"data.task_args.{name} must be a whole number of at least {least}, got {value!r}")


class OfflineTask:
    """What offline tasks do alike; a frozen dataclass on top of it says by its fields what the files depend on."""

    dir: str
    what: ClassVar[str]  # of the data, for the message that the folder holds something else

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        """1 for exactly the ground truth, else 0 with the ground truth as feedback."""
        expected = row.ground_truth or ""
        return RewardOutput(1.0) if response.strip() == expected else RewardOutput(0.0, FEEDBACK_TEXT + expected)

    def prepare(self, observer: ProgressCallback | None = None) -> None:
        """Make model and data unless the folder already holds those of the same arguments.

        Raises:
            DataError: the folder holds something else, or cannot be made.
        """
        recipe = {name: value for name, value in vars(self).items() if name != "dir"}
        make_folder(self.dir, recipe, self.what, lambda folder: self.write(folder, observer or NullCallback()))

    def write(self, folder: Path, observer: ProgressCallback) -> None:
        """Fill a new folder with ``model/``, ``train.parquet`` and ``test.parquet``."""
        raise NotImplementedError


def format_digits(digits: Sequence[int]) -> str:
    """[1, 0, 7] as ``107``."""
    return "".join(map(str, digits))


def make_folder(name: str, recipe: Mapping[str, Any], what: str, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder unless it already holds what was made by the same recipe.

    Everything is made beside the folder and renamed into place, so that an interruption leaves nothing half-made.

    Args:
        name: the folder; a leading ``~`` is the home folder.
        recipe: everything that what is made depends on; stored as ``recipe.json``.
        what: of the data, for the message that the folder holds something else, such as "hidden-rule data".
        write: fills the folder that it is given, which is not yet the one named.

    Raises:
        DataError: the folder holds something else, or cannot be made.
    """
    target = Path(name).expanduser()
    if target.exists():
        made_with = target / "recipe.json"
        if not made_with.is_file():
            raise DataError(f"{target}: exists and holds no {what}; name another folder")
        if json.loads(made_with.read_text()) != recipe:
            raise DataError(f"{target}: was made with {made_with.read_text()}; delete it or name another folder")
        return
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be made ({error.strerror}); name another folder") from error
    try:
        write(partial)
        (partial / "recipe.json").write_text(json.dumps(recipe))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def build_tokenizer(
    texts: Sequence[str], chat_template: str, vision_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level Qwen2 tokenizer that knows the words of the default templates and those of the task's texts.

    So the real templates cost few tokens, and any other text still has a tokenization. Characters that no text joins
    to a word, such as digits, are a token each. Ids 0, 1 and 2 are ``<|endoftext|>``, ``<|im_start|>`` and
    ``<|im_end|>`` (the end of a response); then come ``vision_tokens``.
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
    """One thread and a seeded generator, given back afterwards: sums in another order give another model."""
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
    observer: ProgressCallback,
    description: str,
    *,
    peak_lr: float = 2e-3,
    warmup: int = 100,
) -> None:
    """AdamW for so many steps, the learning rate rising over ``warmup`` steps and falling linearly to 5 %.

    Args:
        parameters: those to be trained; gradients are clipped to a norm of 1.
        compute_loss: draws a batch and gives its loss, a scalar tensor.
        description: of what happens, for whoever watches.
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
        observer.progress(description, step + 1, steps)


def corrupt(answer: Any, num_symbols: int) -> Any:
    """Answers [batch, symbols] with some symbols replaced at random, from none to all of them.

    What a teacher meets: it is shown an answer and reads a response that departs from it.
    """
    import torch

    share = torch.rand(len(answer), 1)
    return torch.where(torch.rand(answer.shape) < share, torch.randint(num_symbols, answer.shape), answer)
