"""What the commands share: types of arguments, and reading the pictures that a user names."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pbe.errors import printable

if TYPE_CHECKING:
    from pbe.data.boxes import Box

Number = TypeVar("Number", int, float)


def at_least(least: int, kind: type[Number]) -> Callable[[str], Number]:
    """An argparse type: a number that is at least `least`."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more")
        return value

    parse.__name__ = kind.__name__  # argparse's own message for other text names it
    return parse


def box(text: str) -> "Box":
    """An argparse type: x0,y0,x1,y1 in pixels, half-open."""
    from pbe.data.boxes import Box

    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: four whole numbers are needed, such as 10,20,200,180") from None
    try:
        return Box(x0, y0, x1, y1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: x0 must be less than x1, and y0 less than y1") from None


def read_file(path: Path) -> bytes:
    """The bytes of a picture, within the limits. Raises ValueError, OSError."""
    from pbe.data import images

    try:
        data = images.open_picture(path).data
        if note := images.colour_note(data):
            print(f"{path}: {printable(note)}")
    except images.ImageError as error:
        raise ValueError(f"{path}: {error}") from None
    return data


def refuse_unwritable_png(out: Path) -> None:
    """Check --out before any work starts. Raises ValueError."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: must end in .png")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
