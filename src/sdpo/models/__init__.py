"""Models of transformers: loading them, and sampling from them. What both engines share beside the algorithm."""
