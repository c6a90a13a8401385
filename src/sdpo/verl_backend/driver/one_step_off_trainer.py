"""verl's one-step-off-policy trainer with the teacher's batch and fixes for verl 0.9.1.

    step k         rollouts k complete   | sync weights k-1 | start sampling k+1  | teacher prompts | train on k
    validation     rollouts k+1 complete | sync weights k   | sample validation responses
    step k+1       rollouts k+1 complete ...

Rollouts k+1 are sampled during step k by the weights before its update, so they are one update old. A validation waits
for them, because it needs the weights after the update.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoConfig
from verl import DataProto
from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer

from sdpo.models.multimodal.processor import MultimodalProcessor
from sdpo.observability import metrics
from sdpo.verl_backend.config.schema import read_self_distillation
from sdpo.verl_backend.driver.failed_rewards import (
    FAILURE,
    REFUSAL,
    FailedRewardsMixin,
    check_failures,
    correct_advantages,
    replace_scores,
)
from sdpo.verl_backend.driver.health import HealthChecksMixin, RunHealth, summarize_rollouts
from sdpo.verl_backend.driver.teacher_batch import Rollout, TeacherBatchBuilder
from sdpo.verl_backend.driver.tools import PromptTokenizer, load_tool_schemas, read_chat_settings
from sdpo.verl_backend.worker.packing import count_response_tokens

PREFETCHED = "prefetched.pt"


def build_teacher_batch(
    config: DictConfig, tokenizer: Any, processor: Any, max_steps: int
) -> TeacherBatchBuilder | None:
    """Return the builder of the teacher's fields; None for other losses than SDPO's."""
    settings = read_self_distillation(config.actor_rollout_ref.actor)
    if settings is None:
        return None
    model = config.actor_rollout_ref.model
    architecture = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    window = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    reader = MultimodalProcessor(processor, config.data.max_pixels) if processor is not None else tokenizer
    reader = PromptTokenizer(
        reader, load_tool_schemas(config.actor_rollout_ref.rollout), read_chat_settings(config.data)
    )
    return TeacherBatchBuilder(
        settings, reader, window, config.data.seed or 0, max_steps, solution_key=config.data.solution_key
    )


def rename_metrics(values: dict[str, Any]) -> None:
    """Remove verl's prefix ``actor/`` from sdpo's metrics, in place."""
    for name in [name for name in values if name.removeprefix("actor/") in metrics.DESCRIPTIONS]:
        values[name.removeprefix("actor/")] = values.pop(name)


def find_resumed(config: DictConfig, step: int) -> Path | None:
    """Return the checkpoint that a run resumes from; None for a new run, which is at step 0."""
    if not step:
        return None
    if config.trainer.resume_mode == "resume_path":
        return Path(config.trainer.resume_from_path)
    return Path(config.trainer.default_local_dir) / f"global_step_{step}"


class SelfDistillationOneStepOffTrainer(FailedRewardsMixin, HealthChecksMixin, OneStepOffRayTrainer):  # type: ignore[misc]
    """One step off policy: sampling GPUs and training GPUs work at the same time.

    Fixes for verl 0.9.1:

    - An error while the next batch is fetched is raised; verl prints it and continues with None
      (https://github.com/verl-project/verl/pull/6558 improves the message).
    - ``trainer.rollout_data_dir`` works; verl does not start its writer. No upstream issue found (2026-11).
    - ``training/epoch`` counts. No upstream issue found (2026-11).
    - A step's validation uses the weights after its update. No upstream issue found (2026-11).
    - A checkpoint contains the batch sampled ahead, with which a resumed run continues. No upstream issue found
      (2026-11).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_dump_executor()
        self.teacher_batch = build_teacher_batch(self.config, self.tokenizer, self.processor, self.total_training_steps)
        self._fetch_error: Exception | None = None
        self._prefetched: Any = None
        self._loader_state: Any = None
        self._first_epoch = 0
        self._saved_step = -1

    # The teacher's batch

    def _fit_compute_reward(self, batch: DataProto) -> DataProto:
        batch = super()._fit_compute_reward(batch)
        names = [name for name in (FAILURE, REFUSAL) if name in self.reward_extra_infos_dict]
        extras = [{name: self.reward_extra_infos_dict[name][i] for name in names} for i in range(len(batch))]
        self.failed = check_failures(extras, self.config, f"step {self.global_steps}")
        scores = self.reward_tensor.sum(-1).tolist()
        self.scores = [math.nan if failed else score for failed, score in zip(self.failed, scores, strict=True)]
        if self.teacher_batch is not None:
            rollouts = self._read_rollouts(batch, self.teacher_batch)
            fields, values = self.teacher_batch.build(rollouts, self.global_steps)
            for name, tensor in fields.items():
                batch.batch[name] = tensor
            self.metrics.update(values)
        versions = [v for v in batch.non_tensor_batch.get("min_global_steps", []) if v is not None]
        if versions:
            # verl gives the weights before step k the version k, and the initial weights the version 0 or 1.
            self.metrics[metrics.STALENESS] = self.global_steps - max(min(versions), 1)
        return batch

    def _read_rollouts(self, batch: DataProto, teacher_batch: TeacherBatchBuilder) -> list[Rollout]:
        lengths = count_response_tokens(batch.batch).tolist()
        fields = batch.non_tensor_batch
        extra_info = fields.get("extra_info", [None] * len(lengths))
        feedback = self.reward_extra_infos_dict.get("feedback", [None] * len(lengths))
        return [
            Rollout(
                uid=fields["uid"][i],
                messages=list(fields["raw_prompt"][i]),
                response_ids=batch.batch["responses"][i, : lengths[i]].tolist(),
                response_mask=batch.batch["response_mask"][i, : lengths[i]].tolist(),
                score=score,
                feedback=feedback[i],
                ground_truth=teacher_batch.read_solution(fields["reward_model"][i], extra_info[i]),
            )
            for i, score in enumerate(self.scores)
        ]

    def _fit_compute_advantage(self, batch: DataProto) -> DataProto:
        batch = super()._fit_compute_advantage(batch)
        values = batch.batch
        advantages = correct_advantages(
            values["advantages"].unbind(),
            values["response_mask"].unbind(),
            values["token_level_rewards"].sum(-1),
            self.failed,
            batch.non_tensor_batch["uid"].tolist(),
            self.config,
        )
        values["advantages"] = torch.stack(advantages)
        return batch

    def _fit_collect_metrics(self, batch: DataProto) -> None:
        super()._fit_collect_metrics(batch)
        replace_scores(self.metrics, self.scores, self.config)

    def _fit_update_actor(self, batch: DataProto) -> DataProto:
        batch = super()._fit_update_actor(batch)
        rename_metrics(self.metrics)
        lengths = count_response_tokens(batch.batch).tolist()
        self.metrics |= summarize_rollouts(self.scores, lengths, self.config.data.max_response_length)
        self.metrics |= self.health.check(self.global_steps, self.metrics)
        self.is_last_step |= self.health.is_stopped  # so that the step is saved and validated like the last
        return batch

    # Fetching

    def _create_continuous_iterator(self) -> Iterator[tuple[int, Any]]:
        """Yield batches with their epoch, from the loader's position, without end."""
        for epoch in itertools.count(self._first_epoch):
            try:
                yield from ((epoch, batch) for batch in self.train_dataloader)
            except Exception as error:
                self._fetch_error = error  # verl prints it and continues with None
                raise

    async def _async_gen_next_batch(self, continuous_iterator: Any) -> Any:
        if self._prefetched is not None:
            fetched, self._prefetched = self._prefetched, None
            return fetched
        self._loader_state = self.train_dataloader.state_dict()
        fetched = await super()._async_gen_next_batch(continuous_iterator)
        if fetched is None:
            raise RuntimeError("the next batch could not be fetched") from self._fetch_error
        return fetched

    async def _fit_generate(self, batch_data_future: Any, continuous_iterator: Any) -> Any:
        self.epoch = (await batch_data_future)[2]
        self.metrics["training/epoch"] = self.epoch
        return await super()._fit_generate(batch_data_future, continuous_iterator)

    # The end of a step, after the batch ahead is complete

    async def fit_step(self, batch_data_future: Any, continuous_iterator: Any) -> Any:
        step = self.global_steps
        next_batch_future = await super().fit_step(batch_data_future, continuous_iterator)
        if self._saved_step == step:
            try:
                await self._save_batch_ahead(next_batch_future)
            finally:  # without this batch, a resumed run samples its prompts again
                self.health.complete_checkpoint(step)
        await self._evaluate(next_batch_future)
        super()._fit_postprocess_step()
        if self.is_last_step:
            self._shutdown_dump_executor()
        return next_batch_future

    async def _evaluate(self, next_batch_future: Any) -> None:
        """Validate with the weights after the update, which verl has not synced to the sampler yet."""
        every = self.config.trainer.test_freq
        if every <= 0 or (self.global_steps % every and not self.is_last_step):
            return
        if next_batch_future is not None:
            await next_batch_future  # the weights before the update must sample all of it
        self._fit_update_weights()
        super()._fit_validate()
        self.metrics[metrics.TIME_EVAL] = self.timing_raw["testing"]

    def _fit_validate(self) -> None:
        """Do nothing: ``fit_step`` calls ``_evaluate`` later."""

    def _fit_postprocess_step(self) -> None:
        """Do nothing: ``fit_step`` calls verl's method, which logs the metrics, after the validation."""

    # Saving

    def _complete_checkpoint(self) -> None:
        """Postpone completion: ``fit_step`` also saves the batch ahead, which is still being sampled."""
        self._saved_step, folder = self.global_steps, self._checkpoint_folder(self.global_steps)
        (folder / PREFETCHED).unlink(missing_ok=True)  # written by a process that was killed in this step
        if self._loader_state is not None and self.global_steps < self.total_training_steps:
            torch.save(self._loader_state, folder / "data.pt")

    async def _save_batch_ahead(self, future: Any) -> None:
        if future is not None:
            state = {"batch": await future, "loader": self.train_dataloader.state_dict()}
            torch.save(state, self._checkpoint_folder(self.global_steps) / PREFETCHED)

    def _load_checkpoint(self) -> Any:
        super()._load_checkpoint()
        self._first_epoch = self.global_steps // len(self.train_dataloader)
        folder = find_resumed(self.config, self.global_steps)
        self.health = RunHealth(self.config, self.teacher_batch, self.actor_rollout_wg, folder)
        saved = folder / PREFETCHED if folder is not None else None
        if saved is not None and saved.is_file():
            state = torch.load(saved, weights_only=False)
            self._prefetched = state["batch"]
            self._first_epoch = self._prefetched[2]
            self.train_dataloader.load_state_dict(state["loader"])

    def _checkpoint_folder(self, step: int) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{step}"
