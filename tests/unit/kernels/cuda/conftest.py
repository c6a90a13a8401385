"""Launch the kernels with blocks of 32 entries, so that a vocabulary of 75 needs three blocks."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu"):
        return
    pytest.importorskip("triton")
    from sdpo.kernels.cuda import logits_gradient, row_statistics

    launch = row_statistics.Launch(32, 1)
    monkeypatch.setattr(row_statistics, "STATISTICS_LAUNCH", launch)
    monkeypatch.setattr(row_statistics, "JENSEN_SHANNON_LAUNCH", launch)
    monkeypatch.setattr(logits_gradient, "GRADIENT_LAUNCH", launch)
