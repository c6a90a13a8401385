"""The dry run's figures against a model that is really made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpo.config import Run
from sdpo.embedded.cost import estimate_cost
from sdpo.embedded.learner import Learner

MakeRun = Callable[..., Run]


def test_weights_and_moments_are_as_large_as_they_turn_out(
    make_model: Callable[..., Any], make_run: MakeRun, make_samples: Any, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    run = make_run(data__max_prompt_length=24)
    cost = estimate_cost(run)
    learner = Learner(make_model(), run, 0)
    learner.learn(make_samples())
    size = sum(p.numel() * p.element_size() for p in learner.student.parameters())
    moments = sum(
        state[name].numel() * 4 for state in learner.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    )
    assert cost.num_params == sum(p.numel() for p in learner.student.parameters())
    assert cost.learner["student"] == cost.learner["teacher"] == cost.learner["gradients"] == size
    assert cost.learner["AdamW's moments"] == moments
    assert cost.tokens_a_step == 2 * 3 * (24 + 8)
    assert cost.sampler["weights"] == 0, "it samples with the student itself"


@pytest.mark.parametrize(
    ("settings", "role", "item", "factor"),
    [
        ({"staleness": 1}, "sampler", "weights", 1),
        ({"self_distillation__teacher_regularization": "live"}, "learner", "teacher", 0),
        ({"self_distillation__grpo_coef": 1.0}, "learner", "teacher", 0),
        ({"model__dtype": "bfloat16"}, "learner", "student", 0.5),
        ({"model__dtype": "bfloat16"}, "learner", "teacher's float32 average", 1),
    ],
)
def test_what_settings_change(
    make_model: Callable[..., Any],
    make_run: MakeRun,
    tmp_path: Path,
    settings: dict[str, Any],
    role: str,
    item: str,
    factor: float,
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    cost = estimate_cost(make_run(**settings))
    assert cost.num_params is not None
    assert getattr(cost, role)[item] == factor * 4 * cost.num_params


def test_the_cache_holds_keys_and_values_of_all_that_is_decoded_side_by_side(
    make_model: Callable[..., Any], make_run: MakeRun, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    for batch_size, decoded in ((100, 6), (4, 4), (1, 3)):
        run = make_run(sampler__batch_size=batch_size, data__max_prompt_length=24)
        # 2 layers, 1 head of 8 values, keys and values of 4 bytes
        assert estimate_cost(run).sampler["key-value cache"] == decoded * 32 * 2 * 8 * 2 * 4


def test_a_model_that_is_made_on_first_use_has_no_size_yet(make_run: MakeRun, tmp_path: Path) -> None:
    cost = estimate_cost(
        make_run(data__task_args={"dir": str(tmp_path / "none")}, model__path=str(tmp_path / "none/m"))
    )
    assert cost.num_params is None and cost.learner == cost.sampler == {}
    assert cost.tokens_a_step > 0
