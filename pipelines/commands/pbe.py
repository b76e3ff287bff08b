"""The command `pbe`: pbe/cli, with Ray for the rows of `pbe edit --table`."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pbe.cli.__main__ import main as run_cli

if TYPE_CHECKING:
    from pbe.edit_table.results import Result
    from pbe.edit_table.rows import Job
    from pbe.edit_table.work import Work


def main(argv: list[str] | None = None) -> int:
    return run_cli(argv, on_ray=_on_ray)


def _on_ray(groups: "Sequence[tuple[Job, ...]]", work: "Work", actors: int) -> "Iterator[list[Result]]":
    from pipelines.runtime.environment import prepare_driver

    prepare_driver()  # before Ray is imported
    from pipelines.edit_table import edit_on_ray
    from pipelines.runtime.local_ray import ended_with

    with ended_with():
        yield from edit_on_ray(groups, work, actors=actors)


if __name__ == "__main__":
    sys.exit(main())
