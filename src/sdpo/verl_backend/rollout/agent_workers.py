"""verl's agent loop workers; a response that cannot be had or scored is a failed grade, not the end of anything.

verl's one-step-off trainer would stop at the first exception. Its V1 trainers would log it, fill the response's place
with padding and go on without saying so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopManager,
    AgentLoopMetrics,
    AgentLoopOutput,
    AgentLoopWorker,
)
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from sdpo.errors import SDPOError
from sdpo.rewards.scoring import RewardFailure
from sdpo.verl_backend.driver.grades import FAILURE, REFUSAL

EXTRA = "reward_extra_info"


class KeepsFailures:
    """The hooks of both kinds of workers: the agent loop, the grader, and what verl makes of their results."""

    tokenizer: Any
    rollout_config: Any
    _columns: tuple[str, ...] = ("score", "acc", "feedback")  # of the last grade, ours at first

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

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        final = outputs[-1]
        if FAILURE in final.extra_fields.get(EXTRA, {}):
            return
        try:
            await super()._compute_score(outputs, kwargs)  # type: ignore[misc]
            if final.reward_score is None:  # a reward model grades the batch later
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
        """One-step-off: verl makes columns of the first response's extra values, so all must have the same."""
        extras = [each.extra_fields.setdefault(EXTRA, {}) for each in inputs]
        names = dict.fromkeys(name for extra in extras for name in extra)
        for extra in extras:
            for name in names:
                extra.setdefault(name, None)
        return super()._postprocess(inputs, *args, **kwargs)  # type: ignore[misc]

    def _build_empty_output(self, step: int) -> AgentLoopOutput:
        """One token that does not count, in the place of a prompt and of a response."""
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
        cause = getattr(error, "cause", None) or error  # of an error out of another process of Ray's
        reason = " ".join(str(cause).split())[:500]
        if not isinstance(cause, (RewardFailure, SDPOError)):
            reason = f"{row.get('data_source')}: {type(cause).__name__}: {reason}"
        output.reward_score = 0.0
        output.extra_fields[EXTRA] = {
            **dict.fromkeys(self._columns),
            FAILURE: reason,
            REFUSAL: reason if isinstance(cause, SDPOError) else "",
        }


class OneStepOffWorker(KeepsFailures, AgentLoopWorker):  # type: ignore[misc]
    """Of the one-step-off trainer."""


class QueueWorker(KeepsFailures, AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # type: ignore[misc]
    """Of the V1 trainers."""


class OneStepOffManager(AgentLoopManager):  # type: ignore[misc]
    """Named by ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.agent_loop_workers_class = ray.remote(OneStepOffWorker)
        super().__init__(*args, **kwargs)


class QueueManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """The same for the V1 trainers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(QueueWorker)
