"""Shapes that annotations declare: checked in every call, and declared by every public function of the algorithm."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, ones

from sdpo import algorithm
from sdpo.algorithm.advantage import compute_group_advantages
from sdpo.algorithm.batch import TokenBatch
from sdpo.algorithm.distributions import TokenDistributions, gather_log_probs
from sdpo.algorithm.divergence import add_tail, compute_divergence
from sdpo.algorithm.official import compute_self_distillation_loss
from sdpo.config.self_distillation import SelfDistillationConfig
from sdpo.kernels import dispatch
from sdpo.kernels.chunked_log_probs import LinearHead
from sdpo.kernels.fused_linear_loss import FusedOutputs
from sdpo.kernels.fused_self_distillation import fused_self_distillation_loss

FOLDER = Path(inspect.getfile(algorithm)).parent
# The functions of these modules take parameters of models, which have any shape.
OF_ANY_SHAPE = {"ema", "teacher_weights"}
MODULES = sorted(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem not in OF_ANY_SHAPE)
IDS = torch.zeros(3, dtype=torch.long)
HIDDEN, WEIGHT = ones(3, 4), ones(5, 4)
HEAD = LinearHead(HIDDEN, WEIGHT)
CONFIG = SelfDistillationConfig(is_clip=None)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: gather_log_probs(ones(4, 5), IDS), "token_ids"),
        (lambda: gather_log_probs(ones(3, 5), ones(3)), "token_ids"),
        (lambda: compute_divergence(ones(2, 3, 5), ones(2, 1, 5), 0.5), "teacher_log_probs"),
        (lambda: compute_group_advantages(ones(3, 1), IDS), "scores"),
        (lambda: TokenBatch(sampled_ids=IDS, advantages=ones(4)), "advantages"),
        (lambda: TokenBatch(sampled_ids=IDS, distilled=IDS), "distilled"),
        (lambda: TokenDistributions(ones(3), divergence=ones(2, 1)), "divergence"),
        (lambda: compute_self_distillation_loss(ones(2, 3), ones(2, 3), ones(2), CONFIG), "response_mask"),
        (lambda: LinearHead(HIDDEN, ones(5, 6)), "weight"),
        (lambda: LinearHead(HIDDEN, WEIGHT, ones(5, 1)), "bias"),
        (lambda: FusedOutputs(ones(1), ones(3), {}, ones(3), ones(3), ones(2)), "loss"),
        (lambda: dispatch.score_tokens(HEAD, IDS[:, None]), "sampled_ids"),
        (lambda: dispatch.fused_linear_sdpo_loss(HEAD, HEAD, TokenBatch(), CONFIG), "teacher"),
        (lambda: fused_self_distillation_loss(HIDDEN, WEIGHT, ones(2, 4), WEIGHT, IDS, IDS, CONFIG), "teacher_hidden"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(call: Callable[[], object], name: str) -> None:
    with pytest.raises(TypeCheckError, match=f"typechecking parameter '{name}'"):
        call()


def test_a_result_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert add_tail(-ones(2, 3)).shape == (2, 4)
    monkeypatch.setattr(torch, "cat", lambda tensors, dim: tensors[0])
    with pytest.raises(TypeCheckError, match="checking the return value of"):
        add_tail(-ones(2, 3))


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_declare_their_shapes(name: str) -> None:
    # And annotations can be evaluated, without which they are not checked.
    hints = find_hints(importlib.import_module(f"sdpo.algorithm.{name}"))
    assert [where for where, hint in hints if lacks_shape(hint)] == []


def find_hints(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
            continue
        for part in [found, *vars(found).values()] if inspect.isclass(found) else [found]:
            function = part.fget if isinstance(part, property) else part
            if callable(function):
                hints = get_type_hints(function, include_extras=True)
                yield from ((f"{name}: {argument}", hint) for argument, hint in hints.items())


def lacks_shape(hint: Any) -> bool:
    return hint is Tensor or any(map(lacks_shape, get_args(hint)))
