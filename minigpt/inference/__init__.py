"""Inference: weights in, text out."""
