"""Kernels that compute something else than the portable form, or nothing, are not used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="has no wheel for this system")

from sdpo.algorithm.batch import TokenBatch
from sdpo.kernels import dispatch, fused_linear_loss, self_check
from sdpo.kernels.cuda import fused_loss
from sdpo.kernels.self_check import kernels_agree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    kernels_agree.cache_clear()
    yield
    kernels_agree.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [(0.0, True, False), (0.5, True, False), (1.0, False, False), (0.5, True, True)])
def test_the_kernels_agree(kind: tuple[float, bool, bool], dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert kernels_agree(DEVICE, dtype, *kind)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda outputs: replace(outputs, token_losses=1.1 * outputs.token_losses), "its loss differs by 1.0e-01"),
        (lambda outputs: replace(outputs, loss=-1.0 * outputs.loss), "its gradient by hidden states differs by 2.0e"),
        (lambda outputs: replace(outputs, token_losses=outputs.token_losses * torch.nan), "its loss differs by nan"),
        (lambda outputs: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_others_are_not_used(wrong: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = fused_loss.fused_linear_sdpo_loss
    monkeypatch.setattr(fused_loss, "fused_linear_sdpo_loss", lambda *args, **how: wrong(compute(*args, **how)))
    with pytest.warns(UserWarning, match=f"not used on {DEVICE}, torch.float32: {reason}") as caught:
        assert not kernels_agree(DEVICE, torch.float32, 0.5)
        assert not kernels_agree(DEVICE, torch.float32, 0.5)
    assert [w.category for w in caught].count(UserWarning) == 1


def test_the_portable_form_steps_in(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(dispatch, "has_cuda_kernels", lambda hidden: True)
    monkeypatch.setattr(fused_linear_loss, "fused_linear_sdpo_loss", lambda *args, **how: used.append("portable"))
    monkeypatch.setattr(fused_loss, "fused_linear_sdpo_loss", lambda *args, **how: used.append("kernels"))
    config = self_check.SelfDistillationConfig()
    student = fused_linear_loss.LinearHead(torch.zeros(2, 3), torch.zeros(5, 3))
    for agree in (True, False):
        monkeypatch.setattr(dispatch, "kernels_agree", lambda *args, agree=agree: agree)
        dispatch.fused_linear_sdpo_loss(student, [], TokenBatch(torch.zeros(2, dtype=torch.long)), config)
    assert used == ["kernels", "portable"]
