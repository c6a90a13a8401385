"""Operations and reads of the device in an update of the policy, on the path that it takes on a GPU.

Stand-ins: for torch's attention kernel, and Triton's interpreter for the loss. torch's fused AdamW runs on a CPU too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operation_counter import OperationCounter
from transformers import LlamaConfig, LlamaForCausalLM
from varlen import varlen_attn

pytest.importorskip("triton", reason="has no wheel for this system")

from sdpo.config.root import SDPOConfig
from sdpo.kernels import dispatch
from sdpo.models import optimizer
from sdpo.models.packing import attention, support
from sdpo.trainer.actor import statistics
from sdpo.trainer.actor.build import build_actor
from sdpo.trainer.data.samples import TrainingSample

NUM_PROMPTS, NUM_ROLLOUTS, VOCAB_SIZE = 4, 8, 96
# Number of layers, of heads and tied embeddings as in SmolLM2-135M; numbers of operations do not depend on sizes.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 36,
    "intermediate_size": 64,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture
def samples(make_sample: Callable[..., TrainingSample]) -> list[TrainingSample]:
    """32 samples of 3 tokens; the teacher's prompts of a group begin equally and have different lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    made: list[TrainingSample] = []
    for _ in range(NUM_PROMPTS):
        prompt: Any = ids(40)
        context = [*prompt, *ids(30)]
        for i in range(NUM_ROLLOUTS):
            made.append(make_sample(prompt, ids(3), [*context, *ids(i)], log_probs=[-3.0] * 3, advantage=0.1 * i))
            prompt = made[-1].prompt
    return made


@pytest.mark.parametrize(
    ("settings", "max_operations", "max_reads"),
    [
        ({}, 11_300, 2),
        pytest.param(
            {"self_distillation__alpha": 0.5, "self_distillation__distillation_topk": 20},
            11_600,
            2,
            marks=pytest.mark.slow,
        ),
        # Two updates: a forward pass for the old policy, which a KL to the reference model also takes.
        pytest.param(
            {"actor__mini_batch_size": 2, "actor__kl_loss_coef": 0.1, "health__ref_kl_interval": 1},
            25_300,
            5,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_update_takes_few_operations_and_reads(
    settings: dict[str, Any],
    max_operations: int,
    max_reads: int,
    samples: list[TrainingSample],
    make_run: Callable[..., SDPOConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (attention, support):
        monkeypatch.setattr(module, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "ENABLE_GQA", True)
    monkeypatch.setattr(dispatch, "has_cuda_kernels", lambda _: True)
    monkeypatch.setattr(dispatch, "kernels_agree", lambda *_: True)
    adamw = torch.optim.AdamW
    monkeypatch.setattr(optimizer.torch.optim, "AdamW", lambda *args, **kwargs: adamw(*args, **kwargs, fused=True))

    config = make_run(data__train_batch_size=NUM_PROMPTS, rollout__n=NUM_ROLLOUTS, **settings)
    torch.manual_seed(0)
    actor = build_actor(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(), config, pad_token_id=0)
    actor.update_policy(samples)  # the first update allocates moments

    counter = OperationCounter(may_read=True)
    counter.leave_out_kernels(monkeypatch)
    reads: Counter[str] = Counter()
    read_together = statistics.read_together

    def count_read(*args: Any) -> Any:
        reads["read_together"] += 1
        return counter.pause(read_together)(*args)

    monkeypatch.setattr(statistics, "read_together", count_read)
    monkeypatch.setattr("sdpo.trainer.actor.log_probs.read_together", count_read)
    # Batches are built on the host.
    monkeypatch.setattr(actor.collator, "collate", counter.pause(actor.collator.collate))
    with counter:
        actor.update_policy(samples)
    assert reads["read_together"] > 0
    assert (reads + counter.reads).total() <= max_reads, (reads, counter.reads)
    assert 0.9 * max_operations < counter.num_operations <= max_operations, counter.counts.most_common(20)
