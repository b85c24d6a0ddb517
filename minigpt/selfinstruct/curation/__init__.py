"""Filters generated tasks after a run."""
