"""Declaration of a setting: its default, range, choices and help text in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdpo.errors import ConfigError

MAX_INTEGER = 2**63 - 1
MISSING: Any = "???"  # OmegaConf's mark of a setting without default


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    is_path: bool = False,
    fixed: bool = False,
) -> Any:
    """Declare a dataclass field with its documentation and its range.

    Args:
        default: its value if a config does not set it; a list or mapping is copied.
        help: a description that can be read without the other settings' descriptions.
        ge, gt, le: bounds of a number, or of each number in a list.
        choices: allowed values, of a list for each of its items.
        is_path: whether ``~`` is expanded.
        fixed: whether a resumed run is refused if the value differs from the checkpoint's.
    """
    metadata = {
        "help": help,
        "ge": ge,
        "gt": gt,
        "le": le,
        "choices": tuple(choices) if choices else None,
        "is_path": is_path,
        "fixed": fixed,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def describe_range(metadata: Mapping[str, Any]) -> str:
    """Format the range of a setting for error messages and documentation; empty without a range."""
    if metadata.get("choices"):
        return "one of " + ", ".join(metadata["choices"])
    ge, gt, le = metadata.get("ge"), metadata.get("gt"), metadata.get("le")
    low = f"[{_format_bound(ge)}" if ge is not None else f"({_format_bound(gt)}" if gt is not None else None
    if low is None and le is None:
        return ""
    return f"in {low or '(-inf'}, {f'{_format_bound(le)}]' if le is not None else 'inf)'}"


def is_too_large(value: Any) -> bool:
    """Whether an integer does not fit into 64 bits."""
    return isinstance(value, int) and abs(value) > MAX_INTEGER


@dataclass(frozen=True)
class Section:
    """Base class of all sections; checks every setting against its declared range."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if is_too_large(value):
                raise ConfigError(f"{self._key(f.name)}={value!s:.40}: must be an integer of 64 bits")
            if value is None or value == MISSING or _in_range(value, f.metadata):
                continue
            raise ConfigError(f"{self._key(f.name)}={value}: must be {describe_range(f.metadata) or 'finite'}")

    def _key(self, name: str) -> str:
        return f"{self.section}.{name}" if self.section else name


def _format_bound(bound: float | None) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _in_range(value: Any, metadata: Mapping[str, Any]) -> bool:
    if metadata.get("choices"):
        values = value if isinstance(value, (list, tuple)) else [value]
        return all(v in metadata["choices"] for v in values)
    ge, gt, le = metadata.get("ge"), metadata.get("gt"), metadata.get("le")
    if ge is None and gt is None and le is None:
        return not isinstance(value, float) or math.isfinite(value)
    return all(
        isinstance(each, (int, float))
        and not isinstance(each, bool)
        and math.isfinite(each)
        and (ge is None or each >= ge)
        and (gt is None or each > gt)
        and (le is None or each <= le)
        for each in (value if isinstance(value, (list, tuple)) else [value])
    )
