"""Image processors, the vision tower and its features."""
