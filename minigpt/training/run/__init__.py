"""A run's folder and everything written to it."""
