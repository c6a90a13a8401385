"""The smoke test of ``train.sh``: tiny runs, and checks of their metrics and checkpoints."""
