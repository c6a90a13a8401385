"""Rows as encoded prompts, and the order in which training takes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sdpo.config.root import SDPOConfig
from sdpo.errors import DataError, SDPOError
from sdpo.models.multimodal.processor import MultimodalProcessor, TokenPrompt
from sdpo.observability.progress import ProgressCallback
from sdpo.prompting.images import collect_images, place_images
from sdpo.prompting.tokenization import Tokenizer, encode_prompt
from sdpo.rewards.base import Row
from sdpo.rewards.rows import load_rows


@dataclass(frozen=True)
class Prompt:
    """A row and the token ids of its prompt, generation header included."""

    row: Row
    token_ids: list[int]

    @property
    def images(self) -> tuple[bytes, ...]:
        return collect_images(self.row.prompt)

    @cached_property
    def tokens(self) -> TokenPrompt:
        return TokenPrompt(self.token_ids, self.images)


def load_prompts(
    files: Sequence[str],
    setting: str,
    run: SDPOConfig,
    tokenizer: Tokenizer,
    window: int | None,
    observer: ProgressCallback,
) -> list[Prompt]:
    """Read and encode the rows of ``files``; ``setting`` names them in errors.

    Raises:
        DataError: see ``load_rows``; besides images that do not fit the prompt or cannot be read, unless
            ``data.filter_unreadable_images`` skips such rows; a prompt longer than ``data.max_prompt_length`` or, with
            its response, than the model's window, unless ``data.filter_overlong_prompts`` does; or no row left.
    """
    limit, reason = run.data.max_prompt_length, "data.max_prompt_length"
    if window is not None and window - run.rollout.max_response_length < limit:
        limit = window - run.rollout.max_response_length
        reason = f"the model's window of {window} minus rollout.max_response_length={run.rollout.max_response_length}"
    if limit < 1:
        raise DataError(
            f"rollout.max_response_length leaves no room for a prompt in the model's window of {window} tokens"
        )
    rows = load_rows(files, setting)
    prompts = _encode_rows(rows, setting, run, tokenizer, observer)
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    if len(kept) < len(prompts):
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        found = f"{longest.row.origin} has {len(longest.token_ids)} prompt tokens, more than {limit} ({reason})"
        if not run.data.filter_overlong_prompts:
            raise DataError(f"{found}; set data.filter_overlong_prompts=true to skip such rows")
        observer.message(f"{setting}: skipped {len(prompts) - len(kept)} of {len(rows)} rows with overlong prompts")
        if not kept:
            raise DataError(f"{setting}: no row is left: {found}")
    return kept


def _encode_rows(
    rows: Sequence[Row], setting: str, run: SDPOConfig, tokenizer: Tokenizer, observer: ProgressCallback
) -> list[Prompt]:
    prompts: list[Prompt] = []
    unreadable: list[str] = []
    for number, row in enumerate(rows, start=1):
        if row.images and not isinstance(tokenizer, MultimodalProcessor):
            raise DataError(
                f"{row.origin}: has images, which model.path={run.model.path} does not read; take a model that does"
            )
        try:
            messages = place_images(row.prompt, row.images)
            token_ids = encode_prompt(tokenizer, messages)
            if not token_ids:
                raise DataError("its prompt has no tokens; does the folder of model.path hold the tokenizer's files?")
            prompts.append(Prompt(replace(row, prompt=messages), token_ids))
        except SDPOError as error:
            if not tokenizer.chat_template:  # no fault of the row
                raise
            if not row.images:
                raise DataError(f"{row.origin}: {error}") from error
            unreadable.append(f"{row.origin}: {error}")
            if not run.data.filter_unreadable_images:
                raise DataError(f"{unreadable[0]}; set data.filter_unreadable_images=true to skip such rows") from error
        except Exception as error:  # a template is code, and raises what it likes
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(f"{row.origin}: the model's chat template refuses the prompt ({reason})") from error
        if row.images:  # which take as long as a hundred texts
            observer.progress(f"reading {setting}", number, len(rows))
    if unreadable:
        observer.message(f"{setting}: skipped {len(unreadable)} of {len(rows)} rows; the first: {unreadable[0]}")
    if not prompts:
        raise DataError(f"{setting}: no row is left: {unreadable[0]}")
    return prompts


class RandomSampler:
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
