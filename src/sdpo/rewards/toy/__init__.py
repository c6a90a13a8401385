"""Toy tasks that make their own data and model, for the quickstart and the smoke test."""
