"""What runs in verl's agent loop workers."""
