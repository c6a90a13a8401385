"""Linear layers by oneDNN against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sdpo.models import linear
from sdpo.models.linear import fast_linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def _on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_has_onednn", lambda: True)


@pytest.mark.parametrize("shape", [(5, 16), (3, 1, 16), (2, 7, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_product(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, rows = nn.Linear(16, 24, bias=bias), torch.randn(shape)
    with torch.no_grad():
        expected = layer(rows)
        with fast_linear(layer):
            assert "forward" in vars(layer)
            torch.testing.assert_close(layer(rows), expected, atol=1e-6, rtol=1e-5)
            with fast_linear(layer):  # a model that stands twice in a policy
                torch.testing.assert_close(layer(rows), expected, atol=1e-6, rtol=1e-5)
            layer.weight.mul_(2)
            torch.testing.assert_close(layer(rows) - expected, rows @ (layer.weight / 2).T, atol=1e-5, rtol=1e-5)


def test_layers_are_as_they_were_even_after_an_error(make_model: Any) -> None:
    model = make_model()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]

    def count_changed() -> int:
        return sum("forward" in vars(model.get_submodule(name)) for name in names)

    with pytest.raises(ZeroDivisionError), fast_linear(model, model):
        assert count_changed() == len(names)
        raise ZeroDivisionError
    assert count_changed() == 0
    rows = torch.randn(2, 16)
    model.lm_head(rows).sum().backward()  # gradients flow again
    assert model.lm_head.weight.grad is not None


def test_what_is_not_a_float32_linear_layer_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(rows)

    half, scaled = nn.Linear(4, 4, dtype=torch.bfloat16), Scaled(4, 4)
    with fast_linear(nn.ModuleList([half, scaled])):
        assert not any("forward" in vars(layer) for layer in (half, scaled))
