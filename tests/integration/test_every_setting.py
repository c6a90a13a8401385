"""Every setting changes something: each is changed in a tiny run, and the change must be seen in what the run does.

A new setting without a case in ``CASES`` fails here.
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

# ---- what is run ----------------------------------------------------------------------------------------------------

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
        # Any other response gets another score, and half of all succeed.
        noise = zlib.crc32(f"{{self.salt}} {{row.ground_truth}} {{response}}".encode()) % 1000 / 500
        return {{"score": min(noise, 1.0), "feedback": None if noise >= 1 else f"{FEEDBACK} {{noise}}"}}

build_task = Task
"""

SLOWLY = """
import time

class build_task(Task):
    def compute_score(self, row, response):
        grade = super().compute_score(row, response)
        time.sleep(0.1 * (grade["score"] < 0.5))
        return grade
"""

# A model that comes with code: it turns its distribution upside down, and tells with how many threads it samples.
MODEL_CODE = """
import os
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

class UpsideDown(Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        (Path(os.environ["NOTES"]) / f"{os.getpid()} {torch.get_num_threads()}").touch()
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
                param.mul_(5.0 if param.dim() == 2 else 1.0)  # as it is made, it hears nothing of its context
        # Responses of any length: every fifth token ends one.
        model.generation_config.eos_token_id = list(range(tokenizer.eos_token_id, len(tokenizer), 5))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "model", folder / "model_with_code")
    (folder / "model_with_code" / "modeling_upside_down.py").write_text(MODEL_CODE)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_upside_down.UpsideDown"}
    (folder / "model_with_code" / "config.json").write_text(json.dumps(config))

    (folder / "task.py").write_text(TASK.replace("SALT", "0"))
    (folder / "other_task.py").write_text(TASK.replace("SALT", "1"))
    (folder / "slow_task.py").write_text(TASK.replace("SALT", "0") + SLOWLY)
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


# ---- what is seen of a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What a run left behind, and what could be seen of it while it ran."""

    error: str | None
    rows: Sequence[Mapping[str, float]] = ()  # metrics that do not depend on the clock
    rollouts: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    checkpoints: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)  # how often what was called, see Runner
    num_threads: int = 0
    sampler_threads: frozenset[int] = frozenset()  # of the sampler's own process, if the model came with code
    tracked: Sequence[Any] = ()
    messages: Sequence[str] = ()
    alarms: Sequence[Mapping[str, Any]] = ()

    def outcome(self) -> Any:
        return self.error, self.rows, self.rollouts

    def series(self, metric: str) -> list[float]:
        return [row[metric] for row in self.rows if metric in row]

    def steps_with(self, metric: str) -> list[int]:
        return [int(row[metrics.STEP]) for row in self.rows if metric in row]

    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for weights in self.checkpoints.values() for tensor in weights.values()}

    def samples(self, step: str = "") -> list[dict[str, str]]:
        """The rollouts as they were written, by part: prompt, response, feedback, ..."""
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


def same(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    """Equal, up to rounding in another order."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=1e-5)
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-5)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def change(run: SDPOConfig, changes: Mapping[str, Any]) -> SDPOConfig:
    """The run with these settings, validated as when it is read from a file."""
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
    """Runs ``BASE`` with some settings changed; the same settings once only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ran: dict[str, Ran] = {}
        make_files(folder)

    def __call__(self, changes: Mapping[str, Any] | None = None, /, *, again: bool = False) -> Ran:
        changes = changes or {}
        key = json.dumps(changes, sort_keys=True)
        if again or key not in self._ran:
            with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as place:
                patch.chdir(place)
                self._ran[key] = self._run(Path(place), changes, patch)
        return self._ran[key]

    def _run(self, place: Path, changes: Mapping[str, Any], patch: pytest.MonkeyPatch) -> Ran:
        calls: Counter[str] = Counter()
        tracked: list[Any] = []
        seen_threads: list[int] = []
        notes = self.folder / "notes" / place.name
        notes.mkdir(parents=True)
        patch.setenv("NOTES", str(notes))
        self._keep_code_here(patch)
        add_trackers(tracked, patch)
        real_sdpa = torch.nn.functional.scaled_dot_product_attention

        def count_sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls["sdpa"] += 1
            return real_sdpa(*args, **kwargs)

        def count_forward(module: torch.nn.Module, _: Any) -> None:
            name = type(module).__name__
            if name == "Qwen2Model":
                calls["forward with gradient" if torch.is_grad_enabled() else "forward"] += 1
            elif name == "Qwen2MLP" and torch.is_grad_enabled():
                calls["layer with gradient"] += 1

        messages: list[str] = []
        patch.setattr(build.logger, "warning", lambda text, *arguments: messages.append(text % arguments))

        class Watch(NullCallback):
            def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
                seen_threads.append(torch.get_num_threads())

        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", count_sdpa)
        hooks = [
            register_module_forward_pre_hook(count_forward),
            register_optimizer_step_pre_hook(lambda *_: calls.update(["optimizer step"])),
        ]
        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            run = change(BASE, changes)
            SDPOTrainer(run, Watch()).train()
        except SDPOError as error:
            return Ran(str(error))
        finally:
            torch.set_num_threads(threads_before)
            for hook in hooks:
                hook.remove()
        output_dir = Path(run.output_dir)
        rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        health_events_file = output_dir / "health_events.jsonl"
        raised = health_events_file.read_text().splitlines() if health_events_file.exists() else []
        return Ran(
            error=None,
            rows=[
                {k: v for k, v in row.items() if not k.startswith("timing_s/") and k != metrics.THROUGHPUT}
                for row in rows
            ],
            rollouts={p.stem: p.read_text() for p in sorted((output_dir / "rollouts").glob("*.txt"))},
            files=sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()),
            checkpoints={
                p.parent.relative_to(output_dir / "checkpoints").as_posix(): load_file(p)
                for p in sorted((output_dir / "checkpoints").rglob("model.safetensors"))
            },
            calls=calls,
            num_threads=seen_threads[-1],
            sampler_threads=frozenset(
                int(note.split()[1]) for note in os.listdir(notes) if int(note.split()[0]) != os.getpid()
            ),
            tracked=tracked,
            messages=messages,
            alarms=[json.loads(line) for line in raised],
        )

    def find_devices(self, changes: Mapping[str, Any]) -> dict[str, str]:
        """Where student and rollouts would be; also for devices on which nothing can run, such as meta."""
        found = {}

        def sample(policy: Any, *_: Any) -> list[Any]:
            found["rollout"] = next(policy[0][0].parameters()).device.type
            return []

        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as place:
            patch.chdir(place)
            patch.setattr("sdpo.trainer.rollout.hf_engine.sample_responses", sample)
            parts = build_components(change(BASE, changes), NullCallback())
            parts.folder.close()
            parts.sampler.submit([], seed=0)
            parts.sampler.collect()
            return found | {"actor": parts.actor.student.device.type}

    def find_engine(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What would sample, and what vLLM would be asked for; a stand-in takes the place of vLLM."""
        asked: dict[str, Any] = {"engine": "transformers"}

        class LLM:
            def __init__(self, model: str, **arguments: Any) -> None:
                asked.update(engine="vllm", **arguments)

            def generate(self, *_: Any, **__: Any) -> list[Any]:
                return [SimpleNamespace(prompt_logprobs=[None, {0: SimpleNamespace(logprob=0.0)}])]

        vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
        vllm.__spec__ = ModuleSpec("vllm", None)
        vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
        platforms.current_platform = SimpleNamespace(device_type="cpu")  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as place:
            patch.chdir(place)
            patch.setattr(os, "environ", {**os.environ})
            patch.setitem(sys.modules, "vllm", vllm)
            patch.setitem(sys.modules, "vllm.platforms", platforms)
            build_components(change(BASE, changes), NullCallback()).folder.close()
        return asked

    def find_optimizer(self, changes: Mapping[str, Any]) -> Any:
        """Which one would be built."""
        return choose_optimizer(change(BASE, changes).optim)

    def find_first_step(self, changes: Mapping[str, Any]) -> int:
        """Where the run begins in the folder of one that has had a step."""
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as place:
            patch.chdir(place)
            SDPOTrainer(change(BASE, {**changes, "resume_mode": "disable", "max_steps": 1})).train()
            parts = build_components(change(BASE, changes), NullCallback())
            parts.folder.close()
            return parts.actor.version + 1

    def find_wait(self, changes: Mapping[str, Any]) -> float:
        """How long a run that is stopped would wait for rollouts in flight."""
        waits: list[float] = []

        def stop(_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as place:
            patch.chdir(place)
            patch.setattr("sdpo.trainer.trainer.SDPOTrainer._run_to_end", stop)
            patch.setattr("sdpo.trainer.trainer.SDPOTrainer._emergency_save", lambda _, wait: waits.append(wait))
            SDPOTrainer(change(BASE, changes)).train()
        return waits[0]

    def find_restarts(self, changes: Mapping[str, Any]) -> int:
        """How often the sampling process may be restarted."""
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.folder) as place:
            patch.chdir(place)
            parts = build_components(change(BASE, changes), NullCallback())
            parts.folder.close()
            parts.sampler.close()
            return parts.sampler._max_restarts  # type: ignore[attr-defined,no-any-return]

    def _keep_code_here(self, patch: pytest.MonkeyPatch) -> None:
        # Where transformers copies a model's code: read from the environment when it is imported, so in a new process.
        patch.setenv("HF_MODULES_CACHE", str(self.folder / "code"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(self.folder / "code"))
        patch.setattr(sys, "path", [*sys.path])


def add_trackers(tracked: list[Any], patch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the tracking libraries, which tell what they are given."""

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            tracked.append(("tensorboard", folder))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            tracked.append(("tensorboard", step))

        def close(self) -> None:
            pass

    def stand_in(library: str) -> SimpleNamespace:
        return SimpleNamespace(
            init=lambda project, name, config: tracked.append((library, project, name)),
            log=lambda values, step: tracked.append((library, step)),
            finish=lambda: None,
        )

    patch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))  # type: ignore
    for library in ("wandb", "trackio"):
        patch.setitem(sys.modules, library, stand_in(library))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("every_setting"))


# ---- what each setting must change ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How to see that a setting matters.

    Attributes:
        values: what it is changed to. Its own value in ``where`` or in ``BASE``, and all of these, must look different.
        where: other settings, under which it matters.
        observe: what must differ; the run's metrics and rollouts, if not said.
        keeps: what must not.
        look: what is looked at; a whole run, if not said.
    """

    values: Sequence[Any]
    where: Mapping[str, Any] = field(default_factory=dict)
    observe: Callable[[Any], Any] = Ran.outcome
    keeps: Callable[[Any], Any] | None = None
    look: Callable[[Runner, Mapping[str, Any]], Any] = Runner.__call__


def itself(found: Any) -> Any:
    return found


def alarms(ran: Ran) -> list[Any]:
    return [(alarm["step"], alarm["rule"], alarm["action"]) for alarm in ran.alarms]


def calls(name: str) -> Callable[[Ran], int]:
    return lambda ran: ran.calls[name]


ONE_STEP = {"max_steps": 1}
SAVING = {"max_steps": 4, "save_steps": 1, "eval_steps": 1}
THREE = {"max_steps": 3}
GRPO = {"self_distillation.policy_loss_weight": 1.0}
MINIS = {"actor.mini_batch_size": 1}
NUCLEUS = {"rollout.top_p": 0.5}
PEERS = {"self_distillation.demonstration_source": "successful_rollout"}
FEEDBACK_TOO = {"self_distillation.include_environment_feedback": True}
IMAGES = {
    "model.path": "../vision_model",
    "data.train_files": ["../images.parquet"],
    "data.val_files": ["../images.parquet"],
}
SLOW_GRADER = {"data.task": "../slow_task.py"}
WANDB = {"tracking.report_to": ["wandb"]}
# So that chance alone makes alarms.
UNWELL = {"max_steps": 6, "health.window": 1, "health.min_z_score": 0.0, "health.score_drop": 0.0}
HALF = {"model.dtype": "bfloat16", "optim.betas": [0.9, 0.95]}
WORSE = {"max_steps": 6, "health.window": 1, "eval_steps": 1, "health.min_accuracy_gap": 0.0, "optim.lr": 1e-1}
NOTHING = {
    "max_steps": 6,
    "health.window": 1,
    "self_distillation.demonstration_source": "successful_rollout",
    "data.train_batch_size": 1,
    "rollout.n": 2,
}

CASES = {
    "seed": Case([1]),
    "output_dir": Case(["another/place"], observe=lambda ran: ran.files),
    "max_steps": Case([3]),
    "eval_steps": Case([1]),
    "save_steps": Case([1], observe=lambda ran: set(ran.checkpoints)),
    "save_total_limit": Case([1, 4], SAVING, observe=lambda ran: set(ran.checkpoints), keeps=Ran.outcome),
    "save_best_limit": Case([4], SAVING, observe=lambda ran: set(ran.checkpoints), keeps=Ran.outcome),
    "resume_mode": Case(["auto"], look=Runner.find_first_step, observe=itself),
    "shutdown_timeout": Case([0.0], look=Runner.find_wait, observe=itself),
    "max_staleness": Case([1], WITH_CODE),
    # What verl makes of them is seen in tests/unit/verl_backend/test_to_verl.py.
    "verl": Case([{"trainer.nnodes": 2}], observe=lambda ran: ran.messages, keeps=Ran.outcome),
    "model.path": Case(["../other_model"]),
    "model.dtype": Case(["bfloat16"], {"optim.betas": [0.9, 0.95]}),
    "model.attn_implementation": Case(["eager"], observe=calls("sdpa"), keeps=Ran.outcome),
    "model.trust_remote_code": Case([True], {"model.path": "../model_with_code"}),
    "data.task": Case(["../other_task.py"]),
    "data.task_args": Case([{"salt": 2}]),
    "data.train_files": Case([["../other_train.parquet"], ["../train.parquet", "../other_train.parquet"]]),
    "data.val_files": Case([["../other_test.parquet"], ["../test.parquet", "../other_test.parquet"]]),
    "data.train_batch_size": Case([2]),
    "data.max_prompt_length": Case([11], {"data.filter_overlong_prompts": True}),
    "data.filter_overlong_prompts": Case([True], {"data.max_prompt_length": 11}),
    "data.max_pixels": Case([800], IMAGES),
    "data.filter_unreadable_images": Case([True], {**IMAGES, "data.train_files": ["../broken_images.parquet"]}),
    "reward.timeout_s": Case(
        [0.02],
        {**SLOW_GRADER, "reward.max_failure_fraction": 1.0},
        observe=lambda ran: ran.series(metrics.REWARD_FAILURES),
    ),
    "reward.max_failure_fraction": Case([1.0], {**SLOW_GRADER, "reward.timeout_s": 0.02}),
    "data.shuffle": Case([False]),
    # That vLLM then samples, and that its cache has this size, is seen in tests/vllm.
    "rollout.engine": Case(["vllm"], observe=itemgetter("engine"), look=Runner.find_engine),
    "rollout.device": Case(["meta"], observe=itemgetter("rollout"), look=Runner.find_devices),
    "rollout.n": Case([2]),
    "rollout.temperature": Case([0.5]),
    "rollout.top_p": Case([0.5]),
    "rollout.max_response_length": Case([3]),
    "rollout.max_num_seqs": Case([6, 1], observe=calls("forward")),
    "rollout.kv_cache_memory_gib": Case(
        [0.5], {"rollout.engine": "vllm"}, observe=itemgetter("kv_cache_memory_bytes"), look=Runner.find_engine
    ),
    "rollout.max_restarts": Case([0], {"max_staleness": 1}, look=Runner.find_restarts, observe=itself),
    "rollout.num_threads": Case([2], {"max_staleness": 1, **WITH_CODE}, observe=lambda ran: ran.sampler_threads),
    "actor.device": Case(["meta"], observe=itemgetter("actor"), look=Runner.find_devices),
    "actor.mini_batch_size": Case([2, 1]),
    "actor.max_tokens_per_micro_batch": Case([200, 1], observe=calls("forward with gradient"), keeps=Ran.outcome),
    "actor.loss_agg_mode": Case(["seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]),
    "actor.kl_loss_coef": Case([0.5, 2.0]),
    # k1, k2, k3 are other names of kl, mse, low_var_kl, and mse+ is mse.
    "actor.kl_loss_type": Case(
        ["kl", "abs", "mse", "kl+", "abs+", "low_var_kl+"], {**THREE, "actor.kl_loss_coef": 1.0}
    ),
    "actor.entropy_coeff": Case([0.1, 0.5]),
    "rollout_correction.rollout_is": Case(["none", "sequence"], NUCLEUS),
    "rollout_correction.rollout_is_threshold": Case([0.4], NUCLEUS),
    "actor.autocast": Case([True]),
    "actor.freeze_vision_tower": Case([True], IMAGES),
    "actor.gradient_checkpointing": Case([True], observe=calls("layer with gradient"), keeps=Ran.outcome),
    "actor.num_threads": Case([2], ONE_STEP, observe=lambda ran: ran.num_threads),
    "lora.rank": Case([2, 4]),
    "lora.alpha": Case([1, 16], {"lora.rank": 2}),
    "lora.target_modules": Case([["q_proj"], ["q_proj", "down_proj"]], {"lora.rank": 2}),
    # What these two make of the moments and of the weights is seen in tests/unit/models/test_optimizer.py.
    "optim.name": Case(["adamw_8bit"], look=Runner.find_optimizer, observe=itself),
    "optim.stochastic_rounding": Case([True], HALF, look=Runner.find_optimizer, observe=itself),
    "optim.lr": Case([2e-2]),
    "optim.weight_decay": Case([10.0]),
    "optim.betas": Case([[0.1, 0.999], [0.9, 0.1]], THREE),
    "optim.warmup_steps": Case([2]),
    "optim.lr_scheduler_type": Case(["linear", "cosine"], THREE),
    "optim.max_grad_norm": Case([1e-3], THREE),
    "self_distillation.full_logit_distillation": Case([False], {"self_distillation.alpha": 1.0}),
    "self_distillation.alpha": Case([0.5, 1.0]),
    "self_distillation.distillation_topk": Case([5, 10]),
    "self_distillation.distillation_add_tail": Case([False], {"self_distillation.distillation_topk": 5}),
    "self_distillation.divergence_clip": Case([0.01]),
    "self_distillation.teacher_entropy_beta": Case([0.5]),
    "self_distillation.is_clip": Case([1.0, None], MINIS),
    "self_distillation.weight_by_prompt_difficulty": Case([True]),
    "self_distillation.distillation_coef_start": Case([2.0]),
    "self_distillation.distillation_coef_end": Case([2.0]),
    "self_distillation.policy_loss_weight": Case([0.5, 1.0]),
    "self_distillation.clip_ratio_low": Case([0.0], {**GRPO, **MINIS}),
    "self_distillation.clip_ratio_high": Case([0.0], {**GRPO, **MINIS}),
    "self_distillation.norm_adv_by_std_in_grpo": Case([False], GRPO),
    "self_distillation.teacher_regularization": Case(
        ["trust-region", "frozen", "live", "snapshot"],
        {**THREE, "self_distillation.teacher_sync_steps": 2, "self_distillation.ema_update_rate": 0.3},
    ),
    "self_distillation.ema_update_rate": Case([0.3]),
    "self_distillation.teacher_sync_steps": Case([1], {"self_distillation.teacher_regularization": "snapshot"}),
    "self_distillation.demonstration_source": Case(
        ["successful_rollout", "successful_rollout_then_ground_truth", "none"], FEEDBACK_TOO
    ),
    "self_distillation.success_reward_threshold": Case([0.5], PEERS),
    "self_distillation.dont_reprompt_on_self_success": Case([False], PEERS),
    "self_distillation.distill_only_failed": Case([True]),
    "self_distillation.include_environment_feedback": Case([True]),
    "self_distillation.environment_feedback_only_without_solution": Case([True], {**PEERS, **FEEDBACK_TOO}),
    "self_distillation.remove_thinking_from_demonstration": Case([False]),
    "self_distillation.max_reprompt_len": Case([26]),
    "self_distillation.reprompt_template": Case(["{solution}{feedback}{prompt}"]),
    "self_distillation.solution_template": Case([" It is {successful_previous_attempt}."]),
    "self_distillation.feedback_template": Case([" Mind: {feedback_raw}."], FEEDBACK_TOO),
    "eval.val_before_train": Case([True]),
    "eval.max_prompts": Case([2]),
    "eval.n": Case([2, 3]),
    "eval.temperature": Case([0.2], {"eval.n": 3}),
    "eval.top_p": Case([0.2], {"eval.n": 3}),
    "eval.evaluate_teacher": Case([False]),
    "health.score_collapse": Case(["ignore", "stop"], UNWELL, observe=alarms),
    "health.entropy_collapse": Case(["ignore", "stop"], {**UNWELL, "health.entropy_fall": 1.0}, observe=alarms),
    "health.entropy_explosion": Case(["ignore", "stop"], {**UNWELL, "health.entropy_rise": 1.0}, observe=alarms),
    "health.length_collapse": Case(["ignore", "stop"], {**UNWELL, "health.length_fall": 1.0}, observe=alarms),
    "health.teacher_entropy_increase": Case(
        ["ignore", "stop"], {**UNWELL, "health.teacher_entropy_rise": 1.0}, observe=alarms
    ),
    "health.teacher_underperforms_student": Case(["ignore", "stop"], WORSE, observe=alarms),
    "health.no_distillation_targets": Case(["ignore", "stop"], NOTHING, observe=alarms),
    "health.window": Case([2, 3], UNWELL, observe=alarms),
    "health.min_z_score": Case([100.0], UNWELL, observe=alarms),
    "health.score_drop": Case([10.0], UNWELL, observe=alarms),
    "health.entropy_fall": Case([1.0], UNWELL, observe=alarms),
    "health.entropy_rise": Case([1.0], UNWELL, observe=alarms),
    "health.length_fall": Case([1.0], UNWELL, observe=alarms),
    "health.max_clip_ratio_increase": Case([0.0], UNWELL, observe=alarms),
    "health.teacher_entropy_rise": Case([1.0], UNWELL, observe=alarms),
    "health.min_accuracy_gap": Case([1.0], WORSE, observe=alarms),
    "health.min_distilled_fraction": Case([1.0], NOTHING, observe=alarms),
    "health.reduce_factor": Case([0.9], {**UNWELL, "health.score_collapse": "reduce_weight"}),
    "health.min_scale": Case([0.9], {**UNWELL, "health.score_collapse": "reduce_weight"}),
    "health.ref_kl_interval": Case([1, 3], THREE),
    "tracking.report_to": Case([["tensorboard"], ["wandb"], ["trackio"]], observe=lambda ran: ran.tracked),
    "tracking.project": Case(["another"], WANDB, observe=lambda ran: ran.tracked),
    "tracking.name": Case(["another"], WANDB, observe=lambda ran: ran.tracked),
    "tracking.log_completions_steps": Case([2, 0], THREE, observe=lambda ran: set(ran.rollouts)),
    "tracking.num_completions": Case([2], observe=lambda ran: len(ran.samples())),
}

IN_ANOTHER_PROCESS = {"max_staleness", "rollout.num_threads"}
# What comes after sampling leaves the first step's responses alone.
AFTER_SAMPLING = ("actor.", "lora.", "optim.", "self_distillation.", "eval.")


def in_turn() -> list[Any]:
    keys = [key for key, _ in iterate_settings()]
    return [pytest.param(key, marks=pytest.mark.slow) if key in IN_ANOTHER_PROCESS else key for key in keys]


@pytest.mark.parametrize("key", in_turn())
def test_setting_changes_the_result(key: str, ran: Runner) -> None:
    assert key in CASES, f"{key} is a setting that no test changes; add to CASES how to see that it matters"
    case = CASES[key]
    looked = [case.look(ran, case.where), *(case.look(ran, {**case.where, key: value}) for value in case.values)]
    named = list(zip([f"the {key} of the base run", *map(repr, case.values)], looked, strict=True))
    for name, one in named[1:]:
        assert getattr(one, "error", None) is None, f"{key}: {name} is refused"
    for (name, one), (other_name, other) in combinations(named, 2):
        assert not same(case.observe(one), case.observe(other)), f"{key}: {name} and {other_name} give the same"
    if case.keeps is not None:
        for name, other in named[1:]:
            assert same(case.keeps(looked[0]), case.keeps(other)), f"{key}: {name} changes what it must not"
    if key.startswith(AFTER_SAMPLING) and key != "actor.autocast" and case.look is Runner.__call__:
        assert all(one.responses("step_1") == looked[0].responses("step_1") for one in looked), (
            f"{key} changes sampling"
        )


def test_no_case_is_of_a_setting_that_is_gone() -> None:
    assert set(CASES) - {key for key, _ in iterate_settings()} == set()


def test_a_run_is_repeated_exactly(ran: Runner) -> None:
    first, again = ran(), ran(again=True)
    assert first.outcome() == again.outcome()
    for name, weights in first.checkpoints.items():
        for param, value in weights.items():
            assert torch.equal(value, again.checkpoints[name][param])


# ---- exactly what some of them must change --------------------------------------------------------------------------

STUDENT, TEACHER = "step_2", "step_2/teacher"
GREEDY = metrics.val_name(SOURCE, "mean@1")
GREEDY_TEACHER = metrics.teacher_val_name(SOURCE, "mean@1")
ROUNDING = 1e-6


def sd(**changes: Any) -> dict[str, Any]:
    return {f"self_distillation.{name}": value for name, value in changes.items()}


@pytest.fixture(scope="session")
def initial(ran: Runner) -> Mapping[str, torch.Tensor]:
    return load_file(ran.folder / "model" / "model.safetensors")


def test_steps_evaluations_and_checkpoints_come_when_they_are_due(ran: Runner) -> None:
    due = ran({"max_steps": 5, "eval_steps": 2, "save_steps": 3, "eval.val_before_train": True})
    assert due.steps_with(metrics.STEP) == [0, 1, 2, 3, 4, 5]
    assert due.steps_with(metrics.LOSS) == [1, 2, 3, 4, 5]
    assert due.steps_with(GREEDY) == due.steps_with(GREEDY_TEACHER) == [0, 2, 4, 5]
    assert set(due.checkpoints) == {"step_3", "step_3/teacher", "step_5", "step_5/teacher"}
    assert ran().steps_with(GREEDY) == [2]


def test_everything_stands_in_the_run_folder(ran: Runner) -> None:
    files = ran({"output_dir": "another/place"}).files
    assert {name.removeprefix("another/place/") for name in files} == {
        name.removeprefix("run/") for name in ran().files
    }


def test_seed_decides_the_samples_and_not_the_model(ran: Runner) -> None:
    one, other = (ran({"eval.val_before_train": True, "seed": seed}) for seed in (0, 1))
    assert one.responses("step_1") != other.responses("step_1")
    assert [sample["prompt"] for sample in one.samples()] != [sample["prompt"] for sample in other.samples()]
    assert one.rows[0] == other.rows[0]
    unshuffled = [ran({"data.shuffle": False, "seed": seed}) for seed in (0, 1)]
    assert unshuffled[0].responses("step_1") != unshuffled[1].responses("step_1")


@pytest.mark.slow
def test_staleness_1_samples_with_the_weights_of_the_step_before(ran: Runner) -> None:
    fresh, stale = ran(WITH_CODE), ran({**WITH_CODE, "max_staleness": 1})
    assert (fresh.series(metrics.STALENESS), stale.series(metrics.STALENESS)) == ([0, 0], [0, 1])
    assert stale.responses("step_1") == fresh.responses("step_1")  # the same weights, in another process
    assert stale.series(metrics.ROLLOUT_KL)[0] == pytest.approx(0, abs=1e-5)
    assert abs(stale.series(metrics.ROLLOUT_KL)[1]) > 1e-3
    assert (stale.sampler_threads, fresh.sampler_threads) == ({1}, set())
    assert ran({**WITH_CODE, "max_staleness": 1, "rollout.num_threads": 2}).sampler_threads == {2}


def test_code_of_a_model_runs_only_if_it_is_trusted(ran: Runner) -> None:
    assert ran({"model.path": "../model_with_code"}).outcome() == ran().outcome()


def test_dtype_is_that_of_the_weights_and_autocast_is_not(ran: Runner) -> None:
    dtypes = [ran(changes).dtypes() for changes in ({}, HALF, {"actor.autocast": True})]
    assert dtypes == [{torch.float32}, {torch.bfloat16}, {torch.float32}]


@pytest.mark.parametrize("key", ["actor.device", "rollout.device"])
def test_device_that_is_not_there_is_refused(key: str, ran: Runner) -> None:
    error = ran({key: MISSING_DEVICE}).error
    assert error is not None and error.startswith(f"{key}: no device {MISSING_DEVICE!r} here")
    assert ran.find_devices({key: "meta"}) == {"actor": "cpu", "rollout": "cpu", key.split(".")[0]: "meta"}


def test_prompts_come_in_the_order_of_the_file_or_shuffled(ran: Runner) -> None:
    in_order, shuffled = (
        [sample["prompt"].removeprefix("[user] ") for sample in ran(changes).samples()[:: BASE.rollout.n]]
        for changes in ({"data.shuffle": False}, {})
    )
    assert in_order == [question(i) for i in range(8)]
    assert shuffled != in_order and len(set(shuffled)) == 8 and set(shuffled) <= {question(i) for i in range(10)}


def test_number_and_length_of_prompts_and_responses(ran: Runner) -> None:
    assert len(ran().samples()) == 2 * 4 * 3
    assert len(ran({"data.train_batch_size": 2}).samples()) == 2 * 2 * 3
    assert len(ran({"rollout.n": 2}).samples()) == 2 * 4 * 2
    assert ran().series(metrics.RESPONSE_LENGTH_MAX) == [4, 4]
    assert ran({"rollout.max_response_length": 3}).series(metrics.RESPONSE_LENGTH_MAX) == [3, 3]
    assert max(ran().series(metrics.PROMPT_LENGTH_MAX)) > 11
    short = ran({"data.max_prompt_length": 11, "data.filter_overlong_prompts": True})
    assert max(short.series(metrics.PROMPT_LENGTH_MAX)) <= 11


def test_learner_divides_logits_by_the_temperature_of_the_sampler(ran: Runner) -> None:
    hot, cold = ran(), ran({"rollout.temperature": 0.5})
    for run in (hot, cold):
        assert run.series(metrics.ROLLOUT_KL) == pytest.approx([0, 0], abs=1e-5)
    assert cold.series(metrics.ENTROPY)[0] < hot.series(metrics.ENTROPY)[0] - 0.1


def test_rollout_weights_correct_what_the_nucleus_left_out(ran: Runner) -> None:
    exact, none = ran(), ran({"rollout_correction.rollout_is": "none"})
    assert same(none.series(metrics.LOSS), exact.series(metrics.LOSS))  # the sampler's policy is the old one
    nucleus, cut = ran(NUCLEUS), ran({**NUCLEUS, "rollout_correction.rollout_is_threshold": 0.4})
    assert all(0.4 < mean < 1 for mean in nucleus.series(metrics.ROLLOUT_IS_MEAN))  # about the nucleus' mass
    assert all(mean <= 0.4 + ROUNDING for mean in cut.series(metrics.ROLLOUT_IS_MEAN))
    assert all(share > 0 for share in cut.series(metrics.ROLLOUT_IS_CLIP_FRACTION))
    assert none.series(metrics.ROLLOUT_IS_MEAN) == []


def test_mini_batches_are_optimizer_steps(ran: Runner) -> None:
    steps = [ran({"actor.mini_batch_size": size}).calls["optimizer step"] for size in (None, 4, 2, 1)]
    assert steps == [2, 2, 4, 8]


def test_learning_rate_follows_its_settings(ran: Runner) -> None:
    def rates(**changes: Any) -> list[float]:
        return ran({f"optim.{name}": value for name, value in changes.items()} | THREE).series(metrics.LR)

    assert rates() == pytest.approx([0.01] * 3)
    assert rates(lr=2e-2) == pytest.approx([0.02] * 3)
    assert rates(warmup_steps=2) == pytest.approx([0, 0.005, 0.01])
    assert rates(lr_scheduler_type="linear") == pytest.approx([0.01 * (1 - i / 3) for i in range(3)])
    assert rates(lr_scheduler_type="cosine") == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
    )


def test_weight_decay_shrinks_weights_that_get_no_gradient(ran: Runner, initial: Mapping[str, torch.Tensor]) -> None:
    def embeddings(weight_decay: float) -> torch.Tensor:
        return ran({**ONE_STEP, "optim.weight_decay": weight_decay}).checkpoints["step_1"]["model.embed_tokens.weight"]

    before, without, decayed = initial["model.embed_tokens.weight"], embeddings(0.0), embeddings(10.0)
    unseen = (without == before).all(-1)  # tokens in no prompt and no response
    assert unseen.any() and not unseen.all()
    assert torch.allclose(decayed[unseen], before[unseen] * (1 - BASE.optim.lr * 10))


def test_grad_clip_comes_after_the_norm_that_is_told(ran: Runner) -> None:
    free, clipped = ran({**THREE, "optim.max_grad_norm": 1e6}), ran({**THREE, "optim.max_grad_norm": 1e-3})
    assert free.series(metrics.GRAD_NORM)[0] == clipped.series(metrics.GRAD_NORM)[0] > 1e-3
    assert free.rows == ran({**THREE, "optim.max_grad_norm": 1e5}).rows  # both above every norm there is


def test_grpo_coef_blends_two_losses_of_which_grpo_needs_no_teacher(ran: Runner) -> None:
    distilled, blended, grpo = (ran(sd(policy_loss_weight=coef)) for coef in (0.0, 0.5, 1.0))
    assert blended.series(metrics.PG_LOSS)[0] == pytest.approx(grpo.series(metrics.LOSS)[0], abs=1e-6)
    assert blended.series(metrics.DISTILLATION_LOSS)[0] == pytest.approx(distilled.series(metrics.LOSS)[0])
    expected = 0.5 * grpo.series(metrics.LOSS)[0] + 0.5 * distilled.series(metrics.LOSS)[0]
    assert blended.series(metrics.LOSS)[0] == pytest.approx(expected, abs=1e-6)
    for absent in (metrics.DISTILLATION_LOSS, metrics.DISTILLATION_COEF, metrics.TEACHER_ENTROPY, GREEDY_TEACHER):
        assert distilled.series(absent) and not grpo.series(absent)
    assert not distilled.series(metrics.PG_LOSS)
    assert set(distilled.checkpoints) == {STUDENT, TEACHER} and set(grpo.checkpoints) == {STUDENT}


def test_advantages_are_score_minus_mean_over_deviation(ran: Runner) -> None:
    def advantages(by_std: bool) -> list[tuple[float, float]]:
        heads = [sample["head"] for sample in ran({**GRPO, **sd(norm_adv_by_std_in_grpo=by_std)}).samples("step_1")]
        return [(float(head.split()[1][:-1]), float(head.split()[3][:-1])) for head in heads]

    plain, divided = advantages(False), advantages(True)
    for start in range(0, len(plain), BASE.rollout.n):
        group = torch.tensor(plain[start : start + BASE.rollout.n])
        assert torch.allclose(group[:, 1], group[:, 0] - group[:, 0].mean(), atol=1e-3)
        by_std = torch.tensor(divided[start : start + BASE.rollout.n])[:, 1]
        assert torch.allclose(by_std * group[:, 0].std(), group[:, 1], atol=1e-3)


def test_ppo_clips_take_the_gradient_of_tokens_away(ran: Runner) -> None:
    wide = ran({**GRPO, **MINIS, **sd(clip_ratio_low=1.0, clip_ratio_high=1e6)}).series(metrics.PG_CLIPFRAC)
    tight = ran({**GRPO, **MINIS, **sd(clip_ratio_low=0.0, clip_ratio_high=0.0)}).series(metrics.PG_CLIPFRAC)
    assert wide == [0, 0] and min(tight) > 0
    # In the only mini-batch of a step the ratio is 1, and there is nothing to clip.
    assert ran({**GRPO, **sd(clip_ratio_low=0.0, clip_ratio_high=0.0)}).series(metrics.PG_CLIPFRAC) == [0, 0]


def test_distillation_weight_goes_from_start_to_end(ran: Runner) -> None:
    fading, constant = ran({**THREE, **sd(distillation_coef_start=2.0, distillation_coef_end=0.0)}), ran(THREE)
    assert fading.series(metrics.DISTILLATION_COEF) == [2, 1, 0]
    assert constant.series(metrics.DISTILLATION_COEF) == [1, 1, 1]
    weighted = [w * loss for w, loss in zip((2, 1, 0), fading.series(metrics.DISTILLATION_LOSS), strict=True)]
    assert fading.series(metrics.LOSS) == pytest.approx(weighted)
    assert fading.series(metrics.DISTILLATION_LOSS)[0] == pytest.approx(constant.series(metrics.LOSS)[0])


def test_full_support_top_k_is_the_whole_vocabulary(ran: Runner, initial: Mapping[str, torch.Tensor]) -> None:
    vocab_size = len(initial["lm_head.weight"])
    everything = sd(distillation_topk=vocab_size, distillation_add_tail=False)
    assert same(ran(everything).outcome(), ran().outcome())
    error = ran(sd(distillation_topk=vocab_size + 1)).error
    assert error is not None and str(vocab_size) in error


def test_alpha_names_the_divergence(ran: Runner) -> None:
    forward, jensen_shannon, reverse = (ran(sd(alpha=a)).series(metrics.DIVERGENCE)[0] for a in (0.0, 0.5, 1.0))
    assert 0 < jensen_shannon < (forward + reverse) / 8 * (1 + 1e-3)  # at most, by the convexity of the KL


def test_divergence_is_clipped_and_weighted_after_it_is_told(ran: Runner) -> None:
    plain, clipped, sure = ran(), ran(sd(divergence_clip=0.01)), ran(sd(teacher_entropy_beta=0.5))
    divergence, entropy = plain.series(metrics.DIVERGENCE)[0], plain.series(metrics.TEACHER_ENTROPY)[0]
    for run in (clipped, sure):
        assert run.series(metrics.DIVERGENCE)[0] == pytest.approx(divergence)
    assert 0 < clipped.series(metrics.DISTILLATION_LOSS)[0] <= 0.01 + ROUNDING < divergence
    # By Jensen's inequality about what the mean entropy says; a random model's entropies are all alike.
    expected = divergence * math.exp(-0.5 * entropy)
    assert sure.series(metrics.DISTILLATION_LOSS)[0] == pytest.approx(expected, rel=0.2)


def test_is_clip_matters_with_several_mini_batches_only(ran: Runner) -> None:
    def learned(run: Ran) -> Any:
        return run.rollouts, run.series(metrics.LOSS), run.series(metrics.GRAD_NORM)

    assert same(learned(ran()), learned(ran(sd(is_clip=None)))) and same(learned(ran()), learned(ran(sd(is_clip=1.0))))
    assert ran().series(metrics.IS_RATIO_MEAN) == pytest.approx([1, 1])
    assert ran(sd(is_clip=None)).series(metrics.IS_RATIO_MEAN) == []
    clipped = ran({**MINIS, **sd(is_clip=1.0)})
    assert max(clipped.series(metrics.IS_RATIO_MEAN)) < 1 and min(clipped.series(metrics.IS_CLIP_FRACTION)) > 0


def test_prompt_difficulty_is_nothing_where_all_succeed(ran: Runner) -> None:
    easy = ran(sd(weight_by_prompt_difficulty=True, success_reward_threshold=-1.0))
    assert easy.series(metrics.ROLLOUT_SUCCESS_FRACTION) == [1, 1]
    assert easy.series(metrics.LOSS) == [0, 0] and easy.series(metrics.GRAD_NORM) == [0, 0]
    weighted, plain = ran({"seed": 1, **sd(weight_by_prompt_difficulty=True)}), ran({"seed": 1})
    assert 0 < weighted.series(metrics.LOSS)[0] <= plain.series(metrics.LOSS)[0] / 2


def test_teachers_that_are_the_same_by_definition(ran: Runner, initial: Mapping[str, torch.Tensor]) -> None:
    def taught(kind: str, rate: float = 0.0) -> Ran:
        return ran({**THREE, **sd(teacher_regularization=kind, ema_update_rate=rate, teacher_sync_steps=1)})

    frozen, *held = taught("frozen"), taught("ema", 0.0), taught("trust-region", 0.0)
    assert all(same(frozen.outcome(), other.outcome()) for other in held)
    assert same(frozen.checkpoints["step_3/teacher"], initial)
    # A live teacher is the student before the update, and so is a copy of it after each step.
    live, *following = taught("live"), taught("ema", 1.0), taught("snapshot"), taught("trust-region", 1.0)
    assert all(same(live.outcome(), other.outcome()) for other in following)
    assert set(live.checkpoints) == {"step_3"}
    for other in following[:2]:
        assert same(other.checkpoints["step_3/teacher"], other.checkpoints["step_3"], tolerance=0)


def test_teacher_follows_by_rate_and_by_snapshot(ran: Runner, initial: Mapping[str, torch.Tensor]) -> None:
    averaged = ran({**ONE_STEP, **sd(ema_update_rate=0.3)}).checkpoints
    expected = {name: 0.7 * initial[name] + 0.3 * param for name, param in averaged["step_1"].items()}
    assert not same(averaged["step_1"], initial) and same(averaged["step_1/teacher"], expected)
    snapshot = sd(teacher_regularization="snapshot", teacher_sync_steps=2)
    taken = ran({**THREE, **snapshot, "save_steps": 1, "save_total_limit": 3}).checkpoints
    assert same(taken["step_1/teacher"], initial)
    assert same(taken["step_2/teacher"], taken["step_2"]) and same(taken["step_3/teacher"], taken["step_2"])
    assert not same(taken["step_3"], taken["step_2"])


def shown(samples: Sequence[Mapping[str, str]]) -> list[str | None]:
    """What each sample's teacher was shown; None where it was not distilled."""
    texts = [sample["teacher's prompt"].strip() for sample in samples]
    return [None if text == "(not distilled)" else text for text in texts]


def succeeded(sample: Mapping[str, str]) -> bool:
    return sample["head"].startswith("score 1,")


def answer(sample: Mapping[str, str]) -> str:
    return sample["ground truth"].split("</think>")[1].strip()


def test_teacher_is_shown_what_the_settings_say(ran: Runner) -> None:
    run = ran()
    assert {succeeded(sample) for sample in run.samples()} == {True, False}
    for sample, text in zip(run.samples(), shown(run.samples()), strict=True):
        solution = f"\nCorrect solution:\n\n{answer(sample)}\n\n"
        assert text == f"{sample['prompt']}{solution}\n\nCorrectly solve the original question."

    run = ran(sd(remove_thinking_from_demonstration=False))
    assert all(sample["ground truth"] in text for sample, text in zip(run.samples(), shown(run.samples()), strict=True))

    run = ran(sd(distill_only_failed=True))
    assert [text is None for text in shown(run.samples())] == [succeeded(sample) for sample in run.samples()]

    run = ran(FEEDBACK_TOO)
    assert [FEEDBACK in text for text in shown(run.samples())] == [not succeeded(sample) for sample in run.samples()]

    run = ran({**FEEDBACK_TOO, **sd(demonstration_source="none")})
    for sample, text in zip(run.samples(), shown(run.samples()), strict=True):
        assert (text is None) == succeeded(sample) and "Correct solution" not in (text or "")


def test_templates_are_the_teachers_words(ran: Runner) -> None:
    words = {
        "reprompt_template": "{solution}{feedback} Now: {prompt}",
        "solution_template": "It is {successful_previous_attempt}.",
        "feedback_template": " Mind: {feedback_raw}.",
    }
    run = ran({**FEEDBACK_TOO, **sd(**words)})
    for sample, text in zip(run.samples(), shown(run.samples()), strict=True):
        mind = "" if succeeded(sample) else f" Mind: {sample['feedback']}."
        assert text == f"[user] It is {answer(sample)}.{mind} Now: {sample['prompt'].removeprefix('[user] ')}"


def test_peers_are_other_successes_of_the_same_prompt(ran: Runner) -> None:
    peers = {**ONE_STEP, **PEERS, "data.train_batch_size": 10}
    others = ran(peers)
    itself_too = ran({**peers, **sd(dont_reprompt_on_self_success=False)})
    fallback = ran({**peers, **sd(demonstration_source="successful_rollout_then_ground_truth")})
    low = ran({**peers, **sd(success_reward_threshold=-1.0)})
    feedback_else = ran({**peers, **FEEDBACK_TOO, **sd(environment_feedback_only_without_solution=True)})
    samples, everything = others.samples(), (others, itself_too, fallback, low, feedback_else)
    assert all(run.responses() == others.responses() for run in everything)
    seen = zip(*(shown(run.samples()) for run in everything), strict=True)
    situations = set()
    for i, (by_others, by_any, with_fallback, by_low, with_feedback) in enumerate(seen):
        sample, first = samples[i], i - i % BASE.rollout.n
        successes = [j for j in range(first, first + BASE.rollout.n) if succeeded(samples[j])]
        has_peer = any(j != i for j in successes)
        situations.add((has_peer, bool(successes)))
        assert (by_others is not None) == has_peer
        assert (by_any is not None) == bool(successes)
        assert with_fallback is not None and (f"\n\n{answer(sample)}\n\n" in with_fallback) == (not has_peer)
        assert by_low is not None  # everyone is a success, so everyone has a peer
        assert (FEEDBACK in (with_feedback or "")) == (not has_peer and not succeeded(sample))
    assert situations == {(True, True), (False, True), (False, False)}


def test_teacher_prompt_is_trimmed_to_its_limit(ran: Runner) -> None:
    assert ran().series(metrics.TRUNCATED_FRACTION) == [0, 0]
    short = ran(sd(max_reprompt_len=26))
    assert all(share > 0 for share in short.series(metrics.TRUNCATED_FRACTION))
    assert all("Correctly solve" in (text or "Correctly solve") for text in shown(short.samples()))


def test_evaluation_samples_as_it_is_told(ran: Runner) -> None:
    three, two = ran({"eval.n": 3}), ran({"eval.n": 2})
    for run, n in ((three, 3), (two, 2)):
        mean, best = (run.series(metrics.val_name(SOURCE, name))[0] for name in (f"mean@{n}", f"best@{n}/mean"))
        assert mean < best <= 1
        assert run.series(GREEDY) == ran().series(GREEDY)
    for change_of_sampling in ({"eval.temperature": 0.2}, {"eval.top_p": 0.2}):
        assert ran({"eval.n": 3, **change_of_sampling}).series(GREEDY) == ran().series(GREEDY)
    assert ran({"eval.evaluate_teacher": False}).series(GREEDY_TEACHER) == []
    assert ran({"eval.evaluate_teacher": False}).series(GREEDY) == ran().series(GREEDY)
    assert ran({"eval.n": 3, "eval.top_p": 1e-6}).series(metrics.val_name(SOURCE, "mean@3")) == pytest.approx(
        ran().series(GREEDY)  # the likeliest token alone
    )


def test_trackers_are_told_project_name_and_every_row(ran: Runner) -> None:
    assert ran(WANDB).tracked == [("wandb", "sdpo", "run"), ("wandb", 1), ("wandb", 2)]
    named = ran({**WANDB, "tracking.project": "another", "tracking.name": "third"})
    assert named.tracked[0] == ("wandb", "another", "third")
    both = ran({"tracking.report_to": ["tensorboard", "trackio"]}).tracked
    assert both[:2] == [("tensorboard", "run/tensorboard"), ("trackio", "sdpo", "run")]
    assert {("tensorboard", 1), ("tensorboard", 2), ("trackio", 1), ("trackio", 2)} <= set(both)


def test_rollouts_are_written_when_and_as_many_as_told(ran: Runner) -> None:
    written = [set(ran({**THREE, "tracking.log_completions_steps": every}).rollouts) for every in (0, 1, 2)]
    assert written == [set(), {"step_1", "step_2", "step_3"}, {"step_1", "step_2"}]
    for count in (2, 5):
        few = ran({"tracking.num_completions": count})
        assert [len(few.samples(step)) for step in ("step_1", "step_2")] == [count, count]
