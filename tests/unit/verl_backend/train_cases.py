"""One rank of a training step on verl's engine, case by case; run as a process of its own by ``conftest.py``.

Usage: train_cases.py CASES.pt RESULTS.pt, with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.utils.padding import left_right_2_no_padding

from sdpo.algorithm.fused import FusedOutputs, TokenInputs, compute_fused_loss
from sdpo.config import SelfDistillationConfig
from sdpo.verl_backend import engine as engine_module
from sdpo.verl_backend.towers import share_images
from sdpo.verl_backend.worker import SelfDistillationTrainingWorker

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
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=FSDPEngineConfig(
                use_dynamic_bsz=case["max_tokens"] is not None,
                max_token_len_per_gpu=case["max_tokens"],
                infer_max_token_len_per_gpu=case["max_tokens"],
                micro_batch_size_per_gpu=case["micro_batch_size"],
                infer_micro_batch_size_per_gpu=case["micro_batch_size"],
                **engine,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=case["lr"], total_training_steps=10),
            checkpoint_config=CheckpointConfig(),
        ),
        SelfDistillationConfig(**case["settings"]),
        case["loss_agg_mode"],
        case["horizon"],
        case.get("freeze_vision", False),
    )
    worker.reset()
    worker.set_loss_fn(lambda **_: None)  # the engine brings its own
    return worker


def share_of_rank(batch: dict[str, Any]) -> dict[str, Any]:
    size = len(batch["input_ids"]) // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    return {name: values[mine] for name, values in batch.items()}


def learn(worker: SelfDistillationTrainingWorker, case: dict[str, Any], batch: dict[str, Any]) -> Any:
    mine = share_of_rank(batch)
    images = mine.pop("multi_modal_inputs", None)
    data = left_right_2_no_padding(TensorDict(mine, batch_size=len(mine["input_ids"])))
    if images is not None:
        data["multi_modal_inputs"] = NonTensorStack(*map(NonTensorData, images))
    tu.assign_non_tensor(
        data,
        temperature=case["temperature"],
        mini_batch_size=case["mini_batch_size"],
        epochs=1,
        seed=0,
        dataloader_kwargs={"shuffle": False},
        compute_loss=True,
    )
    return tu.get(worker.train_mini_batch(data), "metrics")


def full_weights(module: torch.nn.Module | None) -> dict[str, torch.Tensor]:
    if module is None:
        return {}
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in module.state_dict().items()
    }


def record_log_probs(recorded: list[dict[str, Any]]) -> None:
    """Keep what student and teacher say of each sampled token, micro-batch by micro-batch."""

    def compute(student: Any, teacher: Any, tokens: TokenInputs, config: Any, **settings: Any) -> FusedOutputs:
        outputs = compute_fused_loss(student, teacher, tokens, config, **settings)
        recorded.append(
            {
                "ids": tokens.sampled_ids,
                "student": outputs.student_log_probs,
                "distilled": tokens.distilled,
                "teacher": outputs.teacher_log_probs,
            }
        )
        return outputs

    engine_module.compute_fused_loss = compute


def count_patches(tower: Any, seen: list[int]) -> None:
    def count(_: Any, args: Any) -> None:
        seen[0] += len(args[0])

    tower.patch_embed.register_forward_pre_hook(count)


def gather_in_order(recorded: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """All ranks' records, in the samples' order where micro-batches are cut by numbers."""
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
    num_passes, forward_step = [0], worker.engine.forward_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        num_passes[0] += 1
        return forward_step(*args, **kwargs)

    worker.engine.forward_step = counted
    recorded: list[dict[str, Any]] = []
    num_patches = [0]
    if case.get("record"):
        record_log_probs(recorded)
        count_patches(worker.engine.module.model.visual, num_patches)
    else:
        engine_module.compute_fused_loss = compute_fused_loss
    before = full_weights(worker.engine.teacher.module) if worker.engine.teacher else {}
    values, students = [], []
    for batch in case["batches"]:
        values.append(learn(worker, case, batch))
        students.append(full_weights(worker.engine.module))
    result = {
        "metrics": values,
        "students": students,
        "teacher_before": before,
        "num_passes": num_passes[0],
        "log_probs": gather_in_order(recorded),
        "num_patches": num_patches[0],
        "teacher": full_weights(worker.engine.teacher.module) if worker.engine.teacher else {},
    }
    if "checkpoint" in case:
        worker.engine.save_checkpoint(case["checkpoint"], global_step=1)
        again = build_worker({**case, "settings": {**case["settings"], **case.get("changed", {})}})
        again.engine.load_checkpoint(case["checkpoint"])
        result["loaded_teacher"] = full_weights(again.engine.teacher.module)
        result["loaded_steps"] = again.engine.teacher.num_steps
        learn(worker, case, case["batches"][0])
        learn(again, case, case["batches"][0])
        result["continued"] = [
            {
                **full_weights(w.engine.module),
                **{f"teacher.{k}": v for k, v in full_weights(w.engine.teacher.module).items()},
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
        except Exception as error:  # a case that must fail says with what
            if not case.get("may_fail"):
                raise
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    if os.environ["RANK"] == "0":
        torch.save(results, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
