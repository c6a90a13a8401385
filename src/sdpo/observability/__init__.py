"""Metric names, confidence intervals, health checks, progress."""
