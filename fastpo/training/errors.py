"""The exceptions that end a run without a traceback."""


class UserError(Exception):
    """Something the user can put right; the command line prints it as one line and exits with code 2."""


class Interrupted(Exception):
    """The run stopped at the user's wish and can be resumed; exit code 130."""
