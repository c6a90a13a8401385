"""Complete runs in this process: weights used for sampling, reproducibility, files, errors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.models.generation.sampling import Completion
from sdpo.observability import metrics
from sdpo.observability.progress import NullCallback
from sdpo.trainer import build, trainer
from sdpo.trainer.actor.actor import Actor
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.data.samples import TrainingSample, build_samples
from sdpo.trainer.rollout import build as rollout_build
from sdpo.trainer.rollout.base import RolloutBatch
from sdpo.trainer.rollout.local import LocalSampler
from sdpo.trainer.rollout.process import ProcessSampler
from sdpo.trainer.trainer import SDPOTrainer

MakeRun = Callable[..., SDPOConfig]
Weights = dict[str, Tensor]


def read_rows(output_dir: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def drop_timings(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("timing_s/") and k != metrics.THROUGHPUT} for row in rows]


def read_weights(output_dir: str | Path) -> dict[str, bytes]:
    folder = Path(output_dir) / "checkpoints"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


class Recorder:
    """Records weights by version, rollouts, and the samples and old log-probs of each update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.student: nn.Module | None = None
        self.weights: dict[int, Weights] = {}
        self.rollouts: list[RolloutBatch] = []
        self.samples: list[Sequence[TrainingSample]] = []
        self.old_log_probs: list[list[Tensor]] = []
        update_policy, compute_log_probs = Actor.update_policy, Actor.compute_log_probs

        def record_update(actor: Actor, samples: Sequence[TrainingSample], **kwargs: Any) -> Any:
            self.student = actor.student
            self.samples.append(samples)
            self.copy_weights(actor)
            values = update_policy(actor, samples, **kwargs)
            self.copy_weights(actor)
            return values

        def record_log_probs(actor: Actor, samples: Sequence[TrainingSample], *images: Any) -> Any:
            self.old_log_probs.append(compute_log_probs(actor, samples, *images))
            return self.old_log_probs[-1]

        monkeypatch.setattr(Actor, "update_policy", record_update)
        monkeypatch.setattr(Actor, "compute_log_probs", record_log_probs)
        for sampler_class in (LocalSampler, ProcessSampler):
            collect = sampler_class.collect

            def record_rollouts(sampler: Any, collect: Any = collect) -> RolloutBatch:
                self.rollouts.append(collect(sampler))
                return self.rollouts[-1]

            monkeypatch.setattr(sampler_class, "collect", record_rollouts)

    def copy_weights(self, actor: Actor) -> None:
        self.weights[actor.version] = {n: p.detach().clone() for n, p in actor.student.named_parameters()}

    def log_probs(self, version: int, sample: TrainingSample, temperature: float) -> Tensor:
        """Log-probs of one sample with the weights of a version, without cache and padding."""
        assert self.student is not None
        prompt, response = sample.prompt.token_ids, sample.response.token_ids
        with torch.no_grad():
            logits = torch.func.functional_call(
                self.student, self.weights[version], kwargs={"input_ids": torch.tensor([[*prompt, *response]])}
            ).logits[0, len(prompt) - 1 : -1]
        return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


LARGE_UPDATES = {
    "max_steps": 4,
    "optim__lr": 3e-3,
    "rollout__temperature": 0.9,
    "actor__mini_batch_size": 2,
    "eval__val_before_train": False,
    "data__train_batch_size": 4,
}


def check_log_probs(recorder: Recorder, versions: list[int], temperature: float) -> None:
    assert [rollouts.policy_version for rollouts in recorder.rollouts] == versions
    assert len(recorder.old_log_probs) == len(recorder.samples) == len(versions)
    for step, (version, samples) in enumerate(zip(versions, recorder.samples, strict=True)):
        responses = [response for group in recorder.rollouts[step].responses for response in group]
        assert [s.response for s in samples] == responses
        largest_gap = 0.0
        for sample, old in zip(samples, recorder.old_log_probs[step], strict=True):
            reported = torch.tensor(sample.response.log_probs)
            torch.testing.assert_close(reported, recorder.log_probs(version, sample, temperature), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(old, recorder.log_probs(step, sample, temperature), atol=1e-5, rtol=1e-5)
            largest_gap = max(largest_gap, float((reported - old).abs().max()))
        assert (largest_gap > 1e-3) == (version != step), "different weights must give different log-probabilities"


@pytest.mark.parametrize("uses_other_device", [False, True])
def test_staleness_0_samples_with_the_latest_weights(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch, uses_other_device: bool
) -> None:
    if uses_other_device:  # a different name of the same device makes the sampler copy the student
        monkeypatch.setattr(
            build, "resolve_device", lambda _, name: torch.device("cpu:0" if name == "rollout.device" else "cpu")
        )
    recorder = Recorder(monkeypatch)
    run = make_task_run(**LARGE_UPDATES)
    SDPOTrainer(run).train()
    check_log_probs(recorder, [0, 1, 2, 3], 0.9)
    rows = read_rows(run.output_dir)
    assert [row[metrics.STALENESS] for row in rows] == [0, 0, 0, 0]
    for row in rows:
        assert row[metrics.ROLLOUT_IS_MEAN] == pytest.approx(1, abs=1e-5)
        assert row[metrics.ROLLOUT_KL] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_staleness_1_samples_one_update_behind(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder(monkeypatch)
    run = make_task_run(**LARGE_UPDATES, max_staleness=1, output_dir=str(tmp_path / "parallel"))
    result = SDPOTrainer(run).train()
    check_log_probs(recorder, [0, 0, 1, 2], 0.9)
    rows = read_rows(run.output_dir)
    assert [row[metrics.STALENESS] for row in rows] == [0, 1, 1, 1]
    assert [row[metrics.STEP] for row in rows] == [1, 2, 3, 4]
    assert abs(rows[0][metrics.ROLLOUT_KL]) < 1e-5
    assert all(abs(row[metrics.ROLLOUT_KL]) > 1e-5 for row in rows[1:])
    assert all(metrics.TIME_WEIGHTS in row for row in rows[:-1])
    assert not result.interrupt_signal

    # The first step does not depend on the concurrent sampling.
    monkeypatch.undo()
    in_turn = make_task_run(**LARGE_UPDATES, output_dir=str(tmp_path / "in_turn"))
    SDPOTrainer(in_turn).train()
    first, expected = (drop_timings(read_rows(r.output_dir))[0] for r in (run, in_turn))
    assert first == pytest.approx(expected, rel=1e-4, abs=1e-6)
    second, other = (drop_timings(read_rows(r.output_dir))[1] for r in (run, in_turn))
    assert second != pytest.approx(other, rel=1e-4, abs=1e-6)


def train_one_update_behind(run: SDPOConfig) -> Actor:
    """Train with the schedule of staleness 1 in one process: sample batch k+1, then train on batch k."""
    components = build.build_components(run, NullCallback())
    assert isinstance(components.sampler, LocalSampler), "the sampler must use the student's current weights"

    def sample(step: int) -> RolloutBatch:
        seed = random.Random(f"sampling {run.seed} {step}").getrandbits(63)
        components.sampler.submit([prompt.tokens for prompt in components.prompts_of(step)], seed)
        return components.sampler.collect()

    upcoming = sample(1)
    for step in range(1, run.max_steps + 1):
        rollouts = upcoming
        if step < run.max_steps:
            upcoming = sample(step + 1)
        samples = build_samples(
            components.reward_manager,
            components.tokenizer,
            components.prompts_of(step),
            rollouts.responses,
            run.self_distillation,
            components.window,
            random.Random(f"demonstrations {run.seed} {step}"),
        )
        components.actor.update_policy(samples)
    components.folder.close()
    return components.actor


@pytest.mark.slow
def test_overlapped_steps_equal_the_same_steps_in_sequence(make_task_run: MakeRun, tmp_path: Path) -> None:
    """A weight that is synced too early, too late or partially would change the rollouts and all later steps."""
    overlapped = make_task_run(
        **LARGE_UPDATES, max_staleness=1, rollout__num_threads=1, output_dir=str(tmp_path / "overlapped")
    )
    SDPOTrainer(overlapped).train()
    actor = train_one_update_behind(make_task_run(**LARGE_UPDATES, output_dir=str(tmp_path / "sequential")))
    assert actor.teacher is not None
    assert actor.teacher.module is not None
    saved = Path(overlapped.output_dir) / "checkpoints" / f"step_{overlapped.max_steps}"
    for folder, module in ((saved, actor.student), (saved / "teacher", actor.teacher.module)):
        actual = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        expected = module.state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)

    SDPOTrainer(in_turn := make_task_run(**LARGE_UPDATES, output_dir=str(tmp_path / "in_turn"))).train()
    assert read_weights(in_turn.output_dir) != read_weights(overlapped.output_dir), "staleness must change the weights"


def test_update_from_given_rollouts_does_not_depend_on_max_staleness(
    make_model: Callable[..., Any], make_run: MakeRun, make_samples: Any
) -> None:
    weights = []
    for max_staleness in (0, 1):
        actor = build_actor(make_model(), make_run(max_staleness=max_staleness), 0)
        for seed in range(3):
            actor.update_policy(make_samples(seed=seed))
        weights.append(actor.student.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not torch.equal(weights[0]["lm_head.weight"], make_model().lm_head.weight)


class StaleSampler(LocalSampler):
    """A sampler that ignores every weight sync after the first."""

    def load_weights(self, student: nn.Module, policy_version: int) -> None:
        if policy_version == 0:
            super().load_weights(student, policy_version)


@pytest.mark.parametrize(("max_staleness", "refused_step"), [(0, 2), (1, 3)])
def test_batch_above_max_staleness_is_refused(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch, max_staleness: int, refused_step: int
) -> None:
    monkeypatch.setattr(rollout_build, "LocalSampler", StaleSampler)
    monkeypatch.setattr(
        rollout_build, "ProcessSampler", lambda student, build_engine, *_, **__: StaleSampler(build_engine())
    )
    recorder = Recorder(monkeypatch)
    message = rf"^step {refused_step}: rollouts are {max_staleness + 1} updates old; max_staleness={max_staleness}$"
    with pytest.raises(RuntimeError, match=message):
        SDPOTrainer(make_task_run(max_staleness=max_staleness, max_steps=5)).train()
    assert len(recorder.samples) == refused_step - 1


# --- reproducibility


def test_runs_with_equal_seeds_are_equal_bit_for_bit(make_task_run: MakeRun, tmp_path: Path) -> None:
    settings = {
        "actor__mini_batch_size": 2,
        "eval__n": 2,
        "rollout__n": 3,
        "self_distillation__demonstration_source": "successful_rollout",
        "self_distillation__success_reward_threshold": 0.0,  # so that every rollout is a demonstration
    }
    runs = [
        make_task_run(output_dir=str(tmp_path / name), seed=seed, **settings)
        for name, seed in (("first", 3), ("same", 3), ("other", 4))
    ]
    for run in runs:
        torch.manual_seed(run.seed + len(run.output_dir))  # the earlier state of the generator must not matter
        SDPOTrainer(run).train()
    first, same, other = (drop_timings(read_rows(run.output_dir)) for run in runs)
    assert first == same
    assert read_weights(runs[0].output_dir) == read_weights(runs[1].output_dir)
    assert len(read_weights(runs[0].output_dir)) == 2  # student and teacher
    assert first[1][metrics.SOLUTION_FRACTION] == 1
    assert [row[metrics.RESPONSE_LENGTH_MEAN] for row in first[1:]] != [
        row[metrics.RESPONSE_LENGTH_MEAN] for row in other[1:]
    ]
    assert read_weights(runs[0].output_dir) != read_weights(runs[2].output_dir)


def test_steps_use_the_rows_in_order(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    SDPOTrainer(make_task_run(max_steps=3, data__shuffle=False, data__train_batch_size=16, rollout__n=1)).train()
    rows = [[s.prompt.row.extra_info["index"] for s in samples] for samples in recorder.samples]
    assert rows == [list(range(16)), list(range(16, 32)), [*range(32, 40), *range(8)]]


def test_every_step_samples_with_another_seed(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal prompts and equal weights give different responses in different steps."""
    recorder = Recorder(monkeypatch)
    SDPOTrainer(
        make_task_run(max_steps=2, data__shuffle=False, data__train_batch_size=40, rollout__n=1, optim__lr=1e-12)
    ).train()
    first, second = ([s.response.token_ids for s in samples] for samples in recorder.samples)
    assert first != second


# --- rows and checkpoints


def test_files_and_rows_at_the_configured_steps(make_task_run: MakeRun) -> None:
    run = make_task_run(max_steps=5, eval_steps=2, save_steps=2, save_total_limit=3, tracking__log_completions_steps=3)
    result = SDPOTrainer(run).train()
    rows = read_rows(run.output_dir)
    accuracy = "val-core/hidden_rule/acc/mean@1"
    assert [row[metrics.STEP] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row[metrics.STEP] for row in rows if accuracy in row] == [0, 2, 4, 5]
    assert [row[metrics.STEP] for row in rows if metrics.TIME_SAVE in row] == [2, 4, 5]
    folder = Path(run.output_dir)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "metrics.jsonl",
        "rollouts",
        "run.yaml",
        "versions.json",
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_2", "step_4", "step_5"]
    assert sorted(p.name for p in (folder / "rollouts").iterdir()) == ["step_1.txt", "step_3.txt"]
    assert "Expected: " in (folder / "rollouts" / "step_1.txt").read_text().split("--- teacher's prompt")[1]
    assert result.output_dir == folder
    assert not result.interrupt_signal
    merged: dict[str, float] = {}
    for row in rows:
        merged |= row
    assert result.metrics == merged


def test_every_metric_has_a_description(make_task_run: MakeRun) -> None:
    run = make_task_run(
        model__dtype="bfloat16",
        optim__betas=[0.9, 0.95],
        self_distillation__policy_loss_weight=0.5,
        actor__mini_batch_size=2,
        actor__kl_loss_coef=0.1,
        eval__n=2,
        health__ref_kl_interval=1,
    )
    SDPOTrainer(run).train()
    names = {name for row in read_rows(run.output_dir) for name in row}
    ends = {end for name in metrics.ESTIMATES for end in metrics.ci95_names(name)}
    undescribed = {name for name in names if not name.startswith(("val-core/", "val-teacher/"))}
    assert undescribed <= metrics.DESCRIPTIONS.keys() | ends
    assert ends <= names
    assert metrics.DESCRIPTIONS.keys() - names == set(), "described but never written"


def test_metrics_of_a_row_are_consistent(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    run = make_task_run(eval__val_before_train=False)
    SDPOTrainer(run).train()
    for step, (row, samples) in enumerate(zip(read_rows(run.output_dir), recorder.samples, strict=True), start=1):
        responses: list[Completion] = [s.response for s in samples]
        tokens = sum(len(s.prompt.token_ids) + len(s.response.token_ids) for s in samples)
        assert row[metrics.TOKENS] == tokens
        assert row[metrics.THROUGHPUT] == pytest.approx(tokens / row[metrics.TIME_STEP])
        assert row[metrics.EPOCH] == pytest.approx(step * 4 / 40)
        assert row[metrics.RESPONSE_LENGTH_MEAN] == sum(len(r.token_ids) for r in responses) / 8
        assert row[metrics.SCORE_MEAN] == sum(s.rollout.score for s in samples) / 8
        assert row[metrics.TIME_STEP] >= row[metrics.TIME_SAMPLE] + row[metrics.TIME_LEARN]


# --- errors


def test_error_in_a_step_is_raised_and_earlier_rows_stay(
    make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_policy = Actor.update_policy

    def fail(actor: Actor, samples: Any, **kwargs: Any) -> Any:
        return 1 / 0 if actor.version == 1 else update_policy(actor, samples, **kwargs)

    monkeypatch.setattr(Actor, "update_policy", fail)
    closed = []
    monkeypatch.setattr(LocalSampler, "close", lambda self: closed.append(self))
    run = make_task_run(eval__val_before_train=False)
    with pytest.raises(ZeroDivisionError):
        SDPOTrainer(run).train()
    assert [row[metrics.STEP] for row in read_rows(run.output_dir)] == [1]
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model__path": "nowhere/at/all"}, "model.path"),
        ({"data__val_files": ["nowhere.parquet"]}, "data.val_files"),
        ({"data__max_prompt_length": 5}, "data.train_files"),
        ({"rollout__max_response_length": 256}, "rollout.max_response_length"),
        ({"self_distillation__distillation_topk": 1000}, "self_distillation.distillation_topk"),
        ({"actor__device": "nowhere"}, "actor.device"),
        ({"data__task_args": {"dir": "x", "mode": "z"}}, "data.task_args"),
    ],
)
def test_invalid_setting_is_refused_before_the_run_folder_is_created(
    make_task_run: MakeRun, settings: dict[str, Any], key: str
) -> None:
    run = make_task_run(**settings)
    with pytest.raises(SDPOError, match=key):
        SDPOTrainer(run).train()
    assert not Path(run.output_dir).exists()


def test_max_prompts_limits_the_validation_prompts(make_task_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []
    monkeypatch.setattr(
        trainer.SDPOTrainer, "_run_to_end", lambda training: evaluated.append(len(training.parts.evaluator.prompts))
    )
    for max_prompts in (None, 3):
        SDPOTrainer(make_task_run(eval__max_prompts=max_prompts)).train()
    assert evaluated == [8, 3]


def test_occasional_failures_of_the_reward_function_are_counted(
    make_task_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(
        "count = 0\n"
        "def compute_score(row, response):\n"
        "    global count\n"
        "    count += 1\n"
        "    return {'score': 1 / (count % 8 != 3), 'feedback': 'No.'}\n"
    )
    settings = {"data__task": str(tmp_path / "mine.py"), "data__task_args": {}, "eval__val_before_train": False}
    run = make_task_run(**settings, reward__max_failure_fraction=0.3, self_distillation__success_reward_threshold=2.0)
    SDPOTrainer(run).train()
    rows = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row[metrics.REWARD_FAILURES] for row in rows] == [1, 1, 1]
    assert [row[metrics.SCORE_MEAN] for row in rows] == [1, 1, 1]
    assert [row[metrics.REPROMPT_FRACTION] for row in rows] == [7 / 8] * 3
    assert [text for text in caplog.messages if "scoring failed" in text][1:] == []
    assert "=== not scored, advantage 0," in (Path(run.output_dir) / "rollouts" / "step_1.txt").read_text()


def test_reward_function_that_always_fails_stops_the_run_in_the_first_step(
    make_task_run: MakeRun, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def compute_score(row, response):\n    return row.answer\n")
    run = make_task_run(data__task=str(tmp_path / "mine.py"), data__task_args={}, eval__val_before_train=False)
    with pytest.raises(SDPOError) as caught:
        SDPOTrainer(run).train()
    assert str(caught.value).startswith("data.task: scoring failed for 1 of the 1 responses")
    assert f"AttributeError: 'Row' object has no attribute 'answer' ({tmp_path}/mine.py:2)" in str(caught.value)
    assert "\n" not in str(caught.value)
