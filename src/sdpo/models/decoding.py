"""Batched sampling with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sdpo.algorithm.teacher import Policy
from sdpo.models.forward import PaddedSequences, compute_logits, pad_sequences
from sdpo.models.processing import TokenPrompt
from sdpo.models.vision import SeenImages, Vision


@dataclass(frozen=True)
class Decoding:
    """How to decode. ``temperature=0`` is greedy; forbidden tokens are never drawn."""

    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    batch_size: int
    stop_token_ids: Sequence[int]
    pad_token_id: int
    forbidden_token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        token_ids: with the stop token at the end if it was reached.
        log_probs: of each token under the distribution that it was drawn from: after temperature and top-p, without
            forbidden tokens (0 where decoding is greedy).
        finished: whether it ended by itself, and not at ``max_new_tokens``.
    """

    token_ids: list[int]
    log_probs: list[float]
    finished: bool


@torch.no_grad()
def sample_responses(
    policy: Policy,
    prompts: Sequence[TokenPrompt],
    decoding: Decoding,
    seed: int,
    vision: Vision | None = None,
) -> list[list[Response]]:
    """``decoding.n`` responses to each prompt, in the prompts' order; the same seed gives the same responses.

    Prompts of similar length are decoded together; a prompt, images included, is read once for all of its responses; a
    response that has ended leaves the batch once half of the batch has. ``vision`` is of the policy's models, where
    they read images.
    """
    device = next(policy[0][0].parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    prompts_at_once = max(1, decoding.batch_size // decoding.n)
    responses: list[list[Response]] = [[] for _ in prompts]
    training = [module.training for module, _ in policy]
    for module, _ in policy:
        module.eval()
    for start in range(0, len(by_length), prompts_at_once):
        chosen = by_length[start : start + prompts_at_once]
        sampled = _sample_batch(policy, [prompts[i] for i in chosen], decoding, generator, vision)
        for place, i in enumerate(chosen):
            responses[i] = sampled[place * decoding.n : (place + 1) * decoding.n]
    for (module, _), was_training in zip(policy, training, strict=True):
        module.train(was_training)
    return responses


def _sample_batch(
    policy: Policy,
    prompts: Sequence[TokenPrompt],
    decoding: Decoding,
    generator: torch.Generator,
    vision: Vision | None,
) -> list[Response]:
    device = generator.device
    batch = pad_sequences(prompts, [[]] * len(prompts), decoding.pad_token_id, device, vision)
    state = _DecodingState(policy)
    logits = state.read_prompts(batch, vision)
    state.repeat(decoding.n)
    logits = logits.repeat_interleave(decoding.n, dim=0)

    num_responses = len(prompts) * decoding.n
    stop = torch.tensor(list(decoding.stop_token_ids), device=device)
    tokens = torch.full((num_responses, decoding.max_new_tokens), decoding.pad_token_id, device=device)
    log_probs = torch.zeros((num_responses, decoding.max_new_tokens), device=device)
    lengths = torch.full((num_responses,), decoding.max_new_tokens, device=device)
    finished = torch.zeros(num_responses, dtype=torch.bool, device=device)
    rows = torch.arange(num_responses, device=device)  # which response each row of the batch is
    for place in range(decoding.max_new_tokens):
        token, log_prob = _pick(logits, decoding, generator)
        active = ~finished[rows]
        tokens[rows[active], place] = token[active]
        log_probs[rows[active], place] = log_prob[active]
        ended = rows[active & torch.isin(token, stop)]
        lengths[ended] = place + 1
        finished[ended] = True
        active = ~finished[rows]
        num_active = int(active.sum())
        if num_active == 0 or place + 1 == decoding.max_new_tokens:
            break
        if num_active <= len(rows) // 2:
            state.select(active.nonzero()[:, 0])
            rows, token = rows[active], token[active]
        logits = state.read(token)
    return [
        Response(tokens[i, :length].tolist(), log_probs[i, :length].tolist(), bool(done))
        for i, (length, done) in enumerate(zip(lengths.tolist(), finished.tolist(), strict=True))
    ]


class _DecodingState:
    """The caches of a policy's modules, the mask of what has been read and the last positions, row by row."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.caches: list[Any] = [DynamicCache(config=module.config) for module, _ in policy]

    def read_prompts(self, prompts: PaddedSequences, vision: Vision | None) -> Tensor:
        """Logits [rows, V] after each prompt."""
        self.mask = prompts.attention_mask
        self.axes = prompts.position_ids.shape[:-2]  # () or (3,)
        self.last_position = prompts.position_ids.amax(-1).reshape(-1, len(self.mask)).amax(0)
        return self._forward(prompts.token_ids, prompts.position_ids, prompts.images, vision)

    def read(self, token: Tensor) -> Tensor:
        """Read one more token [rows]; logits [rows, V] after it."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        self.last_position = self.last_position + 1
        return self._forward(token[:, None], self.last_position[:, None].expand(*self.axes, -1, 1), (), None)

    def _forward(
        self, token_ids: Tensor, position_ids: Tensor, images: Sequence[bytes], vision: Vision | None
    ) -> Tensor:
        total: Tensor | None = None
        for (module, coefficient), cache in zip(self.policy, self.caches, strict=True):
            logits = compute_logits(
                module,
                token_ids,
                self.mask,
                position_ids,
                1,
                vision=vision,
                features=SeenImages(module, vision.reader).select(images) if vision is not None and images else (),
                cache=cache,
            )
            logits = logits[:, -1].float() * coefficient
            total = logits if total is None else total + logits
        assert total is not None
        return total

    def repeat(self, n: int) -> None:
        self.mask = self.mask.repeat_interleave(n, dim=0)
        self.last_position = self.last_position.repeat_interleave(n, dim=0)
        for cache in self.caches:
            cache.batch_repeat_interleave(n)

    def select(self, rows: Tensor) -> None:
        self.mask, self.last_position = self.mask[rows], self.last_position[rows]
        for cache in self.caches:
            cache.batch_select_indices(rows)


def _pick(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if decoding.forbidden_token_ids:
        logits[:, list(decoding.forbidden_token_ids)] = float("-inf")
    if decoding.temperature == 0.0:
        token = logits.argmax(dim=-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    log_probs = compute_sampling_log_probs(logits, decoding.temperature, decoding.top_p)
    token = torch.multinomial(log_probs.exp(), 1, generator=generator)
    return token[:, 0], log_probs.gather(-1, token)[:, 0]


def compute_sampling_log_probs(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probabilities [..., V] that tokens are drawn with: temperature, then the nucleus, renormalised.

    The nucleus is the smallest set of likeliest tokens whose mass reaches ``top_p``; it is never empty.
    """
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_p >= 1.0:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return torch.log_softmax(log_probs.masked_fill(outside, float("-inf")), dim=-1)
