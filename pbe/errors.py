"""What the user can mend. The command line prints such an error as one message, without a traceback."""


class UserError(Exception):
    """The message names the file, row or key, and what to do."""
