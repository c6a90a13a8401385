"""verl's FSDP2 engine with a teacher beside the student and the SDPO loss where the student's logits would be made."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from verl.models.transformers import monkey_patch
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from sdpo.algorithm.aggregation import compute_token_weights
from sdpo.algorithm.regularization import Regularization
from sdpo.algorithm.sums import Sums, add_sums
from sdpo.algorithm.teacher import Teacher
from sdpo.algorithm.teacher_weights import get_shards
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import ConfigError
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.dispatch import fused_linear_sdpo_loss, score_tokens
from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.models.optimizer import UpdateRounding, compile_on_gpus_only
from sdpo.models.output_head import suppress_tokens
from sdpo.observability import metrics
from sdpo.observability.metrics import UPDATE_ROUNDING
from sdpo.verl_backend.config.schema import ACTOR, read_lora
from sdpo.verl_backend.driver.vocabulary import find_forbidden_ids
from sdpo.verl_backend.worker.lora import ShardedDeltas, SharedTeacher, build_lora_teacher, wrap_with_adapters
from sdpo.verl_backend.worker.output_head import compute_at_head
from sdpo.verl_backend.worker.packing import (
    DISTILLATION_WEIGHTS,
    POLICY_WEIGHTS,
    SAMPLE_NUMBERS,
    SAMPLE_WEIGHTS,
    TEACHER_PROMPT_LENGTHS,
    PackedTokens,
    count_response_tokens,
    drop_samples,
    pack_tokens,
    pad_right,
    repair_position_ids,
)
from sdpo.verl_backend.worker.vision_tower import compute_positions, freeze_vision_tower, share_images

logger = logging.getLogger(__name__)

MODEL_TYPE = "self_distillation_language_model"
# verl patches TRL's value head under a name that TRL 1.16 no longer has, which raises; SDPO has no value head.
monkey_patch.is_trl_available = lambda: False
MAX_SKIPPED_IN_A_ROW = 3
FORWARD_SETTINGS = ("temperature", "use_remove_padding", "pad_mode", "pad_token_id")


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cuda", "cpu"])
class SelfDistillationEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """Student and teacher under FSDP2.

    ``configure`` must be called between construction and ``initialize``.
    """

    use_remove_padding: bool

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model_config, *args, **kwargs)
        self._rounding: UpdateRounding | None = None
        self._forbidden_ids: list[int] | None = None  # found at the first output layer, whose rows they end with
        model_config.model_type = "language_model"  # what verl builds modules by; ours chose this class

    def configure(
        self,
        config: SelfDistillationConfig,
        loss_agg_mode: str,
        horizon: int,
        freeze_vision_tower: bool = False,
        regularization: Regularization | None = None,
    ) -> None:
        """Set what to distil, how token losses are aggregated, whether the vision tower learns, and what is added."""
        self.config = config
        self.loss_agg_mode = loss_agg_mode
        self.horizon = horizon
        self.freeze_vision_tower = freeze_vision_tower
        self.regularization = regularization
        # Over all ranks, of the rollout batch that is being learned; whoever reports them begins anew.
        self.counts = {metrics.NONFINITE_SAMPLES: 0, metrics.SKIPPED_UPDATES: 0}
        self._skipped_in_a_row = 0
        # This rank's shards of the student at its best evaluation, on the host, if the student may have to go back.
        self._best: dict[str, Tensor] | None = None

    # Building, moving, saving

    def _build_module(self) -> nn.Module:
        # verl's attention for packed rows calls flash-attn, even with sdpa; transformers' own separates the sequences
        # of a packed row by their position ids, with any implementation.
        packs_rows, self.use_remove_padding = self.use_remove_padding, False
        try:
            module: nn.Module = super()._build_module()
        finally:
            self.use_remove_padding = packs_rows
        share_images(module)
        if self.freeze_vision_tower:
            freeze_vision_tower(module)
        return module

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        # verl keeps what is only read, a reference policy, in pinned host memory, which there is none of without a GPU.
        forward_only = self.engine_config.forward_only
        object.__setattr__(self.engine_config, "forward_only", forward_only and get_device_name() != "cpu")
        try:
            wrapped: nn.Module = super()._build_fsdp_module(module)
        finally:
            object.__setattr__(self.engine_config, "forward_only", forward_only)
        return wrapped

    def _build_model_optimizer(self) -> None:
        super()._build_model_optimizer()
        self.teacher: Teacher | None = None
        # What the teacher holds for itself: a whole model, or with LoRA its deltas; or neither.
        self._teacher_module: nn.Module | None = None
        self._teacher_deltas: ShardedDeltas | None = None
        self._teacher_checkpoints: FSDPCheckpointManager | None = None
        if not self.config.distills:
            return
        if self._is_lora:
            self.teacher = build_lora_teacher(self.module, self.config)
            weights = self.teacher.weights
            self._teacher_deltas = weights if isinstance(weights, ShardedDeltas) else None
            return
        if self.config.teacher_regularization != "live":
            self._teacher_module = self._build_teacher_module()
            self._teacher_checkpoints = FSDPCheckpointManager(
                model=self._teacher_module,
                processing_class=self.model_config.get_processor(),
                checkpoint_config=CheckpointConfig(save_contents=["model"], load_contents=["model"]),
            )
        self.teacher = Teacher(self._teacher_module, self.config)

    def _build_lora_module(self, module: PreTrainedModel) -> nn.Module:
        return wrap_with_adapters(module, read_lora(self.model_config))

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """verl's, in one kernel where that is torch's AdamW on GPUs, which otherwise copies all of the moments."""
        config, given = self.optimizer_config, self.optimizer_config.override_optimizer_config or {}
        is_plain = (config.optimizer_impl, config.optimizer) == ("torch.optim", "AdamW")
        if is_plain and get_device_name() == "cuda" and not given.keys() & {"fused", "foreach"}:
            object.__setattr__(config, "override_optimizer_config", {**given, "fused": True})
        optimizer: torch.optim.Optimizer = super()._build_optimizer(module)
        if config.optimizer in ("AdamW", "AdamW8bit", "_AdamW"):
            self._rounding = UpdateRounding(optimizer, logger.warning if dist.get_rank() == 0 else lambda text: None)
        return optimizer

    def _build_teacher_module(self) -> nn.Module:
        # Shards of a moving average are float32 whatever the student's are; FSDP2 casts what it gathers.
        dtype = self.engine_config.model_dtype
        if self.config.teacher_regularization == "ema":
            object.__setattr__(self.engine_config, "model_dtype", "fp32")
        try:
            module: nn.Module = self._build_fsdp_module(self._build_module())
        finally:
            object.__setattr__(self.engine_config, "model_dtype", dtype)
        return module.requires_grad_(False).eval()

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        # Log-probabilities of the old policy need no teacher.
        if not model or (device != "cpu" and self.mode == "eval"):
            return
        if self._teacher_deltas is not None:
            self._teacher_deltas.to(device)
        if self._teacher_module is not None:
            (offload_fsdp_model_to_cpu if device == "cpu" else load_fsdp_model_to_gpu)(self._teacher_module)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.teacher is None:
            return
        folder = Path(local_path) / "teacher"
        folder.mkdir(exist_ok=True)
        if self._teacher_deltas is not None:
            torch.save(self.teacher.state_dict(), folder / self._deltas_file)
        if self._teacher_checkpoints is not None:
            self._teacher_checkpoints.save_checkpoint(str(folder))
        if self._best is not None:
            torch.save(self._best, folder / self._best_file)
        if dist.get_rank() == 0:
            state = {
                "kind": self.config.teacher_regularization,
                "is_frozen": self._is_frozen,
                "num_steps": self.teacher.num_steps,
            }
            (folder / "teacher.json").write_text(json.dumps(state), encoding="utf-8")

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.teacher is None:
            return
        saved = Path(local_path) / "teacher" / "teacher.json"
        state: dict[str, Any] = {"kind": "no"}
        if saved.is_file():
            state = json.loads(saved.read_text(encoding="utf-8"))
        kind = self.config.teacher_regularization
        if state["kind"] != kind:
            raise RuntimeError(
                f"{local_path} holds {state['kind']} teacher, this run has the {kind} one; set "
                "actor_rollout_ref.actor.self_distillation.teacher_regularization to what the run was begun with"
            )
        if self._teacher_deltas is not None:
            deltas = torch.load(saved.parent / self._deltas_file, map_location="cpu", weights_only=True)
            self.teacher.load_state_dict(deltas)
        if self._teacher_checkpoints is not None:
            self._teacher_checkpoints.load_checkpoint(str(saved.parent))
        if state["is_frozen"]:
            self._freeze()
        best = saved.parent / self._best_file
        if best.is_file():
            self._best = torch.load(best, map_location="cpu", weights_only=True)
        self.teacher.num_steps = state["num_steps"]

    @property
    def _deltas_file(self) -> str:
        """This rank's, named as verl names its own files of shards."""
        return f"deltas_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"

    def optimizer_step(self) -> float:
        with compile_on_gpus_only(get_device_name()):
            norm: float = super().optimizer_step()
        self._count_skipped(norm)
        return norm

    def step_teacher(self) -> None:
        """Let the teacher follow the student, shard by shard, once a rollout batch."""
        if self.teacher is not None:
            self.teacher.step(self.module)

    @torch.no_grad()
    def snapshot_best(self) -> None:
        """Remember the student as it is, for ``freeze_teacher``."""
        self._best = {name: shard.cpu().clone() for name, shard in self._get_trained_shards().items()}

    @torch.no_grad()
    def freeze_teacher(self) -> None:
        """Let the teacher follow no more; of a live one the student goes back to its best evaluation, if there was one.

        The live teacher becomes the initial model, which is loaded again: every rank must call this.
        """
        assert self.teacher is not None, "refused where nothing is distilled"
        if self._best is not None:
            for name, shard in self._get_trained_shards().items():
                shard.copy_(self._best[name])
            self._best = None
        self._freeze()

    def _freeze(self) -> None:
        assert self.teacher is not None
        if self._is_frozen:
            return
        initial: nn.Module | None = None
        if self.teacher.module is None and self._is_lora:
            initial = SharedTeacher(self.module, None)
        elif self.teacher.module is None:
            initial = self._teacher_module = self._build_teacher_module()
            if self.is_param_offload_enabled:
                offload_fsdp_model_to_cpu(initial)
        self.teacher.freeze(initial)

    def _get_trained_shards(self) -> dict[str, Tensor]:
        shards = get_shards(self.module)
        return {name: shards[name] for name, param in self.module.named_parameters() if param.requires_grad}

    @property
    def _is_frozen(self) -> bool:
        """Whether an alarm has frozen the teacher."""
        return self.teacher is not None and self.teacher.kind != self.config.teacher_regularization

    @property
    def _best_file(self) -> str:
        """This rank's, named as verl names its own files of shards."""
        return f"best_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"

    # Learning

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        output = super().train_batch(data, loss_function)
        lost = self._rounding.take() if self._rounding is not None else None
        if lost is not None:
            output["metrics"][UPDATE_ROUNDING] = [lost]
        return output

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        repair_position_ids(data)
        if forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only=True)
        max_tokens = tu.get_non_tensor_data(data=data, key="max_token_len_per_gpu", default=None)
        while True:
            data[SAMPLE_NUMBERS] = torch.arange(len(data))
            self._add_token_weights(data)
            self._make_room_for_teacher(data)
            self._sums: Sums = {}
            self._checked: list[tuple[Tensor, Tensor]] = []
            output = super().forward_backward_batch(data, loss_function)
            broken = self._find_broken_samples(data)
            if broken is None:
                break
            # A NaN that is only masked still comes back through the backward pass: begin again without its sample.
            self.optimizer_zero_grad()
            data = drop_samples(data, broken)
            if max_tokens is not None:
                tu.assign_non_tensor(data, max_token_len_per_gpu=max_tokens)
        output["metrics"] = {name: [value] for name, value in self._reduce_sums().items()}
        if self.regularization is not None and self.regularization.kl_loss_coef is not None:
            output["metrics"][metrics.KL_COEF] = [self.regularization.kl_loss_coef]
        return output

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        micro_batch = micro_batch.to(get_device_id())
        if forward_only:
            return self._score(micro_batch, loss_function)
        tokens = pack_tokens(micro_batch)
        tokens = replace(tokens, inputs=replace(tokens.inputs, regularization=self.regularization))
        teacher = self._read_teacher(tokens, micro_batch)

        def compute(logits: LinearHead) -> Tensor:
            student = self._forbid(logits)
            # Of a teacher that has the student's output layer the weight is gathered again by now.
            parts = [
                replace(part, weight=student.weight, bias=student.bias) if self._has_students_head(module) else part
                for module, part in teacher
            ]
            temperature = float(micro_batch["temperature"])
            outputs = fused_linear_sdpo_loss(student, parts, tokens.inputs, self.config, temperature=temperature)
            add_sums(self._sums, outputs.sums)
            self._check_samples(tokens, outputs)
            return outputs.loss

        inputs, _ = self.prepare_model_inputs(micro_batch)
        with self._autocast():
            loss = compute_at_head(self.module, inputs, tokens.rows, compute)
        # verl adds up the ranks' gradients and divides by their number, and the token weights are those of the whole
        # mini-batch, over all ranks.
        loss = loss * self.get_data_parallel_size()
        return loss, {"model_output": {}, "loss": loss.detach().item(), "metrics": {}}

    def _count_skipped(self, norm: float) -> None:
        """Count an update that verl has left out, since its gradient was not finite.

        Raises:
            ConfigError: it is one of a row, over all ranks alike.
        """
        skipped = not math.isfinite(norm)
        self.counts[metrics.SKIPPED_UPDATES] += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise ConfigError(
                f"{MAX_SKIPPED_IN_A_ROW} updates in a row were left out because their gradient was not finite "
                f"({norm}), so nothing is learned any more; lower {ACTOR}.optim.lr, or look for numbers that are not "
                "finite in the model and its data"
            )

    def _check_samples(self, tokens: PackedTokens, outputs: FusedOutputs) -> None:
        """Note which tokens have a number that is not finite, without waiting for the device."""
        inputs = tokens.inputs
        finite = torch.isfinite(outputs.token_losses) & torch.isfinite(outputs.student_log_probs)
        for values in (inputs.old_log_probs, inputs.rollout_is_weights):
            if values is not None:
                finite &= torch.isfinite(values)
        if len(outputs.teacher_log_probs):
            finite[inputs.distilled] &= torch.isfinite(outputs.teacher_log_probs)
        self._checked.append((tokens.sample_numbers, finite))

    def _find_broken_samples(self, data: TensorDict) -> list[int] | None:
        """This rank's samples to leave out; None on every rank if there are none, or if one would have none left."""
        numbers, finite = (torch.cat(parts) for parts in zip(*self._checked, strict=True))
        broken = numbers[~finite].unique().tolist()
        num_samples = int(pad_right(data["response_mask"]).bool().any(1).sum())
        ranks = _gather_objects((len(broken), num_samples), self.get_data_parallel_group())
        found = sum(number for number, _ in ranks)
        if not found or any(0 < number >= available for number, available in ranks):
            return None  # then the gradient is not finite, and the update is left out
        self.counts[metrics.NONFINITE_SAMPLES] += found
        return broken

    def _score(self, micro_batch: TensorDict, loss_function: Any) -> Any:
        """Log-probabilities and entropies of all tokens of a micro-batch, as verl's ``forward_step`` returns them."""
        token_ids = micro_batch["input_ids"]
        next_ids, temperature = token_ids.values().roll(-1), float(micro_batch["temperature"])
        inputs, _ = self.prepare_model_inputs(micro_batch)

        def compute(logits: LinearHead) -> tuple[Tensor, Tensor]:
            return score_tokens(self._forbid(logits), next_ids, temperature=temperature)

        with self._autocast():
            values = compute_at_head(self.module, inputs, slice(None), compute)
        log_probs, entropies = (torch.nested.nested_tensor_from_jagged(v, token_ids.offsets()) for v in values)
        output = {"log_probs": log_probs}
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            output["entropy"] = entropies
        loss, metrics = log_probs.values().new_ones(()), {}
        if loss_function is not None:
            loss, metrics = loss_function(
                model_output=output, data=micro_batch, dp_group=self.get_data_parallel_group()
            )
        return loss, {"model_output": output, "loss": loss.detach().item(), "metrics": metrics}

    @torch.no_grad()
    def _read_teacher(self, tokens: PackedTokens, micro_batch: TensorDict) -> list[tuple[nn.Module, LinearHead]]:
        """What the teacher's logits [M, V] are made of, model by model; nothing if no sample is distilled."""
        if self.teacher is None:
            return []
        inputs, _ = self.prepare_model_inputs(self._build_teacher_inputs(tokens, micro_batch))
        parts = []
        for module, coefficient in self.teacher.policy(self.module):
            keep = partial(self._keep, coefficient=coefficient, with_weight=not self._has_students_head(module))
            with self._autocast():
                parts.append((module, compute_at_head(module, inputs, tokens.teacher_rows, keep)))
            for each in module.modules():
                if isinstance(each, FSDPModule):
                    each.reshard()  # what is still gathered would hide the shards that the average is taken of
        return parts if tokens.teacher_sequences else []

    def _has_students_head(self, module: nn.Module) -> bool:
        one, other = (each.get_output_embeddings() for each in (module, self.module))  # type: ignore[operator]
        return one is other

    def _keep(self, logits: LinearHead, coefficient: float, with_weight: bool) -> LinearHead:
        return _keep(self._forbid(logits), coefficient, with_weight)

    def _forbid(self, logits: LinearHead) -> LinearHead:
        if self._forbidden_ids is None:
            tokenizer, processor = self.model_config.tokenizer, self.model_config.processor
            self._forbidden_ids = find_forbidden_ids(tokenizer, processor, len(logits.weight))
        return suppress_tokens(logits, self._forbidden_ids)

    def _build_teacher_inputs(self, tokens: PackedTokens, micro_batch: TensorDict) -> TensorDict:
        """The teacher's sequences as a micro-batch of verl's, with the images of their samples."""
        # Every rank runs the teacher as often as every other, since its forward pass gathers shards.
        sequences = tokens.teacher_sequences or [tokens.inputs.sampled_ids.new_zeros(1)]
        images = read_images(micro_batch)
        shown = [images[i] for i in tokens.teacher_samples] or [{}]
        batch = TensorDict(
            {"input_ids": torch.nested.as_nested_tensor(sequences, layout=torch.jagged)}, batch_size=len(sequences)
        )
        if micro_batch["position_ids"].dim() == 3:
            lengths = tokens.teacher_prompt_lengths or [1]
            positions = [
                compute_positions(self._model, ids, length, inputs.get("image_grid_thw"))
                for ids, length, inputs in zip(sequences, lengths, shown, strict=True)
            ]
            batch["position_ids"] = tu.nested_tensor_from_tensor_list(positions, ragged_idx=2)
        else:
            positions = [torch.arange(len(ids), device=ids.device) for ids in sequences]
            batch["position_ids"] = torch.nested.as_nested_tensor(positions, layout=torch.jagged)
        if any(shown):
            batch["multi_modal_inputs"] = NonTensorStack(*map(NonTensorData, shown))
        for name in FORWARD_SETTINGS:
            value = tu.get_non_tensor_data(data=micro_batch, key=name, default=None)
            if value is not None:
                tu.assign_non_tensor(batch, **{name: value})
        return batch

    @property
    def _model(self) -> nn.Module:
        """The model of transformers, without PEFT's wrapper."""
        return self.module.get_base_model() if self._is_lora else self.module

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(get_device_name(), dtype=self._autocast_dtype)

    def _add_token_weights(self, data: TensorDict) -> None:
        """What one token of each sample counts, from the counts of the whole mini-batch over all ranks."""
        num_tokens = pad_right(data["response_mask"]).bool().sum(1)
        counts = torch.stack([num_tokens, num_tokens * (data[TEACHER_PROMPT_LENGTHS] > 0)])
        gathered = _gather_objects(counts.cpu(), self.get_data_parallel_group())
        start = sum(part.shape[1] for part in gathered[: self.get_data_parallel_rank()])
        mine = slice(start, start + counts.shape[1])
        policy, distillation = (
            compute_token_weights(part, self.loss_agg_mode, self.horizon)[mine] for part in torch.cat(gathered, dim=1)
        )
        data[POLICY_WEIGHTS] = policy
        data[DISTILLATION_WEIGHTS] = distillation * data[SAMPLE_WEIGHTS]

    def _make_room_for_teacher(self, data: TensorDict) -> None:
        """With dynamic batches, lower verl's token budget by the teacher's share, which verl does not count."""
        if not tu.get_non_tensor_data(data=data, key="use_dynamic_bsz", default=True):
            return
        lengths = data["input_ids"].offsets().diff()
        prompts = data[TEACHER_PROMPT_LENGTHS]
        teacher = int((prompts + (prompts > 0) * count_response_tokens(data)).sum())
        student = int(lengths.sum())
        budget = int(data["max_token_len_per_gpu"] * student / (student + teacher))
        # verl demands room for the longest sequence of all ranks from each of them.
        longest = max(_gather_objects(int(lengths.max()), self.get_data_parallel_group()))
        tu.assign_non_tensor(data, max_token_len_per_gpu=max(budget, longest))

    def _reduce_sums(self) -> dict[str, float]:
        """Metrics of the mini-batch over all ranks, from their sums and counts."""
        # A rank without distilled samples lacks names that others have.
        names = _gather_objects(list(self._sums), self.get_data_parallel_group())
        every = sorted({name for many in names for name in many})
        device, zero = get_device_id(), (torch.tensor(0.0), torch.tensor(0))
        pairs = [self._sums.get(name, zero) for name in every]
        table = torch.tensor([[float(total), float(count)] for total, count in pairs], dtype=torch.float64).to(device)
        dist.all_reduce(table, group=self.get_data_parallel_group())
        return {name: total / max(count, 1.0) for name, (total, count) in zip(every, table.tolist(), strict=True)}


def _keep(logits: LinearHead, coefficient: float, with_weight: bool) -> LinearHead:
    """Logits that outlast the forward pass, after which the weights that were gathered for it are gone."""
    kept = replace(logits, coefficient=coefficient)
    if with_weight:
        bias = None if logits.bias is None else logits.bias.clone()
        kept = replace(kept, weight=logits.weight.clone(), bias=bias)
    return kept


def read_images(micro_batch: TensorDict) -> list[dict[str, Tensor]]:
    """What the vision tower reads of each sample, by the names of its arguments; empty for a text."""
    if "multi_modal_inputs" not in micro_batch:
        return [{}] * len(micro_batch)
    entries = (getattr(entry, "data", entry) for entry in micro_batch["multi_modal_inputs"])
    return [entry or {} for entry in entries]


def _gather_objects(value: Any, group: Any) -> list[Any]:
    """Every rank's value, in the ranks' order."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
