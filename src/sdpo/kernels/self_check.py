"""Compare the CUDA kernels with the portable form on six tokens, once per process.

On an untested GPU, driver or compiler the kernels may fail or compute wrong values. The run then uses the slower
portable form.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.regularization import Regularization
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels import chunked_log_probs, fused_linear_loss
from sdpo.kernels.chunked_log_probs import LinearHead

NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 6, 1030, 32
TOLERANCE = 0.05  # relative; bfloat16 leaves 0.01
# So large that the entropy's and the other terms' gradients are each at least an eighth of their sum.
ENTROPY_TERM = Regularization(kl_loss_coef=None, kl_loss_type="kl", entropy_coeff=3.0)


@cache
def kernels_agree(
    device: torch.device,
    dtype: torch.dtype,
    alpha: float = 0.0,
    full: bool = True,
    has_topk: bool = False,
    has_entropy: bool = False,
) -> bool:
    """Whether losses, gradients and scores agree; if not, logs one warning with the reason and the cost.

    Args:
        device, dtype: of hidden states.
        alpha, full, has_topk: settings that select the kernels.
        has_entropy: whether the loss has an entropy term, whose gradient is another variant of a kernel.
    """
    topk = 20 if has_topk else None
    config = SelfDistillationConfig(alpha=alpha, full_logit_distillation=full, distillation_topk=topk)
    try:
        fault = _compare(device, dtype, config, ENTROPY_TERM if has_entropy else None)
    except Exception as error:  # Triton has no compiler, a kernel does not compile or start
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if fault:
        warnings.warn(
            f"the loss's CUDA kernels are not used on {device}, {dtype}: {fault}; the portable form takes up to twenty "
            "times as long",
            stacklevel=2,
        )
    return not fault


def _compare(
    device: torch.device, dtype: torch.dtype, config: SelfDistillationConfig, regularization: Regularization | None
) -> str:
    from sdpo.kernels.cuda import fused_loss

    generator = torch.Generator().manual_seed(0)  # separate, so that the run's random numbers do not change

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    hidden, head, teacher_hidden = draw(NUM_TOKENS, HIDDEN_SIZE), draw(VOCAB_SIZE, HIDDEN_SIZE), draw(4, HIDDEN_SIZE)
    ids = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator).to(device)
    distilled = torch.tensor([True, False, True, True, False, True], device=device)
    ones = torch.ones(NUM_TOKENS, device=device)
    tokens = TokenBatch(
        ids,
        policy_weights=ones,
        advantages=ones - 0.5,
        distilled=distilled,
        distillation_weights=ones,
        regularization=regularization,
    )
    found = []
    for module, wide in ((fused_loss, dtype), (fused_linear_loss, torch.float32)):
        leaves = [x.detach().to(wide).requires_grad_() for x in (hidden, head)]
        student = LinearHead(leaves[0], leaves[1])
        teacher = LinearHead(teacher_hidden.to(wide), 0.5 * head.to(wide))
        with torch.enable_grad():
            outputs = module.fused_linear_sdpo_loss(student, [teacher], tokens, replace(config, policy_loss_weight=0.3))
            gradients = torch.autograd.grad(outputs.loss, leaves)
        scored = (fused_loss if module is fused_loss else chunked_log_probs).score_tokens(student.detach(), ids)
        found.append([outputs.token_losses, *gradients, *scored])
    for name, ours, expected in zip(
        ("loss", "gradient by hidden states", "gradient by head", "log-probability", "entropy"), *found, strict=True
    ):
        error = float((ours.detach().float() - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            return f"its {name} differs by {error:.1e} from the portable form's"
    return ""
