"""`Batch` in, weights out: optimizer, engine, loop."""
