"""Translation of config files into Hydra overrides for verl."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from sdpo.config.loader import load_config
from sdpo.config.model import LoraConfig
from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.verl_backend.config.schema import read_health, read_lora, read_self_distillation
from sdpo.verl_backend.config.to_verl import quote, to_verl_overrides
from sdpo.verl_backend.entrypoint.compose import compose_config
from sdpo.verl_backend.entrypoint.launch import build_command
from sdpo.verl_backend.entrypoint.model_checks import limit_length

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
PARSER = OverridesParser.create()


@given(st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t")) | st.text('\\"a \n'))
def test_hydra_parses_quoted_text_unchanged(text: str) -> None:
    (override,) = PARSER.parse_overrides([f"key={quote(text)}"])
    assert override.value() == text


@pytest.mark.parametrize(
    "value",
    [None, True, False, 3, 1e-5, -2.5, [1, 0.5], ["a b", "c,d"], 'it\'s "so"', "a\\", "\\\\", 'a\\\\"b\\"', "\\\n", ""],
)
def test_hydra_parses_quoted_values_unchanged(value: Any) -> None:
    (override,) = PARSER.parse_overrides([f"key={quote(value)}"])
    assert override.value() == value


@pytest.fixture
def compose_run(hidden_rule_dir: Path) -> Callable[[SDPOConfig], Any]:
    def compose(run: SDPOConfig) -> Any:
        translated = to_verl_overrides(run)
        return compose_config(translated.config_name, translated.overrides)

    return compose


def test_translated_config_has_the_same_settings(
    make_task_run: Callable[..., SDPOConfig], compose_run: Callable[[SDPOConfig], Any], hidden_rule_dir: Path
) -> None:
    run = make_task_run(
        seed=5,
        max_staleness=1,
        save_steps=2,
        data__train_batch_size=4,
        data__max_pixels=5000,
        data__filter_unreadable_images=True,
        actor__freeze_vision_tower=True,
        rollout__n=3,
        rollout__temperature=1.0,
        rollout__top_p=0.9,
        rollout__max_num_seqs=17,
        actor__mini_batch_size=2,
        actor__max_tokens_per_micro_batch=777,
        actor__loss_agg_mode="seq-mean-token-sum",
        rollout_correction__rollout_is="sequence",
        rollout_correction__rollout_is_threshold=1.5,
        actor__autocast=True,
        optim__lr=3e-4,
        optim__lr_scheduler_type="cosine",
        optim__warmup_steps=0,
        optim__max_grad_norm=0.7,
        self_distillation__alpha=0.25,
        self_distillation__distillation_topk=7,
        self_distillation__reprompt_template='{prompt}\n"{solution}"\\{feedback}',
        self_distillation__clip_ratio_low=0.1,
        eval__n=4,
        eval__max_prompts=5,
        health__window=3,
        health__teacher_entropy_increase="freeze_teacher",
        health__min_scale=0.25,
        save_total_limit=3,
        save_best_limit=2,
        tracking__report_to=["tensorboard"],
    )
    config = compose_run(run)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    settings = read_self_distillation(actor)
    assert settings is not None
    assert asdict(settings) == asdict(run.self_distillation)
    assert read_health(config) == run.health
    assert (config.trainer.max_actor_ckpt_to_keep, config.trainer.save_best_limit) == (3, 2)
    assert config.trainer.health_events_file == str(Path(run.output_dir).absolute() / "health_events.jsonl")
    assert not config.trainer.use_v1
    assert (config.data.seed, config.data.train_batch_size, config.data.val_max_samples) == (5, 4, 5)
    assert (config.data.max_pixels, config.data.filter_unreadable_images, actor.freeze_vision_tower) == (
        5000,
        True,
        True,
    )
    assert (config.data.max_prompt_length, config.data.max_response_length) == (2048, 8)
    assert (rollout.n, rollout.temperature, rollout.top_p, rollout.max_num_seqs) == (3, 1.0, 0.9, 17)
    assert (rollout.prompt_length, rollout.response_length, rollout.seed) == (2048, 8, 5)
    assert (rollout.val_kwargs.n, rollout.val_kwargs.do_sample, rollout.val_kwargs.temperature) == (4, True, 1.0)
    assert (actor.ppo_mini_batch_size, actor.ppo_max_token_len_per_gpu) == (2, 777)
    assert rollout.log_prob_max_token_len_per_gpu == 777
    assert (actor.loss_agg_mode, actor.clip_ratio_low) == ("seq-mean-token-sum", 0.1)
    correction = config.algorithm.rollout_correction
    assert (correction.rollout_is, correction.rollout_is_threshold) == ("sequence", 1.5)
    assert (actor.optim.lr, actor.optim.lr_scheduler_type, actor.optim.lr_warmup_steps) == (3e-4, "cosine", 0)
    assert actor.optim.clip_grad == 0.7
    assert actor.fsdp_config.mixed_precision.param_dtype == "bf16"
    assert (config.trainer.total_training_steps, config.trainer.save_freq, config.trainer.test_freq) == (3, 2, 3)
    assert config.trainer.logger == ["console", "file", "tensorboard"]
    assert config.data.train_files == [str(hidden_rule_dir / "train.parquet")]
    assert config.reward.custom_reward_function.reward_kwargs.task == "hidden_rule"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("torch.optim", "AdamW", None)),
        ({"optim__name": "adamw_8bit"}, ("torchao.optim", "AdamW8bit", {"bf16_stochastic_round": False})),
        (
            {"optim__stochastic_rounding": True, "model__dtype": "bfloat16", "optim__betas": [0.9, 0.95]},
            ("torchao.optim", "_AdamW", {"bf16_stochastic_round": True}),
        ),
    ],
)
def test_optimizer_settings_are_translated(
    settings: dict[str, Any], expected: tuple[Any, ...], make_task_run: Callable[..., SDPOConfig], compose_run: Any
) -> None:
    config = compose_run(make_task_run(optim__lr=2e-5, **{"optim__betas": [0.8, 0.9], **settings}))
    optim = config.actor_rollout_ref.actor.optim
    given = optim.override_optimizer_config
    assert (optim.optimizer_impl, optim.optimizer, given and dict(given)) == expected
    assert (optim.lr, list(optim.betas)) == (2e-5, settings.get("optim__betas", [0.8, 0.9]))


@pytest.mark.parametrize(
    ("window", "own", "expected"), [(None, None, 72), (64, None, 64), (999, None, 72), (64, 50, 50)]
)
def test_max_model_len_is_the_longest_sequence_within_the_window(
    window: int | None,
    own: int | None,
    expected: int,
    make_task_run: Callable[..., SDPOConfig],
    compose_run: Callable[[SDPOConfig], Any],
) -> None:
    verl = {} if own is None else {"actor_rollout_ref.rollout.max_model_len": own}
    config = compose_run(make_task_run(data__max_prompt_length=64, rollout__max_response_length=8, verl=verl))
    limit_length(config, window)
    assert config.actor_rollout_ref.rollout.max_model_len == expected


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(),
        LoraConfig(rank=4, alpha=6),
        LoraConfig(rank=8, alpha=16, target_modules=["q_proj"]),
    ],
)
def test_lora_settings_are_translated(
    lora: LoraConfig, make_task_run: Callable[..., SDPOConfig], compose_run: Callable[[SDPOConfig], Any]
) -> None:
    settings = {f"lora__{f.name}": getattr(lora, f.name) for f in fields(lora)}
    model = compose_run(make_task_run(**settings)).actor_rollout_ref.model
    assert read_lora(model) == lora
    assert model.lora.merge == (lora.rank > 0)


def test_default_lora_scale_is_two(
    make_task_run: Callable[..., SDPOConfig], compose_run: Callable[[SDPOConfig], Any]
) -> None:
    model = compose_run(make_task_run(lora__rank=4)).actor_rollout_ref.model
    assert model.lora_alpha / model.lora_rank == 2


def test_max_staleness_0_selects_the_sync_trainer(
    make_task_run: Callable[..., SDPOConfig], compose_run: Callable[[SDPOConfig], Any]
) -> None:
    config = compose_run(make_task_run(max_staleness=0))
    assert config.trainer.use_v1 and config.trainer.v1.trainer_mode == "sync"
    assert config.trainer.total_epochs >= config.trainer.total_training_steps, "no epoch ends it before its last step"
    assert config.algorithm.rollout_correction.rollout_is == "token"
    assert config.actor_rollout_ref.rollout.val_kwargs.temperature == 0


def test_unsupported_settings_are_refused_or_listed_as_unused(make_task_run: Callable[..., SDPOConfig]) -> None:
    with pytest.raises(SDPOError, match="verl does not have it"):
        to_verl_overrides(make_task_run(optim__lr_scheduler_type="linear"))
    run = make_task_run(actor__num_threads=2, eval__evaluate_teacher=False)
    assert to_verl_overrides(run).unused == ["actor.num_threads", "eval.evaluate_teacher"]
    assert to_verl_overrides(make_task_run(rollout__engine="vllm")).unused == ["rollout.engine"]
    unseen = to_verl_overrides(
        make_task_run(health__ref_kl_interval=2, health__teacher_underperforms_student="stop", health__window=2)
    )
    assert unseen.unused == ["health.teacher_underperforms_student", "health.ref_kl_interval"]
    assert [override for override in unseen.overrides if override.startswith("health.")] == ["health.window=2"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_file_is_translated(path: Path) -> None:
    command = build_command(to_verl_overrides(load_config(path)), "runs/x", ["trainer.nnodes=2"])
    assert command.arguments[-1] == "trainer.nnodes=2"
    assert str(command).startswith("VERL_FILE_LOGGER_PATH=") and "python -m sdpo.verl_backend.entrypoint.main" in str(
        command
    )


def test_verl_section_is_appended_and_takes_precedence(
    make_task_run: Callable[..., SDPOConfig], compose_run: Callable[[SDPOConfig], Any]
) -> None:
    alone = {
        "rollout.n_gpus_per_node": 4,
        "trainer": {"n_gpus_per_node": 4, "balance_batch": False, "logger": ["file"]},
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.limits": {"image": 2, "names": [{"a b": 1.5}], "none": {}},
        "actor_rollout_ref.rollout.n": 4,
    }
    run = make_task_run(max_staleness=1, rollout__n=2, verl=alone)
    assert to_verl_overrides(run).overrides[-8:] == [
        "rollout.n_gpus_per_node=4",
        "trainer.n_gpus_per_node=4",
        "trainer.balance_batch=false",
        'trainer.logger=["file"]',
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.limits.image=2",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.limits.names=[{a b:1.5}]",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.limits.none={}",
        "actor_rollout_ref.rollout.n=4",
    ]
    config = compose_run(run)
    assert (config.trainer.n_gpus_per_node, config.rollout.n_gpus_per_node) == (4, 4)
    assert (config.trainer.balance_batch, config.trainer.logger) == (False, ["file"])
    assert config.actor_rollout_ref.rollout.n == 4, "it wins over rollout.n"
    limits = config.actor_rollout_ref.rollout.engine_kwargs.vllm.limits
    assert (limits.image, limits.names[0]["a b"], limits.none) == (2, 1.5, {})


def test_unknown_key_of_the_verl_section_is_refused(
    make_task_run: Callable[..., SDPOConfig], compose_run: Callable[[SDPOConfig], Any]
) -> None:
    with pytest.raises(SDPOError, match=r"nodes_of_gpus") as caught:
        compose_run(make_task_run(verl={"trainer.nodes_of_gpus": 2}))
    assert "\n" not in str(caught.value)


def test_command_line_overrides_are_last(make_task_run: Callable[..., SDPOConfig]) -> None:
    translated = to_verl_overrides(make_task_run(verl={"trainer.nnodes": 2}))
    arguments = build_command(translated, "runs/x", ["trainer.nnodes=3"]).arguments
    assert [a for a in arguments if a.startswith("trainer.nnodes=")] == ["trainer.nnodes=2", "trainer.nnodes=3"]
