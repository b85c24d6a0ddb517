"""Engines: forward, backward and step, in plain PyTorch or with DeepSpeed."""
