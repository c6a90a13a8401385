"""The optimizers: updates lost to rounding, memory of the moments, and bit-exact resumption."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdpo.config.actor import OptimConfig
from sdpo.errors import SDPOError
from sdpo.models.optimizer import (
    MAX_LOST,
    NUM_SAMPLED,
    UpdateRounding,
    build_optimizer,
    choose_optimizer,
    compile_on_gpus_only,
)

PLAIN, SMALL = OptimConfig(), OptimConfig(name="adamw_8bit")
RANDOM = OptimConfig(stochastic_rounding=True, betas=[0.9, 0.95])
SMALL_RANDOM = OptimConfig(name="adamw_8bit", stochastic_rounding=True, betas=[0.9, 0.95])
SHAPES = ((300, 256), (40,), (7, 9))


def make_params(dtype: torch.dtype, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]


def run_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    """Run steps with gradients of a constant part and noise, deterministic for a step."""
    for step in steps:
        for place, param in enumerate(params):
            generator = torch.Generator().manual_seed(place)
            steady = torch.randn(param.shape, generator=generator)
            generator.manual_seed(1000 * step + place)
            noise = torch.randn(param.shape, generator=generator)
            param.grad = (1e-3 * (0.5 * steady + noise)).to(param.dtype)
        with compile_on_gpus_only("cpu"):
            optimizer.step()


def displacement(config: OptimConfig, dtype: torch.dtype, num_steps: int = 40) -> Tensor:
    torch.manual_seed(0)
    params = make_params(dtype)
    before = [param.detach().double().clone() for param in params]
    run_steps(build_optimizer(params, config), params, range(num_steps))
    return torch.cat([(p.detach().double() - b).flatten() for p, b in zip(params, before, strict=True)])


def test_default_optimizer_is_adamw_of_torch() -> None:
    params = make_params(torch.float32)
    optimizer = build_optimizer(params, OptimConfig(lr=3e-4, weight_decay=0.2, betas=[0.8, 0.9]))
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["fused"]) == (3e-4, 0.2, (0.8, 0.9), None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PLAIN, ("torch.optim", "AdamW", {})),
        (SMALL, ("torchao.optim", "AdamW8bit", {"bf16_stochastic_round": False})),
        (RANDOM, ("torchao.optim", "_AdamW", {"bf16_stochastic_round": True})),
        (SMALL_RANDOM, ("torchao.optim", "AdamW8bit", {"bf16_stochastic_round": True})),
    ],
)
def test_optimizer_by_settings(config: OptimConfig, expected: Any) -> None:
    assert choose_optimizer(config) == expected


def test_missing_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError("none")
        return plain(name, *arguments)

    monkeypatch.setattr("importlib.import_module", lambda name: refuse(name))
    with pytest.raises(SDPOError, match=r"optim\.name=adamw_8bit: .*pip install 'sdpo\[torchao\]'"):
        build_optimizer(make_params(torch.float32), SMALL)
    with pytest.raises(SDPOError, match=r"optim\.stochastic_rounding: .*pip install 'sdpo\[torchao\]'"):
        build_optimizer(make_params(torch.bfloat16), RANDOM)


@pytest.mark.parametrize(
    ("config", "dtype", "cosine", "length"),
    [
        (SMALL, torch.float32, (0.98, 1.0), (0.97, 1.03)),
        (OptimConfig(betas=[0.9, 0.95]), torch.bfloat16, (0.1, 0.4), (0.05, 0.4)),
        (RANDOM, torch.bfloat16, (0.7, 0.95), (1.0, 1.5)),
        (SMALL_RANDOM, torch.bfloat16, (0.7, 0.95), (1.0, 1.5)),
    ],
    ids=["8-bit", "bfloat16", "random", "8-bit random"],
)
def test_change_of_the_weights_compared_with_float32(
    config: OptimConfig, dtype: torch.dtype, cosine: tuple[float, float], length: tuple[float, float]
) -> None:
    if config is not PLAIN and choose_optimizer(config)[0] != "torch.optim":
        pytest.importorskip("torchao")
    exact = displacement(OptimConfig(betas=config.betas), torch.float32)
    found = displacement(config, dtype)
    assert cosine[0] < float(exact @ found / exact.norm() / found.norm()) <= cosine[1] + 1e-12
    assert length[0] < float(found.norm() / exact.norm()) < length[1]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(PLAIN, torch.float32), (SMALL, torch.float32), (RANDOM, torch.bfloat16), (SMALL_RANDOM, torch.bfloat16)],
    ids=["plain", "8-bit", "random", "8-bit random"],
)
def test_optimizer_resumes_bit_for_bit_from_a_file(config: OptimConfig, dtype: torch.dtype, tmp_path: Any) -> None:
    """Stochastic rounding resumes too, because its random numbers come from torch's generator."""
    if choose_optimizer(config)[0] != "torch.optim":
        pytest.importorskip("torchao")
    torch.manual_seed(3)
    params = make_params(dtype)
    optimizer = build_optimizer(params, config)
    run_steps(optimizer, params, range(3))
    state = {"moments": optimizer.state_dict()["state"], "weights": params, "random": torch.get_rng_state()}
    torch.save(state, tmp_path / "state.pt")
    run_steps(optimizer, params, range(3, 6))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = [nn.Parameter(param.detach()) for param in saved["weights"]]
    second = build_optimizer(again, config)
    second.load_state_dict({**second.state_dict(), "state": saved["moments"]})
    torch.manual_seed(99)
    torch.set_rng_state(saved["random"])
    run_steps(second, again, range(3, 6))
    for one, other in zip(params, again, strict=True):
        assert torch.equal(one, other)


def test_size_of_8_bit_moments() -> None:
    pytest.importorskip("torchao")
    params = make_params(torch.float32, [(512, 256)])
    optimizer = build_optimizer(params, SMALL)
    run_steps(optimizer, params, range(1))
    moment = optimizer.state[params[0]]["exp_avg"]
    assert moment.codes.numel() * moment.codes.element_size() == 512 * 256
    assert moment.scale.numel() * moment.scale.element_size() == 512 * 4


# ---- updates lost to rounding ---------------------------------------------------------------------------------------


def measure(config: OptimConfig, dtype: torch.dtype, num_steps: int, lr: float = 1e-5) -> tuple[list[Any], list[str]]:
    torch.manual_seed(0)
    params = make_params(dtype, [(512, 512)])
    optimizer = build_optimizer(params, OptimConfig(**{**vars(config), "lr": lr}))
    messages: list[str] = []
    rounding = UpdateRounding(optimizer, messages.append)
    lost = []
    for step in range(num_steps):
        run_steps(optimizer, params, range(step, step + 1))
        lost.append(rounding.take())
    assert rounding.take() is None, "only one value per step"
    return lost, messages


def test_no_rounding_is_measured_for_float32() -> None:
    assert measure(PLAIN, torch.float32, 2) == ([None, None], [])


def test_fraction_lost_to_rounding() -> None:
    """At its first step AdamW moves each weight by the learning rate against the gradient's sign."""
    weights = torch.tensor([1.0, 1.0, 2.0**-9, 0.0])
    param = nn.Parameter(weights.bfloat16())
    lr = 2.0**-10  # a quarter of the spacing below 1, an eighth of the spacing above
    optimizer = build_optimizer([param], OptimConfig(lr=lr, weight_decay=0.0, betas=[0.9, 0.95]))
    rounding = UpdateRounding(optimizer, lambda text: None)
    param.grad = torch.tensor([-1.0, 1.0, -1.0, -1.0]).bfloat16()
    optimizer.step()
    assert param.tolist() == pytest.approx([1.0, 1.0, 2.0**-9 + 2.0**-10, 2.0**-10])
    assert rounding.take() == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_fraction_equals_that_of_all_entries(lr: float) -> None:
    """Over all entries, against the update of torch's step on float32 weights with the same initial values."""
    config = OptimConfig(lr=lr, betas=[0.9, 0.95])
    half = make_params(torch.bfloat16, [(512, 512)])
    whole = [nn.Parameter(p.detach().float()) for p in half]
    before = half[0].detach().double()
    rounding = UpdateRounding(optimizer := build_optimizer(half, config), lambda text: None)
    run_steps(optimizer, half, range(1))
    run_steps(build_optimizer(whole, config), whole, range(1))
    asked, moved = whole[0].detach().double() - before, half[0].detach().double() - before
    expected = 1 - float((moved * asked).sum() / asked.square().sum())
    assert rounding.take() == pytest.approx(expected, abs=0.02)
    assert (expected > 0.8) == (lr == 1e-5)


def test_bfloat16_logs_a_warning_at_the_start_and_during_training() -> None:
    lost, messages = measure(OptimConfig(betas=[0.9, 0.95]), torch.bfloat16, 4)
    assert min(lost) > 0.8
    assert len(messages) == 2
    assert all("model.dtype=float32" in line for line in messages)
    assert messages[0].startswith("bfloat16 weights: ") and "1e-05" in messages[0]


def test_no_warning_at_a_large_learning_rate() -> None:
    lost, messages = measure(OptimConfig(betas=[0.9, 0.95]), torch.bfloat16, 1, lr=1e-2)
    assert abs(lost[0]) < MAX_LOST
    assert len(messages) == 1 and "model.dtype" not in messages[0]


@pytest.mark.parametrize("config", [RANDOM, SMALL_RANDOM], ids=["random", "8-bit random"])
def test_stochastic_rounding_keeps_the_update_on_average(config: OptimConfig) -> None:
    pytest.importorskip("torchao")
    lost, messages = measure(config, torch.bfloat16, 3)
    assert all(abs(share) < 0.1 for share in lost)
    assert messages == ["bfloat16 weights with stochastic rounding: updates are kept on average, with noise"]


def test_step_with_learning_rate_zero_has_no_fraction() -> None:
    params = make_params(torch.bfloat16)
    optimizer = build_optimizer(params, OptimConfig(betas=[0.9, 0.95]))
    rounding = UpdateRounding(optimizer, lambda text: None)
    optimizer.param_groups[0]["lr"] = 0.0
    run_steps(optimizer, params, range(1))
    assert rounding.take() is None


def test_measured_entries_are_sampled_from_trained_parameters_by_seed() -> None:
    frozen, learns, whole = make_params(torch.bfloat16, [(300, 300), (300, 300), (4, 4)])
    frozen.requires_grad_(False)
    whole.data = whole.data.float()

    def places(seed: int) -> list[Tensor]:
        optimizer = torch.optim.AdamW([frozen, learns, whole], lr=1e-5)
        return [entry[2] for entry in UpdateRounding(optimizer, lambda text: None, seed)._entries]

    (first,) = places(0)
    assert len(first) == NUM_SAMPLED and int(first.min()) >= 0 and int(first.max()) < 90_000
    assert torch.equal(first, places(0)[0]) and not torch.equal(first, places(1)[0])
