"""Translation of the official implementation's ``self_distillation`` section."""

from __future__ import annotations

from typing import Any

from sdpo.errors import ConfigError

# Official keys without a counterpart here, each with the only supported value.
_OFFICIAL_VALUES = {
    "rho": 0.25,
    "renyi_regularization": False,
    "renyi_regularization_level": 0.5,
    "reprompt_truncation": "right",
}


def translate_official_keys(origin: str, section: dict[str, Any]) -> None:
    """Translate an official ``self_distillation`` section in place.

    Raises:
        ConfigError: an unsupported value, or a teacher update rate under both names.
    """
    section.pop("_target_", None)
    for key, supported in _OFFICIAL_VALUES.items():
        if key in section and (value := section.pop(key)) != supported:
            raise ConfigError(
                f"{origin}: self_distillation.{key}={value}: not implemented; remove it, or set it to {supported}"
            )
    if "teacher_update_rate" in section:
        if "ema_update_rate" in section:
            raise ConfigError(
                f"{origin}: self_distillation.teacher_update_rate and ema_update_rate are the same setting; remove one"
            )
        section["ema_update_rate"] = section.pop("teacher_update_rate")
