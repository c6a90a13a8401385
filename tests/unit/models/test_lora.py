"""LoRA adapters: their layers, their effect, and that PEFT reads the saved files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sdpo.config.model import LoraConfig
from sdpo.errors import SDPOError
from sdpo.models.lora.adapters import (
    MergedParameters,
    add_adapters,
    copy_without_adapters,
    get_adapted_layers,
    load_adapter,
    merge_adapters,
    save_adapter,
)

MakeModel = Callable[..., Any]
IDS = torch.tensor([[5, 6, 7, 8, 3]])
ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.clone()


def scramble(model: nn.Module, seed: int = 0) -> None:
    """Set B to random values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(0.3 * torch.randn(param.shape, generator=generator))


@pytest.fixture
def adapted(make_model: MakeModel) -> Any:
    model = make_model()
    add_adapters(model, LoraConfig(rank=4, alpha=6))
    scramble(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_no_logits_and_only_they_train_in_float32(
    make_model: MakeModel, dtype: torch.dtype
) -> None:
    model = make_model(dtype=dtype)
    before = logits_of(model)
    frozen = {id(param) for param in model.parameters()}
    add_adapters(model, LoraConfig(rank=4))
    assert torch.equal(logits_of(model), before)
    assert all(param.requires_grad == (id(param) not in frozen) for param in model.parameters())
    assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.float32}
    assert {name.rpartition(".")[2] for name in get_adapted_layers(model)} == ALL
    assert len(get_adapted_layers(model)) == 14
    scramble(model)
    assert logits_of(model).dtype == dtype and not torch.equal(logits_of(model), before)


def test_only_target_modules_are_adapted(make_model: MakeModel) -> None:
    model = make_model()
    add_adapters(model, LoraConfig(rank=2, target_modules=["q_proj", "1.mlp.up_proj"]))
    assert sorted(get_adapted_layers(model)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "query", "proj", ""])
def test_invalid_target_module_is_refused(make_model: MakeModel, name: str) -> None:
    with pytest.raises(SDPOError, match=rf"lora\.target_modules: '{name}' is no linear layer.*down_proj, gate_proj"):
        add_adapters(make_model(), LoraConfig(rank=2, target_modules=["q_proj", name]))


def test_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(SDPOError, match=r"lora\.rank: GPT2LMHeadModel has no linear layers to adapt"):
        add_adapters(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8)), LoraConfig(rank=2))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3"])
def test_vision_tower_has_no_adapters(vision_model: Callable[[str], Any], family: str) -> None:
    model = vision_model(family).model
    add_adapters(model, LoraConfig(rank=2))
    assert get_adapted_layers(model)
    assert all(".language_model." in name for name in get_adapted_layers(model))


@pytest.mark.parametrize("tied", [False, True])
def test_merged_parameters_equal_those_of_a_merged_model(make_model: MakeModel, tied: bool) -> None:
    plain, model = (make_model(tie_word_embeddings=tied) for _ in range(2))
    add_adapters(model, LoraConfig(rank=4, alpha=6, target_modules=["v_proj", "down_proj"]))
    scramble(model)
    merged = MergedParameters(model)
    start = dict(plain.named_parameters())
    assert list(merged) == list(start)
    for name, param in start.items():
        layer = get_adapted_layers(model).get(name.removesuffix(".weight"))
        expected = param.detach().double()
        if layer is not None:
            a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
            expected = expected + 6 / 4 * b @ a
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)
        assert merged.changes(name) == (layer is not None)
    with torch.no_grad():
        for name, param in start.items():
            param.copy_(merged[name])
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=1e-5, atol=1e-5)


def test_merged_parameters_without_adapters_are_the_parameters(make_model: MakeModel) -> None:
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    merged = MergedParameters(model)
    assert [*merged] == [name for name, _ in model.named_parameters()]
    assert all(merged[name].data_ptr() == param.data_ptr() for name, param in model.named_parameters())
    assert [name for name in merged if not merged.changes(name)] == ["lm_head.weight"]


def test_merging_does_not_change_the_logits(adapted: Any, tmp_path: Path) -> None:
    before = logits_of(adapted)
    merge_adapters(adapted)
    torch.testing.assert_close(logits_of(adapted), before, rtol=1e-5, atol=1e-5)
    adapted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(adapted))


def test_copy_without_adapters_shares_the_base_weights(adapted: Any, make_model: MakeModel) -> None:
    trained = logits_of(adapted)
    base = copy_without_adapters(adapted)
    assert torch.equal(logits_of(base), logits_of(make_model()))
    assert torch.equal(logits_of(adapted), trained)
    own = {param.data_ptr() for param in adapted.parameters()}
    assert all(param.data_ptr() in own for param in base.parameters())
    assert not hasattr(base, "peft_config") and adapted.peft_config


def test_peft_loads_saved_adapters(adapted: Any, make_model: MakeModel, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = peft.PeftModel.from_pretrained(make_model(), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded), logits_of(adapted))
    assert not torch.equal(logits_of(loaded), logits_of(make_model()))
    merged = loaded.merge_and_unload().state_dict()
    for name, value in MergedParameters(adapted).items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


def test_loaded_adapters_equal_the_saved_adapters(adapted: Any, make_model: MakeModel, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path)
    again = make_model()
    add_adapters(again, LoraConfig(rank=4, alpha=6))
    load_adapter(again, tmp_path)
    for (name, one), two in zip(adapted.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert all(param.requires_grad == ("lora_" in name) for name, param in again.named_parameters())


@pytest.mark.parametrize("other", [LoraConfig(rank=3), LoraConfig(rank=4, target_modules=["q_proj"])])
def test_adapters_of_another_config_are_refused(
    adapted: Any, make_model: MakeModel, tmp_path: Path, other: LoraConfig
) -> None:
    save_adapter(adapted, tmp_path)
    model = make_model()
    add_adapters(model, other)
    with pytest.raises(SDPOError, match=re.escape("layers or rank differ from lora.* in the config")):
        load_adapter(model, tmp_path)
    with pytest.raises(SDPOError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(model, tmp_path / "nowhere")
