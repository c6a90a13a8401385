"""Load transformers models, run forward passes and sample: code that both backends share."""
