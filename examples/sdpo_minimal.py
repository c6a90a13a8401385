"""SDPO in one file: sample, score, reprompt, loss, step. Plain torch and transformers, one device, one loop.

    python examples/sdpo_minimal.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Self-Distillation Policy Optimization (arXiv 2601.20802). The policy answers a prompt n times. The teacher is the same
model with the solution in its prompt: it reads the policy's response and predicts a next-token distribution at each of
its tokens. The loss is the divergence between the two distributions, averaged over the response tokens. The teacher's
weights are a moving average of the policy's.

Omitted parts of ``sdpo train``: packed rows and shared prefixes, a fused loss without the logits of
all tokens, a decoder, validation, checkpoints, overlapped sampling with importance correction, GRPO blend, images,
LoRA, health checks. tests/integration/test_minimal.py checks that both losses are equal on the same rollouts.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

# 1. Settings, with the names and defaults of ``sdpo train``.


@dataclass(frozen=True)
class Settings:
    steps: int = 20
    prompts_per_step: int = 4
    n: int = 8  # rollouts per prompt
    temperature: float = 1.0
    max_response_length: int = 64
    alpha: float = 0.0  # 0 forward KL(teacher || student), 1 reverse KL, between: Jensen-Shannon
    ema_update_rate: float = 0.05
    lr: float = 1e-5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


REPROMPT = "{prompt}{solution}\n\nCorrectly solve the original question.\n"
SOLUTION = "\nCorrect solution:\n\n{solution}\n\n"

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    messages: list[Message]
    answer: str


@dataclass(frozen=True)
class Rollout:
    """A response with the student's and the teacher's prompt."""

    problem: Problem
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    response_ids: list[int]
    score: float


# 2. Sample.


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt_ids: list[int], settings: Settings) -> list[list[int]]:
    """Sample n responses to a prompt; their token ids include the end token."""
    prompt = torch.tensor([prompt_ids] * settings.n, device=model.device)
    rows = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_response_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return [truncate_after(row[len(prompt_ids) :].tolist(), tokenizer.eos_token_id) for row in rows]


def truncate_after(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


# 3. Score. SDPO with the ground truth does not use the score; it measures progress.


def score(response: str, answer: str) -> float:
    return float(answer in response)


# 4. Reprompt: insert the solution into the last user message.


def reprompt(messages: list[Message], answer: str) -> list[Message]:
    solution = SOLUTION.replace("{solution}", answer)
    before, after = REPROMPT.split("{prompt}")
    content = before + messages[-1]["content"] + after.replace("{solution}", solution)
    return [*messages[:-1], {"role": "user", "content": content}]


def encode(tokenizer: Any, messages: list[Message]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def roll_out(model: Any, tokenizer: Any, problem: Problem, settings: Settings) -> list[Rollout]:
    prompt_ids = encode(tokenizer, problem.messages)
    teacher_prompt_ids = encode(tokenizer, reprompt(problem.messages, problem.answer))
    rollouts = []
    for response_ids in sample(model, tokenizer, prompt_ids, settings):
        text = tokenizer.decode(response_ids, skip_special_tokens=True)
        value = score(text, problem.answer)
        rollouts.append(Rollout(problem, prompt_ids, teacher_prompt_ids, response_ids, value))
    return rollouts


# 5. Loss.


def compute_log_probs(model: Any, prompt_ids: list[int], response_ids: list[int], temperature: float) -> Tensor:
    """Compute next-token log-probabilities [T, V] at the T response tokens."""
    ids = torch.tensor([prompt_ids + response_ids], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)


def compute_divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Compute the divergence [T] in nats of log-probabilities [T, V].

    alpha = 0: KL(teacher || student); alpha = 1: KL(student || teacher); between: alpha KL(teacher || m) +
    (1 - alpha) KL(student || m) with m = (1 - alpha) student + alpha teacher.
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if alpha == 0.0:
        return kl(teacher, student)
    if alpha == 1.0:
        return kl(student, teacher)
    weights = torch.tensor([1.0 - alpha, alpha], device=student.device).log()
    mixture = torch.logsumexp(torch.stack([student + weights[0], teacher + weights[1]]), 0)
    return alpha * kl(teacher, mixture) + (1.0 - alpha) * kl(student, mixture)


def compute_loss(student: Any, teacher: Any, rollout: Rollout, settings: Settings) -> Tensor:
    """Compute the sum of the token losses of one rollout.

    The importance ratio student / old policy is omitted, because it is 1 with one optimizer step per batch.
    """
    student_log_probs = compute_log_probs(student, rollout.prompt_ids, rollout.response_ids, settings.temperature)
    with torch.no_grad():
        teacher_log_probs = compute_log_probs(
            teacher, rollout.teacher_prompt_ids, rollout.response_ids, settings.temperature
        )
    return compute_divergence(student_log_probs, teacher_log_probs, settings.alpha).sum()


# 6. Step.


def update(
    student: Any, teacher: Any, optimizer: torch.optim.Optimizer, rollouts: list[Rollout], settings: Settings
) -> tuple[float, float]:
    """Update the student on the mean over response tokens, then the teacher; return loss and gradient norm."""
    num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    total = 0.0
    for rollout in rollouts:
        loss = compute_loss(student, teacher, rollout, settings) / num_tokens
        loss.backward()
        total += float(loss.detach())
    norm = nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for average, weight in zip(teacher.parameters(), student.parameters(), strict=True):
            average.lerp_(weight, settings.ema_update_rate)
    return total, float(norm)


def build_optimizer(student: Any, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


def load_problems(path: Path | None) -> list[Problem]:
    """Load {"question": ..., "answer": ...} from a file of JSON lines; without a file, create small sums."""
    if path is not None:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        pairs = [(a, b) for a in range(11, 40, 3) for b in range(12, 40, 5)]
        rows = [{"question": f"What is {a} + {b}? Give the number only.", "answer": str(a + b)} for a, b in pairs]
    return [Problem([{"role": "user", "content": row["question"]}], row["answer"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name on the Hugging Face hub, or a folder")
    parser.add_argument("--data", type=Path, help="JSON lines with question and answer; default: sums")
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    settings = Settings(**{name: options[name] for name in vars(Settings())})

    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    student = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32).to(device).eval()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = build_optimizer(student, settings)
    problems = load_problems(options["data"])

    for step in range(1, settings.steps + 1):
        chosen = rng.sample(problems, settings.prompts_per_step)
        rollouts = [rollout for problem in chosen for rollout in roll_out(student, tokenizer, problem, settings)]
        loss, norm = update(student, teacher, optimizer, rollouts, settings)
        mean_score = sum(rollout.score for rollout in rollouts) / len(rollouts)
        length = sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts)
        print(
            f"step {step}  score {mean_score:.3f}  loss {loss:.4f}  grad norm {norm:.3f}  length {length:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
