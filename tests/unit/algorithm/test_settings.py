"""Validation of self_distillation settings; an error has the setting, its value and its range."""

from __future__ import annotations

from typing import Any

import pytest

from sdpo import SelfDistillationConfig

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("alpha", -0.1, "in [0, 1]"),
        ("alpha", 1.5, "in [0, 1]"),
        ("alpha", NAN, "in [0, 1]"),
        ("distillation_topk", 0, "in [1, inf)"),
        ("divergence_clip", 0.0, "in (0, inf)"),
        ("teacher_entropy_beta", -1.0, "in [0, inf)"),
        ("teacher_entropy_beta", INF, "in [0, inf)"),
        ("is_clip", 0.0, "in (0, inf)"),
        ("is_clip", INF, "in (0, inf)"),
        ("distillation_coef_start", -0.5, "in [0, inf)"),
        ("distillation_coef_end", -0.5, "in [0, inf)"),
        ("policy_loss_weight", 1.01, "in [0, 1]"),
        ("clip_ratio_low", 1.2, "in [0, 1]"),
        ("clip_ratio_high", -0.2, "in [0, inf)"),
        ("teacher_regularization", "none", "one of ema, trust-region, frozen, live, snapshot"),
        ("ema_update_rate", 1.1, "in [0, 1]"),
        ("teacher_sync_steps", 0, "in [1, inf)"),
    ],
)
def test_value_out_of_range_is_refused(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError) as caught:
        SelfDistillationConfig(**{name: value})
    message = str(caught.value)
    assert f"self_distillation.{name}={value}: " in message
    assert allowed in message


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"full_logit_distillation": False, "alpha": 0.5}, ("self_distillation.alpha", "must be 1", "0.5")),
        ({"full_logit_distillation": False, "alpha": 0.0}, ("self_distillation.alpha", "must be 1", "0.0")),
        (
            {"full_logit_distillation": False, "alpha": 1.0, "distillation_topk": 5},
            ("self_distillation.distillation_topk", "full_logit_distillation=true"),
        ),
        (
            {"full_logit_distillation": False, "alpha": 1.0, "teacher_entropy_beta": 0.1},
            ("self_distillation.teacher_entropy_beta", "full_logit_distillation=true"),
        ),
        (
            {"demonstration_source": "none", "include_environment_feedback": False},
            ("self_distillation.demonstration_source", "policy_loss_weight=1"),
        ),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], fragments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        SelfDistillationConfig(**settings)
    assert all(fragment in str(caught.value) for fragment in fragments)


@pytest.mark.parametrize(
    "settings",
    [
        {"full_logit_distillation": False, "alpha": 1.0},
        {"full_logit_distillation": False, "alpha": 1.0, "divergence_clip": 5.0, "is_clip": None},
        {"alpha": 0.0},
        {"alpha": 1.0, "distillation_topk": 1, "distillation_add_tail": False},
        {"demonstration_source": "none", "policy_loss_weight": 1.0},
        {"demonstration_source": "none", "include_environment_feedback": True},
        {"ema_update_rate": 0.0, "clip_ratio_low": 0.0, "clip_ratio_high": 0.0},
    ],
)
def test_settings_at_the_limits_are_accepted(settings: dict[str, Any]) -> None:
    config = SelfDistillationConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings
