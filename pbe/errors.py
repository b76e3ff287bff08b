"""Errors that the user can fix. The command line prints only their message, without a traceback."""


class UserError(Exception):
    """The message names the file, row or key, and what to do."""


class ParamsError(UserError, ValueError):
    """A key of params.yaml, or a variable of the environment, is unknown, missing or out of range."""


def one_line(error: object, limit: int = 400) -> str:
    """An error's text in one line of at most `limit` characters, for a message that quotes it."""
    return " ".join(str(error).split())[:limit]
