"""Gradient checkpointing computes the same as evaluation, and still recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sdpo.errors import ConfigError
from sdpo.models.forward import compute_hidden, pad_sequences
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.training_mode import check_training_mode, set_training_mode

IDS = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    **IDS,
}
OPT = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **IDS}
MODELS: dict[str, Callable[[], Any]] = {
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, attention_dropout=0.5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, attention_dropout=0.5)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, **IDS)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=16, layerdrop=0.5)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, router_jitter_noise=0.5)),
}


@pytest.mark.parametrize("family", MODELS)
def test_passes_with_recomputation_are_those_of_evaluation(family: str) -> None:
    torch.manual_seed(0)
    model = MODELS[family]()
    row = pad_sequences([TokenPrompt([3, 4, 5])], [[6, 7, 8]], 0, torch.device("cpu"))

    def differentiate(checkpoints: bool) -> list[torch.Tensor]:
        set_training_mode(model, checkpoints=checkpoints)
        hidden = compute_hidden(model, row)
        params = [param for param in model.parameters() if param.requires_grad]
        grads = torch.autograd.grad(hidden.square().sum(), params, allow_unused=True)
        return [hidden.detach(), *(grad for grad in grads if grad is not None)]

    expected = differentiate(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[bool] = []
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 2)
    norm = next(module for module in layers[0].modules() if "norm" in type(module).__name__.lower())
    norm.register_forward_pre_hook(lambda *_: calls.append(True))
    for actual, wanted in zip(differentiate(True), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)
    assert len(calls) == 2, "the layer runs again in the backward pass"
    check_training_mode(model)


def test_model_with_random_numbers_in_training_is_refused() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model.gradient_checkpointing_enable()

    def disturb(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.randn_like(output) * model.model.layers[1].training

    model.model.layers[0].mlp.register_forward_hook(disturb)
    with pytest.raises(ConfigError, match=r"actor\.gradient_checkpointing=true: Qwen2ForCausalLM draws random numbers"):
        check_training_mode(model)
    assert model.training
