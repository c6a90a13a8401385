"""SDPO as functions of tensors: losses, gradients, and the teacher's weights.

Imports torch and, of this package, only ``sdpo.config.self_distillation``. ``sdpo.kernels`` has faster forms.

Axes in every docstring of this folder:

    B  samples (responses)          N  tokens packed from several samples
    T  response tokens              V  vocabulary
    K  kept vocabulary entries      H  hidden size
    M  distilled tokens among the N
    ...  any leading axes, usually [B, T] or [N]

All log-probabilities are natural logarithms of normalised distributions (<= 0); divergences and entropies are in
nats. A mask is 1 (or True) where an element counts.
"""
