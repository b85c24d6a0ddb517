"""Weights in, text out."""
