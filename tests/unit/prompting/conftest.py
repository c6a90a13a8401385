from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{{ part.text if part.type == 'text' else '<|image|>' }}{% endfor %}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""

CORPUS = [
    "What is the sum of the first ten odd numbers? The correct solution: the sum is n * n, so the answer is 100.",
    "The following is feedback from your unsuccessful earlier attempt: the test failed, expected 100 but got 55.",
    "Correctly solve the original question. You are a helpful assistant; über, naïve, 数学.",
]


def _build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with merges, trained here without files or downloads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|image|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _build_tokenizer()


@pytest.fixture()
def tokenizer_without_chat_template() -> PreTrainedTokenizerFast:
    fast = _build_tokenizer()
    fast.chat_template = None
    return fast
