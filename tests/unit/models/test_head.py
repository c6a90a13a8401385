"""Logits from hidden states against a model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from sdpo.errors import UserError
from sdpo.models.head import build_lazy_logits, compute_dense_logits, measure_logit_scale

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEADS: dict[str, Callable[[], Any]] = {
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=1.5)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "with a bias": lambda: GPTJForCausalLM(GPTJConfig(vocab_size=40, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = HEADS[name]().eval()
    with torch.no_grad():
        for param in model.get_output_embeddings().parameters():
            param.normal_()
    return model


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_the_model_s_own(name: str) -> None:
    model = build(name)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        expected = model(input_ids=ids).logits[0]
    assert measure_logit_scale(model) == 1.0
    torch.testing.assert_close(compute_dense_logits(build_lazy_logits(model, hidden)), expected, atol=1e-5, rtol=1e-5)
    half = compute_dense_logits(build_lazy_logits(model, hidden, 0.5))
    torch.testing.assert_close(half, 0.5 * expected, atol=1e-5, rtol=1e-5)


def change_logits(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    run = model.forward

    def forward(**inputs: Any) -> Any:
        output = run(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_no_setting_names_is_measured(dtype: torch.dtype) -> None:
    model = change_logits(build("multiplied").to(dtype).train(), lambda logits: logits * -2.5)
    assert measure_logit_scale(model) == pytest.approx(-2.5, rel=1e-5 if dtype == torch.float32 else 5e-3)
    assert model.training


@pytest.mark.parametrize("change", [torch.sigmoid, lambda logits: logits + 1.0, lambda logits: logits * float("nan")])
def test_anything_else_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = change_logits(build("divided"), change)
    with pytest.raises(UserError, match="GraniteForCausalLM makes logits of its hidden states in a way that is not"):
        measure_logit_scale(model)
