"""A forward pass whose logits are never made: where the output layer would make them, something else is computed."""

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
    """What ``compute`` makes of some rows of a model's logits.

    It runs inside the output layer, the one place where FSDP2 is sure to have that layer's weight gathered. For the
    model the layer says two numbers a pass instead of V a token: a 1, which comes out as this model's scaling or
    soft-cap would leave it and is compared with what ``build_linear_head`` knows of them; and a 0, to which the graph
    of the result is tied, for the backward pass has to enter where FSDP2 waits for it: at the model's output.

    Args:
        module: a model of transformers, in shards or not.
        inputs: of its forward pass. Where ``attention_mask`` is None, sequences are packed already, [1, tokens]; else
            [B, L], of which padding is left out and the rest packed.
        rows: which of the packed rows.
        compute: what it keeps of the output layer's weight must be copied; if it returns a scalar with a graph, so does
            this function.

    Raises:
        ConfigError: the output layer is no linear layer, or the model makes something unknown of what it says.
    """
    transformer: Any = module
    head, mask = transformer.get_output_embeddings(), inputs["attention_mask"]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ConfigError(
            f"actor_rollout_ref.model.path: the output layer of {_name(module)} is no plain linear layer, which "
            "actor_rollout_ref.actor.policy_loss.loss_mode=sdpo needs; take another model"
        )
    results: list[Result] = []

    def answer(hidden: Tensor) -> Tensor:
        packed = hidden[0] if mask is None else hidden[mask.bool()]
        results.append(compute(build_linear_head(module, packed[rows].to(head.weight.dtype))))
        graph = _get_graph(results[-1])
        one = torch.ones(1, 1, device=hidden.device)
        return torch.stack([one, 0.0 * one if graph is None else (graph - graph.detach()).expand(1, 1)], dim=-1)

    head.forward = answer  # type: ignore[assignment, method-assign]
    try:
        said = module(**inputs, use_cache=False).logits
    finally:
        del head.forward
    known = build_linear_head(module, torch.ones(1, 1))
    scale = float(known.hidden)
    one = scale if known.softcap is None else known.softcap * math.tanh(scale / known.softcap)
    if len(results) != 1 or not math.isclose(float(said[0, 0, 0].detach()), one, rel_tol=0.01):
        raise ConfigError(
            f"actor_rollout_ref.model.path: {_name(module)} makes logits of its hidden states in a way that "
            "actor_rollout_ref.actor.policy_loss.loss_mode=sdpo does not know; take another model"
        )
    result: Any = results[0]
    return result if _get_graph(result) is None else result.detach() + said[0, 0, 1] / scale


def _get_graph(result: Any) -> Tensor | None:
    return result if isinstance(result, Tensor) and result.requires_grad else None


def _name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")
