"""Low-rank adapters (LoRA), and the teacher of a student with adapters."""
