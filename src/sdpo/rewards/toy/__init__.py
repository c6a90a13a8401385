"""Toy tasks that create their own data and model, for the quickstart and for tests."""
