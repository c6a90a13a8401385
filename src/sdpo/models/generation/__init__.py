"""Sampling with a model of transformers."""
