"""Text in, `Batch` out: read, tokenizer, prompts, encode, store, order, collate."""
