"""Tasks: reward functions and data sets. ``base.py`` defines and loads a task, ``manager.py`` calls it."""
