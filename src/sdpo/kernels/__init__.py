"""The loss from hidden states, by device: portable (``sdpo.algorithm``) or with CUDA kernels."""
