"""The loss from hidden states by device: the portable form of ``sdpo.algorithm``, or kernels made for a GPU."""
