"""A tiny model with sharp distributions, runs and samples made by hand: most tests here need no file at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
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
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.tokenization import TeacherPrompt
from sdpo.rewards.base import RewardOutput, Row
from sdpo.rewards.toy.hidden_rule import HiddenRule
from sdpo.trainer.data.prompts import Prompt
from sdpo.trainer.data.samples import TrainingSample

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


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A random Qwen2 with 12 tokens, whose next-token distribution depends sharply on all that it has read."""

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
    """A run from settings by dotted name, dots written as two underscores; what is not named is small and plain."""
    return build_run_maker(tmp_path)


@pytest.fixture(scope="session")
def make_run_in(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """The same for fixtures that several tests share."""
    return build_run_maker(tmp_path_factory.mktemp("run"))


def build_run_maker(tmp_path: Path) -> MakeRun:

    def make(**settings: Any) -> SDPOConfig:
        plain: dict[str, Any] = {
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
        for key, value in {**plain, **settings}.items():
            section, _, name = key.partition("__")
            if name:
                by_section[section][name] = value
            else:
                top[key] = value
        return SDPOConfig(**top, **{name: SECTIONS[name](**values) for name, values in by_section.items()})

    return make


@pytest.fixture
def make_task_run(make_run: MakeRun, hidden_rule_dir: Path) -> MakeRun:
    """The same for the offline task, small enough that a step takes a fraction of a second."""

    def make(**settings: Any) -> SDPOConfig:
        plain: dict[str, Any] = {
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
        return make_run(**{**plain, **settings})

    return make


@pytest.fixture(scope="session")
def make_sample() -> MakeSample:
    """A sample of given token ids; ``teacher=None`` is one that is not distilled. A prompt of another may be given."""

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
            text="",
            reward=RewardOutput(score),
            demonstration=PrivilegedContext(solution=None if teacher is None else "!"),
            teacher_prompt=TeacherPrompt(None if teacher is None else list(teacher), [], truncated=False),
            advantage=advantage,
            distillation_weight=weight,
        )

    return make


@pytest.fixture(scope="session")
def make_samples(make_sample: MakeSample) -> Callable[..., list[TrainingSample]]:
    """Random samples of all lengths, some of them not distilled, none with token 11 in it.

    Three rollouts share a prompt, and their teacher prompts begin alike.
    """

    def make(num_samples: int = 6, seed: int = 0, undistilled: Sequence[int] = (1,)) -> list[TrainingSample]:
        generator = torch.Generator().manual_seed(seed)

        def ids(low: int, high: int) -> list[int]:
            length = int(torch.randint(low, high + 1, (1,), generator=generator))
            return torch.randint(3, VOCABULARY - 1, (length,), generator=generator).tolist()

        samples: list[TrainingSample] = []
        shown: list[int] = []
        for i in range(num_samples):
            response = [*ids(1, 7), STOP]
            prompt: Any = ids(2, 9) if i % 3 == 0 else samples[-1].prompt
            shown = ids(3, 12) if i % 3 == 0 else shown
            samples.append(
                make_sample(
                    prompt,
                    response,
                    None if i in undistilled else shown + ids(1, 8),
                    log_probs=(-3 * torch.rand(len(response), generator=generator)).tolist(),
                    advantage=float(torch.randn(1, generator=generator)),
                    weight=0.5 + 0.1 * i,
                )
            )
        return samples

    return make


@pytest.fixture(scope="session")
def plain_logits() -> Callable[..., Tensor]:
    """What predicts each response token by one forward pass of one sample: no cache, no padding, no mask."""

    @torch.no_grad()
    def compute(model: nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        return logits[len(prompt) - 1 : -1].float()

    return compute


@pytest.fixture(scope="session")
def vision_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family that reads images."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = build_vision_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def vision_model(vision_dir: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """That model, loaded anew, so that a test may train it."""
    return lambda family: load_vision_model(vision_dir(family))


@pytest.fixture(scope="session")
def hidden_rule_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The offline task with an untrained model and few rows."""
    folder = tmp_path_factory.mktemp("task") / "hidden_rule"
    HiddenRule(str(folder), pretrain_steps=0, num_train=40, num_test=8).prepare()
    return folder


@pytest.fixture(scope="session")
def count_peak(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], int]:
    """Bytes that a call allocates at its worst moment, of tensors on the CPU that were not there before."""
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
        held, peak = 0, 0
        made: dict[int, int] = {}
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=itemgetter("ts")):
            if not span["ts"] <= event["ts"] <= span["ts"] + span["dur"]:
                continue  # a profile may carry what an earlier one left behind
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            held -= made.pop(address, 0) if size > 0 else 0  # whose release went unnoticed
            if size > 0:
                made[address] = size
                held += size
            else:
                held -= made.pop(address, 0)
            peak = max(peak, held)
        return peak

    return count
