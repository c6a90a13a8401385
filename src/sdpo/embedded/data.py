"""Rows as encoded prompts, and the order in which training takes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sdpo.config import Run
from sdpo.context.encode import encode_prompt
from sdpo.errors import UserError
from sdpo.observer import Observer
from sdpo.tasks.interface import Row, load_rows


@dataclass(frozen=True)
class Prompt:
    """A row and the token ids of its prompt, generation header included."""

    row: Row
    token_ids: list[int]


def load_prompts(
    files: Sequence[str],
    setting: str,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None,
    observer: Observer,
) -> list[Prompt]:
    """Read and encode the rows of ``files``; ``setting`` names them in errors.

    Raises:
        UserError: see ``load_rows``; besides a prompt longer than ``data.max_prompt_length`` or, with its response,
            than the model's window, unless ``data.filter_overlong_prompts`` skips such rows; or no row left.
    """
    limit, reason = run.data.max_prompt_length, "data.max_prompt_length"
    if window is not None and window - run.sampler.max_response_length < limit:
        limit = window - run.sampler.max_response_length
        reason = f"the model's window of {window} minus sampler.max_response_length={run.sampler.max_response_length}"
    if limit < 1:
        raise UserError(
            f"sampler.max_response_length leaves no room for a prompt in the model's window of {window} tokens"
        )
    prompts = [Prompt(row, encode_prompt(tokenizer, row.prompt)) for row in load_rows(files, setting)]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    if len(kept) < len(prompts):
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        found = f"row {longest} has {len(prompts[longest].token_ids)} prompt tokens, more than {limit} ({reason})"
        if not run.data.filter_overlong_prompts:
            raise UserError(f"{setting}: {found}; set data.filter_overlong_prompts=true to skip such rows")
        observer.message(f"{setting}: skipped {len(prompts) - len(kept)} of {len(prompts)} rows with overlong prompts")
    if not kept:
        raise UserError(f"{setting}: no row is left: {found}")
    return kept


class PromptOrder:
    """Which prompts a step trains on: passes over the rows, each in an order of its own.

    A pure function of the seed and the step, so that any step can be reached without those before it.
    """

    def __init__(self, num_rows: int, batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed

    def batch(self, step: int) -> list[int]:
        """Row numbers of step 1, 2, ..."""
        start = (step - 1) * self.batch_size
        return [self._row(position) for position in range(start, start + self.batch_size)]

    def epoch(self, step: int) -> float:
        """Passes over the rows when the step is done."""
        return step * self.batch_size / self.num_rows

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        return self._permutation(epoch)[place] if self.shuffle else place

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_cached_epoch", None) != epoch:
            order = list(range(self.num_rows))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._cached_epoch, self._cached_order = epoch, order
        return self._cached_order
