"""Several sequences in one row, a shared prompt computed once."""
