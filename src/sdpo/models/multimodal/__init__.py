"""Processors, the vision tower, its features."""
