"""Geometry3k: data and reward."""
