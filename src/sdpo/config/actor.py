"""Settings of the student's updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdpo.config.field import Section, setting
from sdpo.errors import ConfigError

# verl's names; with + the gradient is that of another estimator (``sdpo.algorithm.regularization``).
KL_LOSS_TYPES = tuple(f"{name}{s}" for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3") for s in ("", "+"))


@dataclass(frozen=True)
class ActorConfig(Section):
    section: ClassVar[str] = "actor"

    device: str = setting("auto", "Device that trains student and teacher: auto, cpu, cuda, cuda:1, mps, ...")
    mini_batch_size: int | None = setting(
        None, "Prompts per optimizer step; null: all prompts of the step.", ge=1, fixed=True
    )
    max_tokens_per_micro_batch: int = setting(
        4096,
        "Maximum number of tokens in a micro-batch: the student's, the teacher's, and padding for models that cannot "
        "read packed sequences. A longer sample is a micro-batch by itself.",
        ge=1,
    )
    loss_agg_mode: str = setting(
        "token-mean",
        "Aggregation of the token losses.",
        choices=["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"],
    )
    kl_loss_coef: float = setting(
        0.0,
        "Coefficient of KL(student || initial model) over all response tokens in the loss; 0 leaves the term out, and "
        "the copy of the initial model that it needs.",
        ge=0,
    )
    kl_loss_type: str = setting(
        "low_var_kl",
        "Estimator of KL(student || initial model) from the sampled tokens; a name that ends in + has the unbiased "
        "gradient of mse.",
        choices=KL_LOSS_TYPES,
    )
    entropy_coeff: float = setting(
        0.0,
        "Coefficient of the student's entropy over all response tokens, which is subtracted from the loss.",
        ge=0,
    )
    autocast: bool = setting(
        False, "Compute in bfloat16 autocast and sample in bfloat16; the weights keep model.dtype."
    )
    freeze_vision_tower: bool = setting(
        False, "Train the language model alone; the vision tower and its projector are frozen.", fixed=True
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    num_threads: int | None = setting(None, "CPU threads of the training process; null: torch's choice.", ge=1, le=1024)


@dataclass(frozen=True)
class OptimConfig(Section):
    section: ClassVar[str] = "optim"

    name: str = setting(
        "adamw",
        "Optimizer. adamw keeps moments in the data type of the weights; adamw_8bit (torchao) keeps them in 8 bits, a "
        "quarter of float32.",
        choices=["adamw", "adamw_8bit"],
        fixed=True,
    )
    stochastic_rounding: bool = setting(
        False,
        "Round bfloat16 weights up or down at random after an update (torchao), so that updates below their precision "
        "are applied on average.",
    )
    lr: float = setting(1e-5, "Peak learning rate of AdamW.", gt=0)
    weight_decay: float = setting(0.01, "Decoupled weight decay of AdamW.", ge=0)
    betas: list[float] = setting(
        [0.9, 0.999],
        "Decay rates of AdamW's first and second moment; moments in bfloat16 need a second rate of at most 0.996.",
        ge=0,
        le=1,
    )
    warmup_steps: int = setting(
        10, "Optimizer steps of linear learning rate warm-up; the first step has 1/warmup_steps of the peak.", ge=0
    )
    lr_scheduler_type: str = setting(
        "constant",
        "Learning rate schedule after the warm-up, over the whole run.",
        choices=["constant", "linear", "cosine"],
        fixed=True,
    )
    max_grad_norm: float = setting(1.0, "Global gradient norm above which gradients are scaled down.", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise ConfigError(f"optim.betas={list(self.betas)}: must be two numbers, as in [0.9, 0.999]")
