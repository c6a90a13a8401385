"""Test at startup whether a model supports packed rows, and estimate the cost of its forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from sdpo.models.forward import compute_hidden, compute_positions
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.multimodal.vision_tower import VisionAdapter, get_vision_tower_parameters
from sdpo.models.packing.attention import NAME, attend, has_varlen_kernel
from sdpo.models.packing.attention_plan import AttentionCostModel, PrefixGroup
from sdpo.models.packing.layout import pack_sequences

# Overhead of one attention call in one layer (launch, gather, scatter; forward and backward), expressed in FLOPs of a
# forward pass. CPU: 60 microseconds measured, one thread. Others: estimate, 100 microseconds at 300 TFLOP/s.
CALL_ON_CPU, CALL_ELSEWHERE = 5e6, 1e10
PROBE = f"{NAME}_probe"


def enable_packing(
    model: nn.Module, vision: VisionAdapter | None = None, *, autocast: bool = False
) -> AttentionCostModel | None:
    """Enable packed rows in a transformers model; returns the cost of its forward pass, or None if unsupported.

    Supported models use full causal attention in every layer and pass the layout on to it, as most models do. Sliding
    windows, recurrent layers and bidirectional attention among image tokens are not supported. Models with another
    attention kernel than SDPA keep it and read padded rows.

    Supported models get the packed attention, which is SDPA for rows that are not packed.

    Args:
        autocast: whether forward passes run in bfloat16 autocast.
    """
    transformer: Any = model
    config = transformer.config.get_text_config()
    if config._attn_implementation != "sdpa" or (vision is not None and vision.marks_images):
        return None
    device = next(model.parameters()).device
    cost: AttentionCostModel | None = None
    group, prompts = PrefixGroup(2, (3, 4)), [TokenPrompt([0, 1]), TokenPrompt([0, 1])]
    layers: list[nn.Module] = []

    def probe(module: nn.Module, *states: Any, **settings: Any) -> Any:
        layers.append(module)
        return attend(module, *states, **settings)

    AttentionInterface.register(PROBE, probe)
    config._attn_implementation = PROBE
    was_training = model.training
    packs = False
    try:
        cost = measure_attention_cost(model, vision, autocast=autocast)
        row = pack_sequences([group], prompts, [[1], [0, 1]], compute_positions(prompts, 2, vision), cost, device)
        with torch.no_grad():
            compute_hidden(model.eval(), row)
        packs = len(layers) == config.num_hidden_layers
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that does not expect a packed row may raise anything
        pass
    finally:
        model.train(was_training)
        config._attn_implementation = NAME if packs else "sdpa"
    return cost if packs else None


def measure_attention_cost(
    model: nn.Module, vision: VisionAdapter | None = None, *, autocast: bool = False
) -> AttentionCostModel:
    """Estimate the cost of a model's forward pass from its shape, device and data type."""
    transformer: Any = model
    config = transformer.config.get_text_config()
    outside = {id(param) for param in get_vision_tower_parameters(model)} if vision is not None else set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is transformer.get_output_embeddings():
            outside.add(id(module.weight))
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    matrices = [param for param in model.parameters() if param.dim() > 1 and id(param) not in outside]
    device, dtype = matrices[0].device, torch.bfloat16 if autocast else matrices[0].dtype
    call = CALL_ON_CPU if device.type == "cpu" else CALL_ELSEWHERE
    if has_varlen_kernel(device, dtype, head_size):
        call = 0.0  # a row takes one call, however many segments it has
    return AttentionCostModel(
        flops_per_token=2.0 * sum(param.numel() for param in matrices),
        flops_per_pair=4.0 * layers * heads * head_size,
        flops_per_call=layers * call,
    )
