"""AdamW as a run's settings name it, and how much of its updates survives where weights are rounded.

A weight in bfloat16 has 8 significant bits: an update below 1/512 to 1/256 of the weight is rounded away, which at a
learning rate of 1e-5 is the fate of nearly all of them. Weights in float32 keep every update; torchao's AdamW with
8-bit moments makes room for them.
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

from sdpo.config import OptimConfig
from sdpo.errors import UserError

NUM_SAMPLED = 65_536
# Above this share of an update lost, training is another one than the learning rate says.
MOST_LOST = 0.25
REMEDY = (
    "use model.dtype=float32 with learner.autocast=true and optim.name=adamw_8bit, or optim.stochastic_rounding=true"
)
_HALF = (torch.bfloat16, torch.float16)


def choose_optimizer(config: OptimConfig) -> tuple[str, str, dict[str, Any]]:
    """Module, class and further arguments, as verl's settings of an optimizer have them."""
    if config.name == "adamw_8bit":
        return "torchao.optim", "AdamW8bit", {"bf16_stochastic_round": config.stochastic_rounding}
    if config.stochastic_rounding:
        return "torchao.optim", "_AdamW", {"bf16_stochastic_round": True}
    return "torch.optim", "AdamW", {}


def require_optimizer(module: str, setting: str) -> None:
    """Refuse an optimizer whose package is missing.

    Raises:
        UserError: it is.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{setting}: {module} cannot be imported ({error}); pip install 'sdpo[torchao]'") from error


def build_optimizer(params: Sequence[torch.nn.Parameter], config: OptimConfig) -> Optimizer:
    """The optimizer of these parameters; those without gradients have no part in it.

    Raises:
        UserError: torchao, which the settings ask for, is missing.
    """
    module, name, arguments = choose_optimizer(config)
    require_optimizer(module, f"optim.name={config.name}" if config.name != "adamw" else "optim.stochastic_rounding")
    if module == "torch.optim" and all(param.is_cuda for param in params):
        arguments = {"fused": True}  # torch's choice, one operation for many tensors, copies all of the moments
    optimizer: Optimizer = getattr(importlib.import_module(module), name)(
        params, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, **arguments
    )
    return optimizer


def compile_on_gpus_only(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The context of a step of torchao's: it compiles its update, which on a CPU takes minutes and wins nothing."""
    return contextlib.nullcontext() if device_type == "cuda" else torch.compiler.set_stance("force_eager")


class UpdateRounding:
    """Measures, at each step of an AdamW, what share of the update rounding took away.

    On ``NUM_SAMPLED`` entries of the weights in half precision, drawn once: with u the update that AdamW asks for
    and d what the weights moved by, 1 - <d, u> / <u, u>. It is 0 for float32, on average also where weights are rounded
    at random, and 1 where nothing moved. Where parameters are shards (DTensor), those of this rank are sampled.

    Args:
        optimizer: torch's AdamW or one of torchao's, its learning rate still the peak.
        tell: is told what to expect before the first update, and once if more than ``MOST_LOST`` was lost. Not called
            where all weights that learn are float32: nothing is lost, and nothing measured.
        seed: of the entries.
    """

    def __init__(self, optimizer: Optimizer, tell: Callable[[str], None], seed: int = 0) -> None:
        self._optimizer = optimizer
        self._tell = tell
        self._at_random = bool(getattr(optimizer, "bf16_stochastic_round", False))
        half = [
            (param, number)  # of its group: the groups themselves are others once a state was loaded
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
        self._asked: list[tuple[Tensor, ...]] = []
        self._measured: Tensor | None = None
        self._has_warned = False
        if self._entries:
            tell(self._describe(float(optimizer.param_groups[0]["lr"])))
            optimizer.register_step_pre_hook(lambda *_: self._remember())
            optimizer.register_step_post_hook(lambda *_: self._compare())

    def take(self) -> float | None:
        """The share lost in the last step, once; None if there was no step, or its learning rate was 0."""
        measured, self._measured = self._measured, None
        if measured is None:
            return None
        kept, asked = measured.tolist()
        if asked == 0:
            return None
        lost = 1.0 - kept / asked
        if lost > MOST_LOST and not self._at_random and not self._has_warned:
            self._has_warned = True
            self._tell(f"{lost:.0%} of the optimizer's update was lost to rounding; {REMEDY}")
        return lost

    def _describe(self, lr: float) -> str:
        name = str(self._entries[0][0].dtype).removeprefix("torch.")
        if self._at_random:
            return f"{name} weights are rounded at random: an update is kept on average, with noise"
        lost = self._estimate_lost_share(lr)
        line = f"{name} weights: {lost:.0%} of an update as large as the learning rate of {lr:g} is lost to rounding"
        return line if lost <= MOST_LOST else f"{line}; {REMEDY}"

    @torch.no_grad()
    def _estimate_lost_share(self, lr: float) -> float:
        """Of an update of that size, up or down, rounded to nearest."""
        kept, count = 0.0, 0
        for param, _, places in self._entries:
            before = _take(param, places.to(_local(param).device))
            for update in (lr, -lr):
                kept += float(((before + update).to(param.dtype).float() - before).sum() / update)
                count += len(before)
        return 1.0 - kept / count

    @torch.no_grad()
    def _remember(self) -> None:
        self._entries = [(p, number, places.to(_local(p).device)) for p, number, places in self._entries]
        self._asked = [self._compute_update(*entry) for entry in self._entries if entry[0].grad is not None]

    @torch.no_grad()
    def _compare(self) -> None:
        pairs = [(_take(param, places) - before, update) for param, places, before, update in self._asked]
        self._asked = []
        if pairs:
            kept = torch.stack([(moved * update).sum() for moved, update in pairs]).sum()
            self._measured = torch.stack([kept, torch.stack([update.square().sum() for _, update in pairs]).sum()])

    def _compute_update(self, param: Tensor, number: int, places: Tensor) -> tuple[Tensor, ...]:
        """Parameter, places, its entries and what AdamW's step, in float32, adds to them."""
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
    """``count`` places of so many in all, by tensor, the same for the same seed."""
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
    """Entries of the flattened tensor, in float32; of one that torchao keeps in 8 bits without making it whole."""
    local: Any = _local(tensor)
    if not hasattr(local, "qmap"):
        return local.reshape(-1)[places].float()
    values = local.qmap[local.codes.reshape(-1)[places].int()]
    return values * local.scale[places // local.block_size]
