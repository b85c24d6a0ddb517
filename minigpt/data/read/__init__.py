"""Reads files of any supported format as a stream of conversations."""
