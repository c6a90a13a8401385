"""Which checkpoints of a run stay on the disk."""

from __future__ import annotations

from collections.abc import Mapping


def select_kept(scores: Mapping[int, float | None], keep_last: int, keep_best: int) -> set[int]:
    """Steps of the newest ``keep_last`` checkpoints and of the ``keep_best`` with the highest scores.

    Args:
        scores: held-out accuracy by step, None where it was not evaluated; of two alike the newer counts as better.
        keep_last: at least 1.
        keep_best: at least 0.
    """
    evaluated = [(score, step) for step, score in scores.items() if score is not None]
    best = [step for _, step in sorted(evaluated, reverse=True)[:keep_best]]
    return {*best, *sorted(scores)[-keep_last:]}
