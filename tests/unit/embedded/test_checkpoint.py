"""Checkpoints are models of transformers: the student, and its teacher beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo.config import Run
from sdpo.embedded.checkpoint import save_checkpoint
from sdpo.embedded.learner import Learner
from sdpo.embedded.samples import Sample
from sdpo.tasks.hidden_rule import build_tokenizer

MakeModel = Callable[..., Any]
MakeRun = Callable[..., Run]
MakeSamples = Callable[..., list[Sample]]
TOKENIZER = build_tokenizer()
IDS = torch.tensor([[5, 6, 7, 8, 3]])


def assert_same_model(folder: Path, model: torch.nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.dtype == dtype
        for (name, param), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(param, expected), name
        if dtype == torch.float32:
            torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ema", "trust-region", "frozen", "snapshot"])
def test_student_teacher_and_tokenizer_load(
    make_model: MakeModel, make_run: MakeRun, make_samples: MakeSamples, tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    run = make_run(
        self_distillation__teacher_regularization=kind,
        self_distillation__ema_update_rate=0.5,
        optim__lr=0.1,
    )
    learner = Learner(make_model(dtype=dtype), run, 0)
    for _ in range(2):
        learner.learn(make_samples())
    folder = save_checkpoint(tmp_path, learner, TOKENIZER)
    assert folder == tmp_path / "step_2"
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]
    assert learner.teacher is not None and learner.teacher.module is not None
    assert_same_model(folder, learner.student.eval(), dtype)
    assert_same_model(folder / "teacher", learner.teacher.module, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "123"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == TOKENIZER.apply_chat_template(
        messages, tokenize=False
    )
    with torch.no_grad():
        difference = (learner.student(IDS).logits - learner.teacher.module(IDS).logits).abs().max()
    assert difference > 1e-2, "teacher and student must differ for this to tell them apart"


@pytest.mark.parametrize("settings", [{"teacher_regularization": "live"}, {"grpo_coef": 1.0}])
def test_no_teacher_is_saved_where_there_is_none(
    model: Any, make_run: MakeRun, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = make_run(**{f"self_distillation__{name}": value for name, value in settings.items()})
    folder = save_checkpoint(tmp_path, Learner(model, run, 0), TOKENIZER)
    assert folder == tmp_path / "step_0"
    assert not (folder / "teacher").exists()


def test_an_interruption_leaves_the_checkpoint_before_it_whole(
    model: Any, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(model, make_run(), 0)
    whole = {p.name: p.read_bytes() for p in save_checkpoint(tmp_path, learner, TOKENIZER).iterdir() if p.is_file()}
    with torch.no_grad():
        learner.student.lm_head.weight.zero_()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, learner, TOKENIZER)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "step_0").iterdir() if p.is_file()}
    assert kept == whole
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["step_0"]

    monkeypatch.undo()
    save_checkpoint(tmp_path, learner, TOKENIZER)
    assert [p.name for p in tmp_path.iterdir()] == ["step_0"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "step_0").lm_head.weight.abs().max() == 0
