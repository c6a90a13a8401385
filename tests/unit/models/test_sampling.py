"""Sampled tokens and their log-probabilities against plain forward passes of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from operation_counter import OperationCounter
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sdpo.algorithm.teacher import LogitMixture
from sdpo.models.forward import pad_sequences
from sdpo.models.generation import graphed_decoding
from sdpo.models.generation import sampling as decoding_module
from sdpo.models.generation.decoding_state import DecodingState
from sdpo.models.generation.graphed_decoding import GraphedDecodingState, build_decoding_state
from sdpo.models.generation.sampling import (
    BLOCK,
    Completion,
    SamplingParams,
    _TokenSampler,
    restrict_to_nucleus,
    sample_tokens,
)
from sdpo.models.multimodal.processor import TokenPrompt

PROMPTS = [[5, 6, 7, 8, 9, 3, 4], [4, 4, 5], [9], [3, 8, 3, 8, 5], [10, 3], [7, 7, 7, 6, 3, 3, 9, 10, 4]]
DECODING = SamplingParams(
    n=4, max_new_tokens=12, temperature=0.7, top_p=1.0, batch_size=12, stop_token_ids=[2], pad_token_id=0
)


def sample_responses(
    policy: LogitMixture, prompts: Sequence[Sequence[int]], decoding: SamplingParams, seed: int
) -> list[list[Completion]]:
    return decoding_module.sample_responses(policy, [TokenPrompt(ids) for ids in prompts], decoding, seed)


@pytest.fixture(autouse=True, params=["growing cache", "fixed cache"])
def decoding_state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[DecodingState]:
    """Decoding as on a CPU, and with the fixed shapes that are captured on a GPU."""
    if request.param == "growing cache":
        return DecodingState
    monkeypatch.setattr(graphed_decoding, "can_be_captured", lambda _: True)
    monkeypatch.setattr(graphed_decoding, "MIN_STEPS", 1)
    monkeypatch.setattr(graphed_decoding, "PLACES_PER_GRAPH", 5)
    return GraphedDecodingState


PlainLogits = Callable[[nn.Module, Sequence[int], Sequence[int]], Tensor]


def pairs(responses: list[list[Completion]]) -> list[tuple[list[int], Completion]]:
    return [(prompt, one) for prompt, many in zip(PROMPTS, responses, strict=True) for one in many]


def log_probs_of(logits: Tensor, token_ids: list[int], temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def test_autocast_samples_like_a_cast_model(make_model: Any) -> None:
    model = make_model().train()
    half = replace(DECODING, dtype=torch.bfloat16)
    before = {name: param.clone() for name, param in model.named_parameters()}
    loaded = make_model()  # as from_pretrained returns it in that type: rotary frequencies are float32 buffers
    for param in loaded.parameters():
        param.data = param.data.bfloat16()
    expected = sample_responses([(loaded, 1.0)], PROMPTS, DECODING, seed=1)
    assert sample_responses([(model, 1.0)], PROMPTS, half, seed=1) == expected
    assert sample_responses([(model, 1.0)], PROMPTS, DECODING, seed=1) != expected
    assert model.training and all(param.requires_grad for param in model.parameters())
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    copied = decoding_module._cast(model, torch.bfloat16)
    assert copied.lm_head.weight.dtype == torch.bfloat16
    assert (copied.lm_head.weight is copied.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert decoding_module._cast(copied, torch.bfloat16) is copied


@pytest.mark.parametrize("batch_size", [1, 12, 1000])
def test_log_probs_equal_a_forward_pass(
    model: Any,
    plain_logits: PlainLogits,
    batch_size: int,
    decoding_state: type[DecodingState],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compactions = []
    select = decoding_state.select
    monkeypatch.setattr(decoding_state, "select", lambda self, rows: (compactions.append(rows), select(self, rows)))
    responses = sample_responses([(model, 1.0)], PROMPTS, replace(DECODING, batch_size=batch_size), seed=1)

    assert len(responses) == len(PROMPTS)
    assert all(len(many) == DECODING.n for many in responses)
    assert compactions, "no response left the batch early, so compaction was not tested"
    assert len({len(one.token_ids) for _, one in pairs(responses)}) > 3
    for prompt, one in pairs(responses):
        expected = log_probs_of(plain_logits(model, prompt, one.token_ids), one.token_ids, DECODING.temperature)
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-5, rtol=1e-5)


def test_step_of_fixed_shapes_reads_nothing_from_the_device(model: Any, decoding_state: type[DecodingState]) -> None:
    """Within a number of rows and places, all operations have equal shapes and none depends on a tensor's values."""
    if decoding_state is DecodingState:
        pytest.skip("its cache grows")
    state = build_decoding_state([(model, 1.0)], capacity=30, num_steps=20)
    batch = pad_sequences([TokenPrompt(ids) for ids in PROMPTS[:3]], [[]] * 3, 0, torch.device("cpu"))
    state.prefill(batch, None)
    state.repeat(2)
    shapes = []
    for _ in range(4):  # from 7 to 11 tokens: 10 and then 15 places
        with OperationCounter() as counter:
            state.decode(torch.tensor([3, 4, 5, 6, 7, 8]))
        shapes.append((counter.num_operations, counter.largest))
    assert shapes[0] == shapes[1] == shapes[2] and shapes[3][0] == shapes[0][0]
    assert len(state._steps) == 2  # type: ignore[attr-defined]


def test_responses_are_in_the_order_of_the_prompts(model: Any, plain_logits: PlainLogits) -> None:
    """Otherwise the test above would not detect swapped prompts."""
    responses = sample_responses([(model, 1.0)], PROMPTS, DECODING, seed=1)
    for i, many in enumerate(responses):
        for one in many:
            elsewhere = log_probs_of(plain_logits(model, PROMPTS[i - 1], one.token_ids), one.token_ids, 0.7)
            assert (torch.tensor(one.log_probs) - elsewhere).abs().max() > 1e-2


@pytest.mark.parametrize("prompts", [PROMPTS, [[9], [10]]])
def test_model_with_absolute_positions(prompts: list[list[int]], plain_logits: PlainLogits) -> None:
    """Rotary embeddings are invariant to a shift of all positions; learned embeddings are not."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight, std=1.0)
    responses = sample_responses([(model, 1.0)], prompts, DECODING, seed=3)
    for prompt, many in zip(prompts, responses, strict=True):
        for one in many:
            expected = log_probs_of(plain_logits(model, prompt, one.token_ids), one.token_ids, DECODING.temperature)
            torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-5, rtol=1e-5)


def test_response_ends_at_a_stop_token_or_the_limit(model: Any) -> None:
    decoding = replace(DECODING, n=16, max_new_tokens=6, stop_token_ids=[2, 5])
    responses = [one for _, one in pairs(sample_responses([(model, 1.0)], PROMPTS, decoding, seed=0))]
    for one in responses:
        assert len(one.token_ids) == len(one.log_probs)
        assert one.finished == (one.token_ids[-1] in (2, 5))
        assert not {2, 5} & set(one.token_ids[:-1])
        assert len(one.token_ids) == 6 or one.finished
    assert {one.token_ids[-1] for one in responses if one.finished} == {2, 5}
    assert any(not one.finished for one in responses)
    assert any(one.finished and len(one.token_ids) == 6 for one in responses), "no stop token at the last position"


def test_responses_depend_on_the_seed(model: Any) -> None:
    first, same, other = (sample_responses([(model, 1.0)], PROMPTS, DECODING, seed) for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_responses_to_one_prompt_differ(model: Any) -> None:
    for many in sample_responses([(model, 1.0)], PROMPTS, DECODING, seed=1):
        assert len({tuple(one.token_ids) for one in many}) > 1


def test_greedy_equals_argmax_and_generate(model: Any, plain_logits: PlainLogits) -> None:
    decoding = replace(DECODING, n=1, temperature=0.0)
    for prompt, one in pairs(sample_responses([(model, 1.0)], PROMPTS, decoding, seed=0)):
        looped: list[int] = []
        while len(looped) < decoding.max_new_tokens and looped[-1:] != [2]:
            looped.append(int(plain_logits(model, prompt, [*looped, 0])[-1].argmax()))
        generated = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=0
        )
        assert one.token_ids == looped == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_frequencies_match_the_probabilities(model: Any, plain_logits: PlainLogits, temperature: float) -> None:
    num_samples = 4000
    decoding = replace(DECODING, n=num_samples, max_new_tokens=2, temperature=temperature, stop_token_ids=[])
    [responses] = sample_responses([(model, 1.0)], PROMPTS[:1], decoding, seed=0)

    def chi_square(tokens: list[int], probabilities: Tensor) -> float:
        expected = probabilities * len(tokens)
        counts = torch.bincount(torch.tensor(tokens), minlength=12)
        common = expected >= 5
        rare = torch.stack([expected[~common].sum(), counts[~common].sum()])
        statistic = ((counts - expected).square() / expected)[common].sum()
        return float(statistic + ((rare[1] - rare[0]).square() / rare[0] if rare[0] >= 5 else 0))

    first = (plain_logits(model, PROMPTS[0], [0])[0] / temperature).softmax(-1)
    assert first.max() > 2 / 12, "too flat to distinguish from uniform sampling"
    # 11 degrees of freedom: 38 is exceeded with probability 1e-4.
    assert chi_square([one.token_ids[0] for one in responses], first) < 38
    likely = int(first.argmax())
    followers = [one.token_ids[1] for one in responses if one.token_ids[0] == likely]
    second = (plain_logits(model, PROMPTS[0], [likely, 0])[1] / temperature).softmax(-1)
    assert chi_square(followers, second) < 38


HAND_MADE = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.64, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.94, [0, 1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, nucleus: list[int]) -> None:
    shifted = HAND_MADE + 3.0
    log_probs = torch.stack([shifted, shifted.flip(0)]).log_softmax(-1)
    expected = torch.zeros(5)
    expected[nucleus] = HAND_MADE.exp()[nucleus]
    torch.testing.assert_close(restrict_to_nucleus(log_probs, top_p), torch.stack([expected, expected.flip(0)]))


def test_temperature_applies_before_the_nucleus() -> None:
    def draw(temperature: float) -> set[int]:
        params = SamplingParams(1, 1, temperature, 0.5, 1, [], 0)
        uniform = torch.arange(0.005, 1, 0.01, dtype=torch.float64)
        return set(_TokenSampler(params, HAND_MADE)(HAND_MADE.repeat(100, 1), uniform)[0].tolist())

    assert draw(100.0) == {1, 3, 4}
    assert draw(0.1) == {1}


def test_tokens_of_the_nucleus_have_log_probs_among_all_tokens(make_model: Any, plain_logits: PlainLogits) -> None:
    model = make_model(dtype=torch.float64)
    decoding = replace(DECODING, top_p=0.6)
    for prompt, one in pairs(sample_responses([(model, 1.0)], PROMPTS, decoding, seed=1)):
        probs = (plain_logits(model, prompt, one.token_ids) / decoding.temperature).softmax(-1)
        for row, token, log_prob in zip(probs, one.token_ids, one.log_probs, strict=True):
            ordered = sorted(range(12), key=lambda t, row=row: -row[t])
            nucleus = next(ordered[:k] for k in range(1, 13) if row[ordered[:k]].sum() >= decoding.top_p)
            assert token in nucleus
            assert log_prob == pytest.approx(float(row[token].log()), abs=1e-5)


def test_two_modules_sample_from_the_sum_of_logits(make_model: Any, plain_logits: PlainLogits) -> None:
    first, second = make_model(seed=0), make_model(seed=1)
    responses = sample_responses([(first, 0.7), (second, 0.3)], PROMPTS, DECODING, seed=1)
    for prompt, one in pairs(responses):
        logits = torch.lerp(
            plain_logits(first, prompt, one.token_ids), plain_logits(second, prompt, one.token_ids), 0.3
        )
        expected = log_probs_of(logits, one.token_ids, DECODING.temperature)
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_off_and_the_mode_is_restored(make_model: Any) -> None:
    model = make_model(attention_dropout=0.9)
    expected = sample_responses([(model, 1.0)], PROMPTS, DECODING, seed=1)
    model.train()
    assert sample_responses([(model, 1.0)], PROMPTS, DECODING, seed=1) == expected
    assert model.training


@pytest.mark.parametrize(("keep_full", "check_every"), [(0.0, 1), (0.5, 1), (1.0, 1), (1.0, 5), (0.9, 100)])
def test_response_does_not_depend_on_other_rows(
    model: Any, monkeypatch: pytest.MonkeyPatch, keep_full: float, check_every: int
) -> None:
    expected = sample_responses([(model, 1.0)], PROMPTS, DECODING, seed=1)
    monkeypatch.setattr(decoding_module, "COMPACT_BELOW", keep_full)
    monkeypatch.setattr(decoding_module, "CHECK_EVERY", {"cpu": check_every})
    found = sample_responses([(model, 1.0)], PROMPTS, DECODING, seed=1)
    for (_, one), (_, other) in zip(pairs(found), pairs(expected), strict=True):
        assert (one.token_ids, one.finished) == (other.token_ids, other.finished)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_suppressed_tokens_have_probability_zero(model: Any, plain_logits: PlainLogits) -> None:
    forbidden = [3, 8]
    for decoding in (replace(DECODING, suppress_tokens=forbidden), replace(DECODING, temperature=0.0)):
        decoding = replace(decoding, suppress_tokens=forbidden)
        for prompt, one in pairs(sample_responses([(model, 1.0)], PROMPTS, decoding, seed=1)):
            assert not set(forbidden) & set(one.token_ids)
            if decoding.temperature:
                logits = plain_logits(model, prompt, one.token_ids)
                logits[:, forbidden] = float("-inf")
                expected = log_probs_of(logits, one.token_ids, decoding.temperature)
                torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_nonfinite_logits_are_an_error(make_model: Any, top_p: float) -> None:
    model = make_model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(FloatingPointError, match="non-finite"):
        sample_responses([(model, 1.0)], PROMPTS, replace(DECODING, top_p=top_p), seed=1)


# ---- sampling a token ------------------------------------------------------------------------------------------------

LAST = 1 - 2**-53  # the largest number that torch.rand returns in float64


def draw(weights: Tensor, uniform: Sequence[float]) -> list[int]:
    rows = weights.expand(len(uniform), -1)
    tokens, log_probs = sample_tokens(rows, torch.tensor(uniform, dtype=torch.float64))
    expected = (weights.double()[tokens] / weights.double().sum()).log()
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-6, rtol=1e-6)
    return tokens.tolist()


@pytest.mark.parametrize("size", [2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 1000])
def test_first_and_last_token_can_be_sampled(size: int) -> None:
    assert draw(torch.full((size,), 0.7), [0.0, LAST]) == [0, size - 1]


@pytest.mark.parametrize("possible", [[3], [700], [0, 999], [127, 128], [130, 131, 500], [900, 998]])
def test_token_of_probability_zero_is_never_sampled(possible: list[int]) -> None:
    weights = torch.zeros(1000)
    weights[possible] = torch.tensor([0.1, 0.3, 1e-30])[: len(possible)]
    total = weights.double().sum()
    edges = (weights.double().cumsum(0) / total).unique().tolist()
    near = [edge + shift for edge in edges for shift in (-(2**-52), 0.0, 2**-52) if 0 <= edge + shift < 1]
    drawn = draw(weights, [0.0, *near, *torch.rand(100).tolist(), LAST])
    assert set(drawn) <= set(possible)
    assert {drawn[0], drawn[-1]} == {possible[0], possible[1 if len(possible) > 1 else 0]}


def test_tokens_are_sampled_in_proportion_to_the_weights() -> None:
    torch.manual_seed(0)
    num_draws, size = 40_000, 1000
    weights = torch.randn(size).exp()
    tokens, _ = sample_tokens(weights.expand(num_draws, -1), torch.rand(num_draws, dtype=torch.float64))
    expected = weights / weights.sum() * num_draws
    statistic = ((torch.bincount(tokens, minlength=size) - expected).square() / expected).sum()
    # 999 degrees of freedom: mean and five standard deviations.
    assert abs(float(statistic) - 999) < 5 * (2 * 999) ** 0.5


@pytest.mark.slow
def test_sampling_from_a_large_vocabulary_is_unbiased() -> None:
    """Cumulative sums in float32 are wrong for one sample in ten."""
    torch.manual_seed(0)
    size = 151_936
    weights = torch.rand(size) * 1e-6
    weights[0] = 1.0
    cumulative = weights.double().cumsum(0)
    uniform = torch.linspace(float(cumulative[0] / cumulative[-1]), LAST, 400, dtype=torch.float64)
    expected = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=size - 1)
    exact = torch.cat([sample_tokens(weights.expand(len(part), -1), part)[0] for part in uniform.split(50)])
    in_float32 = torch.searchsorted(weights.cumsum(0), (uniform * cumulative[-1]).float(), right=True)
    assert (in_float32 != expected).float().mean() > 0.1
    assert (exact != expected).float().mean() < 0.03
    assert (exact - expected).abs().max() <= 1
