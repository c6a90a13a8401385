"""Build AdamW from the config, and measure which fraction of its updates is lost to rounding.

A bfloat16 weight has 8 significant bits, so an update below 1/512 to 1/256 of the weight is rounded away. At a learning
rate of 1e-5 this happens to nearly all updates. Weights in float32 keep every update; torchao's AdamW with 8-bit
moments frees the memory for them.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sdpo.c_compiler import find_missing_compiler
from sdpo.config.actor import OptimConfig
from sdpo.errors import ConfigError

NUM_SAMPLED = 65_536
# Above this lost fraction a warning is logged: the effective learning rate is far from the configured value.
MAX_LOST = 0.25
REMEDY = "use model.dtype=float32 with actor.autocast=true and optim.name=adamw_8bit, or optim.stochastic_rounding=true"
_HALF = (torch.bfloat16, torch.float16)


def choose_optimizer(config: OptimConfig) -> tuple[str, str, dict[str, Any]]:
    """Module, class and extra arguments of the optimizer, as in verl's optimizer config."""
    if config.name == "adamw_8bit":
        return "torchao.optim", "AdamW8bit", {"bf16_stochastic_round": config.stochastic_rounding}
    if config.stochastic_rounding:
        return "torchao.optim", "_AdamW", {"bf16_stochastic_round": True}
    return "torch.optim", "AdamW", {}


def require_optimizer(module: str, setting: str) -> None:
    """Check that an optimizer's package is installed, on both backends.

    Args:
        module: of the optimizer, e.g. ``torchao.optim``.
        setting: that selects the optimizer, for the message.

    Raises:
        ConfigError: ``module`` cannot be imported; the message has the command that installs it.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        name = "'sdpo[torchao]'" if package == "torchao" else package
        raise ConfigError(f"{setting}: {module} cannot be imported ({error}); pip install {name}") from error


def require_compiler(setting: str) -> None:
    """Check that torchao's optimizers can compile their update on a GPU, which they do at the first step.

    Args:
        setting: that selects the optimizer, for the message.

    Raises:
        ConfigError: the C compiler or a header file is missing; the message has the command that installs it.
    """
    missing = find_missing_compiler()
    if missing is not None:
        raise ConfigError(f"{setting}: {missing}")


def build_optimizer(params: Sequence[torch.nn.Parameter], config: OptimConfig) -> Optimizer:
    """Build the optimizer; parameters without gradients are never updated.

    Raises:
        ConfigError: the settings require torchao or a C compiler, which is missing.
    """
    module, name, arguments = choose_optimizer(config)
    setting = f"optim.name={config.name}" if config.name != "adamw" else "optim.stochastic_rounding"
    require_optimizer(module, setting)
    is_on_gpu = all(param.is_cuda for param in params)
    if is_on_gpu and module == "torch.optim":
        arguments = {"fused": True}  # torch's default, foreach, copies all moments
    elif is_on_gpu:
        require_compiler(setting)
    optimizer: Optimizer = getattr(importlib.import_module(module), name)(
        params, lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay, **arguments
    )
    return optimizer


def compile_on_gpus_only(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Context for a step of a torchao optimizer, without torch.compile on CPUs, which takes minutes there."""
    return contextlib.nullcontext() if device_type == "cuda" else torch.compiler.set_stance("force_eager")


class UpdateRounding:
    """Measure at each AdamW step the fraction of the update that is lost to rounding.

    With u the update that AdamW computes and d the actual change of the weights, this is 1 - <d, u> / <u, u>, on
    ``NUM_SAMPLED`` entries of the half-precision weights, drawn once. It is 0 for float32, 0 on average with stochastic
    rounding, and 1 if no weight changed. Of sharded parameters (DTensor), only this rank's shards are sampled.

    Args:
        optimizer: torch's or torchao's AdamW, before the scheduler changes its peak learning rate.
        log: called with a message: an estimate before the first update, and a warning the first time that more than
            ``MAX_LOST`` is lost. Not called if all trained weights are float32, which are not measured.
        seed: of the drawn entries.
    """

    def __init__(self, optimizer: Optimizer, log: Callable[[str], None], seed: int = 0) -> None:
        self._optimizer = optimizer
        self._log = log
        self._at_random = bool(getattr(optimizer, "bf16_stochastic_round", False))
        half = [
            (param, number)  # of its group; the group object changes when a state is loaded
            for number, group in enumerate(optimizer.param_groups)
            for param in group["params"]
            if param.requires_grad and param.dtype in _HALF
        ]
        sizes = [_local(param).numel() for param, _ in half]
        self._entries = [
            (param, number, places)
            for (param, number), places in zip(half, _draw_places(sizes, NUM_SAMPLED, seed), strict=True)
            if len(places)
        ]
        self._expected: list[tuple[Tensor, ...]] = []
        self._measured: Tensor | None = None
        self._has_warned = False
        if self._entries:
            log(self._describe(float(optimizer.param_groups[0]["lr"])))
            optimizer.register_step_pre_hook(lambda *_: self._compute_expected())
            optimizer.register_step_post_hook(lambda *_: self._compare())

    def take(self) -> float | None:
        """Return and reset the last step's lost fraction; None without a step or with a zero update."""
        measured, self._measured = self._measured, None
        if measured is None:
            return None
        kept, asked = measured.tolist()
        if asked == 0:
            return None
        lost = 1.0 - kept / asked
        if lost > MAX_LOST and not self._at_random and not self._has_warned:
            self._has_warned = True
            self._log(f"{lost:.0%} of the optimizer's update was lost to rounding; {REMEDY}")
        return lost

    def _describe(self, lr: float) -> str:
        name = str(self._entries[0][0].dtype).removeprefix("torch.")
        if self._at_random:
            return f"{name} weights with stochastic rounding: updates are kept on average, with noise"
        lost = self._estimate_lost_fraction(lr)
        line = f"{name} weights: {lost:.0%} of an update of size lr={lr:g} is lost to rounding"
        return line if lost <= MAX_LOST else f"{line}; {REMEDY}"

    @torch.no_grad()
    def _estimate_lost_fraction(self, lr: float) -> float:
        """Lost fraction of updates +lr and -lr, rounded to nearest."""
        kept, count = 0.0, 0
        for param, _, places in self._entries:
            before = _take(param, places.to(_local(param).device))
            for update in (lr, -lr):
                kept += float(((before + update).to(param.dtype).float() - before).sum() / update)
                count += len(before)
        return 1.0 - kept / count

    @torch.no_grad()
    def _compute_expected(self) -> None:
        self._entries = [(p, number, places.to(_local(p).device)) for p, number, places in self._entries]
        self._expected = [self._compute_update(*entry) for entry in self._entries if entry[0].grad is not None]

    @torch.no_grad()
    def _compare(self) -> None:
        pairs = [(_take(param, places) - before, update) for param, places, before, update in self._expected]
        self._expected = []
        if pairs:
            kept = torch.stack([(moved * update).sum() for moved, update in pairs]).sum()
            self._measured = torch.stack([kept, torch.stack([update.square().sum() for _, update in pairs]).sum()])

    def _compute_update(self, param: Tensor, number: int, places: Tensor) -> tuple[Tensor, ...]:
        """Parameter, places, entries at these places, and AdamW's update of them in float32."""
        assert param.grad is not None
        before, gradient, state = _take(param, places), _take(param.grad, places), self._optimizer.state[param]
        group = self._optimizer.param_groups[number]
        beta1, beta2 = group["betas"]
        lr = torch.as_tensor(group["lr"]).to(before.device)
        step = torch.as_tensor(state.get("step", 0.0)).to(before.device) + 1
        mean, square = (1 - beta1) * gradient, (1 - beta2) * gradient.square()
        if "exp_avg" in state:
            mean = mean + beta1 * _take(state["exp_avg"], places)
            square = square + beta2 * _take(state["exp_avg_sq"], places)
        ratio = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        return param, places, before, -lr * (ratio + group["weight_decay"] * before)


def _draw_places(sizes: Sequence[int], count: int, seed: int) -> list[Tensor]:
    """Draw ``count`` places from tensors of these sizes, by tensor; deterministic for a seed."""
    total = sum(sizes)
    if total == 0:
        return [torch.empty(0, dtype=torch.long) for _ in sizes]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(total, (count,), generator=generator).sort().values
    ends = torch.tensor(sizes).cumsum(0)
    counts = torch.searchsorted(drawn, ends).diff(prepend=torch.zeros(1, dtype=torch.long))
    starts = (ends - torch.tensor(sizes)).tolist()
    return [part - start for part, start in zip(drawn.split(counts.tolist()), starts, strict=True)]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """Entries of the flattened tensor in float32; of torchao's 8-bit tensors, dequantize only these entries."""
    local: Any = _local(tensor)
    if not hasattr(local, "qmap"):
        return local.reshape(-1)[places].float()
    values = local.qmap[local.codes.reshape(-1)[places].int()]
    return values * local.scale[places // local.block_size]
