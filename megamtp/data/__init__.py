"""Text to training batches: documents -> corpus (tokenizer + indexed_dataset) -> windows -> loader."""
