"""Settings of sampling, and of the correction for sampling with another policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdpo.config.field import Section, setting


@dataclass(frozen=True)
class RolloutConfig(Section):
    section: ClassVar[str] = "rollout"

    engine: str = setting(
        "transformers",
        "Inference engine: transformers, or vllm, which is installed separately.",
        choices=["transformers", "vllm"],
    )
    device: str = setting("auto", "Device that samples: auto, cpu, cuda, cuda:0, mps, ...")
    n: int = setting(8, "Rollouts per prompt.", ge=1, fixed=True)
    temperature: float = setting(
        1.0, "Sampling temperature; the logits of student and teacher are divided by it too.", ge=1e-3
    )
    top_p: float = setting(
        1.0,
        "Nucleus sampling: draw from the most likely tokens up to this probability. Log-probabilities and importance "
        "weights are those of all tokens: that the others are not drawn is not corrected.",
        gt=0,
        le=1,
    )
    max_response_length: int = setting(1024, "Maximum length of a response, in tokens.", ge=1, le=10_000_000)
    max_num_seqs: int = setting(256, "Maximum number of sequences that are decoded at once.", ge=1)
    kv_cache_memory_gib: float = setting(4.0, "Size of vLLM's key-value cache, in GiB (engine vllm).", gt=0)
    num_threads: int | None = setting(
        None, "CPU threads of the sampling process (max_staleness 1); null: torch's choice.", ge=1, le=1024
    )
    max_restarts: int = setting(3, "Times per run that a killed sampling process is restarted (max_staleness 1).", ge=0)


@dataclass(frozen=True)
class RolloutCorrectionConfig(Section):
    """Importance sampling between the old policy and the policy that sampled."""

    section: ClassVar[str] = "rollout_correction"

    rollout_is: str = setting(
        "token",
        "Level of the importance weight old policy / sampling policy: token, sequence (the product over a response), "
        "or none.",
        choices=["none", "token", "sequence"],
    )
    rollout_is_threshold: float = setting(2.0, "Upper limit at which that weight is truncated.", gt=0)
