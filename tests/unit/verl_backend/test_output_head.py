"""Results computed inside the output layer agree with the logits of a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from sdpo.errors import SDPOError
from sdpo.kernels.chunked_log_probs import LinearHead, score_tokens
from sdpo.verl_backend.worker.output_head import compute_at_head

SHAPE: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CAP = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.5}
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
NEXT = torch.tensor([4, 5, 6, 7, 2, 9, 10, 2])

MakeModel = Callable[..., PreTrainedModel]


def build(family: str, make_model: MakeModel) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "soft-cap":
        model: PreTrainedModel = Gemma2ForCausalLM(Gemma2Config(**SHAPE, **CAP))
    elif family == "scale":
        model = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=0.25))
    else:
        return make_model(tie_word_embeddings=family == "tied")
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.4)
    return model.eval()


def compute_token_losses(logits: LinearHead) -> Tensor:
    """Return the summed negative log-likelihood of the next tokens, from dense logits."""
    dense = logits.hidden @ logits.weight.T
    if logits.softcap is not None:
        dense = logits.softcap * torch.tanh(dense / logits.softcap)
    return nn.functional.cross_entropy(dense, NEXT, reduction="sum")


@pytest.mark.parametrize("family", ["untied", "tied", "soft-cap", "scale"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_loss_and_gradients_match_the_model_s_logits(family: str, packed: bool, make_model: MakeModel) -> None:
    model = build(family, make_model)
    if packed:
        ids = IDS[MASK.bool()][None]
        inputs = {"input_ids": ids, "attention_mask": None, "position_ids": torch.arange(5).repeat(2)[None, :8]}
    else:
        inputs = {"input_ids": IDS, "attention_mask": MASK}
    logits = model(**inputs, use_cache=False).logits
    expected = nn.functional.cross_entropy(logits[0] if packed else logits[MASK.bool()], NEXT, reduction="sum")
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = compute_at_head(model, inputs, slice(None), compute_token_losses)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for found, wanted in zip(torch.autograd.grad(3 * loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(found, 3 * wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model(**inputs, use_cache=False).logits, logits, msg="the output layer makes logits again"
    )


@pytest.mark.parametrize("family", ["untied", "soft-cap", "scale"])
def test_chunked_log_probs_and_entropies_match_the_model_s_logits(
    family: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, make_model)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        distribution = (model(**inputs, use_cache=False).logits[MASK.bool()] / 0.7).log_softmax(-1)
    monkeypatch.setattr("sdpo.kernels.chunked_log_probs.BUFFER_BYTES", 3 * 12 * 4)
    read = partial(score_tokens, sampled_ids=NEXT, temperature=0.7)
    log_probs, entropies = compute_at_head(model, inputs, slice(None), read)
    torch.testing.assert_close(log_probs, distribution.gather(1, NEXT[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, -(distribution.exp() * distribution).sum(-1), rtol=0, atol=1e-5)


def test_computation_receives_only_the_selected_rows(make_model: MakeModel) -> None:
    model, inputs = make_model(), {"input_ids": IDS, "attention_mask": MASK}
    hidden = model.model(**inputs).last_hidden_state[MASK.bool()]
    rows = torch.tensor([5, 1, 1])
    found = compute_at_head(model, inputs, rows, lambda logits: logits.hidden.detach())
    torch.testing.assert_close(found, hidden[rows])


def scale_twice(model: Any) -> None:
    forward = model.forward

    def scaled(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits * 2.0
        return output

    model.forward = scaled


def replace_head(model: Any) -> None:
    model.lm_head = nn.Bilinear(16, 16, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale_twice, "Qwen2ForCausalLM transforms its logits .* does not support"),
        (replace_head, "is not a plain linear layer"),
    ],
)
def test_unsupported_output_layer_is_refused(
    change: Callable[[Any], None], message: str, make_model: MakeModel
) -> None:
    model = make_model()
    change(model)
    with pytest.raises(SDPOError, match=message):
        compute_at_head(model, {"input_ids": IDS, "attention_mask": MASK}, slice(None), compute_token_losses)
