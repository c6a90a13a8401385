"""The native trainer on a GPU: updates equal those on a CPU; resume, one step off policy, out of memory."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vision_language import make_messages

from sdpo.config.root import SDPOConfig
from sdpo.models.lora.adapters import add_adapters
from sdpo.observability import metrics
from sdpo.rewards.base import Row
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import TrainingSample
from sdpo.trainer.trainer import SDPOTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DEVICE = "cuda"
MakeRun = Callable[..., SDPOConfig]


def compute_update(student: Any, samples: list[TrainingSample], config: SDPOConfig) -> tuple[dict[str, float], Tensor]:
    """Metrics and gradients of the update's last optimizer step."""
    actor = build_actor(student, config, pad_token_id=0)
    gradients: list[Tensor] = []

    def record(*_: Any) -> None:
        trained = [p for p in student.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten().cpu().float() for p in trained]))

    actor.optimizer.register_step_pre_hook(record)
    return actor.update_policy(samples), gradients[-1]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-4),
        ({"self_distillation__alpha": 0.5, "self_distillation__policy_loss_weight": 0.3}, 1e-4),
        ({"self_distillation__alpha": 0.5, "self_distillation__distillation_topk": 5}, 1e-4),
        ({"self_distillation__alpha": 1.0, "self_distillation__full_logit_distillation": False}, 1e-4),
        ({"self_distillation__teacher_regularization": "trust-region"}, 1e-4),
        ({"actor__kl_loss_coef": 0.1, "actor__entropy_coeff": 0.01}, 1e-4),
        ({"lora__rank": 4}, 1e-4),
        ({"actor__gradient_checkpointing": True}, 1e-4),
        ({"actor__max_tokens_per_micro_batch": 40}, 1e-4),
        ({"actor__autocast": True}, 0.05),
    ],
)
def test_update_equals_that_on_a_cpu(
    settings: dict[str, Any],
    tolerance: float,
    make_model: Callable[..., Any],
    make_samples: Callable[..., list[TrainingSample]],
    make_run: MakeRun,
) -> None:
    samples = make_samples(6)
    config = make_run(**settings)
    results = []
    for device in ("cpu", DEVICE):
        student = make_model()
        if config.lora.rank:
            torch.manual_seed(0)
            add_adapters(student, config.lora)
            for name, param in student.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(param, std=0.2)
        results.append(compute_update(student.to(device), samples, config))
    (expected, expected_gradients), (actual, gradients) = results
    assert float((gradients - expected_gradients).norm() / expected_gradients.norm()) < tolerance
    for name in (metrics.LOSS, metrics.GRAD_NORM, metrics.DISTILLATION_LOSS, metrics.ENTROPY):
        assert actual[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_are_read_as_on_a_cpu(
    family: str, vision_model: Callable[[str], Any], make_run: MakeRun, make_sample: Callable[..., TrainingSample]
) -> None:
    log_probs = []
    for device in ("cpu", DEVICE):
        loaded = vision_model(family)
        loaded.model.to(device)
        messages = make_messages(2, "how long?")
        prompt = Prompt(Row("tiny", messages, {}), list(loaded.encode(messages).token_ids))
        sample = make_sample(prompt, [11, 12, 13])
        actor = build_actor(loaded.model, make_run(), pad_token_id=0, vision=loaded.vision)
        log_probs.append(actor.compute_log_probs([sample])[0].cpu())
    torch.testing.assert_close(*log_probs, atol=1e-3, rtol=1e-3)


def read_weights(config: SDPOConfig, step: int) -> dict[str, Tensor]:
    folder = Path(config.output_dir) / "checkpoints" / f"step_{step}"
    names = ("model.safetensors", "teacher/model.safetensors")
    return {f"{name}:{key}": value for name in names for key, value in load_file(folder / name).items()}


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_resumed_run_ends_as_the_uninterrupted_one(max_staleness: int, make_task_run: MakeRun, tmp_path: Path) -> None:
    """With staleness 1 the sampler is another process on the same GPU. Kernels on GPUs add in varying order."""
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 4,
        "optim__lr": 1e-3,
        "actor__device": DEVICE,
        "rollout__device": DEVICE,
        "max_staleness": max_staleness,
    }
    SDPOTrainer(uninterrupted := make_task_run(**settings, output_dir=str(tmp_path / "run"))).train()
    resumed = replace(uninterrupted, output_dir=str(tmp_path / "resumed"))
    shutil.copytree(uninterrupted.output_dir, resumed.output_dir)
    shutil.rmtree(Path(resumed.output_dir) / "checkpoints" / "step_4")
    SDPOTrainer(replace(resumed, resume_mode="required")).train()
    expected = read_weights(uninterrupted, 4)
    for name, value in read_weights(resumed, 4).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3, msg=name)
    rows = map(json.loads, (Path(resumed.output_dir) / "metrics.jsonl").read_text().splitlines())
    staleness = [row[metrics.STALENESS] for row in rows if metrics.STALENESS in row]
    assert staleness == [0.0] + 3 * [float(max_staleness)]


def test_out_of_memory_halves_the_micro_batch(
    make_sample: Callable[..., TrainingSample], make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8)).eval()
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 1000, (length,), generator=generator).tolist()

    samples = [make_sample(ids(200), ids(100), ids(300)) for _ in range(32)]
    config = make_run(data__train_batch_size=16, rollout__n=2, rollout__max_response_length=100)

    def measure(max_tokens: int) -> tuple[Actor, dict[str, float], int]:
        student = copy.deepcopy(model).to(DEVICE)
        changed = replace(config, actor=replace(config.actor, max_tokens_per_micro_batch=max_tokens))
        actor = build_actor(student, changed, pad_token_id=0)
        torch.cuda.reset_peak_memory_stats()
        values = actor.update_policy(samples)
        return actor, values, torch.cuda.max_memory_allocated()

    _, expected, small = measure(1000)
    _, _, large = measure(100_000)
    assert large > 2 * small
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total)
    try:
        with caplog.at_level(logging.WARNING):
            actor, values, _ = measure(100_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1000 <= actor.budget.max_tokens < 100_000
    assert any("out of memory in a micro-batch" in text for text in caplog.messages)
    assert values[metrics.LOSS] == pytest.approx(expected[metrics.LOSS], rel=1e-4)
    assert values[metrics.GRAD_NORM] == pytest.approx(expected[metrics.GRAD_NORM], rel=1e-3)
