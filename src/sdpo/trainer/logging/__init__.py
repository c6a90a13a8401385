"""The output folder of a run, and experiment trackers."""
