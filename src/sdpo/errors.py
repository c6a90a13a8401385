"""Errors that a user can correct; all others are programming errors."""

MAX_CHARACTERS = 800


class SDPOError(ValueError):
    """A mistake in a config, data, a checkpoint or the environment.

    The message is one line that says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2. Characters of quoted input that cannot be printed are escaped, and the middle of a
    message that is too long is left out.
    """

    def __init__(self, message: str) -> None:
        escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        if len(escaped) > MAX_CHARACTERS:
            escaped = f"{escaped[: MAX_CHARACTERS // 2]} ... {escaped[-MAX_CHARACTERS // 2 :]}"
        super().__init__(escaped)


class ConfigError(SDPOError):
    """A setting, an argument, a model's folder or the installation."""


class DataError(SDPOError):
    """A row, an image, a prompt or a reward."""


class CheckpointError(SDPOError):
    """A checkpoint that is missing, damaged or of another run."""
