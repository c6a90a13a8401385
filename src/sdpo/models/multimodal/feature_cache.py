"""Cache image features, so that the vision tower runs once per distinct image of a step and model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sdpo.models.multimodal.processor import MultimodalProcessor
from sdpo.models.multimodal.vision_tower import ImageFeatures, run_vision_tower

Precision: TypeAlias = Callable[[], AbstractContextManager[Any]]

# Pixel values per run of the tower; bounds the activations of its backward pass.
CHUNK_SIZE = 2**22


class ImageFeatureCache:
    """Features of distinct images by model, computed on first use without a graph.

    The student's features collect gradients, unless its tower is frozen, until ``backward`` runs the tower again with a
    graph, chunk by chunk. So memory holds the activations of one chunk, for any number of sequences and micro-batches
    with an image.

    Args:
        reader: source of pixels.
        student: the trained model; None if no model is trained.
        frozen: whether the student's tower is frozen. Then all models have the same tower, and share its features.
        precision: the context of the tower's forward pass, such as autocast.
    """

    def __init__(
        self,
        reader: MultimodalProcessor,
        *,
        student: nn.Module | None = None,
        frozen: bool = False,
        precision: Precision = nullcontext,
    ) -> None:
        self.reader = reader
        self._trained = None if frozen else student
        self._shared = student if frozen else None
        self._precision = precision
        self._features: defaultdict[nn.Module, dict[bytes, ImageFeatures]] = defaultdict(dict)

    def select(self, model: nn.Module, images: Sequence[bytes]) -> list[ImageFeatures]:
        """Features of these images for ``model``, in this order."""
        model = model if self._shared is None else self._shared
        cached = self._features[model]
        new = dict.fromkeys(image for image in images if image not in cached)
        for chunk in _split_into_chunks(self.reader, new):
            with torch.no_grad(), self._precision():
                made = run_vision_tower(model, list(chunk.values()))
            for features in made if model is self._trained else ():
                for tensor in features.tensors():
                    tensor.requires_grad_()
            cached.update(zip(chunk, made, strict=True))
        return [cached[image] for image in images]

    def backward(self) -> None:
        """Propagate the collected gradients through the student's tower, then clear them."""
        if self._trained is None:
            return
        cached = self._features[self._trained]
        reached = [
            image for image, features in cached.items() if any(tensor.grad is not None for tensor in features.tensors())
        ]
        for chunk in _split_into_chunks(self.reader, reached):
            with torch.enable_grad(), self._precision():
                made = run_vision_tower(self._trained, list(chunk.values()))
            pairs = [
                (tensor, leaf.grad)
                for image, features in zip(chunk, made, strict=True)
                for tensor, leaf in zip(features.tensors(), cached[image].tensors(), strict=True)
                if leaf.grad is not None and tensor.requires_grad
            ]
            if pairs:
                torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Discard the collected gradients, before a mini-batch is repeated."""
        for cached in self._features.values():
            for features in cached.values():
                for tensor in features.tensors():
                    tensor.grad = None

    def clear_student(self) -> None:
        """Discard the student's features after an update of its weights; features of a frozen tower stay."""
        if self._trained is not None:
            self._features.pop(self._trained, None)


def _split_into_chunks(reader: MultimodalProcessor, images: Iterable[bytes]) -> list[dict[bytes, Mapping[str, Tensor]]]:
    chunks: list[dict[bytes, Mapping[str, Tensor]]] = []
    size = CHUNK_SIZE
    for image in images:
        pixels = reader.read_pixels(image)
        num_values = sum(tensor.numel() for tensor in pixels.values())
        if size + num_values > CHUNK_SIZE:
            chunks.append({})
            size = 0
        chunks[-1][image] = pixels
        size += num_values
    return chunks
