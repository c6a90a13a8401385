"""Batched sampling with a key-value cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdpo.algorithm.teacher import LogitMixture
from sdpo.models.forward import pad_sequences
from sdpo.models.generation.graphed_decoding import build_decoding_state
from sdpo.models.multimodal.processor import TokenPrompt
from sdpo.models.multimodal.vision_tower import VisionAdapter

# Vocabulary entries per partial sum when a token is sampled.
BLOCK = 128
# Decoding steps between checks for finished rows; each check synchronizes with the GPU.
CHECK_EVERY = {"cpu": 1}
CHECK_EVERY_ELSE = 8
# Finished rows are removed from the batch when at most this fraction of its rows is running.
COMPACT_BELOW = 0.9


MIN_BIAS = -100.0  # of a token that vLLM must not draw: the lowest that it accepts


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings.

    Attributes:
        n: responses per prompt.
        max_new_tokens: maximum length of a response.
        temperature: 0 is greedy decoding.
        top_p: mass of the nucleus; 1 samples from all tokens.
        batch_size: maximum number of sequences that are decoded together.
        stop_token_ids: a response ends with the first of these tokens.
        pad_token_id: fills up shorter prompts; masked.
        suppress_tokens: tokens that are never sampled.
        dtype: sampling uses copies of the models in this type; None for the models themselves.
    """

    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    batch_size: int
    stop_token_ids: Sequence[int]
    pad_token_id: int
    suppress_tokens: Sequence[int] = ()
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: with the stop token at the end if it was reached.
        log_probs: of each token among all tokens but the suppressed ones, after temperature (0 with greedy decoding).
            With top-p they are not those of the nucleus: the policy that is trained has all tokens, so that the
            importance weight of an unchanged policy is 1.
        finished: whether it ended with a stop token instead of at ``max_new_tokens``.
    """

    token_ids: list[int]
    log_probs: list[float]
    finished: bool


@torch.no_grad()
def sample_responses(
    policy: LogitMixture,
    prompts: Sequence[TokenPrompt],
    params: SamplingParams,
    seed: int,
    vision: VisionAdapter | None = None,
) -> list[list[Completion]]:
    """Sample ``params.n`` responses per prompt, in the prompts' order; deterministic for a seed.

    Prompts of similar length are decoded together. A prompt, images included, is read once for all of its responses.
    Finished responses leave the batch. ``vision`` is needed if the policy's models read images.

    Raises:
        FloatingPointError: the models' logits are non-finite.
    """
    if params.dtype is not None:
        policy = [(_cast(module, params.dtype), coefficient) for module, coefficient in policy]
    device = next(policy[0][0].parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    prompts_at_once = max(1, params.batch_size // params.n)
    responses: list[list[Completion]] = [[] for _ in prompts]
    training = [module.training for module, _ in policy]
    for module, _ in policy:
        module.eval()
    for start in range(0, len(by_length), prompts_at_once):
        chosen = by_length[start : start + prompts_at_once]
        sampled = _sample_batch(policy, [prompts[i] for i in chosen], params, generator, vision)
        for place, i in enumerate(chosen):
            responses[i] = sampled[place * params.n : (place + 1) * params.n]
    for (module, _), was_training in zip(policy, training, strict=True):
        module.train(was_training)
    return responses


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy the module in this data type; returns the module itself if all parameters have it."""
    own = list(module.parameters())
    if all(param.dtype == dtype for param in own):
        return module
    return copy.deepcopy(module, {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in own})


def _sample_batch(
    policy: LogitMixture,
    prompts: Sequence[TokenPrompt],
    params: SamplingParams,
    generator: torch.Generator,
    vision: VisionAdapter | None,
) -> list[Completion]:
    device, limit = generator.device, params.max_new_tokens
    check_every = CHECK_EVERY.get(device.type, CHECK_EVERY_ELSE)
    num_responses = len(prompts) * params.n
    # Random numbers are per response, so that a response does not depend on which other rows are running.
    uniform = torch.rand((limit, num_responses), dtype=torch.float64, generator=generator, device=device)
    batch = pad_sequences(prompts, [[]] * len(prompts), params.pad_token_id, device, vision)
    state = build_decoding_state(policy, batch.token_ids.shape[1] + limit, limit)
    logits = state.prefill(batch, vision).repeat_interleave(params.n, dim=0)
    state.repeat(params.n)

    sample_next = _TokenSampler(params, logits)
    stop = torch.tensor(list(params.stop_token_ids), device=device)
    tokens = torch.full((limit, num_responses), params.pad_token_id, device=device)
    log_probs = torch.zeros((limit, num_responses), device=device)
    rows = torch.arange(num_responses, device=device)  # response index of each row in the batch
    running = torch.ones_like(rows, dtype=torch.bool)
    for place in range(limit):
        token, log_prob = sample_next(logits, uniform[place, rows])
        tokens[place, rows], log_probs[place, rows] = token, log_prob  # ignored in finished rows
        if place + 1 == limit:
            break
        running &= ~torch.isin(token, stop)
        if (place + 1) % check_every == 0:
            num_running = int(running.sum())
            if num_running == 0:
                break
            if num_running <= COMPACT_BELOW * len(rows):
                kept = _fill_gaps(running, num_running)
                state.select(kept)
                rows, token, running = rows[kept], token[kept], running[kept]
        logits = state.decode(token)
    return _truncate_at_stop(tokens, log_probs, stop)


def _fill_gaps(running: Tensor, num_running: int) -> Tensor:
    """Indices of the running rows; the last rows fill the gaps, and all others keep their place."""
    kept = torch.arange(num_running, device=running.device)
    kept[~running[:num_running]] = num_running + running[num_running:].nonzero()[:, 0]
    return kept


def _truncate_at_stop(tokens: Tensor, log_probs: Tensor, stop: Tensor) -> list[Completion]:
    """Build completions from sampled tokens [T, responses], each up to its first stop token."""
    if not log_probs.isfinite().all():
        raise FloatingPointError("cannot sample: the logits are non-finite")
    stops = torch.isin(tokens, stop)
    finished = stops.any(0)
    lengths = torch.where(finished, stops.int().argmax(0) + 1, len(tokens))
    return [
        Completion(token_ids[:length], token_log_probs[:length], ended)
        for token_ids, token_log_probs, length, ended in zip(
            tokens.T.tolist(), log_probs.T.tolist(), lengths.tolist(), finished.tolist(), strict=True
        )
    ]


class _TokenSampler:
    """Sample the next token of each row."""

    def __init__(self, params: SamplingParams, logits: Tensor) -> None:
        self.params = params
        self.suppressed = torch.tensor(list(params.suppress_tokens), dtype=torch.long, device=logits.device)
        self.buffer = torch.empty_like(logits) if params.temperature > 0 and params.top_p >= 1 else None

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [rows] and their log-probabilities, from logits [rows, V], which are overwritten.

        ``uniform`` [rows] are the random numbers in [0, 1), float64.
        """
        temperature, top_p = self.params.temperature, self.params.top_p
        if len(self.suppressed):
            logits.index_fill_(-1, self.suppressed, float("-inf"))
        if temperature == 0.0:
            return logits.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
        if self.buffer is None:
            log_probs = torch.log_softmax(logits.div_(temperature), dim=-1)
            token = sample_tokens(restrict_to_nucleus(log_probs, top_p), uniform)[0]
            return token, log_probs.gather(-1, token[:, None])[:, 0]
        if temperature != 1.0:
            logits.div_(temperature)
        return sample_tokens(torch.softmax(logits, dim=-1, out=self.buffer[: len(logits)]), uniform)


def sample_tokens(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample tokens [rows] in proportion to ``weights`` [rows, V]; returns their log-probabilities too.

    Inverse transform: it finds a block of tokens, then a token in the block. Cumulative sums are short and float64, so
    large vocabularies cause no bias and tokens of weight 0 are never sampled. NaN weights give NaN log-probabilities.

    Args:
        uniform: [rows] in [0, 1), float64.
    """
    full = weights.shape[-1] // BLOCK * BLOCK
    blocks = weights[:, :full].unflatten(-1, (-1, BLOCK))
    mass = torch.cat([blocks.sum(-1), weights[:, full:].sum(-1, keepdim=True)], dim=-1).double()
    total = mass.sum(-1, keepdim=True)
    block, rest = _find(mass, uniform[:, None] * total)
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    in_block = weights.gather(-1, places.clamp(max=weights.shape[-1] - 1)).double()
    in_block = in_block.masked_fill_(places >= weights.shape[-1], 0.0)
    place, _ = _find(in_block, rest)
    log_prob = (in_block.gather(-1, place) / total).log()
    token = (block * BLOCK + place).clamp(max=weights.shape[-1] - 1)  # out of range for NaN weights
    return token[:, 0], log_prob[:, 0].float()


def _find(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Index at which the cumulative sum of ``mass`` [rows, K] passes ``target`` [rows, 1], and the remainder.

    The target is clamped below the total, so rounding never selects an entry of mass 0.
    """
    cumulative = mass.cumsum(-1)
    target = torch.minimum(target, cumulative[:, -1:].nextafter(torch.zeros_like(target)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=mass.shape[-1] - 1)
    before = torch.where(index > 0, cumulative.gather(-1, (index - 1).clamp(min=0)), 0.0)
    return index, target - before


def restrict_to_nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """Probabilities [..., V] of the tokens in the nucleus, not renormalized, and 0 for all others.

    The nucleus is the smallest set of most probable tokens with a mass of at least ``top_p``; it is never empty.
    """
    probs = log_probs.exp()
    ordered, order = probs.sort(dim=-1, descending=True)
    mass_before = ordered.cumsum(-1) - ordered
    outside = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return probs.masked_fill_(outside, 0.0)
