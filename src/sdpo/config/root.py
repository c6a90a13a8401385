"""The complete configuration: all sections, the settings of the run, and checks across sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sdpo.config.actor import ActorConfig, OptimConfig
from sdpo.config.data import DataConfig, RewardConfig
from sdpo.config.field import MISSING, Section, setting
from sdpo.config.model import LoraConfig, ModelConfig
from sdpo.config.monitoring import EvalConfig, HealthConfig, TrackingConfig
from sdpo.config.rollout import RolloutConfig, RolloutCorrectionConfig
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import ConfigError

MAX_ROLLOUTS = 1_000_000
# A step without gradient multiplies a moment by beta; bfloat16 rounds relative changes below 2^-8 to zero.
MAX_BETA2_IN_BFLOAT16 = 1 - 2**-8


UNWEIGHTED_SAMPLES = (
    "rollout_correction.rollout_is=none with max_staleness=1: samples of the policy before the last update are trained "
    "on without importance weights; set it to token or sequence"
)


@dataclass(frozen=True)
class SDPOConfig(Section):
    """All settings of a run: the content of one YAML file.

    Keys in ``verl`` are keys of Hydra's command line, including ``+`` and ``++``, as in verl's documentation. Nested
    sections are flattened (``flatten_keys``), because ``verl.trainer.nnodes=2`` on the command line is parsed into
    sections.
    """

    seed: int = setting(0, "Random seed of data order, sampling and initialization.", ge=0, fixed=True)
    output_dir: str = setting(MISSING, "Folder for everything that the run writes.", is_path=True)
    max_steps: int = setting(100, "Training steps; each samples one batch of rollouts.", ge=1, le=1_000_000_000)
    eval_steps: int = setting(10, "Steps between validations; 0: only before the first and after the last step.", ge=0)
    save_steps: int = setting(0, "Steps between checkpoints; 0: only after the last step.", ge=0)
    save_total_limit: int = setting(2, "Number of most recent checkpoints to keep.", ge=1)
    save_best_limit: int = setting(
        1, "Also keep this many checkpoints with the best validation accuracy (only evaluated steps qualify).", ge=0
    )
    resume_mode: str = setting(
        "disable",
        "How to treat an existing run in output_dir. disable: move it aside; auto: resume from the latest complete "
        "checkpoint, if any; required: resume, or fail without a checkpoint.",
        choices=["disable", "auto", "required"],
    )
    shutdown_timeout: float = setting(
        20.0, "Seconds that a stopped run (Ctrl-C, SIGTERM) waits for rollouts in flight before it saves.", ge=0
    )
    max_staleness: int = setting(
        0,
        "Maximum number of updates between the sampling and the trained policy. 0: sample, then train. 1: sample "
        "batch k+1 in another process while batch k is trained.",
        ge=0,
        le=1,
        fixed=True,
    )
    verl: dict[str, Any] = setting(
        {},
        "Settings of verl by their dotted Hydra keys (trainer.nnodes: 2); they override what the other settings imply. "
        "The native trainer ignores them.",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    self_distillation: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.train_batch_size * self.rollout.n > MAX_ROLLOUTS:
            raise ConfigError(
                f"data.train_batch_size={self.data.train_batch_size}: with rollout.n={self.rollout.n} more than "
                f"{MAX_ROLLOUTS} rollouts per step; lower one of them"
            )
        self.health.check_actions(self.self_distillation)
        mini = self.actor.mini_batch_size
        if mini is not None and self.data.train_batch_size % mini:
            raise ConfigError(
                f"actor.mini_batch_size={mini}: must divide data.train_batch_size={self.data.train_batch_size}"
            )
        self._check_rounding()
        if self.lora.rank and self.actor.freeze_vision_tower:
            raise ConfigError(
                f"actor.freeze_vision_tower=true: has no effect with lora.rank={self.lora.rank}, which never trains "
                "the vision tower; remove it"
            )

    def _check_rounding(self) -> None:
        """Refuse stochastic rounding of float32 weights, and second moments that cannot decay in bfloat16."""
        half = self.model.dtype == "bfloat16" and self.lora.rank == 0
        if self.optim.stochastic_rounding and not half:
            what = f"lora.rank={self.lora.rank}" if self.lora.rank else f"model.dtype={self.model.dtype}"
            raise ConfigError(
                f"optim.stochastic_rounding=true: has no effect with {what}, where trained weights are float32; "
                "remove it"
            )
        beta1, beta2 = self.optim.betas
        if half and beta2 > MAX_BETA2_IN_BFLOAT16:
            raise ConfigError(
                f"optim.betas=[{beta1},{beta2}] with model.dtype=bfloat16: second moments in bfloat16 would never "
                f"decay; set optim.betas=[{beta1},0.95] (the second at most {MAX_BETA2_IN_BFLOAT16:.3f}) or "
                "model.dtype=float32"
            )

    @property
    def sampling_dtype(self) -> str:
        """Data type of the sampler's weights, which is the data type of the actor's computations."""
        return "bfloat16" if self.actor.autocast else self.model.dtype

    @property
    def trains_without_weights(self) -> bool:
        """Whether samples of an earlier policy have no importance weights; see ``UNWEIGHTED_SAMPLES``."""
        return self.max_staleness > 0 and self.rollout_correction.rollout_is == "none"

    @property
    def trains_vision(self) -> bool:
        """Whether a vision tower would be trained."""
        return not self.actor.freeze_vision_tower and self.lora.rank == 0

    @property
    def needs_initial(self) -> bool:
        """Whether the run needs a copy of the initial model, as the reference model or as a later teacher."""
        teacher = self.self_distillation
        may_become_teacher = self.health.may_freeze and teacher.distills and teacher.teacher_regularization == "live"
        return may_become_teacher or self.health.ref_kl_interval > 0 or self.actor.kl_loss_coef > 0

    @property
    def teacher_stays_initial(self) -> bool:
        """Whether the teacher's weights are the initial model's for the whole run."""
        teacher = self.self_distillation
        return teacher.distills and teacher.teacher_regularization in ("frozen", "trust-region")

    def get(self, key: str) -> Any:
        """Return the value of a setting by its dotted key."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

    def find_changes(self, earlier: SDPOConfig) -> dict[str, tuple[Any, Any]]:
        """Settings that differ, by dotted key, with the earlier and the present value."""
        values = {key: (earlier.get(key), self.get(key)) for key, _ in iterate_settings()}
        return {key: (old, new) for key, (old, new) in values.items() if old != new}


def iterate_settings(
    section: type[Section] = SDPOConfig, prefix: str = ""
) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Iterate over all settings as (dotted key, dataclass field), in order of declaration."""
    defaults = section()
    for f in dataclasses.fields(section):
        value = getattr(defaults, f.name)
        if isinstance(value, Section):
            yield from iterate_settings(type(value), f"{f.name}.")
        else:
            yield prefix + f.name, f
