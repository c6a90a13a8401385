"""Inputs and implementations for the loss benchmarks: the four products, ours, official formula, TRL, Liger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "Jensen-Shannon": {"alpha": 0.5},
    "forward KL": {"alpha": 0.0},
    "reverse KL": {"alpha": 1.0},
    "top 100 with tail": {"alpha": 0.5, "distillation_topk": 100},
    "sampled token": {"alpha": 1.0, "full_logit_distillation": False},
}


@dataclass(frozen=True)
class Case:
    """One line at one size."""

    line: str
    setting: str
    tokens: int
    dtype: str
    hidden: int
    vocab: int
    device: str
    repeats: int
    memory_bytes: int


@dataclass(frozen=True)
class Inputs:
    """Inputs for N tokens; the student's hidden states and output layer are autograd leaves."""

    hidden: Any  # [N, H]
    head: Any  # [V, H]
    teacher_hidden: Any  # [N, H]
    teacher_head: Any  # [V, H]
    ids: Any  # [N]
    mask: Any  # [N]


def build_inputs(case: Case) -> Inputs:
    import torch

    torch.manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device=case.device, dtype=getattr(torch, case.dtype))

    n, h, v = case.tokens, case.hidden, case.vocab
    scale = h**-0.5  # applied in place, so that the peak does not include freed memory
    return Inputs(
        draw(n, h).requires_grad_(),
        draw(v, h).mul_(scale).requires_grad_(),
        draw(n, h),
        draw(v, h).mul_(scale),
        torch.randint(v, (n,), device=case.device),
        torch.ones(n, device=case.device),
    )


def run_floor(chunk: int, inputs: Inputs) -> None:
    import torch

    hidden, head = inputs.hidden.detach(), inputs.head.detach()
    with torch.no_grad():
        grad_head = torch.zeros_like(head)
        grad_hidden = torch.empty_like(hidden)
        for student, teacher, out in zip(
            hidden.split(chunk), inputs.teacher_hidden.split(chunk), grad_hidden.split(chunk), strict=True
        ):
            logits = torch.mm(student, head.T)
            torch.mm(teacher, inputs.teacher_head.T, out=logits)
            torch.mm(logits, head, out=out)
            grad_head.addmm_(logits.T, student)


def run_floor_by_onednn(chunk: int, inputs: Inputs) -> None:
    import torch

    from sdpo.kernels.cpu.onednn import PIECE_ROWS, multiply, multiply_into

    hidden, head = inputs.hidden.detach(), inputs.head.detach()
    with torch.no_grad():
        grad_head = torch.zeros_like(head)
        grad_hidden = torch.zeros_like(hidden)
        logits = torch.empty(chunk, len(head))
        for student, teacher, out in zip(
            hidden.split(chunk), inputs.teacher_hidden.split(chunk), grad_hidden.split(chunk), strict=True
        ):
            chunk_logits = logits[: len(student)]
            multiply_into(chunk_logits, student, head)
            multiply_into(chunk_logits, teacher, inputs.teacher_head)
            for columns, rows, grad_rows in zip(
                chunk_logits.split(PIECE_ROWS, dim=1), head.split(PIECE_ROWS), grad_head.split(PIECE_ROWS), strict=True
            ):
                out += multiply(columns, rows.T)
                grad_rows += multiply(columns.T, student.T)


def compute_ours(settings: dict[str, Any], x: Inputs) -> Any:
    from sdpo import SelfDistillationConfig, fused_self_distillation_loss

    config = SelfDistillationConfig(**settings, is_clip=None)
    loss, _ = fused_self_distillation_loss(x.hidden, x.head, x.teacher_hidden, x.teacher_head, x.ids, x.mask, config)
    return loss


def compute_logits(x: Inputs) -> tuple[Any, Any]:
    """Logits [1, N, V] of student and teacher, in float32."""
    import torch

    student = (x.hidden[None] @ x.head.T).float()
    with torch.no_grad():
        teacher = (x.teacher_hidden[None] @ x.teacher_head.T).float()
    return student, teacher


def compute_official(settings: dict[str, Any], x: Inputs) -> Any:
    import torch
    from torch.nn.functional import kl_div

    alpha, topk = settings["alpha"], settings.get("distillation_topk")
    student, teacher = compute_logits(x)
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    if not settings.get("full_logit_distillation", True):
        student, teacher = (side.gather(-1, x.ids[None, :, None])[..., 0] for side in (student, teacher))
        token_losses = (student - teacher).detach() * student
        return (token_losses * x.mask).sum() / x.mask.sum()
    if topk is not None:
        student, topk_ids = student.topk(topk, dim=-1)
        teacher = teacher.gather(-1, topk_ids)
        student, teacher = (torch.cat([side, _compute_tail(side)], dim=-1) for side in (student, teacher))
    if alpha == 0.0:
        token_losses = kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    elif alpha == 1.0:
        token_losses = kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    else:
        weights = torch.tensor([1 - alpha, alpha], device=student.device).log()
        mixture = torch.logsumexp(torch.stack([student + weights[0], teacher + weights[1]]), dim=0)
        student_kl, teacher_kl = (
            kl_div(mixture, side, reduction="none", log_target=True).sum(-1) for side in (student, teacher)
        )
        token_losses = (1 - alpha) * student_kl + alpha * teacher_kl
    return (token_losses * x.mask).sum() / x.mask.sum()


def _compute_tail(topk_log_probs: Any) -> Any:
    """Logarithm of the probability outside the top k: log(1 - sum of the kept probabilities)."""
    import torch

    return torch.log(-torch.expm1(torch.logsumexp(topk_log_probs, dim=-1, keepdim=True).clamp(max=-1e-7)))


def compute_trl(settings: dict[str, Any], x: Inputs) -> Any:
    from trl.experimental.sdpo import loss_utils

    temperature = 1.0
    # TRL's trainer divides by the temperature, also by a temperature of 1.
    student, teacher = (side / temperature for side in compute_logits(x))
    if not settings.get("full_logit_distillation", True):
        token_losses = loss_utils.compute_sampled_token_self_distillation_loss(
            student, teacher, x.ids[None], distillation_alpha=settings["alpha"]
        )
    elif "distillation_topk" in settings:
        token_losses = loss_utils.compute_topk_self_distillation_loss(
            student,
            teacher,
            distillation_topk=settings["distillation_topk"],
            distillation_alpha=settings["alpha"],
            distillation_add_tail=True,
        )
    else:
        token_losses = loss_utils.compute_full_logit_self_distillation_loss(
            student, teacher, distillation_alpha=settings["alpha"]
        )
    return ((token_losses * x.mask).sum(-1) / x.mask.sum(-1)).mean()


def compute_liger(compiled: bool, settings: dict[str, Any], x: Inputs) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=settings["alpha"], compiled=compiled
    )
    return loss(x.hidden, x.head, x.teacher_hidden, x.teacher_head, x.ids)


COMPUTE: dict[str, Callable[[dict[str, Any], Inputs], Any]] = {
    "ours": compute_ours,
    "official": compute_official,
    "trl": compute_trl,
    "liger": partial(compute_liger, True),
    "liger, eager": partial(compute_liger, False),
}
