"""An exported model computes the same logits as the run's student or teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.trainer import trainer
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.checkpoint.export import export_model
from sdpo.trainer.trainer import SDPOTrainer

MakeRun = Callable[..., SDPOConfig]
IDS = torch.tensor([[5, 6, 7, 8, 3]])
SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "optim__lr": 1e-2,
    "self_distillation__ema_update_rate": 0.3,
    "self_distillation__teacher_sync_steps": 2,
}
LORA = {"lora__rank": 4, "lora__alpha": 6}
CHECKPOINT = "checkpoints/step_3"


@torch.no_grad()
def compute_logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def train_and_return_actor(config: SDPOConfig, monkeypatch: pytest.MonkeyPatch) -> Actor:
    """Train and return the actor of the last checkpoint."""
    kept: list[Actor] = []
    save = trainer.save_models

    def keep(folder: Path, actor: Actor, processing: Any) -> None:
        kept.append(actor)
        save(folder, actor, processing)

    monkeypatch.setattr(trainer, "save_models", keep)
    SDPOTrainer(config).train()
    return kept[-1]


@pytest.mark.parametrize("kind", ["ema", "snapshot", "frozen"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-5),
        (LORA, 1e-5),
        ({**LORA, "lora__target_modules": ["v_proj"]}, 1e-5),
        # Merged weights are rounded to 2^-9, through two layers.
        ({**LORA, "model__dtype": "bfloat16"}, 0.05),
    ],
    ids=["full", "lora", "some", "bfloat16"],
)
def test_exported_model_computes_equal_logits(
    make_task_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    settings: dict[str, Any],
    tolerance: float,
) -> None:
    config = make_task_run(**SETTINGS, **settings, self_distillation__teacher_regularization=kind)
    actor = train_and_return_actor(config, monkeypatch)
    assert actor.teacher is not None and actor.teacher.module is not None
    checkpoint = Path(config.output_dir) / CHECKPOINT
    models = {}
    for name, teacher, module in (("s", False, actor.student), ("t", True, actor.teacher.module)):
        export_model(checkpoint, tmp_path / name, teacher=teacher)
        models[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert not list((tmp_path / name).glob("adapter*"))
        assert models[name].dtype == module.dtype
        torch.testing.assert_close(compute_logits(models[name]), compute_logits(module), rtol=tolerance, atol=tolerance)
        assert AutoTokenizer.from_pretrained(tmp_path / name).vocab_size == actor.student.config.vocab_size
    assert (
        compute_logits(models["s"]) - compute_logits(models["t"])
    ).abs().max() > 10 * tolerance or "model__dtype" in settings
    if "model__dtype" in settings:  # the teacher's module has the same merged weights
        for name, param in actor.teacher.module.named_parameters():
            assert torch.equal(param, models["t"].get_parameter(name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_regularization": "live"}, "is the student; export it without --teacher"),
        ({"teacher_regularization": "trust-region"}, "mixes the logits of two models"),
        ({"policy_loss_weight": 1.0}, "does not exist with self_distillation.policy_loss_weight=1"),
    ],
)
def test_export_of_a_teacher_without_a_model_is_refused(
    make_task_run: MakeRun, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    changes = {f"self_distillation__{name}": value for name, value in settings.items()}
    config = make_task_run(**{**SETTINGS, "max_steps": 1}, **changes)
    SDPOTrainer(config).train()
    with pytest.raises(SDPOError, match=message):
        export_model(Path(config.output_dir) / "checkpoints/step_1", tmp_path / "out", teacher=True)
    assert not (tmp_path / "out").exists()


def test_failed_export_leaves_no_folder(make_task_run: MakeRun, tmp_path: Path) -> None:
    config = make_task_run(**{**SETTINGS, "max_steps": 1}, **LORA)
    SDPOTrainer(config).train()
    checkpoint, out = Path(config.output_dir) / "checkpoints/step_1", tmp_path / "out"
    with pytest.raises(SDPOError, match=r"is no checkpoint of a run"):
        export_model(tmp_path, out)
    with pytest.raises(SDPOError, match=r"is damaged \(manifest\.json"):
        export_model(checkpoint.with_name("step_7"), out)
    out.mkdir()
    with pytest.raises(SDPOError, match="out: exists already; name another folder"):
        export_model(checkpoint, out)
    out.rmdir()
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SDPOError, match=r"is damaged \(adapter_model\.safetensors has \d+ bytes"):
        export_model(checkpoint, out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
