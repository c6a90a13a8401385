"""Vision towers: equal images, verl's forward pass, freezing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from verl.models.transformers import qwen2_vl
from vision_language import LoadedModel

from sdpo.errors import SDPOError
from sdpo.verl_backend.worker.vision_tower import compute_positions, find_distinct, freeze_vision_tower, share_images


def test_images_are_equal_only_if_all_pixels_and_the_grid_are_equal() -> None:
    first = torch.arange(8.0).reshape(4, 2)
    turned = first.flip(0)  # the same sum
    images = [first, turned, first.clone(), first.clone(), turned.clone()]
    grids = torch.tensor([[1, 2, 2], [1, 2, 2], [1, 2, 2], [1, 4, 1], [1, 2, 2]])
    assert find_distinct(images, grids) == ([0, 1, 3], [0, 1, 0, 2, 1])


@pytest.fixture
def verls_model(vision_model: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    loaded = vision_model("qwen2_5_vl")
    monkeypatch.setattr(type(loaded.model.model), "forward", qwen2_vl.qwen2_vl_base_forward)
    return loaded


def test_batch_without_images_crashes_only_verl_s_forward_pass(verls_model: LoadedModel) -> None:
    inner = verls_model.model.model
    text = torch.tensor([[7, 8, 9]])
    with pytest.raises(AttributeError):
        qwen2_vl._get_input_embeds(inner, text)
    share_images(verls_model.model)
    embeds, _ = qwen2_vl._get_input_embeds(inner, text)
    torch.testing.assert_close(embeds, inner.get_input_embeddings()(text))


def test_gradients_of_equal_images_are_summed(verls_model: LoadedModel) -> None:
    tower: Any = verls_model.model.model.visual
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(16, 1176, generator=generator) for _ in range(2))
    patches, grids = torch.cat([one, other, one]), torch.tensor([[1, 4, 4]]).repeat(3, 1)
    weights = torch.randn(12, 32, generator=generator)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = tower(patches, grid_thw=grids)
        tokens = getattr(output, "pooler_output", output)
        return tokens.detach(), list(torch.autograd.grad((tokens * weights).sum(), tower.parameters()))

    plain, plain_gradients = run()
    share_images(verls_model.model)
    shared, gradients = run()
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(shared[:4], shared[8:]) and not torch.equal(shared[:4], shared[4:8])
    for gradient, expected in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_other_models_are_unchanged(vision_model: Callable[[str], LoadedModel]) -> None:
    for family in ("qwen2_5_vl", "llava"):  # transformers' own forward pass
        model = vision_model(family).model
        share_images(model)
        assert all("forward" not in vars(module) for module in model.modules())


def test_freeze_vision_tower_is_refused_for_a_language_model(model: Any) -> None:
    with pytest.raises(SDPOError, match=r"freeze_vision_tower=True: .*Qwen2ForCausalLM"):
        freeze_vision_tower(model)


def test_response_positions_continue_after_the_images_as_text(verls_model: LoadedModel) -> None:
    image = [3, 5, 5, 5, 5, 4]  # four tokens: 2 x 2
    token_ids = torch.tensor([7, *image, 8, 9, 5])  # an image token in the response counts as text
    positions = compute_positions(verls_model.model, token_ids, 8, torch.tensor([[1, 4, 4]]))
    assert positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 2, 2, 2, 4, 5, 6, 7],
        [0, 1, 2, 2, 3, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 2, 3, 4, 5, 6, 7],
    ]
    assert compute_positions(verls_model.model, token_ids[:3], 2, None).tolist() == [[0, 1, 2]] * 4
