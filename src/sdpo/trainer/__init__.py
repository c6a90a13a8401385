"""The engine that needs only torch and transformers. ``trainer.py`` is the loop: read it first."""
