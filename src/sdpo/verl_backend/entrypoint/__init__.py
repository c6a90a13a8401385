"""From a config file to a running verl job."""
