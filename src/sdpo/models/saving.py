"""Save models in the Hugging Face format, with the generation config exactly as it was read."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from sdpo.errors import ConfigError

GENERATION_CONFIG = "generation_config.json"


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Save a model for ``from_pretrained``.

    ``save_pretrained`` refuses generation configs that ``from_pretrained`` accepts, such as a temperature beside
    ``do_sample: false``. Training does not change them, so they are written as they are.

    Args:
        options: of ``save_pretrained``.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, **options)
        if generation is not None:
            generation.to_json_file(folder / GENERATION_CONFIG, use_diff=True)
    finally:
        if generation is not None:
            model.generation_config = generation


def rehearse_save(model: PreTrainedModel, processing: Any, folder: Path) -> None:
    """Write everything of a checkpoint's model but its weights, and read it back, so that no save fails after training.

    Args:
        processing: tokenizer or processor.
        folder: empty.

    Raises:
        ConfigError: something cannot be saved or read back.
    """
    try:
        processing.save_pretrained(folder)
        save_model(model, folder, state_dict={})
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # files of models may have any content, and their code may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"model.path: the model could not be saved after training ({reason:.300})") from error
    shared = find_undeclared_sharing(model)
    if shared:
        raise ConfigError(
            f"model.path: {' and '.join(shared)} share memory, but the model does not declare them as tied, so that it "
            "could not be saved; set tie_word_embeddings in its config.json"
        )


def find_undeclared_sharing(model: PreTrainedModel) -> list[str]:
    """Names of parameters that are one tensor without being tied; empty if there are none."""
    names = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        if not param.is_meta:
            names[param.data_ptr(), param.shape].append(name)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for group in names.values():
        if len(group) > 1 and len([name for name in group if name not in tied]) > 1:
            return group
    return []
