"""The configuration of a run: every setting with its default, range and meaning, one file per section.

The dataclasses are the schema of a config file, its validation, and the source of ``docs/configuration.md``. Nothing
here imports torch, so that the command line starts fast.
"""
