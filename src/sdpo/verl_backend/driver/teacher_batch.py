"""Teacher prompts and sample weights of a batch, as fields of verl's batch; runs on the driver."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo.algorithm.aggregation import compute_distillation_coef, compute_prompt_weights
from sdpo.config.data import DataConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.observability import metrics
from sdpo.prompting.demonstrations import ScoredRollout, compute_success_rates, shows_ground_truth
from sdpo.prompting.teacher_context import build_teacher_contexts, compute_reprompt_metrics
from sdpo.prompting.templates import Message
from sdpo.rewards.rows import read_solution
from sdpo.verl_backend.worker.packing import DISTILLATION_COEF, SAMPLE_WEIGHTS, TEACHER_PROMPT_LENGTHS, TEACHER_PROMPTS


@dataclass(frozen=True)
class Rollout:
    """One rollout, read from a trainer's container; the score is NaN for a failed reward."""

    uid: str  # verl's: equal for all rollouts of a prompt
    messages: Sequence[Message]
    response_ids: Sequence[int]  # of all turns, including tools' outputs
    response_mask: Sequence[int]  # 1 where the policy sampled the token
    score: float
    feedback: str | None
    ground_truth: str | None

    @property
    def is_failed(self) -> bool:
        return math.isnan(self.score)


def decode_turns(tokenizer: Any, response_ids: Sequence[int], response_mask: Sequence[int]) -> str:
    """Decode the tokens that the policy sampled (mask 1), each turn on a separate line."""
    turns = itertools.groupby(zip(response_ids, response_mask, strict=True), key=lambda pair: bool(pair[1]))
    return "\n".join(
        tokenizer.decode([token_id for token_id, _ in pairs], skip_special_tokens=True)
        for is_sampled, pairs in turns
        if is_sampled
    )


class TeacherBatchBuilder:
    """Builds the teacher's fields of a batch.

    Args:
        config: teacher prompts and weights.
        tokenizer: of the policy.
        window: at most this many tokens fit the model; None if its configuration has no limit.
        seed: with the step, selects the demonstrations.
        max_steps: of the run, for the schedule of the distillation coefficient.
        solution_key: field of a row with its solution.

    Attributes:
        factor: multiplies the scheduled distillation coefficient; health actions reduce it.
    """

    def __init__(
        self,
        config: SelfDistillationConfig,
        tokenizer: Any,
        window: int | None,
        seed: int,
        max_steps: int,
        solution_key: str = DataConfig.solution_key,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.window = window
        self.seed = seed
        self.max_steps = max_steps
        self.solution_key = solution_key
        self.factor = 1.0

    def read_solution(self, reward_model: Mapping[str, Any], extra_info: Mapping[str, Any] | None) -> str | None:
        """Return the text of a row that its teacher is shown as the solution, if it is shown any.

        Raises:
            DataError: the field is a list or a mapping.
        """
        if not shows_ground_truth(self.config):
            return None
        row = {"reward_model": reward_model, "extra_info": extra_info}
        return read_solution(row, self.solution_key, "data.train_files")

    def build(self, rows: Sequence[Rollout | None], step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return fields by name, [B, ...] in the rows' order, and the step's metrics.

        Args:
            rows: the batch; None for padding, which is not distilled, not a demonstration and not counted.
            step: from 1.
        """
        rollouts = [row for row in rows if row is not None]
        uids = [rollout.uid for rollout in rollouts]
        group_ids = {uid: number for number, uid in enumerate(dict.fromkeys(uids))}
        scored = [
            ScoredRollout(
                group_id=group_ids[rollout.uid],
                response=decode_turns(self.tokenizer, rollout.response_ids, rollout.response_mask),
                score=rollout.score,
                feedback=rollout.feedback,
                ground_truth=rollout.ground_truth,
            )
            for rollout in rollouts
        ]
        contexts = build_teacher_contexts(
            self.tokenizer,
            [rollout.messages for rollout in rollouts],
            scored,
            [None if self.window is None else self.window - len(rollout.response_ids) for rollout in rollouts],
            self.config,
            random.Random(f"demonstrations {self.seed} {step}"),
        )
        weights = [1.0] * len(scored)
        if self.config.weight_by_prompt_difficulty:
            rates = compute_success_rates(scored, self.config.success_reward_threshold)
            weights = compute_prompt_weights(torch.tensor(rates)).tolist()
        coef = compute_distillation_coef(self.config, step, self.max_steps) * self.factor
        of_samples = iter(zip(contexts, weights, strict=True))
        prompts, row_weights = [], []
        for row in rows:
            token_ids, weight = (None, 0.0)
            if row is not None:
                context, weight = next(of_samples)
                token_ids = context.prompt.token_ids
            prompts.append(torch.tensor(token_ids or [], dtype=torch.long))
            row_weights.append(weight)
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        fields = {
            # At least one column: some containers reject empty tensors.
            TEACHER_PROMPTS: padded if padded.shape[1] else padded.new_zeros(len(prompts), 1),
            TEACHER_PROMPT_LENGTHS: torch.tensor([len(prompt) for prompt in prompts]),
            SAMPLE_WEIGHTS: torch.tensor(row_weights),
            DISTILLATION_COEF: torch.full((len(rows),), coef),
        }
        values = compute_reprompt_metrics(scored, contexts, self.config)
        if self.config.distills:
            values[metrics.DISTILLATION_COEF] = coef
        return fields, values
