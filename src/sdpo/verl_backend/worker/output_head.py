"""A forward pass that computes a function of the last hidden states in place of all logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdpo.errors import ConfigError
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.models.output_head import build_linear_head

Result = TypeVar("Result")


def compute_at_head(
    module: nn.Module, inputs: dict[str, Any], rows: Tensor | slice, compute: Callable[[LinearHead], Result]
) -> Result:
    """Run the model and return ``compute`` of the logits' ``LinearHead`` for some rows.

    ``compute`` runs inside the output layer, because FSDP2 has gathered the layer's weight there. The patched layer
    returns two dummy logits per pass: a constant 1, which reveals scaling or soft-capping that ``build_linear_head``
    does not know, and a 0 that carries the result's graph, so that FSDP2's backward hooks at the model's output run.

    Args:
        module: a transformers model, sharded or not.
        inputs: of its forward pass. If ``attention_mask`` is None, sequences are packed, [1, tokens]; otherwise
            [B, L], from which padding is removed.
        rows: of the packed hidden states.
        compute: must copy the weight to keep it. If it returns a scalar with a graph, so does this function.

    Raises:
        ConfigError: the output layer is not a plain linear layer, or the model transforms logits in an unknown way.
    """
    transformer: Any = module
    head, mask = transformer.get_output_embeddings(), inputs["attention_mask"]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ConfigError(
            f"actor_rollout_ref.model.path: the output layer of {_name(module)} is not a plain linear layer, which "
            "actor_rollout_ref.actor.policy_loss.loss_mode=sdpo needs; use another model"
        )
    results: list[Result] = []

    def patched_forward(hidden: Tensor) -> Tensor:
        packed = hidden[0] if mask is None else hidden[mask.bool()]
        results.append(compute(build_linear_head(module, packed[rows].to(head.weight.dtype))))
        graph = _get_graph(results[-1])
        one = torch.ones(1, 1, device=hidden.device)
        return torch.stack([one, 0.0 * one if graph is None else (graph - graph.detach()).expand(1, 1)], dim=-1)

    head.forward = patched_forward  # type: ignore[assignment, method-assign]
    try:
        logits = module(**inputs, use_cache=False).logits
    finally:
        del head.forward
    known = build_linear_head(module, torch.ones(1, head.in_features))
    scale = float(known.hidden[0, 0])
    one = scale if known.softcap is None else known.softcap * math.tanh(scale / known.softcap)
    if len(results) != 1 or not math.isclose(float(logits[0, 0, 0].detach()), one, rel_tol=0.01):
        raise ConfigError(
            f"actor_rollout_ref.model.path: {_name(module)} transforms its logits in a way that "
            "actor_rollout_ref.actor.policy_loss.loss_mode=sdpo does not support; use another model"
        )
    result: Any = results[0]
    return result if _get_graph(result) is None else result.detach() + logits[0, 0, 1] / scale


def _get_graph(result: Any) -> Tensor | None:
    return result if isinstance(result, Tensor) and result.requires_grad else None


def _name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")
