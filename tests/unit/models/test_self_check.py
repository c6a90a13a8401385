"""Hybrid and state-space models are sampled from and read exactly, or refused in one line before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdpo.errors import ConfigError
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.output_head import measure_logit_scale
from sdpo.models.packing.support import enable_packing
from sdpo.models.self_check import check_exactness

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **IDS,
}
STATES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **IDS}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXACT: dict[str, dict[str, Any]] = {
    "Lfm2": {**SHAPE, "layer_types": ["conv", "full_attention"] * 2},
    "Mamba": STATES,
    "Mamba2": {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "FalconMamba": STATES,
    "Jamba": {
        **SHAPE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "Bamba": {**SHAPE, **MAMBA, "mamba_n_groups": 1, "attn_layer_indices": [1, 3]},
    "FalconH1": {**SHAPE, **MAMBA, "mamba_d_ssm": 64},
    "Qwen3Next": {
        **SHAPE,
        **LINEAR,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3_5Text": {**SHAPE, **LINEAR},
    "Nemotron": SHAPE,
    "Falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS},
    "DiffLlama": SHAPE,
    "Llama4Text": {
        **SHAPE,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "head_dim": 8,
        "attention_chunk_size": 16,
    },
    "Llama": SHAPE,
}
INEXACT: dict[str, dict[str, Any]] = {
    "Doge": SHAPE,
    "RecurrentGemma": {
        **SHAPE,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "MiniMax": {
        **SHAPE,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_local_experts": 2,
        "head_dim": 8,
        "block_size": 16,
    },
}


def build(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(kind(**settings)).float().eval()
        for param in model.parameters():
            param.mul_(3.0 if param.dim() > 1 else 1.0)  # so that other hidden states are other probabilities
    return model


@pytest.mark.parametrize("name", EXACT)
def test_sampled_log_probs_are_those_of_a_plain_forward_pass(name: str) -> None:
    model = build(name, EXACT[name])
    implementation = model.config._attn_implementation
    measure_logit_scale(model)
    if enable_packing(model) is None:
        assert model.config._attn_implementation == implementation
    check_exactness(model, 0)
    prompts = [TokenPrompt([5, 6, 7]), TokenPrompt([9, 8, 7, 6, 5, 4, 3, 9, 8])]
    responses = sample_responses([(model, 1.0)], prompts, SamplingParams(3, 12, 1.0, 1.0, 6, list(range(40, 52)), 0), 3)
    assert len({len(one.token_ids) for group in responses for one in group}) > 1, "rows leave the batch at other times"
    for prompt, group in zip(prompts, responses, strict=True):
        for one in group:
            row = torch.tensor([[*prompt.token_ids, *one.token_ids]])
            with torch.no_grad():
                log_probs = model(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)
            own = log_probs[len(prompt.token_ids) - 1 : -1].gather(-1, row[0, len(prompt.token_ids) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.log_probs), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", INEXACT)
def test_model_that_mixes_the_rows_of_a_batch_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^model\.path: {name}ForCausalLM (cannot be|computes other).*use another model$"
    ):
        check_exactness(build(name, INEXACT[name]), 0)


def test_probe_that_fails_leaves_the_attention_as_it_was() -> None:
    model = build("Llama", SHAPE)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    assert enable_packing(model) is None
    assert model.config._attn_implementation == "sdpa"
    handle.remove()
    assert enable_packing(model) is not None
