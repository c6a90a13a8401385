"""Encoded prompts of the data files, and the order in which training uses them."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sdpo.config.data import DataConfig
from sdpo.errors import DataError, SDPOError
from sdpo.models.multimodal.processor import MultimodalProcessor, TokenPrompt
from sdpo.observability.progress import ProgressCallback
from sdpo.prompting.images import collect_images, place_images
from sdpo.prompting.tokenization import Tokenizer, encode_prompt
from sdpo.rewards.base import Row
from sdpo.rewards.rows import load_rows, read_solution

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A row and the token ids of its prompt, including the generation header.

    Attributes:
        solution: what the teacher is shown (``data.solution_key``), if anything.
    """

    row: Row
    token_ids: list[int]
    solution: str | None = None

    @property
    def images(self) -> tuple[bytes, ...]:
        return collect_images(self.row.prompt)

    @cached_property
    def tokens(self) -> TokenPrompt:
        return TokenPrompt(self.token_ids, self.images)


def load_prompts(
    files: Sequence[str],
    setting: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: ProgressCallback,
    *,
    window: int | None,
    max_response_length: int,
    shows_solution: bool = False,
) -> list[Prompt]:
    """Read and encode the rows of ``files``.

    Args:
        setting: the key that lists the files, for messages.
        progress: receives the progress of reading images.
        window: maximum number of tokens of the model; None: unlimited.
        max_response_length: tokens of the window that are reserved for the response.
        shows_solution: whether the teacher is shown the row's solution.

    Raises:
        DataError: a file is invalid (see ``load_rows``), an image is unreadable or does not fit the prompt, a prompt is
            too long, or no row is left. ``data.filter_unreadable_images`` and ``data.filter_overlong_prompts`` skip
            such rows instead.
    """
    limit, reason = config.max_prompt_length, "data.max_prompt_length"
    if window is not None and window - max_response_length < limit:
        limit = window - max_response_length
        reason = f"the model's window of {window} minus rollout.max_response_length={max_response_length}"
    if limit < 1:
        raise DataError(
            f"rollout.max_response_length={max_response_length}: leaves no room for a prompt in the model's window of "
            f"{window} tokens; lower it"
        )
    rows = load_rows(files, setting)
    prompts = _encode_rows(rows, setting, config, tokenizer, progress)
    if shows_solution:
        prompts = [replace(prompt, solution=_read_solution(prompt.row, config.solution_key)) for prompt in prompts]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    if len(kept) < len(prompts):
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        found = f"{longest.row.origin} has {len(longest.token_ids)} prompt tokens, more than {limit} ({reason})"
        if not config.filter_overlong_prompts:
            raise DataError(f"{found}; set data.filter_overlong_prompts=true to skip such rows")
        logger.warning(f"{setting}: skipped {len(prompts) - len(kept)} of {len(rows)} rows with overlong prompts")
        if not kept:
            raise DataError(f"{setting}: no row is left: {found}")
    return kept


def _read_solution(row: Row, key: str) -> str | None:
    return read_solution({"reward_model": row.reward_model, "extra_info": row.extra_info}, key, row.origin)


def _encode_rows(
    rows: Sequence[Row], setting: str, config: DataConfig, tokenizer: Tokenizer, progress: ProgressCallback
) -> list[Prompt]:
    prompts: list[Prompt] = []
    unreadable: list[str] = []
    for number, row in enumerate(rows, start=1):
        if row.images and not isinstance(tokenizer, MultimodalProcessor):
            raise DataError(
                f"{row.origin}: has images, but the model of model.path has no vision tower; choose one that has"
            )
        try:
            messages = place_images(row.prompt, row.images)
            token_ids = encode_prompt(tokenizer, messages)
            if not token_ids:
                raise DataError("the prompt has no tokens; check the tokenizer files in the folder of model.path")
            prompts.append(Prompt(replace(row, prompt=messages), token_ids))
        except SDPOError as error:
            if not tokenizer.chat_template:  # an error of the tokenizer, not of the row
                raise
            if not row.images:
                raise DataError(f"{row.origin}: {error}") from error
            unreadable.append(f"{row.origin}: {error}")
            if not config.filter_unreadable_images:
                raise DataError(f"{unreadable[0]}; set data.filter_unreadable_images=true to skip such rows") from error
        except Exception as error:  # a chat template is code and may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(f"{row.origin}: the model's chat template rejects the prompt ({reason})") from error
        if row.images:  # reading them is slow
            progress.on_progress(f"reading {setting}", number, len(rows))
    if unreadable:
        logger.warning(f"{setting}: skipped {len(unreadable)} of {len(rows)} rows; the first: {unreadable[0]}")
    if not prompts:
        raise DataError(f"{setting}: no row is left: {unreadable[0]}")
    return prompts


class RandomSampler:
    """Rows of each training step: consecutive passes over the data, shuffled independently.

    The rows are a pure function of the seed and the step, so a resumed run needs no state.
    """

    def __init__(self, num_rows: int, batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed

    def batch(self, step: int) -> list[int]:
        """Return the row numbers of a step, counted from 1."""
        start = (step - 1) * self.batch_size
        return [self._row(position) for position in range(start, start + self.batch_size)]

    def epoch(self, step: int) -> float:
        """Return the number of passes over the data after a step."""
        return step * self.batch_size / self.num_rows

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.num_rows)
        return self._permutation(epoch)[index] if self.shuffle else index

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_cached_epoch", None) != epoch:
            order = list(range(self.num_rows))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._cached_epoch, self._cached_order = epoch, order
        return self._cached_order
