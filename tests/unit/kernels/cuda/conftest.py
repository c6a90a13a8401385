"""The kernels with blocks small enough that a vocabulary of 75 takes three of them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu"):
        return
    pytest.importorskip("triton")
    from sdpo.kernels.cuda import logits_gradient, row_statistics

    small = row_statistics.Launch(32, 1)
    monkeypatch.setattr(row_statistics, "STATISTICS_LAUNCH", small)
    monkeypatch.setattr(row_statistics, "JENSEN_SHANNON_LAUNCH", small)
    monkeypatch.setattr(logits_gradient, "GRADIENT_LAUNCH", small)
