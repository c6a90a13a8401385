"""Which checkpoints of a run stay on the disk."""

from __future__ import annotations

from collections.abc import Mapping


def select_kept(scores: Mapping[int, float | None], save_total_limit: int, save_best_limit: int) -> set[int]:
    """Steps of the newest ``save_total_limit`` checkpoints and of the ``save_best_limit`` with the highest scores.

    Args:
        scores: held-out accuracy by step, None where it was not evaluated; of two alike the newer counts as better.
        save_total_limit: at least 1.
        save_best_limit: at least 0.
    """
    evaluated = [(score, step) for step, score in scores.items() if score is not None]
    best = [step for _, step in sorted(evaluated, reverse=True)[:save_best_limit]]
    return {*best, *sorted(scores)[-save_total_limit:]}
