"""Prompts: files to rows, rows to token ids, and the order in which training sees them."""
