"""The network: GPT-2, its cache, its head, and the files that hold its weights."""
