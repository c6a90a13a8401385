"""A step's images through each tower once: not once a rollout, and not again for a teacher whose tower is the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sdpo.models.multimodal.vision_tower import ImageFeatureCache, ImageFeatures, Precision, VisionAdapter


class StepImageFeatures:
    """Features of a step's images, by module.

    Args:
        vision: of the student.
        student: the module whose tower may learn.
        frozen: no tower ever changes, so that all modules share the student's features.
        precision: the context of forward passes, such as autocast.
    """

    def __init__(self, vision: VisionAdapter, student: nn.Module, *, frozen: bool, precision: Precision) -> None:
        self.vision = vision
        self._student = student
        self._frozen = frozen
        self._precision = precision
        self._seen: dict[nn.Module, ImageFeatureCache] = {}

    def select(self, module: nn.Module, images: Sequence[bytes]) -> list[ImageFeatures]:
        """What ``module`` makes of these images, in this order."""
        if not images:
            return []
        key = self._student if self._frozen else module
        if key not in self._seen:
            learning = key is self._student and not self._frozen
            self._seen[key] = ImageFeatureCache(key, self.vision.reader, learning=learning, precision=self._precision)
        return self._seen[key].select(images)

    def backward(self) -> None:
        """Send what gradients the student's features have collected through its tower."""
        if self._student in self._seen and not self._frozen:
            self._seen[self._student].backward()

    def forget_gradients(self) -> None:
        """The mini-batch is begun again."""
        if self._student in self._seen:
            self._seen[self._student].forget_gradients()

    def forget_student(self) -> None:
        """The student's weights have changed, and with them its features, unless its tower is frozen."""
        if not self._frozen:
            self._seen.pop(self._student, None)
