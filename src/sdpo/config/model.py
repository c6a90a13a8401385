"""Settings of the model and of LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdpo.config.field import MISSING, Section, setting
from sdpo.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig(Section):
    section: ClassVar[str] = "model"

    path: str = setting(
        MISSING, "Folder or hub name of the model, in the Hugging Face format.", is_path=True, fixed=True
    )
    dtype: str = setting("float32", "Data type of the student's weights.", choices=["float32", "bfloat16"], fixed=True)
    attn_implementation: str = setting(
        "sdpa", "Attention kernel of transformers.", choices=["sdpa", "eager", "flash_attention_2"]
    )
    trust_remote_code: bool = setting(False, "Run Python code that the model's folder contains.")


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters; all other weights, a vision tower's included, are frozen."""

    section: ClassVar[str] = "lora"

    rank: int = setting(0, "Rank of the adapters; 0 trains all weights without adapters.", ge=0, fixed=True)
    alpha: int | None = setting(
        None,
        "Scale of an adapter's output, which is multiplied by alpha / rank; null: twice the rank.",
        ge=1,
        fixed=True,
    )
    target_modules: list[str] = setting(
        [],
        "Linear layers of the language model that get adapters, by the last part of their names (q_proj); empty: all "
        "linear layers but the output layer.",
        fixed=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "target_modules"):
            if self.rank == 0 and getattr(self, name):
                raise ConfigError(
                    f"lora.{name}={getattr(self, name)}: has no effect with lora.rank=0; set lora.rank or remove it"
                )

    @property
    def scale_numerator(self) -> int:
        """``alpha``, or its default of twice the rank."""
        return self.alpha or 2 * self.rank
