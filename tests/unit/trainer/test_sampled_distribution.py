"""An unchanged policy has importance weight 1: the sampler's distribution is the actor's, over the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo.config.root import SDPOConfig
from sdpo.models.loading import find_unknown_ids
from sdpo.observability import metrics
from sdpo.observability.progress import NullCallback
from sdpo.trainer.build import build_components
from sdpo.trainer.trainer import SDPOTrainer

MakeRun = Callable[..., SDPOConfig]


@pytest.fixture(scope="module")
def padded_model(hidden_rule_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 300 more rows than its tokenizer has tokens, which hold most of the probability."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    model = AutoModelForCausalLM.from_pretrained(hidden_rule_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(hidden_rule_dir / "model")
    size = len(tokenizer)
    model.resize_token_embeddings(size + 300)
    with torch.no_grad():
        model.get_output_embeddings().weight[size:] = model.get_output_embeddings().weight[:size].mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weight_of_an_unchanged_policy_is_1(
    top_p: float, temperature: float, make_task_run: MakeRun, padded_model: Path
) -> None:
    run = make_task_run(
        model__path=str(padded_model), max_steps=1, rollout__top_p=top_p, rollout__temperature=temperature
    )
    SDPOTrainer(run).train()
    values = json.loads((Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    assert values[metrics.ROLLOUT_IS_MEAN] == pytest.approx(1.0, abs=1e-5)
    assert values[metrics.ROLLOUT_KL] == pytest.approx(0.0, abs=1e-5)
    assert values[metrics.ROLLOUT_IS_CLIP_FRACTION] == 0.0


def test_ids_that_the_tokenizer_does_not_have_are_never_sampled_and_do_not_train(
    make_task_run: MakeRun, padded_model: Path
) -> None:
    run = make_task_run(model__path=str(padded_model), rollout__n=20)
    parts = build_components(run, NullCallback())
    size = len(AutoTokenizer.from_pretrained(padded_model))
    prompts = [prompt.tokens for prompt in parts.prompts[:4]]
    with torch.no_grad():
        logits = parts.actor.student(torch.tensor([list(prompts[0].token_ids)])).logits[0, -1]
    assert logits.softmax(-1)[size:].sum() > 0.3, "without the mask, many ids would be unknown"
    parts.sampler.submit(prompts, 1)
    rollouts = parts.sampler.collect()
    drawn = [token for group in rollouts.responses for one in group for token in one.token_ids]
    assert len(drawn) > 200 and max(drawn) < size
    parts.folder.close()
    run = make_task_run(model__path=str(padded_model), max_steps=2, optim__weight_decay=0.0)
    SDPOTrainer(run).train()
    trained = AutoModelForCausalLM.from_pretrained(Path(run.output_dir) / "checkpoints" / "step_2")
    before, after = (
        model.get_output_embeddings().weight for model in (AutoModelForCausalLM.from_pretrained(padded_model), trained)
    )
    assert torch.equal(before[size:], after[size:]) and not torch.equal(before[:size], after[:size])


def test_unknown_ids_are_those_without_a_token_holes_included(padded_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(padded_model)
    size = len(tokenizer)
    assert find_unknown_ids(tokenizer, size) == []
    assert find_unknown_ids(tokenizer, size + 3) == [size, size + 1, size + 2]
    known = tokenizer.get_vocab()
    word = next(word for word, token_id in known.items() if token_id == 7)

    class WithHole:
        added_tokens_decoder = tokenizer.added_tokens_decoder

        def get_vocab(self) -> dict[str, int]:
            return {text: token_id for text, token_id in known.items() if text != word}

    assert find_unknown_ids(WithHole(), size + 1) == [7, size]  # type: ignore[arg-type]
