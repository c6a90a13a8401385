"""Colours of the figure and the page, for light and dark backgrounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    background: str
    ink: str
    muted: str
    line: str
    runs: tuple[str, ...]
    ramp: tuple[str, ...]

    def run_colours(self, count: int) -> list[str]:
        """Return a colour per run: distinct hues for few runs, steps of a ramp for many."""
        if count <= len(self.runs):
            return list(self.runs[:count])
        return [_blend(self.ramp, i / (count - 1)) for i in range(count)]


def _blend(ramp: tuple[str, ...], position: float) -> str:
    scaled = position * (len(ramp) - 1)
    i = min(int(scaled), len(ramp) - 2)
    channels = [(int(ramp[i][c : c + 2], 16), int(ramp[i + 1][c : c + 2], 16)) for c in (1, 3, 5)]
    return "#" + "".join(f"{round(low + (high - low) * (scaled - i)):02x}" for low, high in channels)


# Okabe and Ito's palette for colour-blind readers, with the colours of lowest contrast last. The dark theme has lighter
# shades of the same hues.
LIGHT = Theme(
    background="#ffffff",
    ink="#1c2024",
    muted="#646b73",
    line="#e3e6ea",
    runs=("#0072b2", "#d55e00", "#009e73", "#b65b8d", "#4a4f55", "#e69f00", "#56b4e9"),
    ramp=("#2d1160", "#2a6f97", "#35a37c", "#c9a227"),
)
DARK = Theme(
    background="#14171a",
    ink="#e8eaed",
    muted="#9aa1a9",
    line="#2c3136",
    runs=("#56b4e9", "#f0823c", "#2bc497", "#dc90bd", "#c3c8ce", "#f0c244", "#8f9bf0"),
    ramp=("#7f6ff0", "#4aa3d8", "#43c59e", "#f2e26b"),
)
