"""verl's configuration with SDPO's section: wrong settings are refused in one line, before Ray starts."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoProcessor, PreTrainedTokenizerFast, Qwen2Config
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY
from verl.trainer.ppo.utils import need_reference_policy

from sdpo.algorithm.regularization import Regularization
from sdpo.config.data import DataConfig, RewardConfig
from sdpo.config.monitoring import HealthConfig
from sdpo.config.root import SDPOConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import SDPOError
from sdpo.models.multimodal.processor import load_without_videos
from sdpo.verl_backend.config.schema import read_health, read_regularization, read_self_distillation
from sdpo.verl_backend.driver.tools import load_tool_schemas
from sdpo.verl_backend.entrypoint.compose import compose_config
from sdpo.verl_backend.entrypoint.main import forward_environment, main, train
from sdpo.verl_backend.entrypoint.model_checks import check_model

ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model"
ROLLOUT = "actor_rollout_ref.rollout"
LORA = f"{MODEL}.lora_rank=8 {MODEL}.lora.merge=true"
NAMES = ["sdpo_trainer", "sdpo_separate_async", "sdpo_sync"]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"data_source": "x"}]), rows)
    return [f"data.train_files={rows}", f"data.val_files={rows}"]


@pytest.fixture(scope="session")
def compose(files: list[str]) -> Callable[..., DictConfig]:
    def compose(*overrides: str, name: str = "sdpo_trainer") -> DictConfig:
        return compose_config(name, [*files, *overrides])

    return compose


@pytest.mark.parametrize("name", NAMES)
def test_defaults_equal_the_dataclasses(name: str, compose: Callable[..., DictConfig]) -> None:
    config = compose(name=name)
    assert read_self_distillation(config.actor_rollout_ref.actor) == SelfDistillationConfig()
    assert read_health(config) == HealthConfig()
    assert config.trainer.save_best_limit == SDPOConfig(output_dir="x").save_best_limit
    assert config.trainer.health_events_file == f"{config.trainer.default_local_dir}/health_events.jsonl"
    assert config.trainer.n_gpus_per_node == config.rollout.n_gpus_per_node == 1
    assert config.actor_rollout_ref.rollout.calculate_log_probs
    assert config.data.max_pixels == DataConfig(task="x").max_pixels
    assert config.data.filter_unreadable_images == DataConfig(task="x").filter_unreadable_images


def test_overrides_reach_the_self_distillation_settings(compose: Callable[..., DictConfig]) -> None:
    given = {
        "full_logit_distillation": "false",
        "alpha": "1.0",
        "ema_update_rate": "0.01",
        "is_clip": "null",
        "policy_loss_weight": "0.5",
        "teacher_regularization": "trust-region",
        "solution_template": '"Look: {successful_previous_attempt}\n"',
    }
    config = compose(*(f"{ACTOR}.self_distillation.{key}={value}" for key, value in given.items()))
    settings = read_self_distillation(config.actor_rollout_ref.actor)
    assert settings is not None
    assert (settings.alpha, settings.ema_update_rate, settings.is_clip, settings.policy_loss_weight) == (
        1.0,
        0.01,
        None,
        0.5,
    )
    assert settings.solution_template == "Look: {successful_previous_attempt}\n"
    assert not settings.full_logit_distillation and settings.teacher_regularization == "trust-region"


def test_other_loss_modes_have_no_self_distillation_settings(compose: Callable[..., DictConfig]) -> None:
    config = compose(f"{ACTOR}.policy_loss.loss_mode=vanilla", f"{ACTOR}.use_kl_loss=true")
    assert read_self_distillation(config.actor_rollout_ref.actor) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{ACTOR}.self_distillation.alfa=0.5", "alfa"),
        (f"{ACTOR}.self_distillation.alpha=2", f"{ACTOR}.self_distillation.alpha=2.0: must be in [0, 1]"),
        (f"{ACTOR}.self_distillation.alpha=many", "many"),
        (f"{ACTOR}.self_distillation.teacher_regularization=none", "teacher_regularization=none: must be one of"),
        (f"{ACTOR}.self_distillation.full_logit_distillation=false", "alpha=0.0: must be 1"),
        (
            f"{ACTOR}.strategy=fsdp",
            "strategy=fsdp: not supported with loss_mode=sdpo, whose teacher is sharded",
        ),
        (
            f"{ROLLOUT}.name=sglang",
            "name=sglang: not supported with loss_mode=sdpo, which gives probability 0",
        ),
        (f"{ACTOR}.entropy_coeff=-0.01", f"{ACTOR}.entropy_coeff=-0.01: must be in [0, inf)"),
        (
            f"{ACTOR}.use_kl_loss=true {ACTOR}.kl_loss_type=full",
            f"{ACTOR}.kl_loss_type=full: must be one of kl, kl+, k1",
        ),
        (f"{ACTOR}.use_kl_loss=true {ACTOR}.kl_loss_coef=-1", f"{ACTOR}.kl_loss_coef=-1: must be in [0, inf)"),
        (f"{ACTOR}.clip_ratio_high=0.28", f"set {ACTOR}.self_distillation.clip_ratio_high instead"),
        ("algorithm.norm_adv_by_std_in_grpo=false", f"set {ACTOR}.self_distillation.norm_adv_by_std_in_grpo instead"),
        (f"{ACTOR}.loss_agg_mode=token-sum", "use token-mean"),
        (f"{ACTOR}.ulysses_sequence_parallel_size=2", "on the rank that has all tokens of a sequence; set it to 1"),
        ("actor_rollout_ref.model.use_fused_kernels=true", "use_fused_kernels"),
        (f"{ACTOR}.calculate_sum_pi_squared=true", "calculate_sum_pi_squared=True has no effect"),
        ("actor_rollout_ref.model.enable_activation_offload=true", "enable_activation_offload=True is not supported"),
        (f"++{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp16", "param_dtype=fp16 is not supported"),
        ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge must be true"),
        ("actor_rollout_ref.model.lora.merge=true", "lora.merge=True has no effect with lora_rank=0"),
        ("actor_rollout_ref.model.lora.rank=8", "FSDP ignores it; set actor_rollout_ref.model.lora_rank instead"),
        (f"{LORA} {MODEL}.lora.alpha=16", "set actor_rollout_ref.model.lora_alpha instead"),
        (f"{LORA} {MODEL}.lora.target_modules=[q_proj]", f"set {MODEL}.target_modules instead"),
        (f"{LORA} {MODEL}.lora.dropout=0.1", "lora.dropout=0.1 is for Megatron"),
        (f"{LORA} {MODEL}.lora_adapter_path=/some/adapter", "merge the adapter into this model"),
        (f"{LORA} {MODEL}.exclude_modules=q_proj", "exclude_modules is not supported"),
        (f"{LORA} +{MODEL}.target_parameters=[experts]", "target_parameters is not supported"),
        (f"{LORA} {ACTOR}.freeze_vision_tower=true", "freeze_vision_tower=True has no effect with LoRA"),
        ("algorithm.rollout_correction.bypass_mode=true", "bypass_mode"),
        ("data.train_files=/no/such.parquet", "/no/such.parquet: no such file"),
        (
            "algorithm.rollout_correction.bypass_mode=true algorithm.rollout_correction.rollout_is=null "
            "actor_rollout_ref.rollout.top_p=0.9",
            "actor_rollout_ref.rollout.top_p=0.9 cannot be used with algorithm.rollout_correction.bypass_mode=true",
        ),
        (
            "algorithm.rollout_correction.bypass_mode=true algorithm.rollout_correction.rollout_is=null "
            "actor_rollout_ref.rollout.top_k=20",
            "actor_rollout_ref.rollout.top_k=20 cannot be used with algorithm.rollout_correction.bypass_mode=true",
        ),
        ("trainer.nodes=2", "nodes"),
        (f"{ACTOR}.ppo_mini_batch_size=24", f"{ACTOR}.ppo_mini_batch_size=24 must divide data.train_batch_size=32"),
        (f"{ACTOR}.freeze_vision_tower=true {ACTOR}.policy_loss.loss_mode=vanilla", "freeze_vision_tower=True has no"),
        ("health.windows=3", "windows"),
        ("health.window=0", "health.window=0: must be in [1, inf)"),
        ("health.score_collapse=halt", "health.score_collapse=halt: must be one of"),
        ("health.ref_kl_interval=5", "health.ref_kl_interval=5 has no effect on verl: the workers hold"),
        (
            "health.teacher_underperforms_student=stop",
            "health.teacher_underperforms_student=stop has no effect on verl: verl evaluates the stud",
        ),
        (
            f"health.score_collapse=reduce_weight {ACTOR}.policy_loss.loss_mode=vanilla",
            "health.score_collapse=reduce_weight: has no effect with self_distillation.policy_loss_weight=1",
        ),
        (
            f"health.score_collapse=freeze_teacher {ACTOR}.self_distillation.teacher_regularization=frozen",
            "health.score_collapse=freeze_teacher: has no effect with self_distillation.teacher_regularization=frozen",
        ),
        ("trainer.save_best_limit=-1", "trainer.save_best_limit must be an integer, at least 0, got -1"),
        ("trainer.save_best_limit=true", "trainer.save_best_limit must be an integer"),
        ("trainer.n_gpus_per_node=3", "must be a multiple of the 3 training GPUs"),
    ],
)
def test_invalid_setting_is_a_one_line_error(override: str, message: str, compose: Callable[..., DictConfig]) -> None:
    with pytest.raises(SDPOError) as caught:
        compose(*override.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


TURNS = "actor_rollout_ref.rollout.multi_turn"
AGENT = "actor_rollout_ref.rollout.agent"
TOOL = """
from verl.tools.function_tool import function_tool

@function_tool
def add(a: int, b: int) -> str:
    \"\"\"Add two numbers.

    Args:
        a: one
        b: the other
    \"\"\"
    return str(a + b)
"""


@pytest.fixture
def tool_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the relative path of a file with tools in the working folder."""
    (tmp_path / "tools.py").write_text(TOOL)
    monkeypatch.chdir(tmp_path)
    FUNCTION_TOOL_REGISTRY.clear()
    return "tools.py"


@pytest.mark.parametrize("name", NAMES)
def test_tools_select_the_agent_loop(name: str, compose: Callable[..., DictConfig], tool_file: str) -> None:
    config = compose(f"{TURNS}.enable=true", f"{TURNS}.function_tool_path={tool_file}", name=name)
    rollout = config.actor_rollout_ref.rollout
    assert rollout.agent.default_agent_loop == "sdpo_tools"
    # Ray's processes and the dataset find the file from every working folder.
    assert rollout.multi_turn.function_tool_path == config.data.function_tool_path == str(Path(tool_file).absolute())
    assert [tool["function"]["name"] for tool in load_tool_schemas(rollout)] == ["add"]
    rollout = compose(name=name).actor_rollout_ref.rollout
    assert rollout.agent.default_agent_loop == "sdpo_single_turn" and load_tool_schemas(rollout) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{TURNS}.enable=true", f"{TURNS}.enable=true needs tools: set {TURNS}.tool_config_path or"),
        (f"{TURNS}.function_tool_path=tools.py", f"{TURNS}.function_tool_path has no effect without {TURNS}.enable"),
        (f"{AGENT}.default_agent_loop=tool_agent", "must be sdpo_single_turn with loss_mode=sdpo and"),
        (f"{AGENT}.default_agent_loop=mine", "default_agent_loop=mine must be sdpo_single_turn"),
        (f"{AGENT}.agent_loop_config_path=loops.yaml", "agent_loop_config_path is not supported with loss_mode=sdpo"),
        (
            f"{TURNS}.enable=true {TURNS}.function_tool_path=tools.py {TURNS}.format=hermas",
            f"{TURNS}.format=hermas: verl has no such parser of tool calls; use one of hermes",
        ),
        (f"{TURNS}.enable=true {TURNS}.function_tool_path=no.py", "no.py: the tools cannot be loaded (FileNotFound"),
        (f"{TURNS}.enable=true {TURNS}.function_tool_path=broken.py", "cannot be loaded (ZeroDivisionError: division"),
        (f"{TURNS}.enable=true {TURNS}.function_tool_path=empty.py", f"{TURNS}: the files define no tool"),
    ],
)
def test_invalid_tool_setting_is_a_one_line_error(
    override: str, message: str, compose: Callable[..., DictConfig], tool_file: str
) -> None:
    Path("broken.py").write_text("1 / 0")
    Path("empty.py").write_text("")
    with pytest.raises(SDPOError) as caught:
        compose(*override.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        # verl has no processor for LLaVA, and without torchvision transformers has none for Qwen.
        ("llava", "", "verl cannot load its image processor (Failed to create processor: Unsupported processor"),
        ("qwen2_5_vl", "", "verl cannot load its image processor (Failed to create processor: "),
        (
            "qwen2_5_vl",
            f"{ACTOR}.policy_loss.loss_mode=vanilla",
            "model.use_remove_padding=True: verl's own engine packs rows of a qwen2_5_vl with flash-attn only",
        ),
        ("text", f"{ACTOR}.freeze_vision_tower=true", "actor.freeze_vision_tower=True: "),
        ("text", f"{LORA} {MODEL}.target_modules=[lm_head]", "model.target_modules: 'lm_head' is no linear layer of"),
    ],
)
def test_unsupported_model_is_a_one_line_error(
    family: str,
    override: str,
    message: str,
    compose: Callable[..., DictConfig],
    vision_dir: Callable[[str], Path],
    hidden_rule_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if family == "llava":
        monkeypatch.setattr(AutoProcessor, "from_pretrained", load_without_videos)
    elif family == "qwen2_5_vl" and not override and importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is here")
    path = hidden_rule_dir / "model" if family == "text" else vision_dir(family)
    config = compose(f"actor_rollout_ref.model.path={path}", *override.split())
    with pytest.raises(SDPOError) as caught:
        train(config)
    assert str(caught.value).startswith("actor_rollout_ref.") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sampler_of_the_run_is_checked_for_its_head_size_and_limited_in_length(
    compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    settings = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())).save_pretrained(tmp_path)
    Qwen2Config(**settings, head_dim=16, max_position_embeddings=700).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = compose(f"{MODEL}.path={tmp_path}", "data.max_prompt_length=400", "data.max_response_length=200")
    check_model(config)
    assert config.actor_rollout_ref.rollout.max_model_len == 600
    Qwen2Config(**settings, head_dim=32).save_pretrained(tmp_path)
    with pytest.raises(SDPOError, match="vLLM cannot sample from it: its head_dim=32"):
        check_model(config)


@pytest.mark.parametrize("key", ["top_p=0.9", "top_k=20"])
def test_truncated_sampling_of_vllm_needs_log_probs_of_all_tokens(key: str, compose: Callable[..., DictConfig]) -> None:
    rollout = "actor_rollout_ref.rollout"
    vllm = [f"{rollout}.name=vllm", f"{rollout}.{key}", "algorithm.rollout_correction.rollout_is=token"]
    for more in ([], [f"{rollout}.logprobs_mode=raw_logprobs", f"{rollout}.temperature=0.7"]):
        with pytest.raises(SDPOError, match=rf"^actor_rollout_ref\.rollout\.{key} with algorithm\.rollout_correction"):
            compose(*vllm, *more)
    compose(*vllm, f"{rollout}.logprobs_mode=raw_logprobs")
    compose(*vllm[:2], "algorithm.rollout_correction.rollout_is=null")


def test_top_p_and_bypass_mode_are_accepted_separately(
    compose: Callable[..., DictConfig],
) -> None:
    compose("actor_rollout_ref.rollout.top_p=0.9", "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs")
    compose("algorithm.rollout_correction.bypass_mode=true", "algorithm.rollout_correction.rollout_is=null")


def test_max_failure_fraction_has_the_native_default(compose: Callable[..., DictConfig]) -> None:
    assert compose().data.max_failure_fraction == RewardConfig.max_failure_fraction


def test_kl_and_entropy_terms_are_read_from_verl_s_settings(compose: Callable[..., DictConfig]) -> None:
    plain, terms = compose(), compose(f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.entropy_coeff=0.01")
    assert read_regularization(plain.actor_rollout_ref.actor) == Regularization(None, "low_var_kl", 0.0)
    assert read_regularization(terms.actor_rollout_ref.actor) == Regularization(0.001, "low_var_kl", 0.01)
    assert not need_reference_policy(plain) and need_reference_policy(terms)


def test_reference_model_has_the_precision_of_the_actor(compose: Callable[..., DictConfig]) -> None:
    names = ("model_dtype", "mixed_precision")
    key = f"++{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp32"
    for overrides in ([], [f"{ACTOR}.fsdp_config.model_dtype=bf16"], [key]):
        workers = compose(*overrides).actor_rollout_ref
        for name in names:
            assert workers.ref.fsdp_config.get(name) == workers.actor.fsdp_config.get(name), (overrides, name)


def test_self_distillation_clip_ratio_sets_verl_s_clip_ratio(compose: Callable[..., DictConfig]) -> None:
    config = compose(f"{ACTOR}.self_distillation.clip_ratio_high=0.28")
    assert config.actor_rollout_ref.actor.clip_ratio_high == 0.28


def test_hydra_section_has_every_self_distillation_setting(compose: Callable[..., DictConfig]) -> None:
    section = compose().actor_rollout_ref.actor.self_distillation
    assert set(section) == {f.name for f in dataclasses.fields(SelfDistillationConfig)}


def test_command_line_refuses_invalid_arguments_and_prints_help_and_config(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SDPOError, match="not of the form key=value"):
        main(["train"])
    main(["--help"])
    assert "usage" in capsys.readouterr().out
    main(["--config-name", "sdpo_sync", "--cfg", *files])
    assert "trainer_mode: sync" in capsys.readouterr().out


def test_environment_variables_are_forwarded_to_ray_workers(
    compose: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "/run/metrics.jsonl")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", raising=False)
    config = compose("+ray_kwargs.ray_init.runtime_env.env_vars.OMP_NUM_THREADS='2'")
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    forward_environment(config)
    expected = {"VERL_FILE_LOGGER_PATH": "/run/metrics.jsonl", "OMP_NUM_THREADS": "2", "VERL_PLATFORM": "cpu"}
    assert dict(config.ray_kwargs.ray_init.runtime_env.env_vars) == expected
    config = compose()
    forward_environment(config)
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.OMP_NUM_THREADS == "3"


@pytest.mark.slow
def test_invalid_setting_exits_with_code_2_before_ray_starts(tmp_path: Path) -> None:
    command: list[Any] = [
        sys.executable,
        "-m",
        "sdpo.verl_backend.entrypoint.main",
        f"{ACTOR}.self_distillation.alpha=7",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith(f"error: {ACTOR}.self_distillation.alpha=7.0: must be in [0, 1]")
    )
    assert "Started a local Ray instance" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


def test_model_and_machine_are_checked_before_ray_starts(
    compose: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def record(name: str) -> Callable[[DictConfig], None]:
        return lambda config: called.append(name)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdpo.verl_backend.entrypoint.main.check_model", record("model"))
    monkeypatch.setattr("sdpo.verl_backend.entrypoint.requirements.check_machine", record("machine"))
    monkeypatch.setattr("verl.trainer.main_ppo.run_ppo", stop)
    with pytest.raises(KeyboardInterrupt):
        train(compose(), record("start"))
    assert called == ["model", "machine", "start"]


@pytest.mark.parametrize("reason", ["score_collapse: it fell", None])
def test_stop_by_a_health_check_is_reported_on_stderr(
    reason: str | None, compose: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """verl's own ``run_ppo``, which discards the driver's result, with a mock of Ray's actor class."""

    class Driver:
        def __init__(self) -> None:
            self.run = SimpleNamespace(remote=lambda config: (config, reason))

        @classmethod
        def remote(cls) -> Driver:
            return cls()

    got = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get", lambda reference: got.append(reference) or reference[1])
    monkeypatch.setattr("sdpo.verl_backend.entrypoint.runners.build_one_step_off_runner", lambda: Driver)
    monkeypatch.setattr("sdpo.verl_backend.entrypoint.main.check_model", lambda _: None)
    monkeypatch.setattr("sdpo.verl_backend.entrypoint.requirements.check_machine", lambda _: None)
    config = compose()
    train(config)
    assert got == [(config, reason)] * 2
    said = capsys.readouterr().err
    assert said == ("stopped by a health check: score_collapse: it fell\n" if reason else "")
