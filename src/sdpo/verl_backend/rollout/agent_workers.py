"""verl's agent loop workers; an exception in the agent loop or the reward function becomes a failed reward.

verl's one-step-off trainer would stop at the first exception. Its V1 trainers would log it and train on padding in
place of the response (https://github.com/verl-project/verl/issues/6437).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray
import torch
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopManager,
    AgentLoopMetrics,
    AgentLoopOutput,
    AgentLoopWorker,
)
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from sdpo.errors import SDPOError
from sdpo.rewards.scoring import RewardFailure
from sdpo.verl_backend.driver.failed_rewards import FAILURE, REFUSAL

EXTRA = "reward_extra_info"


class FailedRewardsWorkerMixin:
    """Hooks of both kinds of workers into the agent loop, the reward function and the batch's columns."""

    tokenizer: Any
    rollout_config: Any
    _columns: tuple[str, ...] = ("score", "acc", "feedback")  # of the last reward; sdpo's before the first

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)  # type: ignore[misc]
        except Exception as error:
            output = self._build_empty_output(trajectory["step"])
            self._mark_failed(output, error, kwargs)
            del kwargs["agent_name"]
            kwargs.pop("trace", None)
            return await self._agent_loop_postprocess(  # type: ignore[attr-defined]
                output, trajectory["validate"], **kwargs
            )

    def _compute_multi_modal_inputs(self, output: AgentLoopOutput, input_ids: Any) -> Any:
        """Read the images of a sequence; verl reads its text too, in which a spelled image token becomes an image."""
        control = torch.tensor(sorted(self.tokenizer.added_tokens_decoder), device=input_ids.device)
        kept = input_ids[torch.isin(input_ids, control)][None]
        return super()._compute_multi_modal_inputs(output, kept)  # type: ignore[misc]

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        final = outputs[-1]
        if FAILURE in final.extra_fields.get(EXTRA, {}):
            return
        try:
            await super()._compute_score(outputs, kwargs)  # type: ignore[misc]
            if final.reward_score is None:  # a reward model scores the batch later
                return
            if not math.isfinite(final.reward_score):
                raise RewardFailure(
                    f"{kwargs.get('data_source')}: the reward must be a finite number, got {final.reward_score}"
                )
        except Exception as error:
            self._mark_failed(final, error, kwargs)
            return
        extra = final.extra_fields.setdefault(EXTRA, {})
        self._columns = tuple(extra)
        extra.update({FAILURE: "", REFUSAL: ""})

    def _postprocess(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """One-step-off: give all responses the same extra values; verl makes the first response's into columns."""
        extras = [each.extra_fields.setdefault(EXTRA, {}) for each in inputs]
        names = dict.fromkeys(name for extra in extras for name in extra)
        for extra in extras:
            for name in names:
                extra.setdefault(name, None)
        return super()._postprocess(inputs, *args, **kwargs)  # type: ignore[misc]

    def _build_empty_output(self, step: int) -> AgentLoopOutput:
        """Return one masked token as prompt and as response."""
        token = self.tokenizer.eos_token_id
        return AgentLoopOutput(
            prompt_ids=[token],
            response_ids=[token],
            response_mask=[0],
            response_logprobs=[0.0] if self.rollout_config.calculate_log_probs else None,
            multi_modal_data={},
            num_turns=0,
            metrics=AgentLoopMetrics(),
            extra_fields={"turn_scores": [], "tool_rewards": [], "min_global_steps": step, "max_global_steps": step},
        )

    def _mark_failed(self, output: AgentLoopOutput, error: Exception, row: dict[str, Any]) -> None:
        cause = getattr(error, "cause", None) or error  # Ray wraps errors of other processes
        reason = " ".join(str(cause).split())[:500]
        if not isinstance(cause, (RewardFailure, SDPOError)):
            reason = f"{row.get('data_source')}: {type(cause).__name__}: {reason}"
        output.reward_score = 0.0
        output.extra_fields[EXTRA] = {
            **dict.fromkeys(self._columns),
            FAILURE: reason,
            REFUSAL: reason if isinstance(cause, SDPOError) else "",
        }


class OneStepOffWorker(FailedRewardsWorkerMixin, AgentLoopWorker):  # type: ignore[misc]
    """Worker of the one-step-off trainer."""


class QueueWorker(FailedRewardsWorkerMixin, AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # type: ignore[misc]
    """Worker of the V1 trainers."""


class OneStepOffManager(AgentLoopManager):  # type: ignore[misc]
    """Manager of the one-step-off trainer, set by ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.agent_loop_workers_class = ray.remote(OneStepOffWorker)
        super().__init__(*args, **kwargs)


class QueueManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """Manager of the V1 trainers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(QueueWorker)
