"""What runs in verl's training workers."""
