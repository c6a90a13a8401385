"""Models that do not separate the sequences of a packed row are refused on verl."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from sdpo.errors import ConfigError
from sdpo.verl_backend.worker.packed_rows import check_packed_rows

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings)).float()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3.0 if param.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_model_with_positions_passes(name: str) -> None:
    model = build(name, **SHAPE)
    check_packed_rows(model)
    assert model.training
    check_packed_rows(model.bfloat16())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
        ("Lfm2", {**SHAPE, "layer_types": ["conv", "full_attention"]}),
        ("OPT", {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)
def test_model_that_mixes_sequences_is_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=rf"use_remove_padding=true: {name}ForCausalLM does not separate .*; set it to f"
    ):
        check_packed_rows(build(name, **settings))


def test_model_without_weights_is_not_checked() -> None:
    check_packed_rows(build("Llama", **SHAPE).to("meta"))
