"""Token budget of micro-batches, halved after an out-of-memory error."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sdpo.errors import ConfigError
from sdpo.kernels.cpu.allocator import is_out_of_memory
from sdpo.trainer.actor.collate import Collator
from sdpo.trainer.data.samples import TrainingSample

logger = logging.getLogger(__name__)


class TokenBudget:
    """Splits samples into micro-batches of at most ``max_tokens`` tokens.

    Args:
        max_tokens: initial budget, >= 1.
        collator: counts tokens.
    """

    def __init__(self, max_tokens: int, collator: Collator) -> None:
        self.max_tokens = max_tokens
        self._collator = collator

    def split(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Indices of the samples of each micro-batch; a sample longer than the budget is a micro-batch by itself."""
        return self._collator.split(samples, self.max_tokens)

    def halve_on_oom(self, error: Exception, samples: Sequence[TrainingSample]) -> None:
        """Halve the budget until micro-batches of these samples become smaller.

        Raises:
            ConfigError: out of memory with a single sample per micro-batch.
            Exception: ``error``, unless it is an out-of-memory error.
        """
        if not is_out_of_memory(error):
            raise error
        largest = max(map(len, self.split(samples)))
        if largest == 1:
            longest = max(_count_tokens(sample) for sample in samples)
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"actor: memory is too small for the longest sample of {longest} tokens ({reason:.200}); lower "
                "data.max_prompt_length or rollout.max_response_length, or set actor.gradient_checkpointing=true"
            ) from error
        while max(map(len, self.split(samples))) == largest:
            self.max_tokens //= 2
        logger.warning(
            "out of memory in a micro-batch; continuing with actor.max_tokens_per_micro_batch=%d", self.max_tokens
        )


def _count_tokens(sample: TrainingSample) -> int:
    """Tokens of a sample, of student and teacher together."""
    response = len(sample.response.token_ids)
    teacher = len(sample.teacher_prompt.token_ids) + response if sample.teacher_prompt.token_ids is not None else 0
    return len(sample.prompt.token_ids) + response + teacher
