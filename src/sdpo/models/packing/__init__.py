"""Pack sequences into one row, with shared prompts computed once."""
