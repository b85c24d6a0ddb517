"""Text in, `Batch` out: tokenizer, records, prompts, dataset, collate."""
