"""Low-rank adapters (LoRA) by PEFT, injected into a transformers model.

An adapted layer computes W x + s B A x. Only A and B are trained, in float32 for every model dtype. Outside of this
file, W + s B A has the name of W in the model without adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo.config.model import LoraConfig
from sdpo.errors import ConfigError
from sdpo.kernels.cpu.fast_linear import speed_up_linear_layers
from sdpo.models.multimodal.vision_tower import get_vision_tower_parameters

if TYPE_CHECKING:
    from peft import LoraConfig as PeftSettings
    from peft.tuners.lora import Linear as AdaptedLayer

ADAPTER = "default"  # PEFT's name for a single adapter
FILE = "adapter_model.safetensors"


def require_peft() -> None:
    """Check that PEFT is installed.

    Raises:
        ConfigError: PEFT cannot be imported.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"lora.rank: PEFT cannot be imported ({error}); pip install 'sdpo[lora]'") from error


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Add adapters to the model and freeze all other parameters.

    A is drawn from torch's generator and B is zero, so the adapters do not change the model yet.

    Raises:
        ConfigError: PEFT is missing, or a name in ``target_modules`` matches no adaptable layer.
    """
    require_peft()
    import peft

    peft.inject_adapter_in_model(build_peft_settings(model, config), model, ADAPTER)
    for param in _get_adapter_parameters(model).values():
        param.data = param.data.float()
    speed_up_linear_layers(model)


def build_peft_settings(model: PreTrainedModel, config: LoraConfig) -> PeftSettings:
    """PEFT's settings, with the full name of each layer to adapt.

    Raises:
        ConfigError: see ``find_target_layers``.
    """
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scale_numerator,
        target_modules=list(find_target_layers(model, config)),
        lora_dropout=0.0,  # the sampler could not reproduce dropout masks
        bias="none",
    )
    settings.base_model_name_or_path = model.name_or_path
    return settings


def find_target_layers(model: PreTrainedModel, config: LoraConfig) -> dict[str, nn.Linear]:
    """Layers to adapt, by name: linear layers of the language model except the output layer.

    Raises:
        ConfigError: there are none, or a name in ``target_modules`` matches none.
    """
    head = model.get_output_embeddings()
    vision = hasattr(model.config, "vision_config")
    outside = {id(param) for param in get_vision_tower_parameters(model)} if vision else set()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and id(module.weight) not in outside
    }
    if not layers:
        raise ConfigError(f"lora.rank: {type(model).__name__} has no linear layers to adapt")
    if not config.target_modules:
        return layers
    for target in config.target_modules:
        if not any(_ends_with(name, target) for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"lora.target_modules: {target!r} is no linear layer of the language model, the output layer excluded; "
                f"use one of: {known}"
            )
    return {
        name: layer
        for name, layer in layers.items()
        if any(_ends_with(name, target) for target in config.target_modules)
    }


def get_adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Adapted layers by name; empty for a model without adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


@torch.no_grad()
def compute_delta(layer: AdaptedLayer) -> Tensor:
    """s B A, [outputs, inputs] in float32: the adapter's change of the layer's weight."""
    delta: Tensor = layer.get_delta_weight(ADAPTER)
    return delta


class MergedParameters(Mapping[str, Tensor]):
    """Parameters with the names of the model without adapters; W + s B A is computed on access.

    So memory holds one merged weight at a time instead of a second model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {f"{name}.weight": layer for name, layer in get_adapted_layers(model).items()}
        adapters = {id(param) for param in _get_adapter_parameters(model).values()}
        self._params = {
            name.replace(".base_layer.", "."): param
            for name, param in model.named_parameters()
            if id(param) not in adapters
        }

    def __getitem__(self, name: str) -> Tensor:
        param = self._params[name].detach()
        if name not in self._layers:
            return param
        return (param + compute_delta(self._layers[name])).to(param.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def changes(self, name: str) -> bool:
        """Whether training changes this parameter."""
        return name in self._layers or self._params[name].requires_grad


def copy_without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Build the model without adapters, as a second module that shares all base weights."""
    shared = {id(param): param for param in model.parameters()}
    base = copy.deepcopy(model, shared)
    _remove_adapters(base)
    return base


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Merge the adapters into the weights and remove them."""
    merged = MergedParameters(model)
    for name, layer in get_adapted_layers(model).items():
        base: Any = layer.get_base_layer()
        base.weight.copy_(merged[f"{name}.weight"])
    _remove_adapters(model)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapters in PEFT's format, for ``PeftModel.from_pretrained(base_model, folder)``."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = model.peft_config[ADAPTER]
    settings.save_pretrained(str(folder))
    save_file(
        {name: param.detach().contiguous() for name, param in _get_adapter_parameters(model).items()}, folder / FILE
    )


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load adapters that ``save_adapter`` wrote, bit for bit.

    Raises:
        ConfigError: the file is missing, or its adapters have other names or shapes.
    """
    own = _get_adapter_parameters(model)
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder}: {FILE} is missing")
    saved = load_file(folder / FILE)
    if {name: param.shape for name, param in own.items()} != {name: value.shape for name, value in saved.items()}:
        raise ConfigError(f"{folder / FILE}: layers or rank differ from lora.* in the config")
    for name, param in own.items():
        param.copy_(saved[name])


def _get_adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices A and B by their names in PEFT's files."""
    return {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight
        for name, layer in get_adapted_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def _remove_adapters(model: PreTrainedModel) -> None:
    for name, layer in get_adapted_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
