"""The one exception that a person's mistake becomes."""


class UserError(ValueError):
    """A mistake in what the person gave us: a run file, data, a model, a path.

    The message is a single line that says what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2; from Python it is an ordinary ``ValueError``.
    """
