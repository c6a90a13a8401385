"""Workload of the benchmarks: a random Qwen2, prompts of exact lengths, responses that never end early.

This file is also the task of the benchmarks of complete steps. Every response fails and gets the row's ground truth as
feedback, so that every sample is distilled and the length of every teacher prompt is known beforehand.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.config.loader import load_config
from sdpo.config.root import SDPOConfig

END = "<|never|>"  # probability 0


def compute_score(row: Any, response: str) -> dict[str, Any]:
    return {"score": 0.0, "feedback": row.ground_truth}


@dataclass(frozen=True)
class Workload:
    """Sizes of a step, lengths in tokens; the prompt's length includes the chat template."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int = 4
    dtype: str = "float32"
    num_prompts: int = 8
    n: int = 8
    prompt_length: int = 56
    response_length: int = 64
    feedback_length: int = 32

    def build_model(self, pad_token_id: int | None = None) -> Any:
        """Build the random Qwen2, for benchmarks without text."""
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=pad_token_id,
        )
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        # No layer changes the first entry of a hidden state. This entry gives the last token, which would end a
        # response, the probability 0.
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight
            embeddings[:, 0] = 1.0
            embeddings[-1] = 0.0
            embeddings[-1, 0] = -1e4
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = 0.0
                layer.mlp.down_proj.weight[0] = 0.0
        return model.to(getattr(torch, self.dtype))

    def write(self, folder: Path) -> None:
        """Write ``model/``, ``train.parquet`` and ``run.yaml`` to the folder."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = build_tokenizer(self.vocab_size)
        self.build_model(tokenizer.pad_token_id).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        pq.write_table(pa.Table.from_pylist(self.build_rows(tokenizer)), folder / "train.parquet")
        (folder / "run.yaml").write_text(json.dumps(self._describe_run(folder)))  # JSON is YAML

    def build_rows(self, tokenizer: Any) -> list[dict[str, Any]]:
        """Rows in verl's schema; each digit is one token."""
        rng = random.Random(0)

        def count(text: str) -> int:
            chat = [{"role": "user", "content": text}]
            return len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

        num_digits = self.prompt_length - count("")
        rows = []
        for _ in range(self.num_prompts):
            prompt = "".join(rng.choices("0123456789", k=num_digits))
            assert count(prompt) == self.prompt_length, "the tokenizer must not merge digits"
            rows.append(
                {
                    "data_source": "random",
                    "prompt": [{"role": "user", "content": prompt}],
                    "reward_model": {"ground_truth": "".join(rng.choices("0123456789", k=self.feedback_length))},
                }
            )
        return rows

    def _describe_run(self, folder: Path) -> dict[str, Any]:
        rows = str(folder / "train.parquet")
        return {
            "output_dir": str(folder / "run"),
            "eval_steps": 0,
            "model": {"path": str(folder / "model"), "dtype": self.dtype},
            "data": {
                "task": __file__,
                "train_files": [rows],
                "val_files": [rows],
                "train_batch_size": self.num_prompts,
                "max_prompt_length": self.prompt_length,
            },
            "rollout": {"n": self.n, "max_response_length": self.response_length},
            "optim": {"warmup_steps": 0, "betas": [0.9, 0.95 if self.dtype == "bfloat16" else 0.999]},
            "self_distillation": {
                "alpha": 0.5,
                "demonstration_source": "none",
                "include_environment_feedback": True,
            },
            "eval": {"val_before_train": False, "max_prompts": 1},
            "tracking": {"log_completions_steps": 0},
        }

    def load(self, folder: Path, overrides: Sequence[str] = ()) -> SDPOConfig:
        return load_config(folder / "run.yaml", overrides)

    def build_samples(self, components: Any, run: SDPOConfig) -> list[Any]:
        """Samples of one step with random responses instead of sampled ones."""
        from sdpo.models.generation.sampling import Completion
        from sdpo.trainer.data.samples import build_samples

        rng = random.Random(0)
        log_probs = [-math.log(self.vocab_size)] * self.response_length
        ids = range(3, self.vocab_size - 1)
        responses = [
            [Completion(rng.choices(ids, k=self.response_length), log_probs, finished=False) for _ in range(self.n)]
            for _ in range(self.num_prompts)
        ]
        prompts = components.prompts_of(1)
        return build_samples(
            components.reward_manager,
            components.tokenizer,
            prompts,
            responses,
            run.self_distillation,
            components.window,
            rng,
        )


def build_tokenizer(vocab_size: int) -> Any:
    """Build the toy tasks' tokenizer with ``vocab_size`` tokens; the last token ends a response."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from sdpo.rewards.toy.base import build_tokenizer
    from sdpo.rewards.toy.hidden_rule import CHAT_TEMPLATE

    content = json.loads(build_tokenizer([], CHAT_TEMPLATE).backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    assert len(vocabulary) <= vocab_size, f"vocab_size={vocab_size}: the templates need {len(vocabulary)} tokens"
    vocabulary.update({f"<{i}>": i for i in range(len(vocabulary), vocab_size - 1)})
    vocabulary[END] = vocab_size - 1
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token=END,
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
