"""Prompts in, training samples out."""
