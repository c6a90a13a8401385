"""Check before training that a model computes the same in a batch as in a forward pass of one sequence.

Some models mix the rows of a batch, or read padding: their log-probabilities would depend on a sample's neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdpo.errors import ConfigError
from sdpo.models.forward import compute_hidden, compute_logits, pad_sequences
from sdpo.models.generation.sampling import SamplingParams, sample_responses
from sdpo.models.multimodal.processor import TokenPrompt

# Mean difference of log-probabilities, in nats, that rounding can explain.
TOLERANCE = {torch.float32: 1e-2}
TOLERANCE_IN_HALF_PRECISION = 0.3
PROMPT_LENGTHS = (3, 19)
NUM_TOKENS = 4


@torch.no_grad()
def check_exactness(model: nn.Module, pad_token_id: int) -> None:
    """Compare padded rows and sampling with forward passes of single sequences.

    Raises:
        ConfigError: they differ, or the model cannot be read in this way.
    """
    param = next(model.parameters())
    if param.is_meta:  # a model without weights, used for counting
        return
    was_training = model.training
    prompts = [TokenPrompt([3 + i % 7 for i in range(length)]) for length in PROMPT_LENGTHS]
    decoding = SamplingParams(2, NUM_TOKENS, 1.0, 1.0, 4, [], pad_token_id)
    try:
        model.eval()
        sampled = [
            (prompt, response)
            for prompt, responses in zip(prompts, sample_responses([(model, 1.0)], prompts, decoding, 0), strict=True)
            for response in responses
        ]
        expected = [_compute_log_probs(model, [*prompt.token_ids, *response.token_ids]) for prompt, response in sampled]
        difference = _mean_difference([response.log_probs for _, response in sampled], expected)
        rows = pad_sequences(prompts, [[3, 4]] * 2, pad_token_id, param.device)
        alone = [compute_hidden(model, pad_sequences([prompt], [[3, 4]], 0, param.device)) for prompt in prompts]
        together, apart = _predict(model, compute_hidden(model, rows)), _predict(model, torch.cat(alone))
        difference = max(difference, float((together - apart).abs().mean()))
    except Exception as error:  # models may raise anything for inputs that they do not expect
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"model.path: {type(model).__name__} cannot be sampled from or read in batches ({reason:.200}); use "
            "another model"
        ) from error
    finally:
        model.train(was_training)
    if not difference <= TOLERANCE.get(param.dtype, TOLERANCE_IN_HALF_PRECISION):
        raise ConfigError(
            f"model.path: {type(model).__name__} computes other log-probabilities in a batch than for one sequence "
            f"({difference:.2g} nats on average); use another model"
        )


def _compute_log_probs(model: nn.Module, token_ids: Sequence[int]) -> list[float]:
    """Log-probabilities of the last ``NUM_TOKENS`` tokens of one sequence."""
    row = pad_sequences([TokenPrompt(token_ids)], [[]], 0, next(model.parameters()).device)
    logits = compute_logits(model, row.token_ids, None, row.position_ids, NUM_TOKENS + 1)[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, row.token_ids[0, -NUM_TOKENS:, None])[:, 0].tolist()


def _mean_difference(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    return float((torch.tensor(found) - torch.tensor(expected)).abs().mean())


def _predict(model: nn.Module, hidden: Tensor) -> Tensor:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    logits: Tensor = head(hidden)
    return logits.float().log_softmax(-1)
