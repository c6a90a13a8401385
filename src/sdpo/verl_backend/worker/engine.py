"""verl's FSDP2 engine with a teacher, and with the SDPO loss computed inside the student's output layer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import PreTrainedModel
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import EngineTrainModeCtx, FSDPEngineWithLMHead

from sdpo.algorithm.regularization import Regularization
from sdpo.algorithm.sums import Sums, add_sums
from sdpo.algorithm.teacher import is_averaged
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import ConfigError
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.dispatch import fused_linear_sdpo_loss, score_tokens
from sdpo.models.optimizer import UpdateRounding, compile_on_gpus_only
from sdpo.models.output_head import suppress_tokens
from sdpo.models.training_mode import set_training_mode
from sdpo.models.warm_up import start_warm_up_at_first_update
from sdpo.observability import metrics
from sdpo.observability.metrics import UPDATE_ROUNDING
from sdpo.verl_backend.compat import workarounds
from sdpo.verl_backend.config.schema import ACTOR, read_lora
from sdpo.verl_backend.driver.vocabulary import find_forbidden_ids
from sdpo.verl_backend.worker.lora import wrap_with_adapters
from sdpo.verl_backend.worker.mini_batch import add_token_weights, reduce_sums, reserve_budget_for_teacher
from sdpo.verl_backend.worker.nonfinite import find_finite_tokens, find_nonfinite_samples
from sdpo.verl_backend.worker.output_head import compute_at_head
from sdpo.verl_backend.worker.packed_rows import check_packed_rows
from sdpo.verl_backend.worker.packing import SAMPLE_NUMBERS, PackedTokens, drop_samples, pack_tokens
from sdpo.verl_backend.worker.teacher_engine import TeacherEngine, TeacherHead
from sdpo.verl_backend.worker.teacher_inputs import build_teacher_inputs
from sdpo.verl_backend.worker.vision_tower import freeze_vision_tower, share_images

logger = logging.getLogger(__name__)

MODEL_TYPE = "self_distillation_language_model"
MAX_SKIPPED_IN_A_ROW = 3

workarounds.skip_trl_value_head()


@dataclass(frozen=True)
class EngineSettings:
    """SDPO's settings of an engine.

    Args:
        self_distillation: loss and teacher.
        loss_agg_mode: how token losses become one number.
        horizon: the constant divisor of ``seq-mean-token-sum-norm``.
        freeze_vision_tower: whether the vision tower stays as it is.
        regularization: KL to the reference policy and entropy in the loss.
    """

    self_distillation: SelfDistillationConfig
    loss_agg_mode: str = "token-mean"
    horizon: int = 1
    freeze_vision_tower: bool = False
    regularization: Regularization | None = None


@dataclass
class SelfDistillationEngineConfig(FSDPEngineConfig):  # type: ignore[misc]
    """verl's engine config with SDPO's settings: verl passes its own configs alone to an engine's constructor."""

    settings: EngineSettings | None = None

    @classmethod
    def extend(cls, config: FSDPEngineConfig, settings: EngineSettings) -> SelfDistillationEngineConfig:
        """Copy verl's config and add the settings."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, settings=settings)


class _UpdateMode(EngineTrainModeCtx):  # type: ignore[misc]
    """verl's context of an update, without dropout, which would make student and teacher differ."""

    def __enter__(self) -> None:
        super().__enter__()
        set_training_mode(self.engine.module, checkpoints=True)


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cuda", "cpu"])
class SelfDistillationEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """Student and teacher of one rank under FSDP2.

    Attributes:
        counts: non-finite samples and skipped updates of the current rollout batch, over all ranks; the worker reports
            and resets them.
        teacher_engine: None if nothing is distilled.
    """

    use_remove_padding: bool
    engine_config: SelfDistillationEngineConfig
    optimizer_config: FSDPOptimizerConfig

    def __init__(
        self, model_config: Any, engine_config: SelfDistillationEngineConfig, *args: Any, **kwargs: Any
    ) -> None:
        assert engine_config.settings is not None
        # verl's worker sets model_type to the name in its registry; verl's engine builds modules by the stock name.
        model_config = copy.copy(model_config)
        model_config.model_type = "language_model"
        super().__init__(model_config, engine_config, *args, **kwargs)
        self.settings = engine_config.settings
        self.config = engine_config.settings.self_distillation
        self.counts = {metrics.NONFINITE_SAMPLES: 0, metrics.SKIPPED_UPDATES: 0}
        self.teacher_engine: TeacherEngine | None = None
        self._skipped_in_a_row = 0
        self._rounding: UpdateRounding | None = None
        self._forbidden_ids: list[int] | None = None  # set in the first forward pass, which knows the vocabulary's size

    # Building, moving, saving

    def _build_module(self) -> nn.Module:
        with workarounds.keep_stock_attention(self):
            module: nn.Module = super()._build_module()
        if self.use_remove_padding:
            check_packed_rows(module)
        share_images(module)
        if self.settings.freeze_vision_tower:
            freeze_vision_tower(module)
        return module

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        # verl keeps a reference policy in pinned host memory, which needs a GPU.
        forward_only = self.engine_config.forward_only and get_device_name() != "cpu"
        with self._changed_config(forward_only=forward_only):
            wrapped: nn.Module = super()._build_fsdp_module(module)
        return wrapped

    def _build_model_optimizer(self) -> None:
        super()._build_model_optimizer()
        if not self.config.distills:
            return
        self.teacher_engine = TeacherEngine(
            self.module,
            self.config,
            build_module=self._build_teacher_module,
            processor=self.model_config.get_processor(),
            mask_head=self._mask_head,
            autocast=self._autocast,
            is_lora=self._is_lora,
            offloads=self.is_param_offload_enabled,
        )

    def _build_lora_module(self, module: PreTrainedModel) -> nn.Module:
        return wrap_with_adapters(module, read_lora(self.model_config))

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build verl's optimizer; torch's AdamW as one fused kernel on GPUs, which avoids copies of the moments."""
        config, given = self.optimizer_config, self.optimizer_config.override_optimizer_config or {}
        is_plain = (config.optimizer_impl, config.optimizer) == ("torch.optim", "AdamW")
        if is_plain and get_device_name() == "cuda" and not given.keys() & {"fused", "foreach"}:
            self.optimizer_config = replace(config, override_optimizer_config={**given, "fused": True})
        optimizer: torch.optim.Optimizer = super()._build_optimizer(module)
        if config.optimizer in ("AdamW", "AdamW8bit", "_AdamW"):
            self._rounding = UpdateRounding(optimizer, logger.warning if dist.get_rank() == 0 else lambda text: None)
        return optimizer

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Build verl's scheduler; its first update would have a learning rate of 0."""
        scheduler, config = super()._build_lr_scheduler(optimizer), self.optimizer_config
        num_steps = config.lr_warmup_steps
        if num_steps <= 0:
            num_steps = int(config.lr_warmup_steps_ratio * config.total_training_steps)
        start_warm_up_at_first_update(scheduler, num_steps)
        return scheduler

    def train_mode(self, **kwargs: Any) -> Any:
        return _UpdateMode(self, **kwargs)

    def _build_teacher_module(self) -> nn.Module:
        # A moving average is float32 for every data type of the student; FSDP2 casts gathered weights.
        dtype = "fp32" if is_averaged(self.config) else self.engine_config.model_dtype
        with self._changed_config(model_dtype=dtype):
            module: nn.Module = self._build_fsdp_module(self._build_module())
        return module.requires_grad_(False).eval()

    @contextlib.contextmanager
    def _changed_config(self, **changes: Any) -> Iterator[None]:
        given = self.engine_config
        self.engine_config = replace(given, **changes)
        try:
            yield
        finally:
            self.engine_config = given

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        # The old policy's log-probabilities (mode eval) need no teacher.
        if self.teacher_engine is not None and model and (device == "cpu" or self.mode != "eval"):
            self.teacher_engine.to(device)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.teacher_engine is not None:
            self.teacher_engine.save(Path(local_path) / "teacher")

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.teacher_engine is not None:
            self.teacher_engine.load(Path(local_path) / "teacher")

    # The teacher, between steps

    def step_teacher(self) -> None:
        """Update the teacher from the student, once per rollout batch."""
        if self.teacher_engine is not None:
            self.teacher_engine.step()

    def snapshot_best(self) -> None:
        """See ``TeacherEngine``."""
        assert self.teacher_engine is not None, "refused where nothing is distilled"
        self.teacher_engine.snapshot_best()

    def freeze_teacher(self) -> None:
        """See ``TeacherEngine.freeze``."""
        assert self.teacher_engine is not None, "refused where nothing is distilled"
        self.teacher_engine.freeze()

    # Training

    def optimizer_step(self) -> float:
        with compile_on_gpus_only(get_device_name()):
            norm: float = super().optimizer_step()
        self._count_skipped(norm)
        return norm

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        output = super().train_batch(data, loss_function)
        lost = self._rounding.take() if self._rounding is not None else None
        if lost is not None:
            output["metrics"][UPDATE_ROUNDING] = [lost]
        return output

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        workarounds.repair_position_ids(data)
        if forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only=True)
        group = self.get_data_parallel_group()
        max_tokens = tu.get_non_tensor_data(data=data, key="max_token_len_per_gpu", default=None)
        while True:
            data[SAMPLE_NUMBERS] = torch.arange(len(data))
            add_token_weights(
                data, self.settings.loss_agg_mode, self.settings.horizon, group, self.get_data_parallel_rank()
            )
            reserve_budget_for_teacher(data, group)
            self._sums: Sums = {}
            self._checked: list[tuple[Tensor, Tensor]] = []
            output = super().forward_backward_batch(data, loss_function)
            nonfinite = find_nonfinite_samples(self._checked, data, group)
            if nonfinite is None:
                break
            own, total = nonfinite
            self.counts[metrics.NONFINITE_SAMPLES] += total
            # Masking is not enough, since NaN times 0 is NaN in the backward pass: repeat without these samples.
            self.optimizer_zero_grad()
            data = drop_samples(data, own)
            if max_tokens is not None:
                tu.assign_non_tensor(data, max_token_len_per_gpu=max_tokens)
        output["metrics"] = {name: [value] for name, value in reduce_sums(self._sums, group).items()}
        regularization = self.settings.regularization
        if regularization is not None and regularization.kl_loss_coef is not None:
            output["metrics"][metrics.KL_COEF] = [regularization.kl_loss_coef]
        return output

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        micro_batch = micro_batch.to(get_device_id())
        if forward_only:
            return self._score(micro_batch, loss_function)
        tokens = pack_tokens(micro_batch)
        tokens = replace(tokens, inputs=replace(tokens.inputs, regularization=self.settings.regularization))
        teacher = self._forward_teacher(tokens, micro_batch)

        def compute(head: LinearHead) -> Tensor:
            student = self._mask_head(head)
            temperature = float(micro_batch["temperature"])
            outputs = fused_linear_sdpo_loss(
                student,
                [part.resolve(student) for part in teacher],
                tokens.inputs,
                self.config,
                temperature=temperature,
            )
            add_sums(self._sums, metrics.name_loss_sums(outputs.sums))
            self._checked.append((tokens.sample_numbers, find_finite_tokens(tokens, outputs)))
            return outputs.loss

        inputs, _ = self.prepare_model_inputs(micro_batch)
        with self._autocast():
            loss = compute_at_head(self.module, inputs, tokens.rows, compute)
        # verl averages gradients over ranks; the token weights already are those of the mini-batch over all ranks.
        loss = loss * self.get_data_parallel_size()
        return loss, {"model_output": {}, "loss": loss.detach().item(), "metrics": {}}

    def _forward_teacher(self, tokens: PackedTokens, micro_batch: TensorDict) -> list[TeacherHead]:
        """Return the teacher's output heads; empty if no sample of the micro-batch is distilled."""
        if self.teacher_engine is None:
            return []
        model = self.module.get_base_model() if self._is_lora else self.module
        inputs, _ = self.prepare_model_inputs(build_teacher_inputs(tokens, micro_batch, model))
        heads = self.teacher_engine.forward(inputs, tokens.teacher_rows)
        return heads if tokens.teacher_sequences else []

    def _score(self, micro_batch: TensorDict, loss_function: Any) -> Any:
        """Compute log-probabilities and entropies of all tokens, in the form of verl's ``forward_step``."""
        token_ids = micro_batch["input_ids"]
        next_ids, temperature = token_ids.values().roll(-1), float(micro_batch["temperature"])
        inputs, _ = self.prepare_model_inputs(micro_batch)

        def compute(head: LinearHead) -> tuple[Tensor, Tensor]:
            return score_tokens(self._mask_head(head), next_ids, temperature=temperature)

        with self._autocast():
            values = compute_at_head(self.module, inputs, slice(None), compute)
        log_probs, entropies = (torch.nested.nested_tensor_from_jagged(v, token_ids.offsets()) for v in values)
        output = {"log_probs": log_probs}
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            output["entropy"] = entropies
        loss, loss_metrics = log_probs.values().new_ones(()), {}
        if loss_function is not None:
            loss, loss_metrics = loss_function(
                model_output=output, data=micro_batch, dp_group=self.get_data_parallel_group()
            )
        return loss, {"model_output": output, "loss": loss.detach().item(), "metrics": loss_metrics}

    def _mask_head(self, head: LinearHead) -> LinearHead:
        """Exclude the tokens that verl's sampler never draws."""
        if self._forbidden_ids is None:
            tokenizer, processor = self.model_config.tokenizer, self.model_config.processor
            self._forbidden_ids = find_forbidden_ids(tokenizer, processor, len(head.weight))
        return suppress_tokens(head, self._forbidden_ids)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(get_device_name(), dtype=self._autocast_dtype)

    def _count_skipped(self, norm: float) -> None:
        """Count an update that verl skipped because its gradient is non-finite.

        Raises:
            ConfigError: too many in a row; on all ranks alike.
        """
        skipped = not math.isfinite(norm)
        self.counts[metrics.SKIPPED_UPDATES] += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise ConfigError(
                f"{MAX_SKIPPED_IN_A_ROW} updates in a row were skipped because their gradient norm is non-finite "
                f"({norm}); lower {ACTOR}.optim.lr, or look for non-finite numbers in the model and its data"
            )
