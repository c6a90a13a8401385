"""Selection of the checkpoints to keep; used by the native trainer and the verl backend."""

from __future__ import annotations

from collections.abc import Mapping


def select_kept(scores: Mapping[int, float | None], save_total_limit: int, save_best_limit: int) -> set[int]:
    """Return the steps of the newest ``save_total_limit`` checkpoints and the ``save_best_limit`` best ones.

    Args:
        scores: validation accuracy by step; None if it was not evaluated. The newer of two equal scores is better.
        save_total_limit: at least 1.
        save_best_limit: at least 0.
    """
    evaluated = [(score, step) for step, score in scores.items() if score is not None]
    best = [step for _, step in sorted(evaluated, reverse=True)[:save_best_limit]]
    return {*best, *sorted(scores)[-save_total_limit:]}
