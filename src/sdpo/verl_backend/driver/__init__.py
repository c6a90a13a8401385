"""Code that runs in verl's driver process."""
