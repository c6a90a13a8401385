"""The native trainer, with torch and transformers alone. ``trainer.py`` has the training loop."""
