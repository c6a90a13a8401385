"""Responses of several turns: student and teacher read a tool's output, which has no loss."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedModel
from verl.workers.utils.padding import left_right_2_no_padding

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.fused_linear_loss import FusedOutputs, fused_linear_sdpo_loss
from sdpo.rewards.toy.hidden_rule import build_model
from sdpo.verl_backend.worker.packing import (
    DISTILLATION_COEF,
    DISTILLATION_WEIGHTS,
    POLICY_WEIGHTS,
    SAMPLE_NUMBERS,
    TEACHER_PROMPT_LENGTHS,
    TEACHER_PROMPTS,
    pack_tokens,
)

# Two rollouts. The first has two sampled tokens, three tokens of a tool and two sampled tokens.
# The second has two sampled tokens.
PROMPTS = [[3, 4, 5], [6]]
RESPONSES = [[10, 11, 20, 21, 22, 12, 13], [14, 15]]
MASKS = [[1, 1, 0, 0, 0, 1, 1], [1, 1]]
TEACHERS = [[7, 8], [9, 8, 7, 6]]
WEIGHTS = torch.tensor([0.1, 0.3], dtype=torch.float64)  # of each token, by rollout


def make_batch(responses: list[list[int]], masks: list[list[int]], masked: float = 0.0) -> TensorDict:
    """Build a padded batch as on verl's driver, with ``masked`` values at masked tokens."""
    ids, attention = torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 10, dtype=torch.long)
    values = torch.full((2, 7), masked)
    mask = torch.zeros(2, 7, dtype=torch.long)
    teachers = torch.zeros(2, 4, dtype=torch.long)
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        ids[i, 3 - len(prompt) : 3 + len(response)] = torch.tensor([*prompt, *response])
        attention[i, 3 - len(prompt) : 3 + len(response)] = 1
        mask[i, : len(response)] = torch.tensor(masks[i])
        teachers[i, : len(TEACHERS[i])] = torch.tensor(TEACHERS[i])
    old = torch.arange(14.0).view(2, 7)
    fields = {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "prompts": ids[:, :3].clone(),
        "responses": ids[:, 3:].clone(),
        "response_mask": mask,
        "old_log_probs": torch.where(mask.bool(), -old, values),
        "advantages": torch.where(mask.bool(), old, values),
        TEACHER_PROMPTS: teachers,
        TEACHER_PROMPT_LENGTHS: torch.tensor([len(prompt) for prompt in TEACHERS]),
        POLICY_WEIGHTS: WEIGHTS,
        DISTILLATION_WEIGHTS: WEIGHTS,
        DISTILLATION_COEF: torch.ones(2),
        SAMPLE_NUMBERS: torch.arange(2),
    }
    return left_right_2_no_padding(TensorDict(fields, batch_size=2))


def test_packed_rows_match_hand_computed_rows() -> None:
    """The student's packed row has prompt and response of each sequence: 3 + 7 and 1 + 2 tokens."""
    packed = pack_tokens(make_batch(RESPONSES, MASKS))
    # A row predicts the next token; the tool's tokens are rows 5, 6, 7 of the first sequence.
    assert packed.rows.tolist() == [2, 3, 7, 8, 10, 11]
    assert packed.inputs.sampled_ids.tolist() == [10, 11, 12, 13, 14, 15]
    assert packed.inputs.old_log_probs is not None and packed.inputs.advantages is not None
    assert packed.inputs.advantages.tolist() == [0, 1, 5, 6, 7, 8]
    assert packed.inputs.old_log_probs.tolist() == [0, -1, -5, -6, -7, -8]
    # The teacher reads the complete responses after its prompts of 2 and 4 tokens.
    assert [sequence.tolist() for sequence in packed.teacher_sequences] == [
        [7, 8, 10, 11, 20, 21, 22, 12, 13],
        [9, 8, 7, 6, 14, 15],
    ]
    assert packed.teacher_rows.tolist() == [1, 2, 6, 7, 12, 13]


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model(40).double()


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    torch.manual_seed(1)
    return build_model(40).double()


def compute(batch: TensorDict, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[FusedOutputs, list[Tensor]]:
    """Return the loss and the student's gradients, from hidden states of each sequence, packed as in verl."""

    def read(model: PreTrainedModel, sequences: list[Tensor]) -> Tensor:
        return torch.cat([model.model(sequence[None]).last_hidden_state[0] for sequence in sequences])

    packed = pack_tokens(batch)
    own = read(student, list(batch["input_ids"].unbind()))[packed.rows]
    others = read(teacher, packed.teacher_sequences)[packed.teacher_rows]
    config = SelfDistillationConfig(alpha=0.0, is_clip=None)
    outputs = fused_linear_sdpo_loss(
        LinearHead(own, student.lm_head.weight), [LinearHead(others, teacher.lm_head.weight)], packed.inputs, config
    )
    return outputs, list(torch.autograd.grad(outputs.loss, list(student.parameters())))


def test_loss_and_gradients_match_dense_logits_at_sampled_tokens(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        log_probs = {}
        for name, model, prompt in (("student", student, PROMPTS[i]), ("teacher", teacher, TEACHERS[i])):
            logits = model(torch.tensor([[*prompt, *RESPONSES[i]]])).logits[0].log_softmax(-1)
            log_probs[name] = logits[len(prompt) - 1 : -1]
        for place, counts in enumerate(MASKS[i]):
            if counts:
                p, q = log_probs["teacher"][place], log_probs["student"][place]
                expected = expected + WEIGHTS[i] * (p.exp() * (p - q)).sum()
    outputs, gradients = compute(make_batch(RESPONSES, MASKS), student, teacher)
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-12, atol=0)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_tool_tokens_are_context_and_their_values_are_ignored(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    plain, gradients = compute(make_batch(RESPONSES, MASKS), student, teacher)
    garbled, same = compute(make_batch(RESPONSES, MASKS, masked=-9.0), student, teacher)
    assert torch.equal(plain.loss, garbled.loss)
    assert all(map(torch.equal, gradients, same))

    another = [[10, 11, 30, 31, 32, 12, 13], RESPONSES[1]]
    other, _ = compute(make_batch(another, MASKS), student, teacher)
    # Tokens before the tool's output and tokens of the other rollout are unchanged; tokens after it are not.
    for name in ("student_log_probs", "teacher_log_probs", "token_losses"):
        difference = (getattr(other, name) - getattr(plain, name)).abs()
        assert difference[[0, 1, 4, 5]].max() < 1e-12, name
        assert difference[[2, 3]].min() > 1e-6, name
