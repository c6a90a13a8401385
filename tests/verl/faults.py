"""Faults for ``test_proof.py``, which verl's workers import by ``actor_rollout_ref.model.external_lib=faults``.

``FAULT`` selects a fault: ``stale`` syncs the weights before the last update to the sampler, ``images`` passes the
images of other rows to the actor.
"""

from __future__ import annotations

import os
from typing import Any

from tensordict import NonTensorData, NonTensorStack

from sdpo.verl_backend.worker.engine import SelfDistillationEngine
from sdpo.verl_backend.worker.teacher_inputs import read_images

FAULT = os.environ["FAULT"]

if FAULT == "stale":
    get_weights = SelfDistillationEngine.get_per_tensor_param

    def get_earlier_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights, more = get_weights(self, *args, **kwargs)
        now = [(name, weight.clone()) for name, weight in weights]
        earlier, self.weights_sent = getattr(self, "weights_sent", now), now
        return iter(earlier), more

    SelfDistillationEngine.get_per_tensor_param = get_earlier_weights

if FAULT == "images":
    step = SelfDistillationEngine.forward_step

    def step_on_other_images(self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        others = read_images(micro_batch)[::-1]
        micro_batch["multi_modal_inputs"] = NonTensorStack(*map(NonTensorData, others))
        return step(self, micro_batch, *args, **kwargs)

    SelfDistillationEngine.forward_step = step_on_other_images
