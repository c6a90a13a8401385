"""SDPO on stock verl: Ray, vLLM, FSDP2. ``main.py`` starts a run; ``docs/verl.md`` names every hook into verl."""
