"""Linear warm-up of the learning rate that begins at the first update, for schedulers of transformers and verl."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def start_warm_up_at_first_update(scheduler: LambdaLR, num_steps: int) -> None:
    """Replace the factors 0, 1/W, ..., (W-1)/W of the first W updates by 1/W, 2/W, ..., 1.

    Schedulers of transformers and verl begin with 0, so that their first update changes nothing. Later factors stay.

    Args:
        scheduler: before its first step.
        num_steps: W; 0 for no warm-up.
    """

    def warm_up(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (step + 1) / num_steps if step < num_steps else factor(step)

    scheduler.lr_lambdas = [warm_up(factor) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [lr * factor(0) for lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    set_lr(scheduler.optimizer, scheduler._last_lr)


def set_lr(optimizer: Optimizer, lrs: Sequence[float | Tensor]) -> None:
    """Set the learning rate of each parameter group."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)  # torchao requires that the tensor stays the same object
        else:
            group["lr"] = lr
