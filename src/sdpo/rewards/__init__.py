"""Data sets and graders: one file a task. ``interface.py`` says what a task is and finds it by name."""
