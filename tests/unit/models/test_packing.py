"""Packed rows against single sequences: values, gradients, cost, and the decision to share a prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operation_counter import OperationCounter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from varlen import varlen_attn

from sdpo.models.forward import compute_hidden, compute_positions, pad_sequences
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.output_head import measure_logit_scale
from sdpo.models.packing import attention
from sdpo.models.packing.attention import NAME
from sdpo.models.packing.attention_plan import AttentionCostModel, PrefixGroup, count_cost
from sdpo.models.packing.layout import PackedSequences, count_shared_tokens, group_by_prefix, pack_sequences
from sdpo.models.packing.support import enable_packing

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OLD_SHAPE: dict[str, Any] = {"vocab_size": 64, "n_embd": 64, "n_layer": 3, "n_head": 4}
OLD_SHAPE |= {"bos_token_id": None, "eos_token_id": None}
PACKABLE: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**OLD_SHAPE)),
}
NOT_PACKABLE: dict[str, Callable[[], Any]] = {
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
    "capped attention": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE)),
    "positions in attention": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=3, n_head=4)),
    "hybrid": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(**{**SHAPE, "num_hidden_layers": 4}, num_experts=4, num_experts_per_tok=2)
    ),
    "recurrent": lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=3)),
}
# Only tokens cost; only pairs cost, so that no call is padded; calls are expensive.
ALWAYS, NO_PADDING, ONE_CALL = AttentionCostModel(1, 0, 0), AttentionCostModel(1e6, 1, 0), AttentionCostModel(1e9, 0, 1)


def make_sequences() -> tuple[list[TokenPrompt], list[list[int]], list[int]]:
    """Three rollouts of a prompt, one rollout, two prompts with a common prefix, and two without."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(0, 64, (length,), generator=generator).tolist()

    question, start = ids(20), ids(9)
    prompts = [question] * 3 + [ids(13), start + ids(5), start + ids(7), [1, *ids(3)], [2, *ids(2)]]
    responses = [ids(length) for length in (5, 30, 11, 8, 4, 17, 1, 2)]
    return [TokenPrompt(prompt) for prompt in prompts], responses, [0, 0, 0, 1, 2, 2, 3, 3]


def pack(cost: AttentionCostModel) -> tuple[PackedSequences, list[PrefixGroup]]:
    prompts, responses, group_ids = make_sequences()
    groups = group_by_prefix(prompts, [len(r) for r in responses], group_ids, cost)
    positions = compute_positions(prompts, max(map(len, responses)), None)
    return pack_sequences(groups, prompts, responses, positions, cost, CPU), groups


def differentiate(model: nn.Module, hidden: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    params = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad((hidden * weights).sum(), params, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(
    ("cost", "num_read", "num_calls"),
    [(ALWAYS, 188 - 2 * 20 - 9, 3), (NO_PADDING, 188 - 2 * 20 - 9, 9), (AttentionCostModel(0, 0, 1), 188, 1)],
    ids=["shared", "shared without padding", "apart"],
)
@pytest.mark.parametrize("family", PACKABLE)
def test_packed_row_equals_separate_sequences(
    family: str, cost: AttentionCostModel, num_read: int, num_calls: int
) -> None:
    torch.manual_seed(0)
    model = PACKABLE[family]().double().eval()
    assert measure_logit_scale(model) == 1.0
    prompts, responses, _ = make_sequences()
    alone = [compute_hidden(model, pad_sequences([p], [r], 0, CPU)) for p, r in zip(prompts, responses, strict=True)]
    expected = torch.cat(alone)
    assert enable_packing(model) is not None
    row, _ = pack(cost)
    assert row.token_ids.shape == (1, num_read)
    assert len(row.layout.attention_calls.calls) == num_calls
    hidden = compute_hidden(model, row)
    torch.testing.assert_close(hidden, expected, atol=1e-12, rtol=1e-10)
    bound = 1e-13 if family == "gpt2" else 1e-6  # the norms of the others compute in float32
    for actual, wanted in zip(differentiate(model, hidden), differentiate(model, expected), strict=True):
        assert float((actual - wanted).norm()) <= bound * float(wanted.norm())


@pytest.mark.parametrize("cost", [ALWAYS, AttentionCostModel(0, 0, 1)], ids=["shared", "apart"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_one_call_for_all_segments_equals_separate_sequences(
    family: str, cost: AttentionCostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of attention on GPUs, with a stand-in for the kernel."""
    torch.manual_seed(0)
    model = PACKABLE[family]().double().eval()
    assert enable_packing(model) is not None
    row, _ = pack(cost)
    expected = compute_hidden(model, row)
    assert "segment_bounds" not in vars(row.layout)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "ENABLE_GQA", True)
    row, _ = pack(cost)
    hidden = compute_hidden(model, row)
    assert "attention_calls" not in vars(row.layout)
    torch.testing.assert_close(hidden, expected, atol=1e-12, rtol=1e-10)
    bound = 1e-13 if family == "gpt2" else 1e-6  # the norms of the others compute in float32
    for actual, wanted in zip(differentiate(model, hidden), differentiate(model, expected), strict=True):
        assert float((actual - wanted).norm()) <= bound * float(wanted.norm())


def test_segments_of_a_row_by_hand() -> None:
    """A prefix of two tokens with suffixes of 1, 0 and 3, and a single sequence."""
    prompts = [TokenPrompt([1, 2])] * 3 + [TokenPrompt([7])]
    positions = [torch.arange(9)] * 4
    groups = [PrefixGroup(2, (3, 2, 5)), PrefixGroup(0, (4,))]
    row = pack_sequences(groups, prompts, [[3], [], [4, 5, 6], [8, 9, 10]], positions, ALWAYS, CPU)
    assert row.token_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    bounds = row.layout.segment_bounds
    assert bounds.query_bounds.tolist() == [0, 2, 3, 6, 10]
    assert bounds.key_bounds.tolist() == [0, 2, 5, 10, 14]
    assert bounds.key_index is not None
    assert bounds.key_index.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert (bounds.max_queries, bounds.max_keys) == (4, 5)


@pytest.mark.parametrize(
    ("kind", "dtype", "size", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, 128, (9, 0), True),
        ("cuda", torch.float16, 64, (8, 0), True),
        ("cuda", torch.float32, 64, (9, 0), False),
        ("cuda", torch.bfloat16, 36, (9, 0), False),
        ("cuda", torch.bfloat16, 512, (9, 0), False),
        ("cuda", torch.bfloat16, 64, (7, 5), False),
        ("cpu", torch.bfloat16, 64, (9, 0), False),
    ],
)
def test_kernel_for_segments_is_used_where_it_exists(
    kind: str,
    dtype: torch.dtype,
    size: int,
    capability: tuple[int, int],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    attention.has_varlen_kernel.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert attention.has_varlen_kernel(torch.device(kind), dtype, size) is expected
    attention.has_varlen_kernel.cache_clear()


@pytest.mark.parametrize("family", NOT_PACKABLE)
def test_unsupported_model_is_not_modified(family: str) -> None:
    model = NOT_PACKABLE[family]().train()
    kernel = model.config._attn_implementation
    before = model(input_ids=torch.arange(12)[None]).logits
    assert enable_packing(model) is None
    assert model.config._attn_implementation == kernel
    assert model.training
    torch.testing.assert_close(model(input_ids=torch.arange(12)[None]).logits, before)


def test_other_attention_implementation_is_not_modified() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager"))
    assert enable_packing(model) is None
    assert model.config._attn_implementation == "eager"


def test_padded_rows_and_caches_are_unaffected() -> None:
    torch.manual_seed(0)
    model = PACKABLE["qwen2"]().double().eval()
    prompts, responses, _ = make_sequences()
    padded = pad_sequences(prompts, responses, 0, CPU)
    expected = compute_hidden(model, padded)
    generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False)
    assert enable_packing(model) is not None
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(compute_hidden(model, padded), expected, atol=1e-13, rtol=0)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False).equal(generated)


def test_decoding_step_does_not_copy_the_cache_for_every_query_head() -> None:
    """Grouped-query attention to 50 cached places, with padding: equal to transformers', which copies 4 times."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, groups, places, size = 3, 8, 2, 50, 16
    query = torch.randn(rows, heads, 1, size, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, rows, groups, places, size, generator=generator, dtype=torch.float64)
    mask = (torch.arange(places) >= torch.tensor([[0], [7], [20]]))[:, None, None]
    layer = nn.Module()
    layer.num_key_value_groups = heads // groups
    counter = OperationCounter()
    with counter:
        output, _ = attention.attend(layer, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    assert output.shape == (rows, 1, heads, size)
    torch.testing.assert_close(output, expected, atol=1e-13, rtol=0)
    scores = 0.3 * query[1, 5, 0] @ key[1, 1, 7:].T
    torch.testing.assert_close(output[1, 0, 5], scores.softmax(0) @ value[1, 1, 7:], atol=1e-13, rtol=0)
    assert counter.largest < rows * heads * places * size


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_half_precision_packed_row(precision: str) -> None:
    torch.manual_seed(0)
    model = PACKABLE["qwen2"]().eval()
    assert enable_packing(model) is not None
    row, _ = pack(ALWAYS)
    expected = compute_hidden(model, row)
    if precision == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        hidden = compute_hidden(model, row)
    torch.testing.assert_close(hidden.float(), expected, atol=0.06, rtol=0.05)


def test_gradient_checkpointing_repeats_the_layout() -> None:
    torch.manual_seed(0)
    model = PACKABLE["llama"]().double().train()
    assert enable_packing(model) is not None
    row, _ = pack(ALWAYS)
    expected = differentiate(model, compute_hidden(model, row))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for actual, wanted in zip(differentiate(model, compute_hidden(model, row)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-10)


# ---- shared prefixes ------------------------------------------------------------------------------------------------


def test_common_prefix_of_prompts() -> None:
    def count(*prompts: list[int], images: tuple[bytes, ...] = (), image_token: int = 99) -> int:
        return count_shared_tokens([TokenPrompt(p, images) for p in prompts], [image_token])

    assert count([1, 2, 3], [1, 2, 3]) == 3
    assert count([1, 2, 3], [1, 2]) == 2
    assert count([1, 2], [1, 2, 3], [1, 4]) == 1
    assert count([1], [2]) == 0
    image = (b"image",)
    assert count([1, 99, 99, 2, 3], [1, 99, 99, 2, 4], images=image) == 4
    assert count([1, 99, 99, 2], [1, 99, 99, 3], images=image) == 3
    assert count([1, 2, 99, 99, 3], [1, 4, 99, 99, 3], images=image) == 1
    two = (b"one", b"two")  # the second image is after the first difference: neither is shared
    assert count([1, 99, 2, 99], [1, 99, 3, 99], images=two) == 1
    assert count([1, 99, 99, 2], [1, 99, 99, 2]) == 4  # without images an image token has no meaning


@pytest.mark.parametrize(("prefix", "num_images"), [(3, 1), (1, 2), (0, 2)])
def test_images_are_repeated_with_their_tokens(prefix: int, num_images: int) -> None:
    prompts = [TokenPrompt([1, 99, 99, 5], (b"image",)), TokenPrompt([1, 99, 99, 6], (b"image",))]
    groups = [PrefixGroup(prefix, (5, 6))] if prefix else [PrefixGroup(0, (5,)), PrefixGroup(0, (6,))]
    positions = [torch.arange(5), torch.arange(6)]
    row = pack_sequences(groups, prompts, [[2], [3, 4]], positions, ALWAYS, CPU, [99])
    assert row.images == (b"image",) * num_images
    assert row.token_ids.tolist()[0].count(99) == 2 * num_images


def test_prefix_is_shared_if_it_saves_more_than_the_calls_cost() -> None:
    """Two rollouts: sharing saves a prompt's tokens and adds a call."""
    prompts, lengths = [TokenPrompt([1] * 10)] * 2, [5, 5]
    for flops_per_call, shares in ((9.9, True), (10.1, False)):
        groups = group_by_prefix(
            prompts,
            lengths,
            [0, 0],
            AttentionCostModel(flops_per_token=1.0, flops_per_pair=0.0, flops_per_call=flops_per_call),
        )
        assert groups == ([PrefixGroup(10, (15, 15))] if shares else [PrefixGroup(0, (15,)), PrefixGroup(0, (15,))])
    assert group_by_prefix(prompts, lengths, [0, 1], ALWAYS) == [PrefixGroup(0, (15,)), PrefixGroup(0, (15,))]
    one = group_by_prefix(prompts[:1], lengths[:1], [0], ALWAYS)
    assert one == [PrefixGroup(0, (15,))]


@pytest.mark.parametrize(("flops_per_call", "num_calls"), [(1000 - 25 - 1, 2), (1000 - 25 + 1, 1)])
def test_padding_is_used_only_if_it_costs_less_than_a_call(flops_per_call: float, num_calls: int) -> None:
    cost = AttentionCostModel(
        flops_per_token=0.0, flops_per_pair=1000 / (40 * 40 - 5 * 5) * 0.975, flops_per_call=flops_per_call
    )
    prompts, responses = [TokenPrompt([1] * 20), TokenPrompt([1] * 2)], [[2] * 20, [2] * 3]
    positions = [torch.arange(40), torch.arange(5)]
    row = pack_sequences([PrefixGroup(0, (40,)), PrefixGroup(0, (5,))], prompts, responses, positions, cost, CPU)
    assert len(row.layout.attention_calls.calls) == num_calls


@pytest.mark.parametrize("cost", [ALWAYS, NO_PADDING, ONE_CALL, AttentionCostModel(1, 1, 1e3)])
@pytest.mark.parametrize(("family", "rotary"), [("llama", 16), ("gpt2", 0)])  # operations per token for rotary angles
def test_cost_equals_the_operations_that_torch_counts(family: str, rotary: int, cost: AttentionCostModel) -> None:
    """Products of weights and of attention on one row, without the output layer."""
    torch.manual_seed(0)
    model = PACKABLE[family]().eval()
    measured = enable_packing(model)
    assert measured is not None
    row, groups = pack(cost)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute_hidden(model, row)
    calls = row.layout.attention_calls.calls
    num_calls, pairs = len(calls), sum(call.queries.numel() * call.keys.shape[1] for call in calls)
    num_read = row.token_ids.numel()
    assert counter.get_total_flops() == num_read * (measured.flops_per_token + rotary) + pairs * measured.flops_per_pair
    assert count_cost(groups, cost) == pytest.approx(
        num_read * cost.flops_per_token + pairs * cost.flops_per_pair + num_calls * cost.flops_per_call
    )


def test_every_token_is_one_query() -> None:
    for cost in (ALWAYS, NO_PADDING, ONE_CALL):
        row, _ = pack(cost)
        queries = torch.cat([call.queries.flatten() for call in row.layout.attention_calls.calls])
        assert queries[row.layout.attention_calls.output_index].equal(torch.arange(row.token_ids.numel()))


@pytest.mark.parametrize("num_rollouts", [2, 8])
def test_long_prompt_is_shared_at_a_realistic_size(num_rollouts: int) -> None:
    """With a model's cost, a prompt of 300 tokens is shared, and a prompt of one token by two rollouts is not."""
    torch.manual_seed(0)
    cost = enable_packing(PACKABLE["qwen2"]())
    assert cost is not None
    for length, shares in ((300, True), (1, False)):
        prompts = [TokenPrompt([1] * length)] * num_rollouts
        groups = group_by_prefix(prompts, [50] * num_rollouts, [0] * num_rollouts, cost)
        assert (groups[0].prefix == length) is shares
