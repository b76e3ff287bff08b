"""Which triplets the codec is fitted on: it names the codec, and the codec names every encoded part."""

import pytest

from pbe.store import File, Manifest, Record
from pipelines.encode import _first_files


def _manifest(*shards: tuple[str, int], slots: int = 2) -> Manifest:
    """shards: content and rows of each."""
    units = []
    for number, (content, rows) in enumerate(shards):
        names = [*(f"slot-{slot:04d}" for slot in range(slots)), "rejects"]
        files = [File(name, f"parts/m/b{number}/{name}.parquet", rows, 1, f"{content} {name}") for name in names]
        units.append(Record(f"b{number:04d}", tuple(files), {}))
    return Manifest("materialize", "digest", {}, 1, tuple(units), {})


def _named(manifest: Manifest, crops: int) -> list[str]:
    return [file.sha256 for file in _first_files(manifest, crops)]


@pytest.mark.parametrize(("crops", "files"), [(1, 1), (10, 1), (11, 2), (30, 2), (31, 3), (60, 4), (999, 4)])
def test_the_codec_is_fitted_on_the_first_files_that_hold_enough_crops_slot_by_slot(crops: int, files: int) -> None:
    order = ["x slot-0000", "y slot-0000", "x slot-0001", "y slot-0001"]
    assert _named(_manifest(("x", 10), ("y", 20)), crops) == order[:files]


def test_new_photos_in_a_later_shard_leave_the_codec_as_it_is() -> None:
    assert _named(_manifest(("x", 10), ("y", 20)), 8) == _named(_manifest(("x", 10), ("y and more", 25)), 8)
    assert _named(_manifest(("x", 10), ("y", 20)), 8) != _named(_manifest(("x and more", 11), ("y", 20)), 8)
