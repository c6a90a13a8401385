"""The student's updates."""
