"""The preallocated cache against transformers' own, which concatenates all tokens at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sdpo.models.generation.kv_cache import MIN_GROWTH, PreallocatedCacheLayer, build_cache
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt

HEADS, SIZE, PROMPT, CAPACITY = 2, 4, 5, 60


def make_states(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, HEADS, tokens, SIZE), torch.randn(rows, HEADS, tokens, SIZE + 1)


@pytest.mark.parametrize("repeats", [1, 3])
def test_layer_holds_the_same_values_as_transformers(repeats: int) -> None:
    torch.manual_seed(0)
    ours, theirs = PreallocatedCacheLayer(CAPACITY), DynamicLayer()

    def do(action: Callable[[Any], Any]) -> None:
        for layer in (ours, theirs):
            action(layer)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)

    def read(rows: int, tokens: int) -> None:
        states = make_states(rows, tokens)
        do(lambda layer: layer.update(*states))

    read(3, PROMPT)
    do(lambda layer: layer.batch_repeat_interleave(repeats))
    rows = 3 * repeats
    while rows > 1:
        for _ in range(7):  # more tokens than the first buffer has room for
            read(rows, 1)
        kept = torch.randperm(rows)[: max(rows // 2, 1)]
        do(lambda layer, kept=kept: layer.batch_select_indices(kept))
        rows = len(kept)
    for tokens in (1, 2, MIN_GROWTH + 1, 3):
        read(rows, tokens)
    assert ours.get_seq_length() > PROMPT + MIN_GROWTH + 7


def test_shared_prompt_is_stored_once() -> None:
    layer = PreallocatedCacheLayer(CAPACITY)
    prompt, token = make_states(2, PROMPT), make_states(2, 1)
    before = prompt[0].clone()
    layer.update(*prompt)
    keys, _ = layer.update(*token)
    assert torch.equal(keys, torch.cat([prompt[0], token[0]], dim=-2))
    assert torch.equal(prompt[0], before), "the model's own tensor was written to"


def test_tokens_are_written_in_place_up_to_the_capacity() -> None:
    layer = PreallocatedCacheLayer(CAPACITY)
    layer.update(*make_states(2, PROMPT))
    layer.batch_repeat_interleave(2)
    places = []
    for _ in range(CAPACITY - PROMPT):
        keys, values = layer.update(*make_states(4, 1))
        places.append((keys.data_ptr(), values.data_ptr()))
    assert len(set(places[:MIN_GROWTH])) == 1
    assert len(set(places)) <= (CAPACITY - PROMPT) // MIN_GROWTH + 1
    assert layer.keys.untyped_storage().nbytes() == 4 * HEADS * CAPACITY * SIZE * 4, "room beyond the capacity"
    with pytest.raises(ValueError, match="cache capacity is 60 tokens, got 61"):
        layer.update(*make_states(4, 1))


def test_sliding_window_layers_use_transformers_cache(make_model: Any, plain_logits: Any) -> None:
    layers = ["full_attention", "sliding_attention"]
    model = make_model(use_sliding_window=True, sliding_window=4, layer_types=layers)
    cache = build_cache(model.config, CAPACITY)
    assert [type(layer) for layer in cache.layers] == [PreallocatedCacheLayer, DynamicSlidingWindowLayer]

    prompts = [[5, 6, 7, 8, 9, 3], [4, 4], [8, 3, 5]]
    decoding = SamplingParams(
        n=2, max_new_tokens=10, temperature=0.7, top_p=1.0, batch_size=6, stop_token_ids=[2], pad_token_id=0
    )
    for chosen in (prompts, prompts[:1]):  # with and without padding
        sampled = sample_responses([(model, 1.0)], [TokenPrompt(ids) for ids in chosen], decoding, seed=1)
        for prompt, many in zip(chosen, sampled, strict=True):
            for one in many:
                log_probs = (plain_logits(model, prompt, one.token_ids) / 0.7).log_softmax(-1)
                expected = log_probs.gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-5, rtol=1e-5)
