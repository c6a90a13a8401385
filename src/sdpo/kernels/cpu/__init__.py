"""Fast paths for processors: oneDNN products, memory allocation."""
