"""Updates of the student."""
