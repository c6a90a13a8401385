"""The loss from hidden states on a CUDA device: cuBLAS for the four products, Triton for what is between them.

All kernels work in float32 and with logarithms to base 2, because the hardware has 2^x and log2 x. Suffix ``_2`` names
a value in these units: x_2 = x * log2 e.
"""
