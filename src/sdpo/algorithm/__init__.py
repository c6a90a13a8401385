"""SDPO as pure functions: tensors in, tensors out. Imports torch and nothing else.

Axes, one letter each, in every docstring of this folder:

    B  samples (responses)          N  tokens packed from several samples
    T  response tokens              V  vocabulary
    K  kept vocabulary entries      H  hidden size
    M  those of the N tokens that are distilled
    ...  any leading axes, usually [B, T] or [N]

All log-probabilities are natural logarithms of normalised distributions (<= 0); divergences and entropies are in
nats. A mask is 1 (or True) where an element counts.
"""
