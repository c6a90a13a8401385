"""Fixtures of the unit tests: a tiny model with sharp distributions, configs, and samples without files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from sdpo.config.field import Section
from sdpo.config.root import SDPOConfig
from sdpo.models.generation.sampling import Completion
from sdpo.prompting.demonstrations import PrivilegedContext, ScoredRollout
from sdpo.prompting.run_date import RUN_DATE
from sdpo.prompting.teacher_context import TeacherContext
from sdpo.prompting.tokenization import TeacherPrompt
from sdpo.rewards.base import Row
from sdpo.rewards.toy.hidden_rule import HiddenRule
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import TrainingSample

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
sys.path.insert(0, str(Path(__file__).parent / "models"))
from vision_language import LoadedModel, build_vision_model, load_vision_model

VOCABULARY = 12
PAD, STOP = 0, 2
SECTIONS = {name: type(value) for name, value in vars(SDPOConfig()).items() if isinstance(value, Section)}

MakeModel = Callable[..., PreTrainedModel]
MakeRun = Callable[..., SDPOConfig]
MakeSample = Callable[..., TrainingSample]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_run_date() -> Iterator[None]:
    """A run sets its date in the environment."""
    yield
    os.environ.pop(RUN_DATE, None)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Factory of a random Qwen2 with 12 tokens; its next-token distribution depends strongly on all earlier tokens."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": STOP,
            "pad_token_id": PAD,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Qwen2ForCausalLM(Qwen2Config(**{**shape, **settings}))
            with torch.no_grad():
                for name, param in model.named_parameters():
                    if "norm" not in name:
                        param.normal_(std=0.4 if "lm_head" in name else 0.6)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model()


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Factory of a small config; keyword arguments change settings, with two underscores for a dot."""
    return build_run_maker(tmp_path)


@pytest.fixture(scope="session")
def make_run_in(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """``make_run`` for fixtures of session scope."""
    return build_run_maker(tmp_path_factory.mktemp("run"))


def build_run_maker(tmp_path: Path) -> MakeRun:
    def make(**settings: Any) -> SDPOConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "model__path": str(tmp_path / "model"),
            "data__task": "hidden_rule",
            "data__train_batch_size": 2,
            "rollout__n": 3,
            "rollout__max_response_length": 8,
            "optim__warmup_steps": 0,
            "optim__lr": 1e-2,
        }
        by_section: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        top: dict[str, Any] = {}
        for key, value in {**defaults, **settings}.items():
            section, _, name = key.partition("__")
            if name:
                by_section[section][name] = value
            else:
                top[key] = value
        return SDPOConfig(**top, **{name: SECTIONS[name](**values) for name, values in by_section.items()})

    return make


@pytest.fixture
def make_task_run(make_run: MakeRun, hidden_rule_dir: Path) -> MakeRun:
    """``make_run`` for the offline task, with sizes at which a step takes a fraction of a second."""

    def make(**settings: Any) -> SDPOConfig:
        defaults: dict[str, Any] = {
            "max_steps": 3,
            "eval_steps": 0,
            "model__path": str(hidden_rule_dir / "model"),
            "data__task_args": {"dir": str(hidden_rule_dir), "pretrain_steps": 0, "num_train": 40, "num_test": 8},
            "data__train_files": [str(hidden_rule_dir / "train.parquet")],
            "data__val_files": [str(hidden_rule_dir / "test.parquet")],
            "data__train_batch_size": 4,
            "rollout__n": 2,
            "self_distillation__demonstration_source": "none",
            "self_distillation__include_environment_feedback": True,
        }
        return make_run(**{**defaults, **settings})

    return make


@pytest.fixture(scope="session")
def make_sample() -> MakeSample:
    """Factory of a sample from token ids or another sample's prompt; ``teacher=None`` makes an undistilled sample."""

    def make(
        prompt: Sequence[int] | Prompt,
        response: Sequence[int],
        teacher: Sequence[int] | None = None,
        *,
        log_probs: Sequence[float] | None = None,
        advantage: float = 0.0,
        weight: float = 1.0,
        score: float = 0.0,
    ) -> TrainingSample:
        if not isinstance(prompt, Prompt):
            row = Row("tiny", [{"role": "user", "content": "?"}], {"ground_truth": "!"})
            prompt = Prompt(row, list(prompt))
        return TrainingSample(
            prompt=prompt,
            response=Completion(list(response), list(log_probs or [-2.0] * len(response)), finished=True),
            rollout=ScoredRollout(id(prompt), "", score),
            context=TeacherContext(
                PrivilegedContext(solution=None if teacher is None else "!"),
                TeacherPrompt(None if teacher is None else list(teacher), [], truncated=False),
            ),
            advantage=advantage,
            distillation_weight=weight,
        )

    return make


@pytest.fixture(scope="session")
def make_samples(make_sample: MakeSample) -> Callable[..., list[TrainingSample]]:
    """Factory of random samples of all lengths, some of them undistilled, without token 11.

    Each three rollouts share a prompt and the first tokens of their teacher prompts.
    """

    def make(num_samples: int = 6, seed: int = 0, undistilled: Sequence[int] = (1,)) -> list[TrainingSample]:
        generator = torch.Generator().manual_seed(seed)

        def ids(low: int, high: int) -> list[int]:
            length = int(torch.randint(low, high + 1, (1,), generator=generator))
            return torch.randint(3, VOCABULARY - 1, (length,), generator=generator).tolist()

        samples: list[TrainingSample] = []
        shared: list[int] = []
        for i in range(num_samples):
            response = [*ids(1, 7), STOP]
            prompt: Any = ids(2, 9) if i % 3 == 0 else samples[-1].prompt
            shared = ids(3, 12) if i % 3 == 0 else shared
            samples.append(
                make_sample(
                    prompt,
                    response,
                    None if i in undistilled else shared + ids(1, 8),
                    log_probs=(-3 * torch.rand(len(response), generator=generator)).tolist(),
                    advantage=float(torch.randn(1, generator=generator)),
                    weight=0.5 + 0.1 * i,
                )
            )
        return samples

    return make


@pytest.fixture(scope="session")
def plain_logits() -> Callable[..., Tensor]:
    """Logits of each response token from one forward pass of one sample, without cache, padding and mask."""

    @torch.no_grad()
    def compute(model: nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        return logits[len(prompt) - 1 : -1].float()

    return compute


@pytest.fixture(scope="session")
def vision_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of a vision-language family."""
    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = build_vision_model(family, tmp_path_factory.mktemp(family))
        return built[family]

    return get


@pytest.fixture
def vision_model(vision_dir: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """Load a separate copy of this model, so that a test may train it."""
    return lambda family: load_vision_model(vision_dir(family))


@pytest.fixture(scope="session")
def hidden_rule_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the offline task with an untrained model and few rows."""
    folder = tmp_path_factory.mktemp("task") / "hidden_rule"
    HiddenRule(str(folder), pretrain_steps=0, num_train=40, num_test=8).prepare()
    return folder


@pytest.fixture(scope="session")
def count_peak(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], int]:
    """Peak bytes of the CPU tensors that a call allocates."""
    trace = tmp_path_factory.mktemp("trace") / "trace.json"

    def count(call: Callable[[], Any]) -> int:
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
            torch.profiler.record_function("counted call"),
        ):
            call()
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        span = next(e for e in events if e.get("name") == "counted call")
        allocated, peak = 0, 0
        sizes: dict[int, int] = {}
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=itemgetter("ts")):
            if not span["ts"] <= event["ts"] <= span["ts"] + span["dur"]:
                continue  # a profile may contain events of an earlier profile
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            allocated -= sizes.pop(address, 0) if size > 0 else 0  # the profiler missed its release
            if size > 0:
                sizes[address] = size
                allocated += size
            else:
                allocated -= sizes.pop(address, 0)
            peak = max(peak, allocated)
        return peak

    return count
