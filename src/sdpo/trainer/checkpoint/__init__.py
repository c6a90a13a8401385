"""Checkpoints: write, find, resume, export."""
