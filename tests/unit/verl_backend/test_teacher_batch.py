"""The teacher's fields of verl's batch agree with ``sdpo.prompting``."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.observability import metrics
from sdpo.prompting.demonstrations import PrivilegedContext
from sdpo.prompting.tokenization import encode_teacher_prompt
from sdpo.rewards.scoring import RewardFailure
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.verl_backend.driver.one_step_off_trainer import rename_metrics
from sdpo.verl_backend.driver.teacher_batch import Rollout, TeacherBatchBuilder
from sdpo.verl_backend.rollout.reward import compute_score
from sdpo.verl_backend.worker.packing import DISTILLATION_COEF, SAMPLE_WEIGHTS, TEACHER_PROMPT_LENGTHS, TEACHER_PROMPTS

TOKENIZER = build_tokenizer()
MESSAGES = [{"role": "user", "content": "123"}]


def make_rollout(text: str, score: float, *, uid: str = "a", feedback: str | None = None) -> Rollout:
    token_ids = TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id]
    return Rollout(uid, MESSAGES, token_ids, [1] * len(token_ids), score, feedback, "321")


def test_demonstration_is_a_successful_rollout_of_the_same_group() -> None:
    config = SelfDistillationConfig(demonstration_source="successful_rollout", weight_by_prompt_difficulty=True)
    rollouts = [make_rollout("77", 0.0), make_rollout("88", 1.0), make_rollout("99", 0.0, uid="b")]
    fields, values = TeacherBatchBuilder(config, TOKENIZER, None, seed=0, max_steps=1).build(rollouts, step=1)
    expected = encode_teacher_prompt(TOKENIZER, MESSAGES, PrivilegedContext(solution="88"), config).token_ids
    assert expected is not None
    assert fields[TEACHER_PROMPT_LENGTHS].tolist() == [len(expected), 0, 0]
    assert fields[TEACHER_PROMPTS][0].tolist() == expected
    torch.testing.assert_close(fields[SAMPLE_WEIGHTS], torch.tensor([0.5, 0.5, 0.0]))
    assert values[metrics.REPROMPT_FRACTION] == pytest.approx(1 / 3)
    assert values[metrics.SUCCESS_GROUP_FRACTION] == 0.5


def test_teacher_prompt_with_feedback_and_ground_truth_fits_the_window() -> None:
    config = SelfDistillationConfig(environment_feedback_only_without_solution=False)
    rollouts = [make_rollout("77", 0.0, feedback="Expected: 321"), make_rollout("321", 1.0, feedback="")]
    build = TeacherBatchBuilder(config, TOKENIZER, 60, seed=0, max_steps=1).build
    fields, _ = build(rollouts, step=1)
    shown = TOKENIZER.decode(fields[TEACHER_PROMPTS][0, : int(fields[TEACHER_PROMPT_LENGTHS][0])])
    assert "Expected: 321" in shown and "Correct solution:\n\n321" in shown
    for length, rollout in zip(fields[TEACHER_PROMPT_LENGTHS].tolist(), rollouts, strict=True):
        assert 0 < length <= 60 - len(rollout.response_ids)


def test_tool_output_is_not_demonstrated_but_counts_towards_the_length() -> None:
    """Two turns of the policy with a tool's output between them."""
    parts = [
        ("7", 1),
        ("<|im_end|>", 1),
        ("\n<|im_start|>tool\n55555<|im_end|>\n<|im_start|>assistant\n", 0),
        ("88", 1),
    ]
    token_ids, mask = [], []
    for text, is_sampled in parts:
        ids = TOKENIZER(text)["input_ids"]
        token_ids += ids
        mask += [is_sampled] * len(ids)
    rollouts = [make_rollout("77", 0.0), Rollout("a", MESSAGES, token_ids, mask, 1.0, None, None)]
    config = SelfDistillationConfig(demonstration_source="successful_rollout", dont_reprompt_on_self_success=False)
    fields, _ = TeacherBatchBuilder(config, TOKENIZER, None, seed=0, max_steps=1).build(rollouts, step=1)
    expected = encode_teacher_prompt(TOKENIZER, MESSAGES, PrivilegedContext(solution="7\n88"), config).token_ids
    assert fields[TEACHER_PROMPTS].tolist() == [expected, expected]
    # The window must fit prompt and response; a sample that is one token too long is not distilled.
    least = len(encode_teacher_prompt(TOKENIZER, MESSAGES, PrivilegedContext(solution="7"), config).token_ids or ())
    narrow = TeacherBatchBuilder(config, TOKENIZER, least + len(token_ids) - 1, seed=0, max_steps=1)
    lengths = narrow.build(rollouts, step=1)[0][TEACHER_PROMPT_LENGTHS].tolist()
    assert lengths[0] == len(expected or ()) and lengths[1] == 0


def test_distillation_coef_follows_the_schedule_without_distilled_samples() -> None:
    config = SelfDistillationConfig(
        demonstration_source="successful_rollout", distillation_coef_start=1.0, distillation_coef_end=0.0
    )
    build = TeacherBatchBuilder(config, TOKENIZER, None, seed=0, max_steps=5).build
    fields, values = build([make_rollout("77", 0.0), make_rollout("88", 0.0)], step=3)
    assert fields[DISTILLATION_COEF].tolist() == [0.5, 0.5] and values[metrics.DISTILLATION_COEF] == 0.5
    assert fields[TEACHER_PROMPT_LENGTHS].tolist() == [0, 0]
    assert fields[TEACHER_PROMPTS].shape == (2, 1)


def test_grpo_alone_has_no_teacher_prompts() -> None:
    fields, values = TeacherBatchBuilder(SelfDistillationConfig(policy_loss_weight=1.0), TOKENIZER, None, 0, 1).build(
        [make_rollout("77", 0.0)], step=1
    )
    assert fields[TEACHER_PROMPT_LENGTHS].tolist() == [0]
    assert metrics.REPROMPT_FRACTION not in values


def test_seed_and_step_determine_the_demonstration() -> None:
    config = SelfDistillationConfig(demonstration_source="successful_rollout")
    rollouts = [make_rollout(str(i), 1.0) for i in range(8)]

    def shown(seed: int, step: int) -> list[list[int]]:
        return TeacherBatchBuilder(config, TOKENIZER, None, seed, 9).build(rollouts, step)[0][TEACHER_PROMPTS].tolist()

    assert shown(0, 1) == shown(0, 1)
    assert len({str(shown(seed, step)) for seed in (0, 1) for step in (1, 2)}) == 4


@pytest.mark.parametrize("source", ["successful_rollout", "ground_truth"])
def test_padding_and_failed_responses_are_neither_distilled_nor_counted(source: str) -> None:
    """Padding changes no metric and no other row."""
    config = SelfDistillationConfig(demonstration_source=source, weight_by_prompt_difficulty=True)  # type: ignore[arg-type]
    build = TeacherBatchBuilder(config, TOKENIZER, None, seed=0, max_steps=1).build
    rollouts = [make_rollout("77", 0.0), make_rollout("88", 1.0), make_rollout("99", math.nan)]
    plain, wanted = build(rollouts, step=1)
    fields, values = build([None, rollouts[0], None, *rollouts[1:], None], step=1)
    assert values == wanted
    assert values[metrics.ROLLOUT_SUCCESS_FRACTION] == 0.5  # of two scored
    for name in (TEACHER_PROMPTS, TEACHER_PROMPT_LENGTHS, SAMPLE_WEIGHTS, DISTILLATION_COEF):
        assert torch.equal(fields[name][[1, 3, 4]], plain[name]), name
    lengths = fields[TEACHER_PROMPT_LENGTHS].tolist()
    assert lengths[1] > 0 and [lengths[i] for i in (0, 2, 4, 5)] == [0, 0, 0, 0]
    assert fields[SAMPLE_WEIGHTS][[0, 2, 5]].tolist() == [0.0, 0.0, 0.0]


def test_prefix_that_verl_adds_to_metrics_is_removed() -> None:
    values = {"actor/self_distillation/loss": 1.0, "actor/grad_norm": 2.0, "actor/actor/entropy": 3.0}
    rename_metrics(values)
    assert values == {metrics.DISTILLATION_LOSS: 1.0, metrics.GRAD_NORM: 2.0, metrics.ENTROPY: 3.0}


def test_verl_s_reward_function_scores_a_task() -> None:
    arguments = {"task": "hidden_rule", "task_args": '{"dir": "unused"}'}
    right = compute_score("hidden_rule", " 321", "321", {"index": 3}, **arguments)
    wrong = compute_score("hidden_rule", "77", "321", None, reward_router_address=None, **arguments)
    assert right == {"score": 1.0, "acc": 1.0, "feedback": ""}
    assert wrong == {"score": 0.0, "acc": 0.0, "feedback": "Expected: 321"}
    assert math.isfinite(right["score"])


def test_time_limit_of_a_task_applies_in_a_thread(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "import time\ndef compute_score(row, response):\n    time.sleep(float(response))\n    return 1.0"
    )
    arguments = {"task": str(tmp_path / "task.py"), "task_args": "{}", "timeout_s": 0.3}
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(compute_score, "sums", "0", None, **arguments).result()["score"] == 1.0
        with pytest.raises(RewardFailure, match=r"^sums: no score within reward\.timeout_s=0\.3 seconds"):
            thread.submit(compute_score, "sums", "60", None, **arguments).result()
