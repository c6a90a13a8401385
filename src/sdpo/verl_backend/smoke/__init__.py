"""The smoke test of ``train.sh``: a tiny run, and checks of what it left."""
