"""Progress bar: redrawn in place on a terminal, one line every ten seconds in a log file or a job."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LOG_INTERVAL_S = 10.0


def progress_bar(label: str, *, total: int | None, unit: str) -> "tqdm[None]":
    """Return a tqdm bar on stderr, to use as a context manager. With total None (unknown) it only counts."""
    interval_s = 0.1 if sys.stderr.isatty() else LOG_INTERVAL_S
    return tqdm(
        desc=label, total=total, unit=unit, unit_scale=total is None, mininterval=interval_s, maxinterval=2 * interval_s
    )


def with_progress(items: Iterable[Item], label: str, *, total: int, unit: str) -> Iterator[Item]:
    """Yield the items while a progress bar counts them."""
    with progress_bar(label, total=total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
