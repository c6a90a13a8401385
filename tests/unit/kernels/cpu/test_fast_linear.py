"""Linear layers by oneDNN compared with float64 and with torch's layers, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdpo.kernels.cpu import fast_linear
from sdpo.kernels.cpu import onednn as onednn_module
from sdpo.kernels.cpu.fast_linear import FastLinear, speed_up_linear_layers
from sdpo.kernels.cpu.onednn import find_round_length, multiply, prefers_onednn, round_up_rows

SHAPES: list[tuple[tuple[int, ...], int, int]] = [((1,), 1, 1), ((7,), 5, 3), ((2, 3), 64, 257), ((300,), 129, 96)]


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test with oneDNN and with MKL, on any machine."""
    monkeypatch.setattr(onednn_module, "prefers_onednn", lambda: request.param)
    monkeypatch.setattr(fast_linear, "prefers_onednn", lambda: request.param)
    monkeypatch.setattr(onednn_module, "MIN_SIZE", 1)
    return bool(request.param)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_products(rows: tuple[int, ...], width: int, out: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(*rows, width), torch.randn(out, width)
    bias = torch.randn(out) if has_bias else None
    expected = left.double() @ right.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(multiply(left, right, bias).double(), expected, atol=1e-4, rtol=1e-5)
    flat = left.flatten(0, -2)
    gradient = torch.randn(len(flat), out)
    torch.testing.assert_close(
        multiply(gradient, right.T).double(), gradient.double() @ right.double(), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(
        multiply(gradient.T, flat.T).double(), gradient.double().T @ flat.double(), atol=1e-4, rtol=1e-5
    )


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_use_torch(dtype: torch.dtype) -> None:
    left, right = torch.randn(4, 8).to(dtype), torch.randn(3, 8).to(dtype)
    assert multiply(left, right).equal(left @ right.T)


def differentiate(layer: nn.Module, input: Tensor) -> list[Tensor | None]:
    output = layer(input)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    return [output.detach(), input.grad, *(param.grad for param in layer.parameters())]


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("frozen", [None, "input", "weight"])
def test_gradients(
    onednn: bool, rows: tuple[int, ...], width: int, out: int, has_bias: bool, frozen: str | None
) -> None:
    torch.manual_seed(0)
    reference = nn.Linear(width, out, bias=has_bias)
    accelerated = copy.deepcopy(reference)
    speed_up_linear_layers(accelerated)
    assert type(accelerated) is (FastLinear if onednn else nn.Linear)
    inputs = torch.randn(*rows, width)
    results = []
    for layer in (accelerated, reference.double()):
        dtype = next(layer.parameters()).dtype
        if frozen == "weight":
            layer.requires_grad_(False)
        results.append(differentiate(layer, inputs.to(dtype, copy=True).requires_grad_(frozen != "input")))
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-5)


def test_model_keeps_parameter_names_and_copies_keep_fast_layers(onednn: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    names = list(model.state_dict())
    speed_up_linear_layers(model)
    duplicate = copy.deepcopy(model)
    assert list(duplicate.state_dict()) == names
    assert (type(duplicate[0]) is FastLinear) == onednn
    with torch.no_grad():
        duplicate[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0


@pytest.mark.usefixtures("onednn")
def test_autocast_and_other_dtypes_use_torch() -> None:
    torch.manual_seed(0)
    reference = nn.Linear(16, 8)
    accelerated = copy.deepcopy(reference)
    accelerated.__class__ = FastLinear
    input = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert accelerated(input).dtype == torch.bfloat16
        assert accelerated(input).equal(reference(input))
    assert accelerated.double()(input.double()).equal(reference.double()(input.double()))


def test_choice_of_onednn_is_deterministic() -> None:
    prefers_onednn.cache_clear()
    assert {prefers_onednn(), prefers_onednn.__wrapped__(), prefers_onednn.__wrapped__()} == {prefers_onednn()}


def test_lengths_are_rounded_to_eight_values_per_octave() -> None:
    assert [find_round_length(n) for n in (1, 15, 16, 17, 31, 33, 1000, 1024, 1025, 4095)] == [
        *(1, 15, 16, 16, 30, 32, 960, 1024, 1024, 3840)
    ]
    assert len({find_round_length(n) for n in range(1024, 2048)}) == 8
    assert len({len(round_up_rows(torch.empty(n, 1))) for n in range(1025, 2049)}) == 8
    rows = torch.randn(3, 11, 2)
    rounded = round_up_rows(rows)
    assert rounded.shape == (36, 2)
    assert torch.equal(rounded[:33], rows.flatten(0, 1)) and rounded[33:].abs().max() == 0
    assert max(len(round_up_rows(torch.empty(n, 1))) / n for n in range(16, 4096)) < 1.126
