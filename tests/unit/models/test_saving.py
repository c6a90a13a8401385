"""What a model's files contain is written back as it was, or refused before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sdpo.config.root import SDPOConfig
from sdpo.errors import ConfigError
from sdpo.models.saving import find_undeclared_sharing, rehearse_save, save_model
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer import build
from sdpo.trainer.trainer import SDPOTrainer

MakeModel = Callable[..., Any]
INVALID: list[dict[str, Any]] = [
    {"do_sample": False, "temperature": 0.6},
    {"do_sample": False, "top_p": 0.9},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    {"pad_token_id": -1},
]


@pytest.mark.parametrize("settings", INVALID, ids=str)
def test_generation_config_is_written_as_it_was_read(
    settings: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    """``save_pretrained`` refuses these."""
    model = make_model()
    (tmp_path / "in").mkdir()
    written = GenerationConfig(eos_token_id=2)
    for name, value in settings.items():
        setattr(written, name, value)
    written.to_json_file(tmp_path / "in" / "generation_config.json")
    model.generation_config = read = GenerationConfig.from_pretrained(tmp_path / "in")
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "refused")
    (tmp_path / "scratch").mkdir()
    rehearse_save(model, build_tokenizer(), tmp_path / "scratch")
    save_model(model, tmp_path / "out")
    assert model.generation_config is read
    again = type(model).from_pretrained(tmp_path / "out")
    assert again.generation_config.to_dict() == read.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_tokenizer_that_cannot_be_saved_ends_the_run_before_sampling(
    make_task_run: Callable[..., SDPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build.load_tokenizer(make_task_run().model)

    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("this tokenizer has no files")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    monkeypatch.setattr(build, "load_tokenizer", lambda config: tokenizer)
    monkeypatch.setattr(build, "build_sampler", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(ConfigError, match=r"^model\.path: the model could not be saved after training \(NotImpl"):
        SDPOTrainer(make_task_run()).train()


def test_shared_weights_that_are_not_declared_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    assert find_undeclared_sharing(model) == []
    assert find_undeclared_sharing(make_model(tie_word_embeddings=True)) == []
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight and .*layers\.1\..* share memory"):
        rehearse_save(model, build_tokenizer(), tmp_path)
