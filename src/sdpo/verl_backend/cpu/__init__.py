"""verl on a machine without a GPU: a platform, a way for weights and a sampler. All fiction that this needs is here.

Slow, and meant for tests, for learning how a run works, and for trying a configuration before renting GPUs.
"""
