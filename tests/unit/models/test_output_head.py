"""Logits computed from hidden states against the model's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from sdpo.algorithm.batch import TokenBatch
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.errors import SDPOError
from sdpo.kernels.chunked_log_probs import LinearHead, score_tokens
from sdpo.kernels.fused_linear_loss import fused_linear_sdpo_loss
from sdpo.models.output_head import build_linear_head, compute_dense_logits, measure_logit_scale, suppress_tokens

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
def test_logits_equal_those_of_the_model(name: str) -> None:
    model = build(name)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        expected = model(input_ids=ids).logits[0]
    assert measure_logit_scale(model) == 1.0
    torch.testing.assert_close(compute_dense_logits(build_linear_head(model, hidden)), expected, atol=1e-5, rtol=1e-5)
    half = compute_dense_logits(build_linear_head(model, hidden, 0.5))
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
def test_scale_without_a_config_key_is_measured(dtype: torch.dtype) -> None:
    model = change_logits(build("multiplied").to(dtype).train(), lambda logits: logits * -2.5)
    assert measure_logit_scale(model) == pytest.approx(-2.5, rel=1e-5 if dtype == torch.float32 else 5e-3)
    assert model.training


@pytest.mark.parametrize("change", [torch.sigmoid, lambda logits: logits + 1.0, lambda logits: logits * float("nan")])
def test_other_transformations_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = change_logits(build("divided"), change)
    with pytest.raises(SDPOError, match="GraniteForCausalLM computes logits from hidden states in an unsupported way"):
        measure_logit_scale(model)


@pytest.mark.parametrize("softcap", [None, 20.0], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("own_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"alpha": 0.5, "policy_loss_weight": 0.3},
        {"alpha": 1.0, "teacher_regularization": "trust-region"},
        {"alpha": 0.5, "distillation_topk": 5},
        {"alpha": 1.0, "full_logit_distillation": False},
        {"alpha": 0.5, "teacher_entropy_beta": 0.5},
    ],
    ids=str,
)
def test_suppressed_tokens_are_excluded_from_the_loss(
    settings: dict[str, Any], own_bias: bool, softcap: float | None
) -> None:
    """Loss, metrics, gradients, log-probs and entropies equal those of a model with a smaller vocabulary."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, vocab_size, forbidden = 12, 40, [3, 17, 38, 39]
    allowed = [i for i in range(vocab_size) if i not in forbidden]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    config = SelfDistillationConfig(**settings)
    weight, bias = draw(vocab_size, 8), draw(vocab_size)
    bias[forbidden] += 5.0  # likely without suppression
    coefficients = [0.95, 0.05] if settings.get("teacher_regularization") == "trust-region" else [1.0]
    hidden, teachers = draw(num_tokens, 8), [draw(num_tokens, 8) for _ in coefficients]
    places = torch.randint(len(allowed), (num_tokens,), generator=generator)
    old = draw(num_tokens, scale=0.1) - 3.0

    def compute(rows: list[int], sampled: Tensor, names: Sequence[int]) -> tuple[Any, ...]:
        leaves = [hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()]
        own = bias[rows] if own_bias else None
        student = suppress_tokens(LinearHead(leaves[0], leaves[1], own, softcap), names)
        teacher = [
            suppress_tokens(LinearHead(each, weight[rows] * 0.9, own, softcap, coefficient), names)
            for each, coefficient in zip(teachers, coefficients, strict=True)
        ]
        tokens = TokenBatch(
            sampled,
            old_log_probs=old,
            policy_weights=torch.full_like(old, 0.1),
            advantages=torch.ones_like(old),
            distilled=torch.ones_like(sampled, dtype=torch.bool),
            distillation_weights=torch.full_like(old, 0.1),
        )
        outputs = fused_linear_sdpo_loss(student, teacher, tokens, config, temperature=0.7)
        outputs.loss.backward()
        scores = score_tokens(student, sampled, temperature=0.7)
        return outputs, [leaf.grad for leaf in leaves], scores

    outputs, (grad_hidden, grad_weight), scores = compute(
        list(range(vocab_size)), torch.tensor(allowed)[places], forbidden
    )
    wanted, (wanted_by_hidden, wanted_by_weight), wanted_scores = compute(allowed, places, ())
    torch.testing.assert_close(outputs.loss, wanted.loss)
    torch.testing.assert_close(grad_hidden, wanted_by_hidden)
    torch.testing.assert_close(grad_weight[allowed], wanted_by_weight)
    assert grad_weight[forbidden].abs().max() < 1e-9
    for ours, theirs in zip(scores, wanted_scores, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name, (total, _) in wanted.sums.items():
        torch.testing.assert_close(outputs.sums[name][0], total, msg=name)
    assert torch.isfinite(outputs.token_losses).all()
