"""Sample from transformers models."""
