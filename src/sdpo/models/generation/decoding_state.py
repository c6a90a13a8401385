"""The state of a batch while it is decoded: caches of keys and values, padding mask, positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from sdpo.algorithm.teacher import LogitMixture
from sdpo.models.forward import PaddedSequences, compute_logits
from sdpo.models.generation.kv_cache import build_cache
from sdpo.models.multimodal.feature_cache import ImageFeatureCache
from sdpo.models.multimodal.vision_tower import VisionAdapter

# Layers with a recurrent state, alone (Mamba) or beside keys and values (Falcon-H1). They can only be reordered.
RECURRENT: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())


class DecodingState:
    """Caches of a policy's modules, and attention mask and last position of each row."""

    def __init__(self, policy: LogitMixture, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.caches: list[Any] = [build_cache(module.config, capacity) for module, _ in policy]

    def prefill(self, prompts: PaddedSequences, vision: VisionAdapter | None) -> Tensor:
        """Read the prompts; returns logits [rows, V] after each prompt."""
        mask = prompts.attention_mask
        self.length = mask.shape[1]
        self.mask: Tensor | None = None  # [rows, capacity]; None without padding
        if not mask.all():
            self.mask = nn.functional.pad(mask, (0, self.capacity - self.length), value=1)
        self.axes = prompts.position_ids.shape[:-2]  # () or (3,)
        self.last_position = prompts.position_ids.amax(-1).reshape(-1, len(mask)).amax(0)
        return self._forward(prompts.token_ids, self._get_mask(), prompts.position_ids, prompts.images, vision)

    def decode(self, token: Tensor) -> Tensor:
        """Read one token per row [rows]; returns logits [rows, V] after it."""
        self.length += 1
        self.last_position = self.last_position + 1
        positions = self.last_position[:, None].expand(*self.axes, -1, 1)
        return self._forward(token[:, None], self._get_mask(), positions)

    def _get_mask(self) -> Tensor | None:
        return None if self.mask is None else self.mask[:, : self.length]

    def _forward(
        self,
        token_ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        images: Sequence[bytes] = (),
        vision: VisionAdapter | None = None,
    ) -> Tensor:
        """Logits [rows, V] of the policy after the last token, the sum over its modules."""
        total: Tensor | None = None
        for (module, coefficient), cache in zip(self.policy, self.caches, strict=True):
            logits = compute_logits(
                module,
                token_ids,
                mask,
                position_ids,
                1,
                vision=vision,
                features=ImageFeatureCache(vision.reader).select(module, images)
                if vision is not None and images
                else (),
                cache=cache,
            )
            logits = logits[:, -1].float()
            if coefficient != 1.0:
                logits = logits * coefficient
            total = logits if total is None else total.add_(logits)
        assert total is not None
        return total

    def repeat(self, n: int) -> None:
        if self.mask is not None:
            self.mask = self.mask.repeat_interleave(n, dim=0)
        self.last_position = self.last_position.repeat_interleave(n, dim=0)
        for cache in self.caches:
            for layer in cache.layers:
                if isinstance(layer, RECURRENT):
                    rows = torch.arange(len(self.last_position) // n, device=self.last_position.device)
                    layer.reorder_cache(rows.repeat_interleave(n))
                else:
                    layer.batch_repeat_interleave(n)

    def select(self, rows: Tensor) -> None:
        if self.mask is not None:
            self.mask = self.mask[rows]
        self.last_position = self.last_position[rows]
        for cache in self.caches:
            for layer in cache.layers:
                if isinstance(layer, RECURRENT):
                    layer.reorder_cache(rows)
                else:
                    layer.batch_select_indices(rows)
