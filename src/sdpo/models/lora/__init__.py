"""Low-rank adapters, and a teacher made of them."""
