"""The run folder and experiment trackers."""
