"""The grouped top-k search against a sort."""

from __future__ import annotations

import pytest
import torch

from sdpo.kernels.cpu import grouped_topk
from sdpo.kernels.cpu.grouped_topk import topk_support


@pytest.mark.parametrize("group", [2, 5, 64])
@pytest.mark.parametrize(("vocab_size", "k"), [(30, 1), (97, 3), (640, 9), (643, 20), (700, 11), (20, 20)])
def test_the_largest_entries_are_those_of_a_sort(
    vocab_size: int, k: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_topk, "TOP_GROUP", group)
    generator = torch.Generator().manual_seed(vocab_size + k)
    values = torch.randn(50, vocab_size, generator=generator, dtype=torch.float64)
    values[:20, -k:] += 5.0  # the rest that fills no group
    values[20:30, :: max(1, vocab_size // group)] += 5.0  # all in one group
    values[30:35] = -torch.inf
    values[30:35, 7] = 0.0
    kept, ids = topk_support(values.requires_grad_(), k)
    wanted, order = values.detach().sort(-1, descending=True)
    assert torch.equal(kept, wanted[:, :k])
    assert torch.equal(values.detach().gather(-1, ids), kept)
    finite = torch.isfinite(wanted[:, :k])
    assert torch.equal(ids[finite], order[:, :k][finite])
    assert all(len(set(row)) == k for row in ids.tolist())
    weights = torch.arange(1.0, k + 1, dtype=torch.float64).expand(50, -1)
    (gradient,) = torch.autograd.grad((kept * weights).where(finite, 0.0).sum(), values)
    expected = torch.zeros_like(gradient).scatter(-1, ids, weights.where(finite, 0.0))
    assert torch.equal(gradient, expected)
