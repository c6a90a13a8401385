"""What a model and its passes take of memory, from settings and architecture alone: upper bounds in bytes.

The constants are measured on tiny models of several families, again in ``tests/unit/models/test_memory_estimate.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sdpo.algorithm.ema import ENTRIES_AT_ONCE
from sdpo.config.model import LoraConfig, ModelConfig
from sdpo.config.root import SDPOConfig
from sdpo.kernels import chunked_log_probs
from sdpo.models.loading import build_meta_model, get_window, reads_images
from sdpo.models.lora.adapters import find_target_layers
from sdpo.models.multimodal.vision_tower import CHUNK_SIZE, get_tower_parameters

BYTES = {"float32": 4, "bfloat16": 2}
# Of the rows and columns of its matrices, together: so many values a layer keeps for its backward pass, a token, in any
# data type. Attention matrices are not among them, which flash and SDPA kernels never store.
KEPT_BY_LAYER = 2.2
# The same for what a layer without gradients holds at once.
HELD_BY_LAYER = 1.7
# Blocks of the loss that are there at once: log-probabilities and probabilities of both sides, what is made of them.
BLOCKS_OF_LOSS = 10


@dataclass(frozen=True)
class MemoryEstimate:
    """Upper bounds. Memory is in bytes, by what needs it, on one GPU of each role.

    Attributes:
        tokens_a_step: prompts and responses of all rollouts.
        num_params: all of the model's; None where the model is only made on first use.
        num_tower_params: those of its vision tower and projector.
        actor: what the actor's device holds all the time.
        learning: what it holds besides while it learns, and frees before it samples.
        phases: what comes on top of both in one phase after the other, by the phase's name.
        sampler: what sampling takes, on its own device or, with ``colocated``, on the actor's between its phases.
        num_learners: GPUs over which the actor is sharded.
        num_samplers: GPUs that sample.
    """

    tokens_a_step: int
    num_params: int | None
    num_tower_params: int = 0
    actor: Mapping[str, int] = field(default_factory=dict)
    learning: Mapping[str, int] = field(default_factory=dict)
    phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sampler: Mapping[str, int] = field(default_factory=dict)
    colocated: bool = True
    num_learners: int = 1
    num_samplers: int = 1

    @property
    def learner_peak(self) -> int:
        """The actor's device at the worst moment."""
        learning = sum(self.learning.values()) + max(sum(phase.values()) for phase in self.phases.values())
        sampling = self.sampler_peak if self.colocated else 0
        return sum(self.actor.values()) + max(learning, sampling)

    @property
    def sampler_peak(self) -> int:
        """The sampler's device, where it has one of its own."""
        return sum(self.sampler.values())


@dataclass(frozen=True)
class Stack:
    """Layers that tokens, or patches of an image, go through one after another.

    Attributes:
        num_params: of the layers and all that belongs to them.
        num_layers: how many.
        hidden_size: of what passes from one to the next.
        width: rows and columns of all matrices but embeddings and output layer, added up.
    """

    num_params: int
    num_layers: int
    hidden_size: int
    width: int

    def count_learning(self, size: int, residual_size: int, *, checkpointing: bool) -> int:
        """Bytes a token at the worst moment of forward and backward pass.

        Args:
            size: bytes of a value in the layers' products.
            residual_size: bytes of a value on its way from layer to layer.
            checkpointing: whether layers keep their input alone and are run again, one by one, in the backward pass.
        """
        kept = KEPT_BY_LAYER * self.width * size
        one = kept / self.num_layers
        if checkpointing:
            return int((self.num_layers + 4) * self.hidden_size * residual_size + 1.5 * one)
        return int(kept + one)

    def count_reading(self, size: int) -> int:
        """Bytes a token at the worst moment of a forward pass without gradients."""
        return int(HELD_BY_LAYER * self.width / self.num_layers * size)


@dataclass(frozen=True)
class Adapters:
    """What LoRA puts beside a model's weights.

    Attributes:
        num_params: of the adapters.
        num_adapted: parameters of the layers' weights that they adapt.
        kept: values that all of them keep for the backward pass, a token: their inputs and what A makes of those.
    """

    num_params: int
    num_adapted: int
    kept: int


@dataclass(frozen=True)
class ModelSize:
    """A model's parts.

    Attributes:
        language: the language model, its embeddings and output layer included.
        tower: the vision tower with its projector; None for a language model.
        vocab_size: logits a token.
        cache_values: keys and values of a token, all layers.
        feature_values: what the tower makes of an image for one of its tokens.
        patch_values: numbers in the pixels of one of the tower's patches.
        patches_a_token: of those, how many become one token.
        largest_param: values of the largest parameter.
        outside_layers: parameters outside the layers that transformers never splits; FSDP2 gathers them together.
        window: most tokens the model reads; None if it does not say.
        adapters: of LoRA; None without it.
    """

    language: Stack
    tower: Stack | None
    vocab_size: int
    cache_values: int
    feature_values: int
    patch_values: int
    patches_a_token: int
    largest_param: int
    outside_layers: int
    window: int | None
    adapters: Adapters | None = None

    @property
    def num_params(self) -> int:
        return self.language.num_params + (self.tower.num_params if self.tower else 0)

    def count_tower(self, max_pixels: int, size: int, residual_size: int, *, checkpointing: bool) -> int:
        """Bytes of the tower's forward and backward pass over the images that go through it together."""
        if self.tower is None:
            return 0
        # Some processors write an image twice, as the two frames of a video that stands still.
        numbers = max(CHUNK_SIZE, 6 * max_pixels)
        patch = self.tower.count_learning(size, residual_size, checkpointing=checkpointing)
        return numbers * 4 + -(-numbers // self.patch_values) * patch


def measure_model(config: ModelConfig, lora: LoraConfig | None = None) -> ModelSize:
    """Count the parameters of the architecture; only ``config.json`` of the model is read.

    Raises:
        ConfigError: as ``build_meta_model`` and ``find_target_layers`` do.
    """
    model = build_meta_model(config)
    shape: Any = model.config.get_text_config()
    tower = _measure_tower(model) if reads_images(config) else None
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    vision: Any = getattr(model.config, "vision_config", None)
    layers = {
        id(param): param.numel()
        for module in model.modules()
        if type(module).__name__ in (model._no_split_modules or ())
        for param in module.parameters()
    }
    num_params = sum(param.numel() for param in model.parameters())
    in_tower = {id(param) for param in get_tower_parameters(model)} if tower else set()
    return ModelSize(
        language=Stack(
            num_params - (tower.num_params if tower else 0),
            shape.num_hidden_layers,
            shape.hidden_size,
            _add_widths(model, {id(param) for param in model.parameters()} - in_tower),
        ),
        tower=tower,
        vocab_size=shape.vocab_size,
        cache_values=shape.num_hidden_layers * kv_heads * head_size * 2,
        feature_values=shape.hidden_size * (1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())),
        patch_values=_count_patch_values(vision) if tower else 0,
        patches_a_token=(_first_of(vision, "spatial_merge_size") or 1) ** 2,
        largest_param=max(param.numel() for param in model.parameters()),
        outside_layers=num_params - sum(layers.values()),
        window=get_window(model),
        adapters=_measure_adapters(model, lora) if lora is not None and lora.rank else None,
    )


def _measure_adapters(model: PreTrainedModel, lora: LoraConfig) -> Adapters:
    weights = [layer.weight for layer in find_target_layers(model, lora).values()]
    return Adapters(
        num_params=lora.rank * sum(sum(weight.shape) for weight in weights),
        num_adapted=sum(weight.numel() for weight in weights),
        kept=sum(weight.shape[1] + lora.rank for weight in weights),
    )


def _measure_tower(model: nn.Module) -> Stack:
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    params = get_tower_parameters(model)
    return Stack(
        num_params=sum(param.numel() for param in params),
        num_layers=_first_of(vision, "num_hidden_layers", "depth", "num_layers") or 1,
        hidden_size=max(_first_of(vision, "embed_dim"), _first_of(vision, "hidden_size")),
        width=_add_widths(model, {id(param) for param in params}),
    )


def _add_widths(model: Any, chosen: set[int]) -> int:
    head = model.get_output_embeddings()
    matrices = (
        param
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module is not head
        for param in module.parameters(recurse=False)
        if param.dim() == 2 and id(param) in chosen
    )
    return sum(sum(param.shape) for param in matrices)


def _count_patch_values(vision: Any) -> int:
    patch = _first_of(vision, "patch_size", "spatial_patch_size") or 14
    channels = _first_of(vision, "in_channels", "num_channels", "in_chans") or 3
    return channels * (_first_of(vision, "temporal_patch_size") or 1) * patch**2


def _first_of(config: Any, *names: str) -> int:
    """The first of these settings that there is, 0 if none; of a pair the first number."""
    for name in names:
        value = getattr(config, name, None)
        if value:
            return int(value[0] if isinstance(value, Sequence) else value)
    return 0


@dataclass(frozen=True)
class Lengths:
    """Most tokens of a run's sequences and micro-batches, images included.

    Attributes:
        prompt: of a prompt.
        teacher_prompt: of a teacher's prompt; 0 where nothing is distilled.
        response: of a response.
        student: the student's in one micro-batch.
        scored: of those, response tokens.
        teacher: the teacher's in one micro-batch.
    """

    prompt: int
    teacher_prompt: int
    response: int
    student: int
    scored: int
    teacher: int


def bound_lengths(run: SDPOConfig, window: int | None) -> Lengths:
    """Where every row's ground truth is shown, the teacher reads at least half of what a micro-batch may hold."""
    config, response = run.self_distillation, run.rollout.max_response_length
    room = run.data.max_prompt_length if window is None else max(window - response, 1)
    prompt = min(run.data.max_prompt_length, room)
    teacher_prompt = 0
    if config.distills:
        teacher_prompt = config.max_reprompt_len if window is None else min(config.max_reprompt_len, room)
    every = config.distills and config.demonstration_source.endswith("ground_truth") and not config.distill_only_failed
    step = run.data.train_batch_size * run.rollout.n
    budget = run.actor.max_tokens_per_micro_batch
    student = budget // 2 if every else budget
    # One sample is always let in, however long it is.
    return Lengths(
        prompt=prompt,
        teacher_prompt=teacher_prompt,
        response=response,
        student=min(max(student, prompt + response), step * (prompt + response)),
        scored=min(max(student, response), step * response),
        teacher=min(max(budget, teacher_prompt + response), step * (teacher_prompt + response)) * config.distills,
    )


def count_fused_loss(vocab_size: int, hidden_size: int, size: int, num_tokens: int, *, trains_head: bool = True) -> int:
    """Bytes at the worst moment of ``fused_linear_sdpo_loss`` and its backward pass on an accelerator.

    Logits of a chunk and the blocks that are worked on, which do not depend on the number of tokens: as much for the
    teacher as for the student, or a quarter of it in half precision, and as many blocks as torch's profiler counted.
    The kernels of ``sdpo.kernels.cuda`` hold as much in two buffers, and add the head's gradient up in its own type.

    Args:
        size: bytes of a value in the products.
        num_tokens: whose hidden states have gradients.
        trains_head: whether the output layer has a gradient, which it has not with LoRA.
    """
    chunks = int((2 if size == 4 else 1.25) * chunked_log_probs.ACCELERATOR_BUFFER_BYTES)
    blocks = BLOCKS_OF_LOSS * chunked_log_probs.ACCELERATOR_BLOCK_BYTES
    # The gradient of the head is added up in float32; next to it is what is added, and then what it is cast to.
    head = (4 + size) * vocab_size * hidden_size if trains_head else 0
    return chunks + blocks + head + 4 * size * num_tokens * hidden_size


def count_moments(run: SDPOConfig, num_params: int) -> int:
    """Bytes of AdamW's moments: two values a parameter, of eight bits with a scale for every 256 of them, if so set."""
    if run.optim.name == "adamw_8bit":
        return 2 * (num_params + num_params // 256 * 4)
    return 2 * num_params * (4 if run.lora.rank else BYTES[run.model.dtype])


def count_update(run: SDPOConfig, model: ModelSize, num_averaged: int) -> int:
    """Bytes at the worst moment of the optimizer's step and of the teacher's average after it.

    On a CPU AdamW makes two tensors of a parameter's size at a time; on a GPU its one kernel makes none.

    Args:
        num_averaged: entries of the teacher's average that are made of a student in another data type, slice by slice,
            or of its adapters, all of them.
    """
    if model.adapters is not None:
        return max(2 * model.adapters.num_params * 4, num_averaged * 4)
    return max(2 * model.largest_param * BYTES[run.model.dtype], min(num_averaged, ENTRIES_AT_ONCE) * 4)


def count_log_probs() -> int:
    """Bytes at the worst moment of log-probabilities and entropies that are computed in chunks."""
    return chunked_log_probs.ACCELERATOR_BUFFER_BYTES + BLOCKS_OF_LOSS * chunked_log_probs.ACCELERATOR_BLOCK_BYTES
