"""Loading a model and a tokenizer, and the error messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sdpo.config.model import ModelConfig
from sdpo.errors import SDPOError
from sdpo.models.loading import (
    build_meta_model,
    get_stop_token_ids,
    get_window,
    load_model,
    load_tokenizer,
    resolve_device,
)

CPU = torch.device("cpu")


@pytest.fixture
def folder(hidden_rule_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hidden_rule_dir / "model", tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_configured_dtype(folder: Path, dtype: str) -> None:
    whole = load_model(ModelConfig(path=str(folder)), CPU)
    model = load_model(ModelConfig(path=str(folder), dtype=dtype), CPU)
    assert not model.training
    for param, reference in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(param, reference.to(getattr(torch, dtype)))


def test_meta_model_has_shapes_without_values(folder: Path) -> None:
    meta = build_meta_model(ModelConfig(path=str(folder)))
    whole = load_model(ModelConfig(path=str(folder)), CPU)
    assert [(n, p.shape) for n, p in meta.named_parameters()] == [(n, p.shape) for n, p in whole.named_parameters()]
    assert all(p.is_meta for p in meta.parameters())


def save_plain_tokenizer(folder: Path, **special: str) -> None:
    """Build a tokenizer without special tokens; Qwen2's class adds some."""
    plain = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    edit(folder / "config.json", model_type="llama")
    plain.save_pretrained(folder)


def test_tokenizer_without_pad_token_pads_with_eos(folder: Path) -> None:
    save_plain_tokenizer(folder, eos_token="<|im_end|>")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


@pytest.mark.parametrize(("configured", "expected"), [(2, [2]), (7, [2, 7]), ([9, 7], [2, 7, 9]), (None, [2])])
def test_stop_tokens_include_those_of_tokenizer_and_model(folder: Path, configured: Any, expected: list[int]) -> None:
    model = load_model(ModelConfig(path=str(folder)), CPU)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = configured
    assert get_stop_token_ids(model, load_tokenizer(ModelConfig(path=str(folder)))) == expected


def test_window_is_read_from_the_model_config(folder: Path) -> None:
    assert get_window(load_model(ModelConfig(path=str(folder)), CPU)) == 256


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_available_devices(name: str) -> None:
    expected = "cuda" if name == "auto" and torch.cuda.is_available() else "cpu"
    assert resolve_device(name, "actor.device").type == expected


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x", ""])
def test_missing_devices_are_refused(name: str) -> None:
    with pytest.raises(SDPOError, match=r"^rollout\.device: no device .* here \(.*\); use auto or cpu$"):
        resolve_device(name, "rollout.device")


@pytest.mark.parametrize("load", [lambda c: load_model(c, CPU), load_tokenizer, build_meta_model])
@pytest.mark.parametrize(
    ("breaking", "complaint"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_folder_without_a_model_is_refused(folder: Path, load: Any, breaking: Any, complaint: str) -> None:
    breaking(folder)
    with pytest.raises(SDPOError) as caught:
        load(ModelConfig(path=str(folder)))
    message = str(caught.value)
    assert message.startswith(f"model.path: {folder}: ") and complaint in message
    assert "\n" not in message


@pytest.mark.parametrize("load", [lambda c: load_model(c, CPU), build_meta_model])
def test_unknown_architecture_is_refused(folder: Path, load: Any) -> None:
    edit(folder / "config.json", model_type="no_such_model")
    with pytest.raises(SDPOError, match=rf"^model\.path: {folder}: cannot be loaded \(.*no_such_model"):
        load(ModelConfig(path=str(folder)))


def test_missing_or_damaged_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(SDPOError, match="cannot be loaded"):
        load_model(ModelConfig(path=str(folder)), CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SDPOError, match="cannot be loaded"):
        load_model(ModelConfig(path=str(folder)), CPU)


def test_missing_tokenizer_or_eos_token_is_refused(folder: Path) -> None:
    save_plain_tokenizer(folder)
    with pytest.raises(SDPOError, match="no end-of-sequence token"):
        load_tokenizer(ModelConfig(path=str(folder)))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SDPOError, match=r"model\.path: .*tokenizer"):
        load_tokenizer(ModelConfig(path=str(folder)))


def test_hub_name_without_a_network_is_refused() -> None:
    with pytest.raises(SDPOError, match=r"model\.path: nowhere/no-such-model: cannot be loaded"):
        load_model(ModelConfig(path="nowhere/no-such-model"), CPU)
