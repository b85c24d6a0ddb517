"""Files of any supported format, read as a stream of conversations."""
