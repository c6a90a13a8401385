"""Complete runs on verl, from the command to the files that they write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from vision_language import build_vision_model, make_image

from sdpo import load_config
from sdpo.config.model import ModelConfig
from sdpo.models.loading import load_model
from sdpo.observability import metrics
from sdpo.rewards.toy import hidden_rule
from sdpo.rewards.toy.hidden_rule import HiddenRule, Mode
from sdpo.verl_backend.config.to_verl import to_verl_overrides
from sdpo.verl_backend.entrypoint.launch import build_command
from sdpo.verl_backend.smoke import checks
from sdpo.verl_backend.smoke.checks import load_weights

ROOT = Path(__file__).parents[2]
ACCURACY = "val-core/hidden_rule/acc/mean@1"

KL_TERM = {"actor.kl_loss_coef": 0.5, "actor.kl_loss_type": "mse", "actor.entropy_coeff": 0.01}

Metrics = Callable[[Path], dict[int, dict[str, Any]]]
Train = Callable[..., Any]


def check_kl(rows: dict[int, dict[str, Any]]) -> None:
    """The KL divergence to the reference model is zero only before the first update."""
    kl = [row[metrics.KL_LOSS] for step, row in sorted(rows.items()) if step > 0]
    assert abs(kl[0]) < 1e-9 and min(kl[1:]) > 1e-6, kl
    assert all(row[metrics.KL_COEF] == 0.5 for step, row in rows.items() if step > 0)


def test_smoke_test_of_the_recipe_passes(start: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMOKE_TEST", "1")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("SMOKE_DIR", str(tmp_path / "smoke"))
    running = start("bash", str(ROOT / "recipe" / "SDPO" / "train.sh"))
    assert running.wait() == 0, running.tail()
    assert "7 of 7 checks passed" in running.tail()
    # The checks that need a batch ahead fail on a changed copy, with the GPU's thresholds too.
    folder = tmp_path / "smoke" / "one-step-off"
    weights = folder / f"checkpoints/global_step_{checks.STEPS - 2}/actor/model_world_size_1_rank_0.pt"
    metrics_file = folder / f"metrics.{checks.STEPS}.jsonl"
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    for is_exact in (True, False):
        run = checks.Finished(folder, tmp_path / "smoke" / "tasks" / "figures", (checks.STEPS,), is_exact)
        checks.check_batch_ahead(run)
        checks.check_images(run)
    later = weights.parents[2] / f"global_step_{checks.STEPS - 1}/actor" / weights.name
    weights.write_bytes(later.read_bytes())
    (last,) = [row["data"] for row in rows if row["step"] == checks.STEPS and metrics.LOGPROB_DIFF_MEAN in row["data"]]
    last[metrics.LOGPROB_DIFF_MEAN] += 0.03
    metrics_file.write_text("\n".join(map(json.dumps, rows)))
    for is_exact in (True, False):
        run = checks.Finished(folder, tmp_path / "smoke" / "tasks" / "figures", (checks.STEPS,), is_exact)
        with pytest.raises(AssertionError, match="from the next weights' by"):
            checks.check_batch_ahead(run)
        with pytest.raises(AssertionError, match="the teacher's log-probabilities differ by"):
            checks.check_images(run)


def load_state(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Return student, teacher and optimizer of a checkpoint, by name."""
    optimizer = torch.load(
        output_dir / f"checkpoints/global_step_{step}/actor/optim_world_size_1_rank_0.pt", weights_only=False
    )
    state = load_weights(output_dir, step)
    state |= {f"teacher.{name}": value for name, value in load_weights(output_dir, step, teacher=True).items()}
    for number, slots in optimizer["state"].items():
        state |= {f"optimizer.{number}.{name}": getattr(v, "_local_tensor", v) for name, v in slots.items()}
    return state


def read_responses(output_dir: Path, step: int) -> dict[str, str]:
    """Return validation responses by prompt."""
    lines = (output_dir / "val" / f"{step}.jsonl").read_text().splitlines()
    return {row["input"]: row["output"] for row in map(json.loads, lines)}


def test_killed_run_resumes_to_the_same_result(train_on_verl: Train, tmp_path: Path, metrics_of: Metrics) -> None:
    """One step off policy. Student, teacher and optimizer are equal, bit for bit.

    The checkpoint contains the data position and the batch sampled ahead.
    """
    settings = [
        "max_staleness=1",
        "max_steps=6",
        "save_steps=3",
        "rollout.max_num_seqs=1",
        "tracking.log_completions_steps=1",
    ]
    settings += ["actor_rollout_ref.rollout.full_determinism=true", "eval_steps=3"]
    settings += [f"{key}={value}" for key, value in KL_TERM.items()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    running = train_on_verl(whole, *settings, f"trainer.validation_data_dir={whole / 'val'}")
    assert running.wait() == 0, running.tail()

    running = train_on_verl(killed, *settings)
    tracker = killed / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert running.wait(until=tracker.exists) is None, running.tail()
    running.kill()
    assert (killed / "checkpoints" / "global_step_3" / "prefetched.pt").exists()
    assert not (killed / "checkpoints" / "global_step_6").exists(), "it was to be killed before the end"
    running = train_on_verl(killed, *settings, "resume_mode=auto", f"trainer.validation_data_dir={killed / 'val'}")
    assert running.wait() == 0, running.tail()

    for step in (3, 6):
        expected, state = load_state(whole, step), load_state(killed, step)
        assert state.keys() == expected.keys() and len(state) > 50
        for name, value in expected.items():
            assert torch.equal(state[name], value), f"step {step}: {name}"
    assert not torch.equal(load_state(whole, 3)["lm_head.weight"], load_state(whole, 6)["lm_head.weight"])

    # The validation at the end of step 3 and the resumed run's first validation use the same weights.
    responses = {step: read_responses(whole, step) for step in (0, 3, 6)}
    assert responses[3] == read_responses(killed, 3) and responses[6] == read_responses(killed, 6)
    assert len({str(each) for each in responses.values()}) == 3

    rows, again = metrics_of(whole), metrics_of(killed)
    check_kl(rows)
    assert rows[6][metrics.LOSS] == again[6][metrics.LOSS]
    assert rows[6][metrics.LR] == again[6][metrics.LR]
    assert rows[6][metrics.KL_LOSS] == again[6][metrics.KL_LOSS], "the reference model is the initial model again"
    # 16 rows, 4 per step; verl's own trainer logs 0 in every step.
    assert [rows[step]["training/epoch"] for step in range(1, 7)] == [0, 0, 0, 0, 1, 1]
    assert [again[step]["training/epoch"] for step in (4, 5, 6)] == [0, 1, 1]
    assert [rows[step][metrics.STALENESS] for step in range(1, 7)] == [0, 1, 1, 1, 1, 1]
    # verl's own trainer crashes with rollout_data_dir.
    assert sorted(int(file.stem) for file in (whole / "rollouts").glob("*.jsonl")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["sdpo_sync", "sdpo_separate_async"])
def test_v1_trainers_log_metrics_and_update_the_teacher(
    name: str,
    start: Train,
    task_dir: Path,
    tmp_path: Path,
    metrics_of: Metrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = {
        "data.task_args.dir": task_dir,
        "data.task_args.num_train": 16,
        "data.task_args.num_test": 4,
        "data.task_args.pretrain_steps": 0,
        "output_dir": tmp_path / "run",
        "max_steps": 3,
        "save_steps": 1,
        "save_total_limit": 3,
        "data.train_batch_size": 4,
        "rollout.n": 2,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "self_distillation.teacher_regularization": "ema",
        "self_distillation.policy_loss_weight": 0.3,
        **KL_TERM,
    }
    run = load_config(ROOT / "configs" / "hidden_rule.yaml", [f"{key}={value}" for key, value in overrides.items()])
    command = build_command(to_verl_overrides(run), run.output_dir)
    arguments = [name if argument.startswith("sdpo_") else argument for argument in command.arguments]
    for variable, value in command.environment.items():
        monkeypatch.setenv(variable, value)
    running = start(sys.executable, "-m", "sdpo.verl_backend.entrypoint.main", *arguments)
    assert running.wait() == 0, running.tail()
    rows = metrics_of(tmp_path / "run")
    assert sorted(rows) == [0, 1, 2, 3]
    check_kl(rows)
    for step in (1, 2, 3):
        assert rows[step][metrics.DISTILLATION_LOSS] > 0
        assert rows[step][metrics.REPROMPT_FRACTION] > 0
        assert metrics.PG_LOSS in rows[step]
        assert 0 <= rows[step][metrics.STALENESS] <= (1 if name == "sdpo_separate_async" else 0)
    assert ACCURACY in rows[0] and ACCURACY in rows[3]
    for step in (2, 3):
        before, after = (
            load_weights(tmp_path / "run", step - 1, teacher=True),
            load_weights(tmp_path / "run", step, teacher=True),
        )
        student = load_weights(tmp_path / "run", step)
        for weight, value in after.items():
            torch.testing.assert_close(value, 0.95 * before[weight] + 0.05 * student[weight], rtol=0, atol=1e-6)


def test_sampler_receives_merged_lora_weights(
    train_on_verl: Train, task_dir: Path, tmp_path: Path, metrics_of: Metrics
) -> None:
    """One step off policy. The batch sampled ahead has the log-probabilities of the merged weights of step 1."""
    output_dir, scale, rate = tmp_path / "run", 12 / 4, 0.05
    settings = ["max_staleness=1", "max_steps=3", "save_steps=1", "save_total_limit=3", "lora.rank=4", "lora.alpha=12"]
    # The reference model is the actor without its adapters.
    settings += [f"{key}={value}" for key, value in KL_TERM.items()]
    running = train_on_verl(output_dir, *settings, "optim.lr=3e-2")
    assert running.wait() == 0, running.tail()
    rows = metrics_of(output_dir)
    check_kl(rows)
    assert all(rows[step][metrics.DISTILLATION_LOSS] > 0 for step in (1, 2, 3))

    base = load_model(ModelConfig(path=str(task_dir / "model")), torch.device("cpu")).state_dict()
    deltas: dict[str, torch.Tensor] = {}
    models = {}
    for step in (1, 2, 3):
        student = {
            name.removeprefix("base_model.model."): value for name, value in load_weights(output_dir, step).items()
        }
        kept = {name.replace(".base_layer.", "."): value for name, value in student.items() if "lora_" not in name}
        assert kept.keys() == base.keys() and all(torch.equal(kept[name], value) for name, value in base.items())
        products = {}
        for name in base:
            layer = name.removesuffix(".weight")
            if name.endswith("_proj.weight"):
                a, b = (student[f"{layer}.lora_{part}.default.weight"].double() for part in "AB")
                products[name] = scale * b @ a
        models[step] = {name: (value + products.get(name, 0)).bfloat16().float() for name, value in base.items()}

        saved = output_dir / f"checkpoints/global_step_{step}/actor/teacher/state_world_size_1_rank_0.pt"
        teacher = torch.load(saved, weights_only=True)["weights"]
        deltas = {name: (1 - rate) * deltas.get(name, 0) + rate * product for name, product in products.items()}
        assert teacher.keys() == deltas.keys()
        for name, delta in deltas.items():
            torch.testing.assert_close(teacher[name].double(), delta, rtol=1e-5, atol=1e-8)

    # The batch of step 3 is sampled in step 2, with the weights after step 1.
    batch = torch.load(output_dir / "checkpoints/global_step_2/prefetched.pt", weights_only=False)["batch"][3].batch
    model = load_model(ModelConfig(path=str(task_dir / "model")), torch.device("cpu"))
    mask = batch["response_mask"].bool()
    errors = {}
    for step, weights in models.items():
        model.load_state_dict(weights)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        log_probs = logits[:, -mask.shape[1] - 1 : -1].log_softmax(-1).gather(-1, batch["responses"][..., None])[..., 0]
        errors[step] = float((log_probs - batch["rollout_log_probs"])[mask].abs().max())
    assert errors[1] < 1e-4 and min(errors[2], errors[3]) > 10 * errors[1], errors


REWARD_FUNCTION = """
def compute_score(row, response):
    return {"score": float(len(response) % 2), "feedback": "Expected: " + row.ground_truth}
"""


def write_rows(path: Path, num_rows: int) -> str:
    """Write rows with one, two and no images in turn, as ``datasets`` writes them, and a row with a broken image."""
    rows = []
    for i in range(num_rows):
        num_images = (1, 2, 0)[i % 3]
        images = [{"bytes": make_image(3 * i + k, (56 + 28 * k, 56)), "path": None} for k in range(num_images)]
        rows.append(
            {
                "data_source": "tiny",
                "prompt": [{"role": "user", "content": "<image>" * num_images + f"how {i}?"}],
                "images": images,
                "reward_model": {"style": "rule", "ground_truth": f"it is {i}"},
            }
        )
    rows.append({**rows[0], "images": [{"bytes": b"broken", "path": None}]})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_images_and_texts_train_with_a_frozen_vision_tower(start: Train, tmp_path: Path, metrics_of: Metrics) -> None:
    """Qwen3-VL on the V1 trainer sync; the smoke test covers Qwen2.5-VL one step off policy."""
    model = build_vision_model("qwen3_vl", tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD_FUNCTION)
    (tmp_path / "run.yaml").write_text("output_dir: ???\nmax_steps: 2\n")
    settings = {
        "output_dir": tmp_path / "run",
        "save_steps": 1,
        "eval_steps": 0,
        "model.path": model,
        "data.task": tmp_path / "reward.py",
        "data.train_files": f"[{write_rows(tmp_path / 'train.parquet', 12)}]",
        "data.val_files": f"[{write_rows(tmp_path / 'test.parquet', 3)}]",
        "data.train_batch_size": 6,
        "data.max_prompt_length": 64,
        "data.filter_unreadable_images": "true",
        "rollout.n": 2,
        "rollout.max_response_length": 8,
        "actor.freeze_vision_tower": "true",
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "self_distillation.teacher_regularization": "ema",
        "self_distillation.include_environment_feedback": "true",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    running = start(sys.executable, "-m", "sdpo.cli", "verl", str(tmp_path / "run.yaml"), *overrides)
    assert running.wait() == 0, running.tail()
    assert "skipped 1 of 13 rows with unreadable images" in running.log.read_text(errors="replace")
    rows = metrics_of(tmp_path / "run")
    for step in (1, 2):
        assert rows[step][metrics.DISTILLATION_LOSS] > 0
        assert rows[step][metrics.REPROMPT_FRACTION] == 1.0
    first, last = load_weights(tmp_path / "run", 1), load_weights(tmp_path / "run", 2)
    for name, value in first.items():
        assert torch.equal(last[name], value) == name.startswith("model.visual."), name


def test_vanilla_loss_mode_trains_without_distillation(
    train_on_verl: Train, tmp_path: Path, metrics_of: Metrics
) -> None:
    running = train_on_verl(
        tmp_path / "run", "max_staleness=1", "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla"
    )
    assert running.wait() == 0, running.tail()
    rows = metrics_of(tmp_path / "run")
    assert "actor/pg_loss" in rows[2] and metrics.DISTILLATION_LOSS not in rows[2]
    assert not (tmp_path / "run" / "checkpoints" / "global_step_2" / "actor" / "teacher").exists()


def test_policy_learns_the_hidden_rule(
    start: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics_of: Metrics
) -> None:
    """The shipped config file, one step off policy, with 5 digits and 4 rollouts in place of 8, and fewer steps."""
    arguments = {"pretrain_steps": 200, "num_train": 3000, "num_test": 200}
    shorter = Mode(length=5, num_rules=9, target_is_pretrained=False, pretrain_steps=0)
    monkeypatch.setitem(hidden_rule.MODES, "feedback", shorter)
    HiddenRule(str(tmp_path / "task"), **arguments).prepare()
    running = start(
        sys.executable,
        *("-m", "sdpo.cli", "verl", str(ROOT / "configs" / "hidden_rule.yaml")),
        *(f"data.task_args.{key}={value}" for key, value in {"dir": tmp_path / "task", **arguments}.items()),
        *(f"output_dir={tmp_path / 'run'}", "max_staleness=1", "rollout.n=4", "max_steps=70", "eval_steps=0"),
    )
    assert running.wait() == 0, running.tail()
    rows = metrics_of(tmp_path / "run")
    assert rows[0][ACCURACY] <= 0.05
    assert rows[70][ACCURACY] >= 0.95
