"""Loss terms for KL to the reference model and for entropy, over all response tokens.

    loss = blend of GRPO and SDPO + kl_loss_coef * KL(student || reference) - entropy_coeff * H(student)

Both are aggregated like the policy loss, over all response tokens, distilled or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Bounds of the log-ratio before exp, and of the estimate, in ``low_var_kl``: verl's.
LOG_RATIO_MAX = 20.0
LOW_VAR_KL_MAX = 10.0
# verl's short names of the estimators.
SYNONYMS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}


@dataclass(frozen=True)
class Regularization:
    """Weights of the two terms.

    Attributes:
        kl_loss_coef: weight of the KL divergence, >= 0; None: no reference model, no KL.
        kl_loss_type: estimator, one of ``sdpo.config.actor.KL_LOSS_TYPES``.
        entropy_coeff: weight of the entropy, which is subtracted; 0: no term.
    """

    kl_loss_coef: float | None
    kl_loss_type: str
    entropy_coeff: float


def estimate_kl(
    log_probs: Float[Tensor, "*axes"], ref_log_probs: Float[Tensor, "*axes"], kl_loss_type: str
) -> Float[Tensor, "*axes"]:
    """Estimate KL(student || reference) of each token in nats, from the log-probabilities of the sampled token.

    Args:
        log_probs: with gradient.
        ref_log_probs: never receives a gradient.
        kl_loss_type: with d = log student - log reference, ``kl`` (``k1``): d; ``abs``: |d|; ``mse`` (``k2``): d^2 / 2;
            ``low_var_kl`` (``k3``): exp(-d) - 1 + d. With a trailing ``+``: the same value,
            with the gradient of ``mse``, which in expectation is the KL divergence's.

    Raises:
        ValueError: unknown type.

    Source: verl ``kl_penalty``; the estimators: http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = log_probs - ref_log_probs.detach()
    name = kl_loss_type.removesuffix("+")
    value = _estimate(log_ratio, SYNONYMS.get(name, name))
    if name == kl_loss_type:
        return value
    surrogate = 0.5 * log_ratio.square()
    return surrogate - surrogate.detach() + value.detach()


def _estimate(log_ratio: Float[Tensor, "*axes"], name: str) -> Float[Tensor, "*axes"]:
    if name == "kl":
        return log_ratio
    if name == "abs":
        return log_ratio.abs()
    if name == "mse":
        return 0.5 * log_ratio.square()
    if name == "low_var_kl":
        log_ratio = log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
        return torch.clamp(torch.exp(-log_ratio) - 1.0 + log_ratio, max=LOW_VAR_KL_MAX)
    raise ValueError(f"unknown kl_loss_type {name!r}")
