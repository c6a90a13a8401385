"""Encoded prompts and training samples."""
