"""verl without a GPU: a platform, a weight sync and a sampler.

Slow; for tests, for learning how a run works, and for trying a configuration before renting GPUs.
"""
