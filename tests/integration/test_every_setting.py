"""Every setting has an effect: a tiny run with another value must differ in an observable way.

The tests fail for a new setting without a case in ``CASES``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "models"))
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from vision_language import build_vision_model, make_image

from sdpo import SDPOConfig, SDPOError, SDPOTrainer
from sdpo.config.actor import ActorConfig, OptimConfig
from sdpo.config.data import DataConfig
from sdpo.config.model import ModelConfig
from sdpo.config.monitoring import EvalConfig, TrackingConfig
from sdpo.config.rollout import RolloutConfig
from sdpo.config.root import iterate_settings
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.models.optimizer import choose_optimizer
from sdpo.observability import metrics
from sdpo.observability.progress import NullCallback
from sdpo.trainer import build
from sdpo.trainer.build import build_components

# ---- the base run ---------------------------------------------------------------------------------------------------

BASE = SDPOConfig(
    output_dir="run",
    max_steps=2,
    eval_steps=0,
    model=ModelConfig(path="../model"),
    data=DataConfig(
        task="../task.py",
        train_files=["../train.parquet"],
        val_files=["../test.parquet"],
        train_batch_size=4,
        max_prompt_length=64,
    ),
    rollout=RolloutConfig(device="cpu", n=3, max_response_length=4),
    actor=ActorConfig(device="cpu"),
    optim=OptimConfig(lr=1e-2, warmup_steps=0),
    self_distillation=SelfDistillationConfig(
        include_environment_feedback=False, environment_feedback_only_without_solution=False
    ),
    eval=EvalConfig(val_before_train=False),
    tracking=TrackingConfig(log_completions_steps=1, num_completions=1000),
)
SOURCE = "digits"
FEEDBACK = "It is wrong"
MISSING_DEVICE = "cuda:63"

TASK = f"""
import zlib

class Task:
    def __init__(self, salt=SALT):
        self.salt = salt

    def compute_score(self, row, response):
        # Different responses get different scores, and half of all responses succeed.
        noise = zlib.crc32(f"{{self.salt}} {{row.ground_truth}} {{response}}".encode()) % 1000 / 500
        return {{"score": min(noise, 1.0), "feedback": None if noise >= 1 else f"{FEEDBACK} {{noise}}"}}

build_task = Task
"""

SLOW_TASK = """
import time

class build_task(Task):
    def compute_score(self, row, response):
        result = super().compute_score(row, response)
        time.sleep(0.1 * (result["score"] < 0.5))
        return result
"""

# A model with custom code, which negates the logits and records the number of threads that sample.
MODEL_CODE = """
import os
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

class NegatedLogits(Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        (Path(os.environ["THREADS_DIR"]) / f"{os.getpid()} {torch.get_num_threads()}").touch()
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output
"""
WITH_CODE = {"model.path": "../model_with_code", "model.trust_remote_code": True}


def make_files(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sdpo.rewards.toy.hidden_rule import build_tokenizer

    tokenizer = build_tokenizer()
    for name, seed in (("model", 0), ("other_model", 1)):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
            )
        )
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(5.0 if param.dim() == 2 else 1.0)  # larger, so that the context has an effect
        # Every fifth token ends a response, so that lengths differ.
        model.generation_config.eos_token_id = list(range(tokenizer.eos_token_id, len(tokenizer), 5))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "model", folder / "model_with_code")
    (folder / "model_with_code" / "modeling_negated_logits.py").write_text(MODEL_CODE)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_negated_logits.NegatedLogits"}
    (folder / "model_with_code" / "config.json").write_text(json.dumps(config))

    (folder / "task.py").write_text(TASK.replace("SALT", "0"))
    (folder / "other_task.py").write_text(TASK.replace("SALT", "1"))
    (folder / "slow_task.py").write_text(TASK.replace("SALT", "0") + SLOW_TASK)
    for name, first, count in (("train", 0, 10), ("other_train", 100, 4), ("test", 200, 6), ("other_test", 300, 6)):
        rows = [
            {
                "data_source": SOURCE,
                "prompt": [{"role": "user", "content": question(i)}],
                "reward_model": {"ground_truth": f"<think>so {i}</think>{i * 31}"},
            }
            for i in range(first, first + count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")

    build_vision_model("qwen2_5_vl", folder / "vision_model")
    prompt = [{"role": "user", "content": "<image>?"}]
    rows = [
        {
            "data_source": SOURCE,
            "prompt": prompt,
            "reward_model": {"ground_truth": str(i)},
            "images": [{"bytes": make_image(i), "path": None}],
        }
        for i in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    rows[2]["images"] = [{"bytes": b"no image", "path": None}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "broken_images.parquet")


def question(row: int) -> str:
    return str((row + 1) * 104729)[: 2 + row % 4]


# ---- observations of a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunResult:
    """Files, metrics and calls of a run."""

    error: str | None
    rows: Sequence[Mapping[str, float]] = ()  # metrics without timings
    rollouts: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    checkpoints: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)  # counted by Runner
    num_threads: int = 0
    sampler_threads: frozenset[int] = frozenset()  # of the sampler's process, if the model has custom code
    tracked: Sequence[Any] = ()
    messages: Sequence[str] = ()
    health_events: Sequence[Mapping[str, Any]] = ()

    def outcome(self) -> Any:
        return self.error, self.rows, self.rollouts

    def series(self, metric: str) -> list[float]:
        return [row[metric] for row in self.rows if metric in row]

    def steps_with(self, metric: str) -> list[int]:
        return [int(row[metrics.STEP]) for row in self.rows if metric in row]

    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for weights in self.checkpoints.values() for tensor in weights.values()}

    def samples(self, step: str = "") -> list[dict[str, str]]:
        """The written rollouts, split into parts: prompt, response, feedback, ..."""
        samples = []
        for text in [self.rollouts[step]] if step else self.rollouts.values():
            for sample in text.split("=== ")[1:]:
                head, *parts = sample.split("\n--- ")
                samples.append({"head": head})
                for part in parts:
                    title, content = part.split("\n", 1)
                    samples[-1][title.split(" (")[0]] = content
        return samples

    def responses(self, step: str = "") -> list[str]:
        return [sample["response"] for sample in self.samples(step)]


def are_close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    """Compare nested values up to rounding errors."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=1e-5)
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-5)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(are_close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(are_close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def apply_changes(run: SDPOConfig, changes: Mapping[str, Any]) -> SDPOConfig:
    """Change settings of a config, with validation."""
    by_section: dict[str, dict[str, Any]] = {}
    top = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            by_section.setdefault(section, {})[name] = value
        else:
            top[name] = value
    sections = {name: replace(getattr(run, name), **values) for name, values in by_section.items()}
    return replace(run, **top, **sections)


class Runner:
    """Runs ``BASE`` with changed settings, and caches the results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results: dict[str, RunResult] = {}
        make_files(folder)

    def __call__(self, changes: Mapping[str, Any] | None = None, /, *, repeat: bool = False) -> RunResult:
        changes = changes or {}
        key = json.dumps(changes, sort_keys=True)
        if repeat or key not in self._results:
            with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as folder:
                patch.chdir(folder)
                self._results[key] = self._run(Path(folder), changes, patch)
        return self._results[key]

    def _run(self, folder: Path, changes: Mapping[str, Any], patch: pytest.MonkeyPatch) -> RunResult:
        calls: Counter[str] = Counter()
        tracked: list[Any] = []
        thread_counts: list[int] = []
        threads_dir = self.folder / "threads" / folder.name
        threads_dir.mkdir(parents=True)
        patch.setenv("THREADS_DIR", str(threads_dir))
        self._redirect_code_cache(patch)
        add_trackers(tracked, patch)
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def count_sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls["sdpa"] += 1
            return sdpa(*args, **kwargs)

        def count_forward(module: torch.nn.Module, _: Any) -> None:
            name = type(module).__name__
            if name == "Qwen2Model":
                calls["forward with gradient" if torch.is_grad_enabled() else "forward"] += 1
            elif name == "Qwen2MLP" and torch.is_grad_enabled():
                calls["layer with gradient"] += 1

        messages: list[str] = []
        patch.setattr(build.logger, "warning", lambda text, *arguments: messages.append(text % arguments))

        class ThreadRecorder(NullCallback):
            def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
                thread_counts.append(torch.get_num_threads())

        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", count_sdpa)
        hooks = [
            register_module_forward_pre_hook(count_forward),
            register_optimizer_step_pre_hook(lambda *_: calls.update(["optimizer step"])),
        ]
        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            run = apply_changes(BASE, changes)
            SDPOTrainer(run, ThreadRecorder()).train()
        except SDPOError as error:
            return RunResult(str(error))
        finally:
            torch.set_num_threads(threads_before)
            for hook in hooks:
                hook.remove()
        output_dir = Path(run.output_dir)
        rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        health_events_file = output_dir / "health_events.jsonl"
        event_lines = health_events_file.read_text().splitlines() if health_events_file.exists() else []
        return RunResult(
            error=None,
            rows=[
                {k: v for k, v in row.items() if not k.startswith("timing_s/") and k != metrics.THROUGHPUT}
                for row in rows
            ],
            rollouts={p.stem: p.read_text() for p in sorted((output_dir / "rollouts").glob("*.txt"))},
            files=sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()),
            checkpoints={
                p.parent.relative_to(output_dir / "checkpoints").as_posix(): load_file(p)
                for p in sorted((output_dir / "checkpoints").rglob("model.safetensors"))
            },
            calls=calls,
            num_threads=thread_counts[-1],
            sampler_threads=frozenset(
                int(entry.split()[1]) for entry in os.listdir(threads_dir) if int(entry.split()[0]) != os.getpid()
            ),
            tracked=tracked,
            messages=messages,
            health_events=[json.loads(line) for line in event_lines],
        )

    def find_devices(self, changes: Mapping[str, Any]) -> dict[str, str]:
        """Devices of student and rollouts, without a step, so that it works for the device meta."""
        found = {}

        def sample(policy: Any, *_: Any) -> list[Any]:
            found["rollout"] = next(policy[0][0].parameters()).device.type
            return []

        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as folder:
            patch.chdir(folder)
            patch.setattr("sdpo.trainer.rollout.hf_engine.sample_responses", sample)
            components = build_components(apply_changes(BASE, changes), NullCallback())
            components.folder.close()
            components.sampler.submit([], seed=0)
            components.sampler.collect()
            return found | {"actor": components.actor.student.device.type}

    def find_engine(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Inference engine, and arguments of vLLM, which a fake module replaces."""
        arguments: dict[str, Any] = {"engine": "transformers"}

        class LLM:
            def __init__(self, model: str, **kwargs: Any) -> None:
                arguments.update(engine="vllm", **kwargs)

            def generate(self, *_: Any, **__: Any) -> list[Any]:
                return [SimpleNamespace(prompt_logprobs=[None, {0: SimpleNamespace(logprob=0.0)}])]

        vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
        vllm.__spec__ = ModuleSpec("vllm", None)
        vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
        platforms.current_platform = SimpleNamespace(device_type="cpu")  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as folder:
            patch.chdir(folder)
            patch.setattr(os, "environ", {**os.environ})
            patch.setitem(sys.modules, "vllm", vllm)
            patch.setitem(sys.modules, "vllm.platforms", platforms)
            build_components(apply_changes(BASE, changes), NullCallback()).folder.close()
        return arguments

    def find_optimizer(self, changes: Mapping[str, Any]) -> Any:
        """Choice of the optimizer."""
        return choose_optimizer(apply_changes(BASE, changes).optim)

    def find_first_step(self, changes: Mapping[str, Any]) -> int:
        """First step of a run in the folder of a run with one step."""
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as folder:
            patch.chdir(folder)
            SDPOTrainer(apply_changes(BASE, {**changes, "resume_mode": "disable", "max_steps": 1})).train()
            components = build_components(apply_changes(BASE, changes), NullCallback())
            components.folder.close()
            return components.actor.version + 1

    def find_wait(self, changes: Mapping[str, Any]) -> float:
        """Seconds that a stopped run waits for rollouts in flight."""
        waits: list[float] = []

        def stop(_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as folder:
            patch.chdir(folder)
            patch.setattr("sdpo.trainer.trainer.SDPOTrainer._run_to_end", stop)
            patch.setattr("sdpo.trainer.trainer.SDPOTrainer._emergency_save", lambda _, wait: waits.append(wait))
            SDPOTrainer(apply_changes(BASE, changes)).train()
        return waits[0]

    def find_restarts(self, changes: Mapping[str, Any]) -> int:
        """Maximum number of restarts of the sampling process."""
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as folder:
            patch.chdir(folder)
            components = build_components(apply_changes(BASE, changes), NullCallback())
            components.folder.close()
            components.sampler.close()
            return components.sampler._max_restarts  # type: ignore[attr-defined,no-any-return]

    def _redirect_code_cache(self, patch: pytest.MonkeyPatch) -> None:
        # transformers copies a model's code to this folder, and reads the variable at import, so only in new processes.
        patch.setenv("HF_MODULES_CACHE", str(self.folder / "code"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(self.folder / "code"))
        patch.setattr(sys, "path", [*sys.path])


def add_trackers(tracked: list[Any], patch: pytest.MonkeyPatch) -> None:
    """Replace the tracking libraries by fakes that record their calls."""

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            tracked.append(("tensorboard", folder))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            tracked.append(("tensorboard", step))

        def close(self) -> None:
            pass

    def build_fake(library: str) -> SimpleNamespace:
        return SimpleNamespace(
            init=lambda project, name, config: tracked.append((library, project, name)),
            log=lambda values, step: tracked.append((library, step)),
            finish=lambda: None,
        )

    patch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))  # type: ignore
    for library in ("wandb", "trackio"):
        patch.setitem(sys.modules, library, build_fake(library))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("every_setting"))


# ---- one case per setting -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How to observe the effect of a setting.

    Attributes:
        values: other values. These and the value in ``context`` or ``BASE`` must give different observations.
        context: other settings, which the effect requires.
        observe: the part of the result that must differ; by default metrics and rollouts.
        unchanged: the part of the result that must not differ.
        measure: how to get the result; by default from a complete run.
    """

    values: Sequence[Any]
    context: Mapping[str, Any] = field(default_factory=dict)
    observe: Callable[[Any], Any] = RunResult.outcome
    unchanged: Callable[[Any], Any] | None = None
    measure: Callable[[Runner, Mapping[str, Any]], Any] = Runner.__call__


def identity(result: Any) -> Any:
    return result


def health_events(result: RunResult) -> list[Any]:
    return [(event["step"], event["rule"], event["action"]) for event in result.health_events]


def count_calls(name: str) -> Callable[[RunResult], int]:
    return lambda result: result.calls[name]


ONE_STEP = {"max_steps": 1}
SAVING = {"max_steps": 4, "save_steps": 1, "eval_steps": 1}
THREE_STEPS = {"max_steps": 3}
GRPO = {"self_distillation.policy_loss_weight": 1.0}
MINI_BATCHES = {"actor.mini_batch_size": 1}
NUCLEUS = {"rollout.top_p": 0.5}
STALE = {"max_staleness": 1, "max_steps": 3}  # samples of the policy before the last update
SUCCESSFUL_ROLLOUTS = {"self_distillation.demonstration_source": "successful_rollout"}
WITH_FEEDBACK = {"self_distillation.include_environment_feedback": True}
IMAGES = {
    "model.path": "../vision_model",
    "data.train_files": ["../images.parquet"],
    "data.val_files": ["../images.parquet"],
}
SLOW_REWARD = {"data.task": "../slow_task.py"}
WANDB = {"tracking.report_to": ["wandb"]}
# Random changes fail the health checks.
FAILING_CHECKS = {"max_steps": 6, "health.window": 1, "health.min_z_score": 0.0, "health.score_drop": 0.0}
HALF = {"model.dtype": "bfloat16", "optim.betas": [0.9, 0.95]}
WEAK_TEACHER = {"max_steps": 6, "health.window": 1, "eval_steps": 1, "health.min_accuracy_gap": 0.0, "optim.lr": 1e-1}
FEW_TARGETS = {
    "max_steps": 6,
    "health.window": 1,
    "self_distillation.demonstration_source": "successful_rollout",
    "data.train_batch_size": 1,
    "rollout.n": 2,
}

CASES = {
    "seed": Case([1]),
    "output_dir": Case(["another/place"], observe=lambda result: result.files),
    "max_steps": Case([3]),
    "eval_steps": Case([1]),
    "save_steps": Case([1], observe=lambda result: set(result.checkpoints)),
    "save_total_limit": Case(
        [1, 4], SAVING, observe=lambda result: set(result.checkpoints), unchanged=RunResult.outcome
    ),
    "save_best_limit": Case([4], SAVING, observe=lambda result: set(result.checkpoints), unchanged=RunResult.outcome),
    "resume_mode": Case(["auto"], measure=Runner.find_first_step, observe=identity),
    "shutdown_timeout": Case([0.0], measure=Runner.find_wait, observe=identity),
    "max_staleness": Case([1], WITH_CODE),
    # tests/unit/verl_backend/test_to_verl.py tests their effect on verl.
    "verl": Case([{"trainer.nnodes": 2}], observe=lambda result: result.messages, unchanged=RunResult.outcome),
    "model.path": Case(["../other_model"]),
    "model.dtype": Case(["bfloat16"], {"optim.betas": [0.9, 0.95]}),
    "model.attn_implementation": Case(["eager"], observe=count_calls("sdpa"), unchanged=RunResult.outcome),
    "model.trust_remote_code": Case([True], {"model.path": "../model_with_code"}),
    "data.task": Case(["../other_task.py"]),
    "data.task_args": Case([{"salt": 2}]),
    "data.train_files": Case([["../other_train.parquet"], ["../train.parquet", "../other_train.parquet"]]),
    "data.val_files": Case([["../other_test.parquet"], ["../test.parquet", "../other_test.parquet"]]),
    "data.train_batch_size": Case([2]),
    "data.max_prompt_length": Case([11], {"data.filter_overlong_prompts": True}),
    "data.filter_overlong_prompts": Case([True], {"data.max_prompt_length": 11}),
    "data.solution_key": Case(["reward_model.style"], {"self_distillation.demonstration_source": "ground_truth"}),
    "data.max_pixels": Case([800], IMAGES),
    "data.filter_unreadable_images": Case([True], {**IMAGES, "data.train_files": ["../broken_images.parquet"]}),
    "reward.timeout_s": Case(
        [0.02],
        {**SLOW_REWARD, "reward.max_failure_fraction": 1.0},
        observe=lambda result: result.series(metrics.REWARD_FAILURES),
    ),
    "reward.max_failure_fraction": Case([1.0], {**SLOW_REWARD, "reward.timeout_s": 0.02}),
    "data.shuffle": Case([False]),
    # tests/vllm tests that vLLM samples, and with a cache of this size.
    "rollout.engine": Case(["vllm"], observe=itemgetter("engine"), measure=Runner.find_engine),
    "rollout.device": Case(["meta"], observe=itemgetter("rollout"), measure=Runner.find_devices),
    "rollout.n": Case([2]),
    "rollout.temperature": Case([0.5]),
    "rollout.top_p": Case([0.5]),
    "rollout.max_response_length": Case([3]),
    "rollout.max_num_seqs": Case([6, 1], observe=count_calls("forward")),
    "rollout.kv_cache_memory_gib": Case(
        [0.5], {"rollout.engine": "vllm"}, observe=itemgetter("kv_cache_memory_bytes"), measure=Runner.find_engine
    ),
    "rollout.max_restarts": Case([0], {"max_staleness": 1}, measure=Runner.find_restarts, observe=identity),
    "rollout.num_threads": Case([2], {"max_staleness": 1, **WITH_CODE}, observe=lambda result: result.sampler_threads),
    "actor.device": Case(["meta"], observe=itemgetter("actor"), measure=Runner.find_devices),
    "actor.mini_batch_size": Case([2, 1]),
    "actor.max_tokens_per_micro_batch": Case(
        [200, 1], observe=count_calls("forward with gradient"), unchanged=RunResult.outcome
    ),
    "actor.loss_agg_mode": Case(["seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]),
    "actor.kl_loss_coef": Case([0.5, 2.0]),
    # k1, k2, k3 are synonyms of kl, mse, low_var_kl, and mse+ equals mse.
    "actor.kl_loss_type": Case(
        ["kl", "abs", "mse", "kl+", "abs+", "low_var_kl+"], {**THREE_STEPS, "actor.kl_loss_coef": 1.0}
    ),
    "actor.entropy_coeff": Case([0.1, 0.5]),
    "rollout_correction.rollout_is": Case(["none", "sequence"], STALE),
    "rollout_correction.rollout_is_threshold": Case([0.4], STALE),
    "actor.autocast": Case([True]),
    "actor.freeze_vision_tower": Case([True], IMAGES),
    "actor.gradient_checkpointing": Case(
        [True], observe=count_calls("layer with gradient"), unchanged=RunResult.outcome
    ),
    "actor.num_threads": Case([2], ONE_STEP, observe=lambda result: result.num_threads),
    "lora.rank": Case([2, 4]),
    "lora.alpha": Case([1, 16], {"lora.rank": 2}),
    "lora.target_modules": Case([["q_proj"], ["q_proj", "down_proj"]], {"lora.rank": 2}),
    # tests/unit/models/test_optimizer.py tests the effect of these two on moments and weights.
    "optim.name": Case(["adamw_8bit"], measure=Runner.find_optimizer, observe=identity),
    "optim.stochastic_rounding": Case([True], HALF, measure=Runner.find_optimizer, observe=identity),
    "optim.lr": Case([2e-2]),
    "optim.weight_decay": Case([10.0]),
    "optim.betas": Case([[0.1, 0.999], [0.9, 0.1]], THREE_STEPS),
    "optim.warmup_steps": Case([2]),
    "optim.lr_scheduler_type": Case(["linear", "cosine"], THREE_STEPS),
    "optim.max_grad_norm": Case([1e-3], THREE_STEPS),
    "self_distillation.full_logit_distillation": Case([False], {"self_distillation.alpha": 1.0}),
    "self_distillation.alpha": Case([0.5, 1.0]),
    "self_distillation.distillation_topk": Case([5, 10]),
    "self_distillation.distillation_add_tail": Case([False], {"self_distillation.distillation_topk": 5}),
    "self_distillation.divergence_clip": Case([0.01]),
    "self_distillation.teacher_entropy_beta": Case([0.5]),
    "self_distillation.is_clip": Case([1.0, None], MINI_BATCHES),
    "self_distillation.weight_by_prompt_difficulty": Case([True]),
    "self_distillation.distillation_coef_start": Case([2.0]),
    "self_distillation.distillation_coef_end": Case([2.0]),
    "self_distillation.policy_loss_weight": Case([0.5, 1.0]),
    "self_distillation.clip_ratio_low": Case([0.0], {**GRPO, **MINI_BATCHES}),
    "self_distillation.clip_ratio_high": Case([0.0], {**GRPO, **MINI_BATCHES}),
    "self_distillation.norm_adv_by_std_in_grpo": Case([False], GRPO),
    "self_distillation.teacher_regularization": Case(
        ["trust-region", "frozen", "live", "snapshot"],
        {**THREE_STEPS, "self_distillation.teacher_sync_steps": 2, "self_distillation.ema_update_rate": 0.3},
    ),
    "self_distillation.ema_update_rate": Case([0.3]),
    "self_distillation.teacher_sync_steps": Case([1], {"self_distillation.teacher_regularization": "snapshot"}),
    "self_distillation.demonstration_source": Case(
        ["successful_rollout", "successful_rollout_then_ground_truth", "none"], WITH_FEEDBACK
    ),
    "self_distillation.success_reward_threshold": Case([0.5], SUCCESSFUL_ROLLOUTS),
    "self_distillation.dont_reprompt_on_self_success": Case([False], SUCCESSFUL_ROLLOUTS),
    "self_distillation.distill_only_failed": Case([True]),
    "self_distillation.include_environment_feedback": Case([True]),
    "self_distillation.environment_feedback_only_without_solution": Case(
        [True], {**SUCCESSFUL_ROLLOUTS, **WITH_FEEDBACK}
    ),
    "self_distillation.remove_thinking_from_demonstration": Case([False]),
    "self_distillation.max_reprompt_len": Case([26]),
    "self_distillation.reprompt_template": Case(["{solution}{feedback}{prompt}"]),
    "self_distillation.solution_template": Case([" It is {successful_previous_attempt}."]),
    "self_distillation.feedback_template": Case([" Mind: {feedback_raw}."], WITH_FEEDBACK),
    "eval.val_before_train": Case([True]),
    "eval.max_prompts": Case([2]),
    "eval.n": Case([2, 3]),
    "eval.temperature": Case([0.2], {"eval.n": 3}),
    "eval.top_p": Case([0.2], {"eval.n": 3}),
    "eval.evaluate_teacher": Case([False]),
    "health.score_collapse": Case(["ignore", "stop"], FAILING_CHECKS, observe=health_events),
    "health.entropy_collapse": Case(
        ["ignore", "stop"], {**FAILING_CHECKS, "health.entropy_fall": 1.0}, observe=health_events
    ),
    "health.entropy_explosion": Case(
        ["ignore", "stop"], {**FAILING_CHECKS, "health.entropy_rise": 1.0}, observe=health_events
    ),
    "health.length_collapse": Case(
        ["ignore", "stop"], {**FAILING_CHECKS, "health.length_fall": 1.0}, observe=health_events
    ),
    "health.teacher_entropy_increase": Case(
        ["ignore", "stop"], {**FAILING_CHECKS, "health.teacher_entropy_rise": 1.0}, observe=health_events
    ),
    "health.teacher_underperforms_student": Case(["ignore", "stop"], WEAK_TEACHER, observe=health_events),
    "health.no_distillation_targets": Case(["ignore", "stop"], FEW_TARGETS, observe=health_events),
    "health.window": Case([2, 3], FAILING_CHECKS, observe=health_events),
    "health.min_z_score": Case([100.0], FAILING_CHECKS, observe=health_events),
    "health.score_drop": Case([10.0], FAILING_CHECKS, observe=health_events),
    "health.entropy_fall": Case([1.0], FAILING_CHECKS, observe=health_events),
    "health.entropy_rise": Case([1.0], FAILING_CHECKS, observe=health_events),
    "health.length_fall": Case([1.0], FAILING_CHECKS, observe=health_events),
    "health.max_clip_ratio_increase": Case([0.0], FAILING_CHECKS, observe=health_events),
    "health.teacher_entropy_rise": Case([1.0], FAILING_CHECKS, observe=health_events),
    "health.min_accuracy_gap": Case([1.0], WEAK_TEACHER, observe=health_events),
    "health.min_distilled_fraction": Case([1.0], FEW_TARGETS, observe=health_events),
    "health.reduce_factor": Case([0.9], {**FAILING_CHECKS, "health.score_collapse": "reduce_weight"}),
    "health.min_scale": Case([0.9], {**FAILING_CHECKS, "health.score_collapse": "reduce_weight"}),
    "health.ref_kl_interval": Case([1, 3], THREE_STEPS),
    "tracking.report_to": Case([["tensorboard"], ["wandb"], ["trackio"]], observe=lambda result: result.tracked),
    "tracking.project": Case(["another"], WANDB, observe=lambda result: result.tracked),
    "tracking.name": Case(["another"], WANDB, observe=lambda result: result.tracked),
    "tracking.log_completions_steps": Case([2, 0], THREE_STEPS, observe=lambda result: set(result.rollouts)),
    "tracking.num_completions": Case([2], observe=lambda result: len(result.samples())),
}

# Settings of later phases do not affect the responses of the first step.
AFTER_SAMPLING = ("actor.", "lora.", "optim.", "self_distillation.", "eval.")


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key, _ in iterate_settings()])
def test_setting_changes_the_result(key: str, runner: Runner) -> None:
    assert key in CASES, f"{key} has no case; add one to CASES"
    case = CASES[key]
    results = [
        case.measure(runner, case.context),
        *(case.measure(runner, {**case.context, key: value}) for value in case.values),
    ]
    named_results = list(zip([f"the {key} of the base run", *map(repr, case.values)], results, strict=True))
    for name, result in named_results[1:]:
        assert getattr(result, "error", None) is None, f"{key}: {name} is refused"
    for (name, result), (other_name, other) in combinations(named_results, 2):
        assert not are_close(case.observe(result), case.observe(other)), (
            f"{key}: {name} and {other_name} give equal results"
        )
    if case.unchanged is not None:
        for name, other in named_results[1:]:
            assert are_close(case.unchanged(results[0]), case.unchanged(other)), (
                f"{key}: {name} changes results that must stay equal"
            )
    if key.startswith(AFTER_SAMPLING) and key != "actor.autocast" and case.measure is Runner.__call__:
        assert all(result.responses("step_1") == results[0].responses("step_1") for result in results), (
            f"{key} changes sampling"
        )


def test_every_case_has_a_setting() -> None:
    assert set(CASES) - {key for key, _ in iterate_settings()} == set()


def test_repeated_run_is_equal(runner: Runner) -> None:
    first, repeat = runner(), runner(repeat=True)
    assert first.outcome() == repeat.outcome()
    for name, weights in first.checkpoints.items():
        for param, value in weights.items():
            assert torch.equal(value, repeat.checkpoints[name][param])


# ---- exact effects of some settings ---------------------------------------------------------------------------------

STUDENT, TEACHER = "step_2", "step_2/teacher"
GREEDY = metrics.val_name(SOURCE, "mean@1")
GREEDY_TEACHER = metrics.teacher_val_name(SOURCE, "mean@1")
ROUNDING = 1e-6


def sd(**changes: Any) -> dict[str, Any]:
    """Settings of the section self_distillation."""
    return {f"self_distillation.{name}": value for name, value in changes.items()}


@pytest.fixture(scope="session")
def initial(runner: Runner) -> Mapping[str, torch.Tensor]:
    return load_file(runner.folder / "model" / "model.safetensors")


def test_steps_of_evaluations_and_checkpoints(runner: Runner) -> None:
    result = runner({"max_steps": 5, "eval_steps": 2, "save_steps": 3, "eval.val_before_train": True})
    assert result.steps_with(metrics.STEP) == [0, 1, 2, 3, 4, 5]
    assert result.steps_with(metrics.LOSS) == [1, 2, 3, 4, 5]
    assert result.steps_with(GREEDY) == result.steps_with(GREEDY_TEACHER) == [0, 2, 4, 5]
    assert set(result.checkpoints) == {"step_3", "step_3/teacher", "step_5", "step_5/teacher"}
    assert runner().steps_with(GREEDY) == [2]


def test_all_files_are_in_output_dir(runner: Runner) -> None:
    files = runner({"output_dir": "another/place"}).files
    assert {name.removeprefix("another/place/") for name in files} == {
        name.removeprefix("run/") for name in runner().files
    }


def test_seed_affects_the_samples_and_not_the_model(runner: Runner) -> None:
    one, other = (runner({"eval.val_before_train": True, "seed": seed}) for seed in (0, 1))
    assert one.responses("step_1") != other.responses("step_1")
    assert [sample["prompt"] for sample in one.samples()] != [sample["prompt"] for sample in other.samples()]
    assert one.rows[0] == other.rows[0]
    unshuffled = [runner({"data.shuffle": False, "seed": seed}) for seed in (0, 1)]
    assert unshuffled[0].responses("step_1") != unshuffled[1].responses("step_1")


@pytest.mark.slow
def test_staleness_1_samples_with_the_weights_of_the_previous_step(runner: Runner) -> None:
    fresh, stale = runner(WITH_CODE), runner({**WITH_CODE, "max_staleness": 1})
    assert (fresh.series(metrics.STALENESS), stale.series(metrics.STALENESS)) == ([0, 0], [0, 1])
    assert stale.responses("step_1") == fresh.responses("step_1")  # equal weights in another process
    assert stale.series(metrics.ROLLOUT_KL)[0] == pytest.approx(0, abs=1e-5)
    assert abs(stale.series(metrics.ROLLOUT_KL)[1]) > 1e-3
    assert (stale.sampler_threads, fresh.sampler_threads) == ({1}, set())
    assert runner({**WITH_CODE, "max_staleness": 1, "rollout.num_threads": 2}).sampler_threads == {2}


def test_trust_remote_code(runner: Runner) -> None:
    assert runner({"model.path": "../model_with_code"}).outcome() == runner().outcome()


def test_dtype_applies_to_the_weights_and_autocast_does_not(runner: Runner) -> None:
    dtypes = [runner(changes).dtypes() for changes in ({}, HALF, {"actor.autocast": True})]
    assert dtypes == [{torch.float32}, {torch.bfloat16}, {torch.float32}]


@pytest.mark.parametrize("key", ["actor.device", "rollout.device"])
def test_missing_device_is_refused(key: str, runner: Runner) -> None:
    error = runner({key: MISSING_DEVICE}).error
    assert error is not None and error.startswith(f"{key}: no device {MISSING_DEVICE!r} here")
    assert runner.find_devices({key: "meta"}) == {"actor": "cpu", "rollout": "cpu", key.split(".")[0]: "meta"}


def test_prompts_are_in_the_order_of_the_file_or_shuffled(runner: Runner) -> None:
    in_order, shuffled = (
        [sample["prompt"].removeprefix("[user] ") for sample in runner(changes).samples()[:: BASE.rollout.n]]
        for changes in ({"data.shuffle": False}, {})
    )
    assert in_order == [question(i) for i in range(8)]
    assert shuffled != in_order and len(set(shuffled)) == 8 and set(shuffled) <= {question(i) for i in range(10)}


def test_number_and_length_of_prompts_and_responses(runner: Runner) -> None:
    assert len(runner().samples()) == 2 * 4 * 3
    assert len(runner({"data.train_batch_size": 2}).samples()) == 2 * 2 * 3
    assert len(runner({"rollout.n": 2}).samples()) == 2 * 4 * 2
    assert runner().series(metrics.RESPONSE_LENGTH_MAX) == [4, 4]
    assert runner({"rollout.max_response_length": 3}).series(metrics.RESPONSE_LENGTH_MAX) == [3, 3]
    assert max(runner().series(metrics.PROMPT_LENGTH_MAX)) > 11
    short = runner({"data.max_prompt_length": 11, "data.filter_overlong_prompts": True})
    assert max(short.series(metrics.PROMPT_LENGTH_MAX)) <= 11


def test_actor_divides_logits_by_the_sampling_temperature(runner: Runner) -> None:
    hot, cold = runner(), runner({"rollout.temperature": 0.5})
    for run in (hot, cold):
        assert run.series(metrics.ROLLOUT_KL) == pytest.approx([0, 0], abs=1e-5)
    assert cold.series(metrics.ENTROPY)[0] < hot.series(metrics.ENTROPY)[0] - 0.1


def test_rollout_weights_are_1_without_staleness_with_a_nucleus_too(runner: Runner) -> None:
    exact, none = runner(), runner({"rollout_correction.rollout_is": "none"})
    assert are_close(none.series(metrics.LOSS), exact.series(metrics.LOSS))  # the sampler uses the old policy
    assert none.series(metrics.ROLLOUT_IS_MEAN) == []
    nucleus = runner(NUCLEUS)
    assert nucleus.series(metrics.ROLLOUT_IS_MEAN) == pytest.approx([1.0] * 2, abs=1e-4)
    assert nucleus.responses("step_1") != exact.responses("step_1")


@pytest.mark.slow
def test_rollout_weights_correct_for_staleness(runner: Runner) -> None:
    stale, truncated = runner(STALE), runner({**STALE, "rollout_correction.rollout_is_threshold": 0.4})
    first, *rest = stale.series(metrics.ROLLOUT_IS_MEAN)
    assert first == pytest.approx(1.0, abs=1e-4) and all(abs(mean - 1) > 1e-3 for mean in rest)
    assert all(mean <= 0.4 + ROUNDING for mean in truncated.series(metrics.ROLLOUT_IS_MEAN))
    assert all(fraction > 0 for fraction in truncated.series(metrics.ROLLOUT_IS_CLIP_FRACTION))


def test_mini_batches_are_optimizer_steps(runner: Runner) -> None:
    steps = [runner({"actor.mini_batch_size": size}).calls["optimizer step"] for size in (None, 4, 2, 1)]
    assert steps == [2, 2, 4, 8]


def test_learning_rate_follows_its_settings(runner: Runner) -> None:
    def rates(**changes: Any) -> list[float]:
        return runner({f"optim.{name}": value for name, value in changes.items()} | THREE_STEPS).series(metrics.LR)

    assert rates() == pytest.approx([0.01] * 3)
    assert rates(lr=2e-2) == pytest.approx([0.02] * 3)
    assert rates(warmup_steps=2) == pytest.approx([0.005, 0.01, 0.01])
    assert rates(lr_scheduler_type="linear") == pytest.approx([0.01 * (1 - i / 3) for i in range(3)])
    assert rates(lr_scheduler_type="cosine") == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
    )


def test_weight_decay_shrinks_weights_without_gradient(runner: Runner, initial: Mapping[str, torch.Tensor]) -> None:
    def embeddings(weight_decay: float) -> torch.Tensor:
        return runner({**ONE_STEP, "optim.weight_decay": weight_decay}).checkpoints["step_1"][
            "model.embed_tokens.weight"
        ]

    before, without, decayed = initial["model.embed_tokens.weight"], embeddings(0.0), embeddings(10.0)
    unseen = (without == before).all(-1)  # tokens in no prompt and no response
    assert unseen.any() and not unseen.all()
    assert torch.allclose(decayed[unseen], before[unseen] * (1 - BASE.optim.lr * 10))


def test_logged_gradient_norm_is_measured_before_the_clip(runner: Runner) -> None:
    unclipped, clipped = (
        runner({**THREE_STEPS, "optim.max_grad_norm": 1e6}),
        runner({**THREE_STEPS, "optim.max_grad_norm": 1e-3}),
    )
    assert unclipped.series(metrics.GRAD_NORM)[0] == clipped.series(metrics.GRAD_NORM)[0] > 1e-3
    assert unclipped.rows == runner({**THREE_STEPS, "optim.max_grad_norm": 1e5}).rows  # both above every gradient norm


def test_policy_loss_weight_mixes_grpo_and_sdpo(runner: Runner) -> None:
    distilled, mixed, grpo = (runner(sd(policy_loss_weight=coef)) for coef in (0.0, 0.5, 1.0))
    assert mixed.series(metrics.PG_LOSS)[0] == pytest.approx(grpo.series(metrics.LOSS)[0], abs=1e-6)
    assert mixed.series(metrics.DISTILLATION_LOSS)[0] == pytest.approx(distilled.series(metrics.LOSS)[0])
    expected = 0.5 * grpo.series(metrics.LOSS)[0] + 0.5 * distilled.series(metrics.LOSS)[0]
    assert mixed.series(metrics.LOSS)[0] == pytest.approx(expected, abs=1e-6)
    for absent in (metrics.DISTILLATION_LOSS, metrics.DISTILLATION_COEF, metrics.TEACHER_ENTROPY, GREEDY_TEACHER):
        assert distilled.series(absent) and not grpo.series(absent)
    assert not distilled.series(metrics.PG_LOSS)
    assert set(distilled.checkpoints) == {STUDENT, TEACHER} and set(grpo.checkpoints) == {STUDENT}


def test_advantages_are_score_minus_mean_over_deviation(runner: Runner) -> None:
    def advantages(by_std: bool) -> list[tuple[float, float]]:
        heads = [sample["head"] for sample in runner({**GRPO, **sd(norm_adv_by_std_in_grpo=by_std)}).samples("step_1")]
        return [(float(head.split()[1][:-1]), float(head.split()[3][:-1])) for head in heads]

    centered, normalized = advantages(False), advantages(True)
    for start in range(0, len(centered), BASE.rollout.n):
        group = torch.tensor(centered[start : start + BASE.rollout.n])
        assert torch.allclose(group[:, 1], group[:, 0] - group[:, 0].mean(), atol=1e-3)
        by_std = torch.tensor(normalized[start : start + BASE.rollout.n])[:, 1]
        assert torch.allclose(by_std * group[:, 0].std(), group[:, 1], atol=1e-3)


def test_ppo_clips_tokens(runner: Runner) -> None:
    wide = runner({**GRPO, **MINI_BATCHES, **sd(clip_ratio_low=1.0, clip_ratio_high=1e6)}).series(metrics.PG_CLIPFRAC)
    tight = runner({**GRPO, **MINI_BATCHES, **sd(clip_ratio_low=0.0, clip_ratio_high=0.0)}).series(metrics.PG_CLIPFRAC)
    assert wide == [0, 0] and min(tight) > 0
    # With one mini-batch per step the ratio is 1, so no token is clipped.
    assert runner({**GRPO, **sd(clip_ratio_low=0.0, clip_ratio_high=0.0)}).series(metrics.PG_CLIPFRAC) == [0, 0]


def test_distillation_coefficient_changes_from_start_to_end(runner: Runner) -> None:
    decreasing, constant = (
        runner({**THREE_STEPS, **sd(distillation_coef_start=2.0, distillation_coef_end=0.0)}),
        runner(THREE_STEPS),
    )
    assert decreasing.series(metrics.DISTILLATION_COEF) == [2, 1, 0]
    assert constant.series(metrics.DISTILLATION_COEF) == [1, 1, 1]
    weighted = [w * loss for w, loss in zip((2, 1, 0), decreasing.series(metrics.DISTILLATION_LOSS), strict=True)]
    assert decreasing.series(metrics.LOSS) == pytest.approx(weighted)
    assert decreasing.series(metrics.DISTILLATION_LOSS)[0] == pytest.approx(constant.series(metrics.LOSS)[0])


def test_top_k_of_the_vocabulary_size_equals_the_full_vocabulary(
    runner: Runner, initial: Mapping[str, torch.Tensor]
) -> None:
    vocab_size = len(initial["lm_head.weight"])
    all_entries = sd(distillation_topk=vocab_size, distillation_add_tail=False)
    assert are_close(runner(all_entries).outcome(), runner().outcome())
    error = runner(sd(distillation_topk=vocab_size + 1)).error
    assert error is not None and str(vocab_size) in error


def test_alpha_selects_the_divergence(runner: Runner) -> None:
    forward, jensen_shannon, reverse = (runner(sd(alpha=a)).series(metrics.DIVERGENCE)[0] for a in (0.0, 0.5, 1.0))
    assert 0 < jensen_shannon < (forward + reverse) / 8 * (1 + 1e-3)  # upper bound, because the KL is convex


def test_logged_divergence_is_measured_before_clip_and_weight(runner: Runner) -> None:
    default, clipped, weighted = runner(), runner(sd(divergence_clip=0.01)), runner(sd(teacher_entropy_beta=0.5))
    divergence, entropy = default.series(metrics.DIVERGENCE)[0], default.series(metrics.TEACHER_ENTROPY)[0]
    for run in (clipped, weighted):
        assert run.series(metrics.DIVERGENCE)[0] == pytest.approx(divergence)
    assert 0 < clipped.series(metrics.DISTILLATION_LOSS)[0] <= 0.01 + ROUNDING < divergence
    # The entropies of a random model are similar, so the mean entropy gives approximately the mean weight.
    expected = divergence * math.exp(-0.5 * entropy)
    assert weighted.series(metrics.DISTILLATION_LOSS)[0] == pytest.approx(expected, rel=0.2)


def test_is_clip_has_an_effect_only_with_several_mini_batches(runner: Runner) -> None:
    def get_losses(run: RunResult) -> Any:
        return run.rollouts, run.series(metrics.LOSS), run.series(metrics.GRAD_NORM)

    assert are_close(get_losses(runner()), get_losses(runner(sd(is_clip=None)))) and are_close(
        get_losses(runner()), get_losses(runner(sd(is_clip=1.0)))
    )
    assert runner().series(metrics.IS_RATIO_MEAN) == pytest.approx([1, 1])
    assert runner(sd(is_clip=None)).series(metrics.IS_RATIO_MEAN) == []
    clipped = runner({**MINI_BATCHES, **sd(is_clip=1.0)})
    assert max(clipped.series(metrics.IS_RATIO_MEAN)) < 1 and min(clipped.series(metrics.IS_CLIP_FRACTION)) > 0


def test_weight_by_prompt_difficulty_is_zero_if_all_rollouts_succeed(runner: Runner) -> None:
    easy = runner(sd(weight_by_prompt_difficulty=True, success_reward_threshold=-1.0))
    assert easy.series(metrics.ROLLOUT_SUCCESS_FRACTION) == [1, 1]
    assert easy.series(metrics.LOSS) == [0, 0] and easy.series(metrics.GRAD_NORM) == [0, 0]
    weighted, unweighted = runner({"seed": 1, **sd(weight_by_prompt_difficulty=True)}), runner({"seed": 1})
    assert 0 < weighted.series(metrics.LOSS)[0] <= unweighted.series(metrics.LOSS)[0] / 2


def test_equivalent_teachers(runner: Runner, initial: Mapping[str, torch.Tensor]) -> None:
    def train_with(kind: str, rate: float = 0.0) -> RunResult:
        return runner({**THREE_STEPS, **sd(teacher_regularization=kind, ema_update_rate=rate, teacher_sync_steps=1)})

    frozen, *constant = train_with("frozen"), train_with("ema", 0.0), train_with("trust-region", 0.0)
    assert all(are_close(frozen.outcome(), other.outcome()) for other in constant)
    assert are_close(frozen.checkpoints["step_3/teacher"], initial)
    # A live teacher is the student before the update, like a copy of the student after each step.
    live, *following = (
        train_with("live"),
        train_with("ema", 1.0),
        train_with("snapshot"),
        train_with("trust-region", 1.0),
    )
    assert all(are_close(live.outcome(), other.outcome()) for other in following)
    assert set(live.checkpoints) == {"step_3"}
    for other in following[:2]:
        assert are_close(other.checkpoints["step_3/teacher"], other.checkpoints["step_3"], tolerance=0)


def test_ema_and_snapshot_teachers_follow_the_student(runner: Runner, initial: Mapping[str, torch.Tensor]) -> None:
    averaged = runner({**ONE_STEP, **sd(ema_update_rate=0.3)}).checkpoints
    expected = {name: 0.7 * initial[name] + 0.3 * param for name, param in averaged["step_1"].items()}
    assert not are_close(averaged["step_1"], initial) and are_close(averaged["step_1/teacher"], expected)
    snapshot = sd(teacher_regularization="snapshot", teacher_sync_steps=2)
    checkpoints = runner({**THREE_STEPS, **snapshot, "save_steps": 1, "save_total_limit": 3}).checkpoints
    assert are_close(checkpoints["step_1/teacher"], initial)
    assert are_close(checkpoints["step_2/teacher"], checkpoints["step_2"]) and are_close(
        checkpoints["step_3/teacher"], checkpoints["step_2"]
    )
    assert not are_close(checkpoints["step_3"], checkpoints["step_2"])


def get_teacher_prompts(samples: Sequence[Mapping[str, str]]) -> list[str | None]:
    """Teacher prompt of each sample; None for an undistilled sample."""
    texts = [sample["teacher's prompt"].strip() for sample in samples]
    return [None if text == "(not distilled)" else text for text in texts]


def is_success(sample: Mapping[str, str]) -> bool:
    return sample["head"].startswith("score 1,")


def get_answer(sample: Mapping[str, str]) -> str:
    return sample["ground truth"].split("</think>")[1].strip()


def test_teacher_prompt_follows_the_settings(runner: Runner) -> None:
    run = runner()
    assert {is_success(sample) for sample in run.samples()} == {True, False}
    for sample, text in zip(run.samples(), get_teacher_prompts(run.samples()), strict=True):
        solution = f"\nCorrect solution:\n\n{get_answer(sample)}\n\n"
        assert text == f"{sample['prompt']}{solution}\n\nCorrectly solve the original question."

    run = runner(sd(remove_thinking_from_demonstration=False))
    assert all(
        sample["ground truth"] in text
        for sample, text in zip(run.samples(), get_teacher_prompts(run.samples()), strict=True)
    )

    run = runner(sd(distill_only_failed=True))
    assert [text is None for text in get_teacher_prompts(run.samples())] == [
        is_success(sample) for sample in run.samples()
    ]

    run = runner(WITH_FEEDBACK)
    assert [FEEDBACK in text for text in get_teacher_prompts(run.samples())] == [
        not is_success(sample) for sample in run.samples()
    ]

    run = runner({**WITH_FEEDBACK, **sd(demonstration_source="none")})
    for sample, text in zip(run.samples(), get_teacher_prompts(run.samples()), strict=True):
        assert (text is None) == is_success(sample) and "Correct solution" not in (text or "")


def test_templates_of_the_teacher_prompt(runner: Runner) -> None:
    templates = {
        "reprompt_template": "{solution}{feedback} Now: {prompt}",
        "solution_template": "It is {successful_previous_attempt}.",
        "feedback_template": " Mind: {feedback_raw}.",
    }
    run = runner({**WITH_FEEDBACK, **sd(**templates)})
    for sample, text in zip(run.samples(), get_teacher_prompts(run.samples()), strict=True):
        feedback = "" if is_success(sample) else f" Mind: {sample['feedback']}."
        assert text == f"[user] It is {get_answer(sample)}.{feedback} Now: {sample['prompt'].removeprefix('[user] ')}"


def test_demonstrations_are_successful_rollouts_of_the_same_prompt(runner: Runner) -> None:
    settings = {**ONE_STEP, **SUCCESSFUL_ROLLOUTS, "data.train_batch_size": 10}
    others = runner(settings)
    including_self = runner({**settings, **sd(dont_reprompt_on_self_success=False)})
    fallback = runner({**settings, **sd(demonstration_source="successful_rollout_then_ground_truth")})
    low_threshold = runner({**settings, **sd(success_reward_threshold=-1.0)})
    feedback_fallback = runner({**settings, **WITH_FEEDBACK, **sd(environment_feedback_only_without_solution=True)})
    samples, runs = others.samples(), (others, including_self, fallback, low_threshold, feedback_fallback)
    assert all(run.responses() == others.responses() for run in runs)
    teacher_prompts = zip(*(get_teacher_prompts(run.samples()) for run in runs), strict=True)
    situations = set()
    for i, (by_others, by_any, with_fallback, by_low, with_feedback) in enumerate(teacher_prompts):
        sample, first = samples[i], i - i % BASE.rollout.n
        successes = [j for j in range(first, first + BASE.rollout.n) if is_success(samples[j])]
        has_peer = any(j != i for j in successes)
        situations.add((has_peer, bool(successes)))
        assert (by_others is not None) == has_peer
        assert (by_any is not None) == bool(successes)
        assert with_fallback is not None and (f"\n\n{get_answer(sample)}\n\n" in with_fallback) == (not has_peer)
        assert by_low is not None  # with the low threshold, every rollout is a success
        assert (FEEDBACK in (with_feedback or "")) == (not has_peer and not is_success(sample))
    assert situations == {(True, True), (False, True), (False, False)}


def test_teacher_prompt_is_truncated_to_the_limit(runner: Runner) -> None:
    assert runner().series(metrics.TRUNCATED_FRACTION) == [0, 0]
    short = runner(sd(max_reprompt_len=26))
    assert all(fraction > 0 for fraction in short.series(metrics.TRUNCATED_FRACTION))
    assert all("Correctly solve" in (text or "Correctly solve") for text in get_teacher_prompts(short.samples()))


def test_evaluation_uses_its_sampling_settings(runner: Runner) -> None:
    three, two = runner({"eval.n": 3}), runner({"eval.n": 2})
    for run, n in ((three, 3), (two, 2)):
        mean, best = (run.series(metrics.val_name(SOURCE, name))[0] for name in (f"mean@{n}", f"best@{n}/mean"))
        assert mean < best <= 1
        assert run.series(GREEDY) == runner().series(GREEDY)
    for sampling in ({"eval.temperature": 0.2}, {"eval.top_p": 0.2}):
        assert runner({"eval.n": 3, **sampling}).series(GREEDY) == runner().series(GREEDY)
    assert runner({"eval.evaluate_teacher": False}).series(GREEDY_TEACHER) == []
    assert runner({"eval.evaluate_teacher": False}).series(GREEDY) == runner().series(GREEDY)
    assert runner({"eval.n": 3, "eval.top_p": 1e-6}).series(metrics.val_name(SOURCE, "mean@3")) == pytest.approx(
        runner().series(GREEDY)  # only the most likely token
    )


def test_trackers_receive_project_name_and_rows(runner: Runner) -> None:
    assert runner(WANDB).tracked == [("wandb", "sdpo", "run"), ("wandb", 1), ("wandb", 2)]
    named = runner({**WANDB, "tracking.project": "another", "tracking.name": "third"})
    assert named.tracked[0] == ("wandb", "another", "third")
    both = runner({"tracking.report_to": ["tensorboard", "trackio"]}).tracked
    assert both[:2] == [("tensorboard", "run/tensorboard"), ("trackio", "sdpo", "run")]
    assert {("tensorboard", 1), ("tensorboard", 2), ("trackio", 1), ("trackio", 2)} <= set(both)


def test_number_and_steps_of_written_rollouts(runner: Runner) -> None:
    written = [set(runner({**THREE_STEPS, "tracking.log_completions_steps": every}).rollouts) for every in (0, 1, 2)]
    assert written == [set(), {"step_1", "step_2", "step_3"}, {"step_1", "step_2"}]
    for count in (2, 5):
        result = runner({"tracking.num_completions": count})
        assert [len(result.samples(step)) for step in ("step_1", "step_2")] == [count, count]
