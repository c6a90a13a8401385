"""What runs on verl's driver."""
