"""Config files and overrides: accepted values, refused values, and one-line error messages with the fix."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpo.config.field import describe_range
from sdpo.config.loader import load_config, save_config
from sdpo.config.renamed import RENAMED_KEYS
from sdpo.config.root import SDPOConfig, iterate_settings
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import SDPOError

MINIMAL = "output_dir: runs/a\nmodel: {path: m}\ndata: {task: hidden_rule}\n"

SETTINGS = dict(iterate_settings())
NUMERIC = {key: f for key, f in SETTINGS.items() if str(f.type).startswith(("int", "float"))}
CHOICES = {key: f for key, f in SETTINGS.items() if f.metadata["choices"]}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., SDPOConfig]:
    def load(*overrides: str, text: str = MINIMAL) -> SDPOConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


@pytest.fixture
def refusal(load: Callable[..., SDPOConfig]) -> Callable[..., str]:
    """Return the error message for a config file and overrides."""

    def refusal(*overrides: str, text: str = MINIMAL) -> str:
        with pytest.raises(SDPOError) as caught:
            load(*overrides, text=text)
        message = str(caught.value)
        assert message
        assert "\n" not in message
        return message

    return refusal


def get_value(run: SDPOConfig, key: str) -> Any:
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


def test_defaults_are_those_of_the_paper(load: Callable[..., SDPOConfig]) -> None:
    config = load().self_distillation
    assert config == SelfDistillationConfig()
    assert config.full_logit_distillation is True
    assert config.alpha == 0.0
    assert config.ema_update_rate == 0.05
    assert config.is_clip == 2.0
    assert config.policy_loss_weight == 0.0
    assert config.teacher_regularization == "ema"


def test_options_of_later_papers_are_off_by_default() -> None:
    config = SelfDistillationConfig()
    assert config.distillation_topk is None
    assert config.divergence_clip is None
    assert config.teacher_entropy_beta == 0.0
    assert not config.weight_by_prompt_difficulty
    assert not config.distill_only_failed
    assert config.distillation_coef_start == config.distillation_coef_end == 1.0


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_has_a_help_text(key: str) -> None:
    assert SETTINGS[key].metadata["help"].endswith((".", "..."))


def test_every_number_except_the_reward_threshold_has_a_range() -> None:
    unbounded = {key for key, f in NUMERIC.items() if not describe_range(f.metadata)}
    assert unbounded == {"self_distillation.success_reward_threshold"}


# --- values ---------------------------------------------------------------------------------------------------------


def list_values_out_of_range(metadata: Any) -> list[float]:
    """One number beyond each end of the range."""
    ge, gt, le = metadata["ge"], metadata["gt"], metadata["le"]
    return [
        *([ge - 1] if ge is not None else []),
        *([gt] if gt is not None else []),
        *([le + 1] if le is not None else []),
    ]


@pytest.mark.parametrize("setting", ["alpha=4", "target_modules=[q_proj]"])
def test_lora_settings_need_a_rank(refusal: Callable[..., str], load: Callable[..., SDPOConfig], setting: str) -> None:
    name = setting.split("=")[0]
    message = refusal(f"lora.{setting}")
    assert re.search(rf"lora\.{name}=\S+: has no effect with lora.rank=0; set lora.rank or remove it$", message)
    assert load(f"lora.{setting}", "lora.rank=2").lora.rank == 2


def test_freeze_vision_tower_is_refused_with_lora(refusal: Callable[..., str], load: Callable[..., SDPOConfig]) -> None:
    assert "actor.freeze_vision_tower=true: has no effect with lora.rank=2" in refusal(
        "lora.rank=2", "actor.freeze_vision_tower=true"
    )
    runs = [load(), load("actor.freeze_vision_tower=true"), load("lora.rank=2")]
    assert [run.trains_vision for run in runs] == [True, False, False]


NEEDS = {"lora.alpha": {"rank": 4}}  # other settings that a setting requires


def build(key: str, value: Any) -> Any:
    """Build the section of a setting with this value, which is 100 times faster than loading a file."""
    section, _, name = key.rpartition(".")
    section_class = type(getattr(SDPOConfig(), section)) if section else SDPOConfig
    return getattr(section_class(**{**NEEDS.get(key, {}), name: value}), name)


OUT_OF_RANGE = [(key, value) for key, f in NUMERIC.items() for value in list_values_out_of_range(f.metadata)]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=[f"{key}={value}" for key, value in OUT_OF_RANGE])
def test_number_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(SDPOError) as caught:
        build(key, value)
    assert str(caught.value) == f"{key}={value}: must be {describe_range(NUMERIC[key].metadata)}"


LIMITS = [(key, f.metadata[end]) for key, f in NUMERIC.items() for end in ("ge", "le") if f.metadata[end] is not None]


@pytest.mark.parametrize(("key", "value"), LIMITS, ids=[f"{key}={value}" for key, value in LIMITS])
def test_limits_of_a_closed_range_are_accepted(key: str, value: float) -> None:
    assert build(key, value) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", sorted({key for key, _ in OUT_OF_RANGE}))
def test_nonfinite_number_is_refused(key: str, value: float) -> None:
    with pytest.raises(SDPOError, match=f"{key}={value}: must be in"):
        build(key, value)


def test_ranges_apply_to_files_and_overrides(refusal: Callable[..., str]) -> None:
    message = "self_distillation.alpha=1.5: must be in [0, 1]"
    assert message in refusal("self_distillation.alpha=1.5")
    assert message in refusal(text=MINIMAL + "self_distillation: {alpha: 1.5}\n")


@pytest.mark.parametrize("key", NUMERIC)
def test_text_is_refused_as_a_number(refusal: Callable[..., str], key: str) -> None:
    message = refusal(f"{key}=many")
    assert key in message
    assert "'many'" in message


@pytest.mark.parametrize("key", [key for key, f in NUMERIC.items() if str(f.type).startswith("int")])
def test_float_is_refused_as_an_integer(refusal: Callable[..., str], key: str) -> None:
    assert key in refusal(f"{key}=1.5")


@pytest.mark.parametrize("key", [key for key, f in SETTINGS.items() if "None" not in str(f.type)])
def test_null_is_refused_for_mandatory_settings(refusal: Callable[..., str], key: str) -> None:
    assert key in refusal(f"{key}=null")


@pytest.mark.parametrize("key", [key for key, f in SETTINGS.items() if "None" in str(f.type)])
def test_null_is_accepted_for_optional_settings(load: Callable[..., SDPOConfig], key: str) -> None:
    assert get_value(load(f"{key}=null"), key) is None


@pytest.mark.parametrize("key", CHOICES)
def test_choice_must_be_one_of_the_list(load: Callable[..., SDPOConfig], refusal: Callable[..., str], key: str) -> None:
    is_list = str(CHOICES[key].type).startswith("list")
    template = "{}=[{}]" if is_list else "{}={}"
    message = refusal(template.format(key, "nonsense"))
    value = "['nonsense']" if is_list else "nonsense"
    assert f"{key}={value}: must be {describe_range(CHOICES[key].metadata)}" in message
    for choice in CHOICES[key].metadata["choices"]:
        extra = {
            "none": ["self_distillation.include_environment_feedback=true"],
            "bfloat16": ["optim.betas=[0.9,0.95]"],
        }.get(choice, [])
        loaded = get_value(load(template.format(key, choice), *extra), key)
        assert loaded == ([choice] if is_list else choice)


@pytest.mark.parametrize("key", ["data.train_files", "tracking.report_to"])
def test_list_needs_brackets(load: Callable[..., SDPOConfig], refusal: Callable[..., str], key: str) -> None:
    assert f"{key}=wandb: must be a list" in refusal(f"{key}=wandb")
    assert get_value(load(f"{key}=[wandb]"), key) == ["wandb"]


def test_python_api_refuses_the_same_values() -> None:
    with pytest.raises(ValueError, match=r"self_distillation\.alpha=1\.5: must be in \[0, 1\]"):
        SelfDistillationConfig(alpha=1.5)
    with pytest.raises(ValueError, match=r"self_distillation\.is_clip=nan: must be in \(0, inf\)"):
        SelfDistillationConfig(is_clip=math.nan)
    with pytest.raises(ValueError, match=r"=True: must be in \[0, 1\]"):
        SelfDistillationConfig(policy_loss_weight=True)


# --- dependent settings ---------------------------------------------------------------------------------------------

SAMPLED = "self_distillation.full_logit_distillation=false"


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        ([SAMPLED], "self_distillation.alpha"),
        ([SAMPLED, "self_distillation.alpha=0.5"], "self_distillation.alpha"),
        (
            [SAMPLED, "self_distillation.alpha=1", "self_distillation.distillation_topk=5"],
            "self_distillation.distillation_topk",
        ),
        (
            [SAMPLED, "self_distillation.alpha=1", "self_distillation.teacher_entropy_beta=1"],
            "self_distillation.teacher_entropy_beta",
        ),
        (
            ["self_distillation.demonstration_source=none", "self_distillation.include_environment_feedback=false"],
            "self_distillation.demonstration_source",
        ),
        (["self_distillation.reprompt_template='{prompt}{solution}'"], "{feedback}"),
        (["self_distillation.solution_template=Look"], "{successful_previous_attempt}"),
        (["self_distillation.feedback_template=Look"], "{feedback_raw}"),
        (["actor.mini_batch_size=5"], "actor.mini_batch_size=5: must divide data.train_batch_size=32"),
    ],
)
def test_contradictory_settings_are_refused(refusal: Callable[..., str], overrides: list[str], fragment: str) -> None:
    assert fragment in refusal(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [SAMPLED, "self_distillation.alpha=1"],
        ["self_distillation.demonstration_source=none", "self_distillation.include_environment_feedback=true"],
        ["self_distillation.demonstration_source=none", "self_distillation.policy_loss_weight=1"],
        ["actor.mini_batch_size=8"],
    ],
)
def test_compatible_settings_are_accepted(load: Callable[..., SDPOConfig], overrides: list[str]) -> None:
    load(*overrides)


def test_grpo_has_no_distillation(load: Callable[..., SDPOConfig]) -> None:
    assert not load("self_distillation.policy_loss_weight=1").self_distillation.distills
    assert load("self_distillation.policy_loss_weight=0.9").self_distillation.distills


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "suggestion"),
    [
        ("optim.rl", "optim.lr"),
        ("self_distillation.ema_rate", "self_distillation.ema_update_rate"),
        ("rollout.temprature", "rollout.temperature"),
        ("optim.temperature", "rollout.temperature"),
        ("max_step", "max_steps"),
        ("otpim.lr", "optim"),
        ("lr", "optim.lr"),
        ("alpha", "lora.alpha or self_distillation.alpha"),
        ("+seed", "seed"),
    ],
)
def test_unknown_key_is_refused_with_a_suggestion(refusal: Callable[..., str], wrong: str, suggestion: str) -> None:
    unknown = wrong.split(".")[0] if suggestion == "optim" else wrong
    assert f"command line: unknown key {unknown}; did you mean {suggestion}?" in refusal(f"{wrong}=1")


def test_error_of_a_key_in_the_file_has_the_file_name(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert f"{tmp_path / 'run.yaml'}: unknown key optim.rl" in refusal(text=MINIMAL + "optim: {rl: 1}\n")


def test_unknown_key_without_a_similar_key_refers_to_the_docs(refusal: Callable[..., str]) -> None:
    assert "docs/configuration.md" in refusal("zzqq=1")


@pytest.mark.parametrize("value", ["3", "null", "[1]", "a"])
def test_value_for_a_section_is_refused(refusal: Callable[..., str], value: str) -> None:
    assert ": must be a section of settings" in refusal(f"optim={value}")
    assert "run.yaml: optim=" in refusal(text=f"{MINIMAL}optim: {value}\n")
    assert ": must be a section of settings" in refusal(text=f"{MINIMAL}optim: {value}\n")


@pytest.mark.parametrize("key", ["output_dir", "model.path", "data.task"])
def test_missing_mandatory_setting_is_reported(refusal: Callable[..., str], key: str) -> None:
    mandatory = {"output_dir": "a", "model.path": "m", "data.task": "t"}
    del mandatory[key]
    message = refusal(*(f"{k}={v}" for k, v in mandatory.items()), text="")
    assert f"{key} is not set" in message


# --- files and overrides --------------------------------------------------------------------------------------------


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SDPOError, match=r"absent\.yaml: no such config file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("optim: {lr: [1\nseed: {", "not a YAML file"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("\x00", "not a YAML file"),
        ("- seed\n- 1\n", "must be a mapping of settings at the top level"),
        ("just words", "unknown key just words"),
    ],
)
def test_invalid_file_is_refused(refusal: Callable[..., str], tmp_path: Path, text: str, fragment: str) -> None:
    message = refusal(text=text)
    assert message.startswith(f"{tmp_path / 'run.yaml'}: ")
    assert fragment in message


@pytest.mark.parametrize("override", ["optim.lr", "=3", "", "optim.lr=[1,"])
def test_malformed_override_is_refused(refusal: Callable[..., str], override: str) -> None:
    assert f"override {override!r}" in refusal(override) or f"overrides {override}" in refusal(override)


def test_overrides_take_precedence_over_the_file_and_earlier_overrides(load: Callable[..., SDPOConfig]) -> None:
    run = load(
        "optim.lr=2e-3",
        "optim.lr=3e-3",
        "output_dir=a=b",
        text=MINIMAL + "optim: {lr: 1e-3, betas: [0.5, 0.9]}\nseed: 7\n",
    )
    assert run.optim.lr == 3e-3
    assert run.optim.betas == [0.5, 0.9]
    assert run.output_dir == "a=b"
    assert run.seed == 7


def test_empty_override_replaces_a_mapping_of_the_file(load: Callable[..., SDPOConfig], tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_text(
        "{model: {path: m}, data: {task: t, task_args: {a: 1}, train_files: [x], val_files: [y]},"
        " output_dir: o, max_steps: 1, verl: {a.b: 1}}"
    )
    assert load_config(tmp_path / "args.yaml", ["data.task_args.b=2"]).data.task_args == {"a": 1, "b": 2}
    config = load_config(tmp_path / "args.yaml", ["data.task_args={}", "verl={}"])
    assert (config.data.task_args, config.verl) == ({}, {})


def test_error_message_has_the_source_of_the_value(refusal: Callable[..., str]) -> None:
    assert "run.yaml + command line: optim.lr=-1.0: must be" in refusal("optim.lr=-1")
    assert "run.yaml: optim.lr=-1.0: must be" in refusal(text=MINIMAL + "optim: {lr: -1}\n")


def test_interpolation(
    load: Callable[..., SDPOConfig], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDPO_TEST_MODEL", "here")
    run = load("output_dir=runs/${seed}/${optim.lr}", "model.path=${oc.env:SDPO_TEST_MODEL}", "seed=3")
    assert run.output_dir == "runs/3/1e-05"
    assert run.model.path == "here"
    assert "optim.lr: " in refusal("optim.lr=${absent}")
    assert "data.train_batch_size: " in refusal("data.train_batch_size=${oc.env:SDPO_TEST_ABSENT}")
    assert "optim.lr=-1.0: must be in (0, inf)" in refusal("optim.lr=${optim.weight_decay}", "optim.weight_decay=-1")


def test_saved_config_loads_to_an_equal_config(load: Callable[..., SDPOConfig], tmp_path: Path) -> None:
    run = load(
        "seed=5",
        "optim.lr=3e-7",
        "data.train_files=[a.parquet, b.parquet]",
        "data.task_args={length: 8, names: [x, y], deep: {k: null}}",
        "self_distillation.is_clip=null",
        "self_distillation.distillation_topk=20",
        "tracking.name=ünï",
        "output_dir=runs/${seed}",
    )
    save_config(run, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == run
    assert run.output_dir == "runs/5"
    assert run.data.task_args == {"length": 8, "names": ["x", "y"], "deep": {"k": None}}


def test_config_is_immutable(load: Callable[..., SDPOConfig]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().optim.lr = 1.0  # type: ignore[misc]


def test_verl_section_accepts_nested_and_dotted_keys(load: Callable[..., SDPOConfig], tmp_path: Path) -> None:
    text = MINIMAL + "verl:\n  trainer: {n_gpus_per_node: 8, empty: {}}\n  trainer.nnodes: 2\n  +a.b: [1]\n"
    run = load("verl.trainer.nnodes=3", text=text)
    flat = {"trainer.nnodes": 3, "+a.b": [1], "trainer.n_gpus_per_node": 8, "trainer.empty": {}}
    assert run.verl == flat
    save_config(run, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == run


def test_verl_section_must_be_a_mapping(refusal: Callable[..., str]) -> None:
    assert "verl" in refusal(text=MINIMAL + "verl: 3\n")


def test_beta2_too_large_for_bfloat16_is_refused(load: Callable[..., SDPOConfig], refusal: Callable[..., str]) -> None:
    """A step without gradient removes 1 - beta of the second moment, which bfloat16 only represents above 2^-8."""
    half = "model.dtype=bfloat16"
    message = refusal(half)
    assert "optim.betas=[0.9,0.999] with model.dtype=bfloat16" in message and "optim.betas=[0.9,0.95]" in message
    assert "optim.betas=[0.9,0.997]" in refusal(half, "optim.betas=[0.9,0.997]")
    assert "optim.betas=[0.9,0.999]" in refusal(half, "optim.name=adamw_8bit"), (
        "the moments of small tensors stay in bfloat16"
    )
    for allowed in (["optim.betas=[0.9,0.996]"], ["lora.rank=2"]):
        assert load(half, *allowed).model.dtype == "bfloat16"


def test_stochastic_rounding_without_effect_is_refused(
    load: Callable[..., SDPOConfig], refusal: Callable[..., str]
) -> None:
    on, half = "optim.stochastic_rounding=true", ["model.dtype=bfloat16", "optim.betas=[0.9,0.95]"]
    assert load(on, *half).optim.stochastic_rounding
    assert "has no effect with model.dtype=float32" in refusal(on)
    assert "has no effect with lora.rank=2" in refusal(on, *half, "lora.rank=2")


# verl/trainer/config/actor/actor.yaml of github.com/lasgroup/SDPO at 0736c782, without its comments.
OFFICIAL = """
self_distillation:
  _target_: verl.workers.config.SelfDistillationConfig
  full_logit_distillation: True
  distillation_topk: 100
  distillation_add_tail: True
  alpha: 0.5
  rho: 0.25
  success_reward_threshold: 0.5
  teacher_regularization: ema
  teacher_update_rate: 0.05
  max_reprompt_len: 10240
  reprompt_truncation: right
  dont_reprompt_on_self_success: True
  remove_thinking_from_demonstration: True
  include_environment_feedback: True
  environment_feedback_only_without_solution: True
  is_clip: 2
  reprompt_template: |-
    {prompt}{solution}{feedback}

    Correctly solve the original question.
  solution_template: |-

    Correct solution:

    {successful_previous_attempt}
  feedback_template: |-

    The following is feedback from your unsuccessful earlier attempt:

    {feedback_raw}
"""


def load_official(tmp_path: Path, change: tuple[str, str] = ("", ""), *overrides: str) -> SelfDistillationConfig:
    path = tmp_path / "official.yaml"
    path.write_text(OFFICIAL.replace(*change))
    mandatory = ["output_dir=r", "model.path=m", "data.task=t"]
    return load_config(path, [*mandatory, *overrides]).self_distillation


def test_official_section_loads_unchanged(tmp_path: Path) -> None:
    config = load_official(tmp_path)
    assert (config.alpha, config.distillation_topk, config.is_clip) == (0.5, 100, 2.0)
    assert config.ema_update_rate == 0.05 and config.success_reward_threshold == 0.5
    assert config.solution_template == "\nCorrect solution:\n\n{successful_previous_attempt}"
    assert load_official(tmp_path, ("teacher_update_rate: 0.05", "teacher_update_rate: 0.01")).ema_update_rate == 0.01
    assert load_official(tmp_path, ("", ""), "self_distillation.teacher_update_rate=0.2").ema_update_rate == 0.2
    # All other defaults are the official ones, except those that docs/algorithm.md lists.
    differs = {"alpha", "distillation_topk", "success_reward_threshold"}
    differs |= {"reprompt_template", "solution_template", "feedback_template"}  # differ in trailing white space
    default = SelfDistillationConfig()
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(default, f.name)}
    assert changed == differs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rho: 0.25", "rho: 0.5"), r"self_distillation\.rho=0\.5: not implemented; remove it, or set it to 0\.25"),
        (("reprompt_truncation: right", "reprompt_truncation: left"), r"reprompt_truncation=left: not implemented"),
        (("alpha: 0.5", "ema_update_rate: 0.1"), "teacher_update_rate and ema_update_rate are the same setting"),
    ],
)
def test_unimplemented_official_setting_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(SDPOError, match=message):
        load_official(tmp_path, change)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_renamed_key_is_refused_with_its_new_name(refusal: Callable[..., str], old: str, new: str) -> None:
    assert new in SETTINGS and old not in SETTINGS
    assert refusal(f"{old}=1") == f"command line: {old} is now {new}; rename it"


def test_renamed_key_in_the_file_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal(text="sampler:\n  batch_size: 8\n").endswith(
        "sampler.batch_size is now rollout.max_num_seqs; rename it"
    )
