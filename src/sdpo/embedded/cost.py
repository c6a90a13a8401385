"""What a run would cost, from its settings and the model's architecture alone: an upper bound of tokens, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdpo.config import Run
from sdpo.models.loading import build_meta_model

BYTES = {"float32": 4, "bfloat16": 2}
# Values of hidden size that a transformer layer keeps for its backward pass, a token: Korthikanti et al.
# (arXiv 2205.05198), eq. 2 without dropout and without the attention matrix, which flash and SDPA kernels never store.
ACTIVATIONS_PER_LAYER = 17


@dataclass(frozen=True)
class Cost:
    """Upper bounds. Memory is in bytes by what needs it, the learner's device first."""

    tokens_a_step: int
    num_params: int | None
    learner: dict[str, int]
    sampler: dict[str, int]


def estimate_cost(run: Run) -> Cost:
    """Tokens a step, and memory of learner and sampler; no memory where the model is only made on first use."""
    sequences = run.data.train_batch_size * run.sampler.n
    longest = run.data.max_prompt_length + run.sampler.max_response_length
    tokens = sequences * longest
    if run.data.task_args.get("dir") and not Path(run.model.path).exists():
        return Cost(tokens, None, {}, {})
    model = build_meta_model(run.model)
    shape = model.config.get_text_config()
    num_params = sum(p.numel() for p in model.parameters())
    size = BYTES[run.model.dtype]
    weights = num_params * size
    config = run.self_distillation
    has_module = config.distills and config.teacher_regularization != "live"
    has_average = config.distills and config.teacher_regularization == "ema" and size < 4

    micro_tokens = min(max(run.learner.micro_batch_tokens, longest), tokens)
    scored = min(micro_tokens, sequences * run.sampler.max_response_length)
    kept = 1 if run.learner.gradient_checkpointing else ACTIVATIONS_PER_LAYER
    activation_size = 2 if run.learner.autocast else size
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    learner = {
        "student": weights,
        "gradients": weights,
        "AdamW's moments": 2 * weights,
        "teacher": weights * has_module,
        "teacher's float32 average": num_params * 4 * has_average,
        "activations of a micro-batch": micro_tokens
        * shape.num_hidden_layers
        * shape.hidden_size
        * kept
        * activation_size,
        # Student's logits, log-probabilities and their gradient; the teacher's log-probabilities and a product.
        "logits of a micro-batch": scored * shape.vocab_size * 4 * (5 if config.distills else 3),
    }
    decoded = min(max(run.sampler.batch_size, run.sampler.n), sequences)
    sampler = {
        "weights": weights if run.staleness or run.sampler.device != run.learner.device else 0,
        "key-value cache": decoded * longest * shape.num_hidden_layers * kv_heads * head_size * 2 * size,
    }
    return Cost(tokens, num_params, learner, sampler)
