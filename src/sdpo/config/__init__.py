"""The configuration: every setting with its default, range and meaning, one file per section.

The dataclasses are the schema of a config file, validate it, and are the source of ``docs/configuration.md``. No module
here imports torch, so that the command line starts fast.
"""
