"""The grouped top-k search compared with a sort."""

from __future__ import annotations

import pytest
import torch

from sdpo.kernels.cpu import grouped_topk
from sdpo.kernels.cpu.grouped_topk import topk_support


@pytest.mark.parametrize("group", [2, 5, 64])
@pytest.mark.parametrize(("vocab_size", "k"), [(30, 1), (97, 3), (640, 9), (643, 20), (700, 11), (20, 20)])
def test_grouped_topk_equals_a_sort(vocab_size: int, k: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_topk, "TOP_GROUP", group)
    generator = torch.Generator().manual_seed(vocab_size + k)
    values = torch.randn(50, vocab_size, generator=generator, dtype=torch.float64)
    values[:20, -k:] += 5.0  # the last entries, which fill no group
    values[20:30, :: max(1, vocab_size // group)] += 5.0  # all large entries in one group
    values[30:35] = -torch.inf
    values[30:35, 7] = 0.0
    topk, ids = topk_support(values.requires_grad_(), k)
    sorted_values, order = values.detach().sort(-1, descending=True)
    assert torch.equal(topk, sorted_values[:, :k])
    assert torch.equal(values.detach().gather(-1, ids), topk)
    finite = torch.isfinite(sorted_values[:, :k])
    assert torch.equal(ids[finite], order[:, :k][finite])
    assert all(len(set(row)) == k for row in ids.tolist())
    weights = torch.arange(1.0, k + 1, dtype=torch.float64).expand(50, -1)
    (gradient,) = torch.autograd.grad((topk * weights).where(finite, 0.0).sum(), values)
    expected = torch.zeros_like(gradient).scatter(-1, ids, weights.where(finite, 0.0))
    assert torch.equal(gradient, expected)
