"""Errors that the user can fix. The command line prints only their message, without a traceback."""

import unicodedata

JOINERS = "\u200c\u200d"  # of Persian, Indic scripts and emoji
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control and format characters, such as those that turn the direction of text


class UserError(Exception):
    """The message names the file, row or key, and what to do."""


class ParamsError(UserError, ValueError):
    """A key of params.yaml, or a variable of the environment, is unknown, missing or out of range."""


def printable(text: str) -> str:
    """Text from data, to be shown: characters that would steer a terminal or a page appear as their escapes.

    Names come from files of others: ESC could clear the screen, a bidirectional override could disguise a name.
    """
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in HIDDEN and char not in JOINERS else char
        for char in text
    )


def one_line(error: object, limit: int = 400) -> str:
    """An error's text in one line of at most `limit` characters, for a message that quotes it."""
    return " ".join(str(error).split())[:limit]
