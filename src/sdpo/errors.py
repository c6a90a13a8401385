"""The one exception that a person's mistake becomes."""

MOST_CHARACTERS = 800


class UserError(ValueError):
    """A mistake in what the person gave us: a run file, data, a model, a path.

    The message is a single line that says what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2; from Python it is an ordinary ``ValueError``.

    What a message quotes may be anything: characters that cannot be printed are escaped, and the middle of a message
    that is too long is left out.
    """

    def __init__(self, message: str) -> None:
        escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        if len(escaped) > MOST_CHARACTERS:
            escaped = f"{escaped[: MOST_CHARACTERS // 2]} ... {escaped[-MOST_CHARACTERS // 2 :]}"
        super().__init__(escaped)
