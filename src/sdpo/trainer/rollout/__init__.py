"""Sampling for the trainer, in its process or beside it."""
