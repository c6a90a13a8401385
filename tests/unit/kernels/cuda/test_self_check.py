"""Dispatch does not use kernels that fail or differ from the portable loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="has no wheel for this system")

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.regularization import Regularization
from sdpo.kernels import dispatch, fused_linear_loss, self_check
from sdpo.kernels.cuda import fused_loss
from sdpo.kernels.self_check import kernels_agree

# alpha, full_logit_distillation, whether distillation_topk is set
KINDS = [(0.0, True, False), (0.5, True, False), (1.0, False, False), (0.5, True, True)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUTPUTS = object.__new__(fused_linear_loss.FusedOutputs)  # the type that calls are checked for


@pytest.fixture(autouse=True)
def clear_cache() -> Iterator[None]:
    kernels_agree.cache_clear()
    yield
    kernels_agree.cache_clear()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_agree_with_the_portable_loss(kind: tuple[float, bool, bool], dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert kernels_agree(DEVICE, dtype, *kind)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (lambda outputs: replace(outputs, token_losses=1.1 * outputs.token_losses), "its loss differs by 1.0e-01"),
        (lambda outputs: replace(outputs, loss=-1.0 * outputs.loss), "its gradient by hidden states differs by 2.0e"),
        (lambda outputs: replace(outputs, token_losses=outputs.token_losses * torch.nan), "its loss differs by nan"),
        (lambda outputs: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_kernels_are_not_used(corrupt: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = fused_loss.fused_linear_sdpo_loss
    monkeypatch.setattr(fused_loss, "fused_linear_sdpo_loss", lambda *args, **kwargs: corrupt(compute(*args, **kwargs)))
    with pytest.warns(UserWarning, match=f"not used on {DEVICE}, torch.float32: {reason}") as caught:
        assert not kernels_agree(DEVICE, torch.float32, 0.5)
        assert not kernels_agree(DEVICE, torch.float32, 0.5)
    assert [w.category for w in caught].count(UserWarning) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[2:])  # the smallest fraction of the gradient, and the separate path of the top k
def test_self_check_covers_the_entropy_term(kind: tuple[float, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the entropy part of the kernel, loss and log-probs are correct, and the gradient is wrong."""
    assert kernels_agree(DEVICE, torch.float32, *kind, has_entropy=True)
    write = fused_loss.write_logits_gradient

    def write_without_entropy(*args: Any, **kwargs: Any) -> None:
        write(*args[:-1], args[-1][:3], **kwargs)

    monkeypatch.setattr(fused_loss, "write_logits_gradient", write_without_entropy)
    kernels_agree.cache_clear()
    with pytest.warns(UserWarning, match="its gradient by hidden states differs by"):
        assert not kernels_agree(DEVICE, torch.float32, *kind, has_entropy=True)


def test_self_check_covers_the_configured_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    monkeypatch.setattr(dispatch, "has_cuda_kernels", lambda hidden: True)
    monkeypatch.setattr(dispatch, "kernels_agree", lambda device, dtype, *kind: bool(kinds.append(kind)))
    monkeypatch.setattr(fused_linear_loss, "fused_linear_sdpo_loss", lambda *args, **kwargs: OUTPUTS)
    config = self_check.SelfDistillationConfig(alpha=0.5, distillation_topk=3)
    student = fused_linear_loss.LinearHead(torch.zeros(2, 3), torch.zeros(5, 3))
    for regularization in (None, Regularization(0.1, "kl", 0.0), Regularization(None, "kl", 0.1)):
        tokens = TokenBatch(torch.zeros(2, dtype=torch.long), regularization=regularization)
        dispatch.fused_linear_sdpo_loss(student, [], tokens, config)
    assert kinds == [(0.5, True, True, False), (0.5, True, True, False), (0.5, True, True, True)]


def test_portable_loss_replaces_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(dispatch, "has_cuda_kernels", lambda hidden: True)
    for module, name in ((fused_linear_loss, "portable"), (fused_loss, "kernels")):
        compute = lambda *args, name=name, **kwargs: used.append(name) or OUTPUTS  # noqa: E731
        monkeypatch.setattr(module, "fused_linear_sdpo_loss", compute)
    config = self_check.SelfDistillationConfig()
    student = fused_linear_loss.LinearHead(torch.zeros(2, 3), torch.zeros(5, 3))
    for agree in (True, False):
        monkeypatch.setattr(dispatch, "kernels_agree", lambda *args, agree=agree: agree)
        dispatch.fused_linear_sdpo_loss(student, [], TokenBatch(torch.zeros(2, dtype=torch.long)), config)
    assert used == ["kernels", "portable"]
