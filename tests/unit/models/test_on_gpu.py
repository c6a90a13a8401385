"""Attention of packed rows and captured decoding steps on a GPU, compared with the forms that a CPU computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sdpo.models.forward import compute_hidden, compute_positions
from sdpo.models.generation import graphed_decoding
from sdpo.models.generation.decoding_state import DecodingState
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.packing import attention
from sdpo.models.packing.attention_plan import AttentionCostModel
from sdpo.models.packing.layout import group_by_prefix, pack_sequences
from sdpo.models.packing.support import enable_packing

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().cuda()


def test_one_call_for_all_segments_equals_a_call_for_each(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 512, (length,), generator=generator).tolist()

    prompts = [TokenPrompt(p) for p in [ids(300)] * 4 + [ids(77)]]
    responses = [ids(n) for n in (100, 3, 250, 64, 31)]
    share = AttentionCostModel(1, 0, 0)
    assert enable_packing(model) is not None

    def differentiate() -> tuple[Tensor, Tensor]:
        groups = group_by_prefix(prompts, [len(r) for r in responses], [0, 0, 0, 0, 1], share)
        positions = compute_positions(prompts, 250, None)
        row = pack_sequences(groups, prompts, responses, positions, share, torch.device("cuda"))
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = compute_hidden(model, row)
        (hidden.float() * torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden)).sum().backward()
        assert ("segment_bounds" in vars(row.layout)) is at_once
        return hidden.detach().float(), torch.cat([p.grad.flatten() for p in model.model.layers.parameters()])

    at_once = True
    ours = differentiate()
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: False)
    at_once = False
    for actual, expected in zip(ours, differentiate(), strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_steps_sample_the_same_tokens(
    temperature: float, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [TokenPrompt(list(range(3, 3 + n))) for n in (5, 40, 17)]
    params = SamplingParams(
        n=8,
        max_new_tokens=200,
        temperature=temperature,
        top_p=1.0,
        batch_size=64,
        stop_token_ids=[2, 3],
        pad_token_id=0,
    )
    monkeypatch.setattr(graphed_decoding, "PLACES_PER_GRAPH", 64)
    steps: list[int] = []
    capture: Callable[..., Any] = graphed_decoding.GraphedDecodingState._capture
    monkeypatch.setattr(
        graphed_decoding.GraphedDecodingState, "_capture", lambda *args: steps.append(1) or capture(*args)
    )
    captured = sample_responses([(model, 1.0)], prompts, params, seed=1)
    assert steps and not caplog.messages, "a graph could not be captured"
    monkeypatch.setattr("sdpo.models.generation.sampling.build_decoding_state", lambda p, c, _: DecodingState(p, c))
    plain = sample_responses([(model, 1.0)], prompts, params, seed=1)
    pairs = [
        (one, two) for ours, theirs in zip(captured, plain, strict=True) for one, two in zip(ours, theirs, strict=True)
    ]
    # A difference of rounding can choose another token, and then all later ones differ.
    assert sum(one.token_ids == two.token_ids for one, two in pairs) >= 0.9 * len(pairs)
    for one, two in pairs:
        if one.token_ids == two.token_ids:
            torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(two.log_probs), atol=1e-3, rtol=0)
