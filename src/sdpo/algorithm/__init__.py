"""SDPO as functions of tensors: losses, gradients, and the teacher's weights.

Imports torch, jaxtyping and, of this package, only ``sdpo.config.self_distillation``. ``sdpo.kernels`` has faster
forms.

Annotations declare the shapes of tensors: ``Float[Tensor, "N V"]`` has N rows of V floating-point numbers, and
``Float[Tensor, ""]`` is a scalar. The tests check them. Axes:

    B  samples (responses)          N  tokens packed from several samples
    T  response tokens              V  vocabulary
    K  kept vocabulary entries      H  hidden size
    M  distilled tokens among the N
    C  entries of a compared distribution: V, K, or K + 1 with a tail
    *axes  any leading axes, usually B T or N

All log-probabilities are natural logarithms of normalised distributions (<= 0); divergences and entropies are in
nats. A mask is 1 (or True) where an element counts.
"""
