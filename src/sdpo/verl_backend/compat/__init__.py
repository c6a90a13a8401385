"""Hooks into verl."""
