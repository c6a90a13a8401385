"""One rank of a training step on verl's engine, case by case; ``conftest.py`` starts it as a separate process.

Usage: train_cases.py CASES.pt RESULTS.pt, with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch.distributed.tensor import distribute_tensor
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.utils.padding import left_right_2_no_padding

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.regularization import Regularization
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels import chunked_log_probs
from sdpo.kernels.fused_linear_loss import FusedOutputs, fused_linear_sdpo_loss
from sdpo.verl_backend.worker import engine as engine_module
from sdpo.verl_backend.worker.engine import EngineSettings
from sdpo.verl_backend.worker.vision_tower import share_images
from sdpo.verl_backend.worker.worker import SelfDistillationTrainingWorker

FULL = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def build_worker(case: dict[str, Any]) -> SelfDistillationTrainingWorker:
    engine = {"strategy": "fsdp2", "use_torch_compile": False, "mixed_precision": FULL, **case["engine"]}
    worker = SelfDistillationTrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=case["model"],
                use_remove_padding=case["use_remove_padding"],
                enable_gradient_checkpointing=case.get("gradient_checkpointing", False),
                override_config={"attn_implementation": case.get("attn_implementation", "sdpa")},
                **case.get("lora", {}),
            ),
            engine_config=FSDPEngineConfig(
                use_dynamic_bsz=case["max_tokens"] is not None,
                max_token_len_per_gpu=case["max_tokens"],
                infer_max_token_len_per_gpu=case["max_tokens"],
                micro_batch_size_per_gpu=case["micro_batch_size"],
                infer_micro_batch_size_per_gpu=case["micro_batch_size"],
                **engine,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=case["lr"], total_training_steps=10, **case.get("optim", {})),
            checkpoint_config=CheckpointConfig(),
        ),
        EngineSettings(
            SelfDistillationConfig(**case["settings"]),
            case["loss_agg_mode"],
            case["horizon"],
            case.get("freeze_vision_tower", False),
            Regularization(*case["regularization"]) if "regularization" in case else None,
        ),
    )
    worker.reset()
    worker.set_loss_fn(lambda **_: None)  # the engine computes the loss itself
    set_weights(worker.engine.module, case.get("adapters", {}))
    return worker


@torch.no_grad()
def set_weights(module: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copy full tensors, by the names of ``full_weights``, into the shards."""
    params = {plain_name(name): param for name, param in module.named_parameters()}
    for name, value in values.items():
        params[name].copy_(distribute_tensor(value, params[name].device_mesh, params[name].placements))


def plain_name(name: str) -> str:
    """Remove the prefix of PEFT's wrapper."""
    return name.removeprefix("base_model.model.")


def take_own_rows(batch: dict[str, Any]) -> dict[str, Any]:
    size = len(batch["input_ids"]) // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    return {name: values[mine] for name, values in batch.items()}


def send(case: dict[str, Any], batch: dict[str, Any], **settings: Any) -> TensorDict:
    """Return this rank's part of a batch in the form that verl's trainer sends."""
    mine = take_own_rows(batch)
    images = mine.pop("multi_modal_inputs", None)
    data = left_right_2_no_padding(TensorDict(mine, batch_size=len(mine["input_ids"])))
    if images is not None:
        data["multi_modal_inputs"] = NonTensorStack(*map(NonTensorData, images))
    tu.assign_non_tensor(data, temperature=case["temperature"], **settings)
    return data


def learn(worker: SelfDistillationTrainingWorker, case: dict[str, Any], batch: dict[str, Any]) -> Any:
    data = send(
        case,
        batch,
        mini_batch_size=case["mini_batch_size"],
        epochs=1,
        seed=0,
        dataloader_kwargs={"shuffle": False},
        compute_loss=True,
    )
    return tu.get(worker.train_mini_batch(data), "metrics")


def score(
    worker: SelfDistillationTrainingWorker, case: dict[str, Any], batch: dict[str, Any], **settings: Any
) -> dict[str, Any]:
    """Compute log-probabilities and entropies of this rank's responses, as for the old policy."""
    output = worker.infer_batch(send(case, batch, calculate_entropy=True, compute_loss=False, **settings))
    lengths = take_own_rows(batch)["response_mask"].sum(1).tolist()
    return {
        name: [values[-length - 1 : -1] for values, length in zip(output[name].unbind(), lengths, strict=True)]
        for name in ("log_probs", "entropy")
    }


def add_reference(worker: SelfDistillationTrainingWorker, case: dict[str, Any], batch: dict[str, Any]) -> None:
    """Add the reference policy's log-probabilities to the batch, as the trainer does."""
    output = worker.infer_batch(send(case, batch, calculate_entropy=False, compute_loss=False))
    log_probs = output["log_probs"]
    mask = take_own_rows(batch)["response_mask"]
    mine = torch.zeros(mask.shape)
    for i, (values, length) in enumerate(zip(log_probs.unbind(), mask.sum(1).tolist(), strict=True)):
        mine[i, :length] = values[-length - 1 : -1]
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine)
    batch["ref_log_prob"] = torch.cat(ranks)


def find_largest(call: Callable[[], Any]) -> int:
    """Return the bytes of the largest tensor that a call allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(event["args"]["Bytes"] for event in events if event.get("name") == "[memory]")


def full_weights(module: torch.nn.Module | None) -> dict[str, torch.Tensor]:
    if module is None:
        return {}
    return {
        plain_name(name): (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in module.state_dict().items()
    }


def teacher_weights(worker: SelfDistillationTrainingWorker) -> dict[str, torch.Tensor]:
    """Return the teacher's full weights, or with LoRA its deltas; empty if it stores none."""
    teacher = worker.engine.teacher_engine
    if teacher is None:
        return {}
    if teacher.deltas is not None:
        return {name: delta.full_tensor().clone() for name, delta in teacher.deltas.full.items()}
    return full_weights(teacher.module)


def sent_weights(worker: SelfDistillationTrainingWorker) -> dict[str, torch.Tensor]:
    """Return the weights that are synced to the sampler."""
    params, _ = worker.engine.get_per_tensor_param()
    return {name: value.clone() for name, value in params}


def count_bytes(worker: SelfDistillationTrainingWorker) -> dict[str, int]:
    """Count this rank's bytes: weights of all modules, each once, the teacher's deltas, moments."""
    engine = worker.engine
    teacher = engine.teacher_engine
    modules = [engine.module, *([teacher.teacher.module] if teacher.teacher.module is not None else [])]
    params = {id(p): p for module in modules for p in module.parameters()}
    deltas = teacher.deltas.full if teacher.deltas is not None else {}
    return {
        "weights": sum(p.to_local().nbytes for p in params.values()),
        "deltas": sum(delta.to_local().nbytes for delta in deltas.values()),
        "moments": sum(
            value.to_local().nbytes
            for state in engine.optimizer.state.values()
            for value in state.values()
            if hasattr(value, "to_local")
        ),
    }


def record_log_probs(recorded: list[dict[str, Any]]) -> None:
    """Record the student's and teacher's log-probabilities of sampled tokens, per micro-batch."""

    def compute(student: Any, teacher: Any, tokens: TokenBatch, config: Any, **settings: Any) -> FusedOutputs:
        outputs = fused_linear_sdpo_loss(student, teacher, tokens, config, **settings)
        recorded.append(
            {
                "ids": tokens.sampled_ids,
                "student": outputs.student_log_probs,
                "distilled": tokens.distilled,
                "teacher": outputs.teacher_log_probs,
            }
        )
        return outputs

    engine_module.fused_linear_sdpo_loss = compute


def record_moves(worker: SelfDistillationTrainingWorker) -> list[str]:
    """Record moves of weights between device and host, and updates of the teacher, in order."""
    engine, moves = worker.engine, list[str]()
    move, step_teacher = engine.to, engine.step_teacher

    def recorded_move(device: str, *args: Any, **kwargs: Any) -> None:
        moves.append("moved")
        move(device, *args, **kwargs)

    def recorded_step() -> None:
        moves.append("followed")
        step_teacher()

    engine.to, engine.step_teacher = recorded_move, recorded_step
    return moves


def count_patches(tower: Any, seen: list[int]) -> None:
    def count(_: Any, args: Any) -> None:
        seen[0] += len(args[0])

    tower.patch_embed.register_forward_pre_hook(count)


def gather_in_order(recorded: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Concatenate all ranks' records; in the samples' order if micro-batches have a fixed size."""
    if not recorded:
        return {}
    own = {name: torch.cat([each[name] for each in recorded]) for name in recorded[0]}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {name: torch.cat([each[name] for each in ranks]) for name in own}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    if not case.get("share_images", True):
        engine_module.share_images = lambda _: None
    worker = build_worker(case)
    engine_module.share_images = share_images
    if case.get("regularization", (None,))[0] is not None:
        changes = {"settings": {"policy_loss_weight": 1.0}, "engine": {**case["engine"], "forward_only": True}}
        reference = build_worker({**case, **changes})
        for batch in case["batches"]:
            add_reference(reference, case, batch)
    num_passes, forward_step = [0], worker.engine.forward_step

    def counted(*args: Any, forward_only: bool, **kwargs: Any) -> Any:
        num_passes[0] += not forward_only
        return forward_step(*args, forward_only=forward_only, **kwargs)

    worker.engine.forward_step = counted
    recorded: list[dict[str, Any]] = []
    num_patches = [0]
    if case.get("record"):
        record_log_probs(recorded)
        module = worker.engine.module
        model = module.get_base_model() if hasattr(module, "get_base_model") else module
        count_patches(model.model.visual, num_patches)
    else:
        engine_module.fused_linear_sdpo_loss = fused_linear_sdpo_loss
    before = teacher_weights(worker)
    moves = record_moves(worker)
    values, students, teachers, scores, base_scores = [], [], [], [], []
    actions = case.get("actions", {})  # methods of the engine, by the number of batches after which they are called
    for action in actions.get(0, []):
        getattr(worker.engine, action)()
    for number, batch in enumerate(case["batches"], start=1):
        if case.get("score"):
            scores.append(score(worker, case, batch))
        if case.get("score_base"):
            base_scores.append(score(worker, case, batch, no_lora_adapter=True))
        values.append(learn(worker, case, batch))
        for action in actions.get(number, []):
            getattr(worker.engine, action)()
        students.append(full_weights(worker.engine.module))
        teachers.append(teacher_weights(worker))
    result = {
        "metrics": values,
        "students": students,
        "teachers": teachers,
        "scores": scores,
        "base_scores": base_scores,
        "teacher_before": before,
        "num_passes": num_passes[0],
        "log_probs": gather_in_order(recorded),
        "num_patches": num_patches[0],
        "moves": moves,
        "teacher": teacher_weights(worker),
    }
    if case.get("send"):
        result["sent"] = sent_weights(worker)
        result["kept"] = count_bytes(worker)
        result["after sending"] = full_weights(worker.engine.module)
    if "buffer_bytes" in case:
        chunked_log_probs.BUFFER_BYTES, usual = case["buffer_bytes"], chunked_log_probs.BUFFER_BYTES
        result["largest"] = find_largest(lambda: learn(worker, case, case["batches"][0]))
        result["largest_of_scores"] = find_largest(lambda: score(worker, case, case["batches"][0]))
        chunked_log_probs.BUFFER_BYTES = usual
    if "checkpoint" in case:
        worker.engine.save_checkpoint(case["checkpoint"], global_step=1)
        again = build_worker({**case, "settings": {**case["settings"], **case.get("changed", {})}})
        again.engine.load_checkpoint(case["checkpoint"])
        result["loaded_teacher"] = teacher_weights(again)
        result["loaded_steps"] = again.engine.teacher_engine.teacher.num_steps
        for action in case.get("actions_after_loading", []):
            getattr(worker.engine, action)()
            getattr(again.engine, action)()
        for each in (worker, again):
            torch.manual_seed(1)  # of stochastic rounding
            learn(each, case, case["batches"][0])
        result["continued"] = [
            {
                **full_weights(w.engine.module),
                **{f"teacher.{k}": v for k, v in teacher_weights(w).items()},
            }
            for w in (worker, again)
        ]
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = torch.load(sys.argv[1], weights_only=False)
    results = {}
    for name, case in cases.items():
        try:
            results[name] = run_case(case)
        except Exception as error:  # expected in some cases: return it
            if not case.get("may_fail"):
                raise
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    if os.environ["RANK"] == "0":
        torch.save(results, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
