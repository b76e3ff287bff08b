"""The progress bar of all stages: redrawn in place on a terminal, a line every ten seconds in a log or a job."""

import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LOG_INTERVAL_S = 10.0


def progress_bar(label: str, *, total: int | None, unit: str) -> "tqdm[None]":
    """Return a tqdm bar on stderr, to use as a context manager. total: None if unknown; it then only counts."""
    redraws = sys.stderr.isatty()
    interval_s = 0.1 if redraws else LOG_INTERVAL_S
    return tqdm(
        desc=label,
        total=total,
        unit=unit,
        unit_scale=total is None,
        mininterval=interval_s,
        maxinterval=2 * interval_s,
        file=sys.stderr if redraws else _Lines(sys.stderr),
        disable=total == 0,
    )


def with_progress(items: Iterable[Item], label: str, *, total: int, unit: str) -> Iterator[Item]:
    """Yield `items` while a bar counts them."""
    with progress_bar(label, total=total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()


class _Lines:
    """File for tqdm that makes a line of each state but the first, which says nothing yet."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._has_begun, self.encoding = stream, False, stream.encoding

    def write(self, text: str) -> None:
        state = text.strip()
        if state and self._has_begun:
            self._stream.write(state + "\n")
        self._has_begun = True

    def flush(self) -> None:
        self._stream.flush()
