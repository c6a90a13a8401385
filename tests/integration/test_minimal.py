"""``examples/sdpo_minimal.py`` compared with the native trainer: equal rollouts give equal losses and weights."""

from __future__ import annotations

import copy
import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdpo import load_config
from sdpo.models.generation.sampling import Completion
from sdpo.observability import metrics
from sdpo.observability.progress import NullCallback
from sdpo.rewards.toy.hidden_rule import HiddenRule
from sdpo.trainer.build import build_components
from sdpo.trainer.data.samples import build_samples

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "sdpo_minimal.py"
TASK = {"pretrain_steps": 5, "num_train": 20, "num_test": 4}


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sdpo_minimal", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_example_has_at_most_300_lines() -> None:
    assert len(FILE.read_text().splitlines()) <= 300


def write_sensitive_model(folder: Path) -> None:
    """Write a model with larger weights, so that the solution in the prompt affects the next-token distribution."""
    HiddenRule(str(folder), **TASK).prepare()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0 if weight.dim() > 1 else 1.0)
    model.save_pretrained(folder / "model")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_losses_and_weights_equal_the_native_trainer(minimal: ModuleType, tmp_path: Path, alpha: float) -> None:
    torch.set_num_threads(1)
    write_sensitive_model(tmp_path / "task")
    overrides = [
        f"output_dir={tmp_path}/run",
        f"data.task_args.dir={tmp_path}/task",
        *(f"data.task_args.{name}={value}" for name, value in TASK.items()),
        "data.train_batch_size=3",
        "rollout.n=2",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "optim.lr_scheduler_type=constant",
        f"self_distillation.alpha={alpha}",
        "self_distillation.teacher_regularization=ema",
        "self_distillation.demonstration_source=ground_truth",
        "self_distillation.include_environment_feedback=false",
        "rollout_correction.rollout_is=none",
        "tracking.log_completions_steps=0",
    ]
    run = load_config(ROOT / "configs" / "hidden_rule.yaml", overrides)
    components = build_components(run, NullCallback())
    settings = minimal.Settings(n=2, max_response_length=8, alpha=alpha, lr=1e-3)
    torch.manual_seed(0)
    student = copy.deepcopy(components.actor.student).eval()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = minimal.build_optimizer(student, settings)
    for step in (1, 2):
        prompts = components.prompts_of(step)
        problems = [minimal.Problem(list(p.row.prompt), p.row.ground_truth) for p in prompts]
        rollouts = [minimal.roll_out(student, components.tokenizer, problem, settings) for problem in problems]
        responses = [
            [Completion(r.response_ids, [0.0] * len(r.response_ids), True) for r in group] for group in rollouts
        ]
        samples = build_samples(
            components.reward_manager,
            components.tokenizer,
            prompts,
            responses,
            run.self_distillation,
            components.window,
            random.Random(0),
        )
        flat = [rollout for group in rollouts for rollout in group]
        assert [list(s.prompt.token_ids) for s in samples] == [r.prompt_ids for r in flat]
        assert [list(s.teacher_prompt.token_ids or []) for s in samples] == [r.teacher_prompt_ids for r in flat]
        values = components.actor.update_policy(samples)
        loss, norm = minimal.update(student, teacher, optimizer, flat, settings)
        assert loss > 1e-3
        assert values[metrics.DISTILLATION_LOSS] == pytest.approx(loss, rel=1e-4)
        assert values[metrics.GRAD_NORM] == pytest.approx(norm, rel=1e-4)
        for param, expected in zip(student.parameters(), components.actor.student.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=0.0, atol=2e-5)
    components.sampler.close()


@pytest.mark.slow
def test_example_runs(tmp_path: Path) -> None:
    HiddenRule(str(tmp_path / "task"), pretrain_steps=10, num_train=4, num_test=2).prepare()
    (tmp_path / "rows.jsonl").write_text('{"question": "1 2 3", "answer": "4"}\n' * 4)
    command = [sys.executable, FILE, "--model", tmp_path / "task" / "model", "--data", tmp_path / "rows.jsonl"]
    sizes = ["--steps", "2", "--n", "2", "--prompts-per-step", "2", "--max-response-length", "8"]
    done = subprocess.run([*map(str, command), *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["1", "2"]
