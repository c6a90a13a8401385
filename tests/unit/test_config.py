"""The config file: accepted and refused content, and one-line messages with the fix."""

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
    """The message of the error for a config file and overrides."""

    def refusal(*overrides: str, text: str = MINIMAL) -> str:
        with pytest.raises(SDPOError) as caught:
            load(*overrides, text=text)
        message = str(caught.value)
        assert message
        assert "\n" not in message
        return message

    return refusal


def value_of(run: SDPOConfig, key: str) -> Any:
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


def test_the_defaults_are_those_of_the_paper(load: Callable[..., SDPOConfig]) -> None:
    config = load().self_distillation
    assert config == SelfDistillationConfig()
    assert config.full_logit_distillation is True
    assert config.alpha == 0.0
    assert config.ema_update_rate == 0.05
    assert config.is_clip == 2.0
    assert config.policy_loss_weight == 0.0
    assert config.teacher_regularization == "ema"


def test_every_follow_up_option_is_off_by_default() -> None:
    config = SelfDistillationConfig()
    assert config.distillation_topk is None
    assert config.divergence_clip is None
    assert config.teacher_entropy_beta == 0.0
    assert not config.weight_by_prompt_difficulty
    assert not config.distill_only_failed
    assert config.distillation_coef_start == config.distillation_coef_end == 1.0


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_says_what_it_means(key: str) -> None:
    assert SETTINGS[key].metadata["help"].endswith((".", "..."))


def test_every_number_has_a_range_but_a_reward_which_may_be_any() -> None:
    unbounded = {key for key, f in NUMERIC.items() if not describe_range(f.metadata)}
    assert unbounded == {"self_distillation.success_reward_threshold"}


# --- values ---------------------------------------------------------------------------------------------------------


def outside(metadata: Any) -> list[float]:
    """A number beyond each end of the range."""
    ge, gt, le = metadata["ge"], metadata["gt"], metadata["le"]
    return [
        *([ge - 1] if ge is not None else []),
        *([gt] if gt is not None else []),
        *([le + 1] if le is not None else []),
    ]


@pytest.mark.parametrize("setting", ["alpha=4", "target_modules=[q_proj]"])
def test_settings_of_adapters_need_adapters(
    refusal: Callable[..., str], load: Callable[..., SDPOConfig], setting: str
) -> None:
    name = setting.split("=")[0]
    said = refusal(f"lora.{setting}")
    assert re.search(rf"lora\.{name}=\S+: has no effect with lora.rank=0; set lora.rank or remove it$", said)
    assert load(f"lora.{setting}", "lora.rank=2").lora.rank == 2


def test_adapters_leave_the_tower_alone_so_that_it_need_not_be_frozen(
    refusal: Callable[..., str], load: Callable[..., SDPOConfig]
) -> None:
    assert "actor.freeze_vision_tower=true: has no effect with lora.rank=2" in refusal(
        "lora.rank=2", "actor.freeze_vision_tower=true"
    )
    runs = [load(), load("actor.freeze_vision_tower=true"), load("lora.rank=2")]
    assert [run.trains_vision for run in runs] == [True, False, False]


NEEDS = {"lora.alpha": {"rank": 4}}  # required by the setting


def build(key: str, value: Any) -> Any:
    """Build the section of a setting with this value, 100 times faster than by reading a file."""
    section, _, name = key.rpartition(".")
    kind = type(getattr(SDPOConfig(), section)) if section else SDPOConfig
    return getattr(kind(**{**NEEDS.get(key, {}), name: value}), name)


BEYOND = [(key, value) for key, f in NUMERIC.items() for value in outside(f.metadata)]


@pytest.mark.parametrize(("key", "value"), BEYOND, ids=[f"{key}={value}" for key, value in BEYOND])
def test_a_number_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(SDPOError) as caught:
        build(key, value)
    assert str(caught.value) == f"{key}={value}: must be {describe_range(NUMERIC[key].metadata)}"


ENDS = [(key, f.metadata[end]) for key, f in NUMERIC.items() for end in ("ge", "le") if f.metadata[end] is not None]


@pytest.mark.parametrize(("key", "value"), ENDS, ids=[f"{key}={value}" for key, value in ENDS])
def test_the_ends_of_a_closed_range_are_in_it(key: str, value: float) -> None:
    assert build(key, value) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", sorted({key for key, _ in BEYOND}))
def test_a_number_is_finite(key: str, value: float) -> None:
    with pytest.raises(SDPOError, match=f"{key}={value}: must be in"):
        build(key, value)


def test_the_ranges_hold_for_files_and_overrides(refusal: Callable[..., str]) -> None:
    said = "self_distillation.alpha=1.5: must be in [0, 1]"
    assert said in refusal("self_distillation.alpha=1.5")
    assert said in refusal(text=MINIMAL + "self_distillation: {alpha: 1.5}\n")


@pytest.mark.parametrize("key", NUMERIC)
def test_a_word_is_not_a_number(refusal: Callable[..., str], key: str) -> None:
    message = refusal(f"{key}=many")
    assert key in message
    assert "'many'" in message


@pytest.mark.parametrize("key", [key for key, f in NUMERIC.items() if str(f.type).startswith("int")])
def test_a_fraction_is_not_a_count(refusal: Callable[..., str], key: str) -> None:
    assert key in refusal(f"{key}=1.5")


@pytest.mark.parametrize("key", [key for key, f in SETTINGS.items() if "None" not in str(f.type)])
def test_null_only_where_it_means_something(refusal: Callable[..., str], key: str) -> None:
    assert key in refusal(f"{key}=null")


@pytest.mark.parametrize("key", [key for key, f in SETTINGS.items() if "None" in str(f.type)])
def test_null_leaves_out_what_is_optional(load: Callable[..., SDPOConfig], key: str) -> None:
    assert value_of(load(f"{key}=null"), key) is None


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_is_one_of_those_listed(
    load: Callable[..., SDPOConfig], refusal: Callable[..., str], key: str
) -> None:
    several = str(CHOICES[key].type).startswith("list")
    form = "{}=[{}]" if several else "{}={}"
    message = refusal(form.format(key, "nonsense"))
    value = "['nonsense']" if several else "nonsense"
    assert f"{key}={value}: must be {describe_range(CHOICES[key].metadata)}" in message
    for choice in CHOICES[key].metadata["choices"]:
        extra = {
            "none": ["self_distillation.include_environment_feedback=true"],
            "bfloat16": ["optim.betas=[0.9,0.95]"],
        }.get(choice, [])
        chosen = value_of(load(form.format(key, choice), *extra), key)
        assert chosen == ([choice] if several else choice)


@pytest.mark.parametrize("key", ["data.train_files", "tracking.report_to"])
def test_a_list_is_written_in_brackets(load: Callable[..., SDPOConfig], refusal: Callable[..., str], key: str) -> None:
    assert f"{key}=wandb: must be a list" in refusal(f"{key}=wandb")
    assert value_of(load(f"{key}=[wandb]"), key) == ["wandb"]


def test_python_gets_the_same_refusals() -> None:
    with pytest.raises(ValueError, match=r"self_distillation\.alpha=1\.5: must be in \[0, 1\]"):
        SelfDistillationConfig(alpha=1.5)
    with pytest.raises(ValueError, match=r"self_distillation\.is_clip=nan: must be in \(0, inf\)"):
        SelfDistillationConfig(is_clip=math.nan)
    with pytest.raises(ValueError, match=r"=True: must be in \[0, 1\]"):
        SelfDistillationConfig(policy_loss_weight=True)


# --- settings that depend on each other -----------------------------------------------------------------------------

SAMPLED = "self_distillation.full_logit_distillation=false"


@pytest.mark.parametrize(
    ("overrides", "named"),
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
def test_settings_that_contradict_each_other(refusal: Callable[..., str], overrides: list[str], named: str) -> None:
    assert named in refusal(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [SAMPLED, "self_distillation.alpha=1"],
        ["self_distillation.demonstration_source=none", "self_distillation.include_environment_feedback=true"],
        ["self_distillation.demonstration_source=none", "self_distillation.policy_loss_weight=1"],
        ["actor.mini_batch_size=8"],
    ],
)
def test_settings_that_go_together(load: Callable[..., SDPOConfig], overrides: list[str]) -> None:
    load(*overrides)


def test_plain_grpo_has_no_distillation(load: Callable[..., SDPOConfig]) -> None:
    assert not load("self_distillation.policy_loss_weight=1").self_distillation.distills
    assert load("self_distillation.policy_loss_weight=0.9").self_distillation.distills


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "meant"),
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
def test_an_unknown_key_names_the_nearest(refusal: Callable[..., str], wrong: str, meant: str) -> None:
    unknown = wrong.split(".")[0] if meant == "optim" else wrong
    assert f"command line: unknown key {unknown}; did you mean {meant}?" in refusal(f"{wrong}=1")


def test_an_unknown_key_of_the_file_names_the_file(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert f"{tmp_path / 'run.yaml'}: unknown key optim.rl" in refusal(text=MINIMAL + "optim: {rl: 1}\n")


def test_a_key_like_no_other_leads_to_the_list(refusal: Callable[..., str]) -> None:
    assert "docs/configuration.md" in refusal("zzqq=1")


@pytest.mark.parametrize("value", ["3", "null", "[1]", "a"])
def test_a_section_is_not_a_value(refusal: Callable[..., str], value: str) -> None:
    assert ": must be a section of settings" in refusal(f"optim={value}")
    assert "run.yaml: optim=" in refusal(text=f"{MINIMAL}optim: {value}\n")
    assert ": must be a section of settings" in refusal(text=f"{MINIMAL}optim: {value}\n")


@pytest.mark.parametrize("key", ["output_dir", "model.path", "data.task"])
def test_what_is_mandatory_is_asked_for(refusal: Callable[..., str], key: str) -> None:
    mandatory = {"output_dir": "a", "model.path": "m", "data.task": "t"}
    del mandatory[key]
    message = refusal(*(f"{k}={v}" for k, v in mandatory.items()), text="")
    assert f"{key} is not set" in message


# --- files and overrides --------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SDPOError, match=r"absent\.yaml: no such config file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {lr: [1\nseed: {", "not a YAML file"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("\x00", "not a YAML file"),
        ("- seed\n- 1\n", "must be a mapping of settings at the top level"),
        ("just words", "unknown key just words"),
    ],
)
def test_a_file_that_is_no_run(refusal: Callable[..., str], tmp_path: Path, text: str, said: str) -> None:
    message = refusal(text=text)
    assert message.startswith(f"{tmp_path / 'run.yaml'}: ")
    assert said in message


@pytest.mark.parametrize("override", ["optim.lr", "=3", "", "optim.lr=[1,"])
def test_an_override_that_is_none(refusal: Callable[..., str], override: str) -> None:
    assert f"override {override!r}" in refusal(override) or f"overrides {override}" in refusal(override)


def test_an_override_beats_the_file_and_the_last_one_the_others(load: Callable[..., SDPOConfig]) -> None:
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


def test_what_the_command_line_breaks_is_not_blamed_on_the_file_alone(refusal: Callable[..., str]) -> None:
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


def test_a_saved_run_is_the_same_run(load: Callable[..., SDPOConfig], tmp_path: Path) -> None:
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


def test_a_run_cannot_be_changed_under_way(load: Callable[..., SDPOConfig]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().optim.lr = 1.0  # type: ignore[misc]


def test_what_verl_alone_has_may_be_nested_or_dotted_and_comes_back_from_a_saved_run(
    load: Callable[..., SDPOConfig], tmp_path: Path
) -> None:
    text = MINIMAL + "verl:\n  trainer: {n_gpus_per_node: 8, empty: {}}\n  trainer.nnodes: 2\n  +a.b: [1]\n"
    run = load("verl.trainer.nnodes=3", text=text)
    flat = {"trainer.nnodes": 3, "+a.b": [1], "trainer.n_gpus_per_node": 8, "trainer.empty": {}}
    assert run.verl == flat
    save_config(run, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == run


def test_verls_settings_are_a_mapping(refusal: Callable[..., str]) -> None:
    assert "verl" in refusal(text=MINIMAL + "verl: 3\n")


def test_a_second_moment_in_bfloat16_must_be_able_to_decay(
    load: Callable[..., SDPOConfig], refusal: Callable[..., str]
) -> None:
    """A step without gradient removes 1 - beta of it, which bfloat16 can represent only above 2^-8."""
    half = "model.dtype=bfloat16"
    message = refusal(half)
    assert "optim.betas=[0.9,0.999] with model.dtype=bfloat16" in message and "optim.betas=[0.9,0.95]" in message
    assert "optim.betas=[0.9,0.997]" in refusal(half, "optim.betas=[0.9,0.997]")
    assert "optim.betas=[0.9,0.999]" in refusal(half, "optim.name=adamw_8bit"), "small tensors keep theirs in bfloat16"
    for allowed in (["optim.betas=[0.9,0.996]"], ["lora.rank=2"]):
        assert load(half, *allowed).model.dtype == "bfloat16"


def test_rounding_at_random_is_refused_where_nothing_is_rounded(
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


def test_the_official_section_loads_unchanged(tmp_path: Path) -> None:
    config = load_official(tmp_path)
    assert (config.alpha, config.distillation_topk, config.is_clip) == (0.5, 100, 2.0)
    assert config.ema_update_rate == 0.05 and config.success_reward_threshold == 0.5
    assert config.solution_template == "\nCorrect solution:\n\n{successful_previous_attempt}"
    assert load_official(tmp_path, ("teacher_update_rate: 0.05", "teacher_update_rate: 0.01")).ema_update_rate == 0.01
    assert load_official(tmp_path, ("", ""), "self_distillation.teacher_update_rate=0.2").ema_update_rate == 0.2
    # Of the other keys the defaults are the official ones, except those that docs/algorithm.md lists.
    differs = {"alpha", "distillation_topk", "success_reward_threshold"}
    differs |= {"reprompt_template", "solution_template", "feedback_template"}  # in white space at the end
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
def test_official_settings_that_are_not_implemented(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(SDPOError, match=message):
        load_official(tmp_path, change)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_its_new_name(refusal: Callable[..., str], old: str, new: str) -> None:
    assert new in SETTINGS and old not in SETTINGS
    assert refusal(f"{old}=1") == f"command line: {old} is now {new}; rename it"


def test_a_renamed_key_in_the_file_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal(text="sampler:\n  batch_size: 8\n").endswith(
        "sampler.batch_size is now rollout.max_num_seqs; rename it"
    )
