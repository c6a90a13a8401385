"""Code that runs in verl's agent loop workers."""
