"""The loss from hidden states on a CUDA device: cuBLAS for the four matrix products, Triton for the rest.

All kernels compute in float32 with logarithms to base 2, because the hardware has 2^x and log2 x. The suffix ``_2``
marks values in these units: x_2 = x * log2 e.
"""
