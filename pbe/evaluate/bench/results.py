"""Read a folder of finished edits, one file per bench item named by its bench id, so that any method can be scored.

Counterpart upstream: results/test_bench/results/{id:012d}.png of scripts/inference_test_bench.py, which this reads
unchanged. Deviations: eval_tool/fid scores any file in the folder and silently resizes a result of another size; here
a missing or misshapen result is rejected by name.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from pbe.data import images
from pbe.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NAME_CHARACTERS = 150  # file systems end at 255 bytes
_LISTED = 5


class ResultsError(UserError, ValueError):
    """The folder, or one of its files, cannot be scored; the message names it."""


@dataclass(frozen=True)
class FoundResults:
    """paths: by bench id, in the bench's order. missing: bench ids without a file. extra_files: how many entries
    of the folder belong to no bench id (other files, folders); they are not read.
    """

    paths: Mapping[str, Path]
    missing: Sequence[str]
    extra_files: int


def result_name(bench_id: str) -> str:
    """The file name of an item's result, without its suffix.

    Letters, digits and . _ - ~ # stay, so COCOEE's 000000012345 and our 000000000139#0#1 do not change; every other
    character becomes the %XX of its UTF-8 bytes, as in a URL (/ is %2F). A name beyond NAME_CHARACTERS is cut and ends
    with its sha256. Two ids never share a name, unless they differ only in case on a case-insensitive file system.
    """
    name = quote(bench_id, safe="#")
    if len(name) <= NAME_CHARACTERS:
        return name
    # quote never writes "%-", so no short id has this name
    return f"{name[:NAME_CHARACTERS]}%-{hashlib.sha256(bench_id.encode()).hexdigest()}"


def find_results(folder: Path, bench_ids: Collection[str], *, allow_missing: bool) -> FoundResults:
    """Match the files of `folder` to bench items by name; subfolders are not searched.

    A result is <result_name(bench_id)> and one of SUFFIXES, in small or capital letters.
    Raises ResultsError if `folder` is not a folder or has no results, for two files of one id and, unless
    allow_missing, for ids without a file. Raises ValueError for a duplicate bench id.
    """
    id_of = {result_name(bench_id): bench_id for bench_id in bench_ids}
    if len(id_of) != len(bench_ids):
        raise ValueError("a bench id is given twice")
    if not folder.is_dir():
        raise ResultsError(f"{folder} is not a folder; results are files <bench id>.png in one folder")
    found: dict[str, Path] = {}
    extra_files = 0
    for path in sorted(folder.iterdir()):
        bench_id = id_of.get(path.stem) if path.suffix.lower() in SUFFIXES and path.is_file() else None
        if bench_id is None:
            extra_files += 1
        elif bench_id in found:
            raise ResultsError(f"{folder}: two results of {bench_id}, {found[bench_id].name} and {path.name}; keep one")
        else:
            found[bench_id] = path
    missing = [bench_id for bench_id in bench_ids if bench_id not in found]
    if not found:
        example = f", such as {result_name(missing[0])}.png" if missing else ""
        raise ResultsError(f"{folder}: none of its {extra_files} entries is a result of this bench{example}")
    if missing and not allow_missing:
        raise ResultsError(
            f"{folder}: no result for {_some(missing)} of {len(bench_ids)} bench ids; make them, or set allow_missing: "
            "true"
        )
    return FoundResults(
        {bench_id: found[bench_id] for bench_id in bench_ids if bench_id in found}, missing, extra_files
    )


def read_result(path: Path, *, width_px: int, height_px: int) -> np.ndarray:
    """Read one result as (height_px, width_px, 3) uint8 RGB, as stored: EXIF orientation and colour profiles are
    ignored, as upstream does.

    Raises ResultsError naming the file if it is unreadable or truncated, has another size (resizing would affect the
    score), is greyscale, palette or CMYK, or is transparent anywhere. A fully opaque alpha channel is dropped.
    """
    try:
        picture = images.open_picture(path)
        mode = images.read_mode(picture.data)
        if mode not in ("RGB", "RGBA"):
            raise ResultsError(f"{path}: pixels are stored as {mode}; save results as RGB, 8 bits a channel")
        if picture.upright_alpha() is not None:
            raise ResultsError(f"{path}: is partly transparent; save results as RGB without an alpha channel")
        edit = picture.stored()
    except images.ImageError as error:
        raise ResultsError(f"{path}: {error}") from None
    if edit.shape[:2] != (height_px, width_px):
        raise ResultsError(
            f"{path}: {edit.shape[1]} x {edit.shape[0]} px, but the bench's photo has {width_px} x {height_px} px;"
            " results are never resized here"
        )
    return edit


def read_results(
    folder: Path, sizes_px: Mapping[str, tuple[int, int]], *, allow_missing: bool
) -> tuple[dict[str, np.ndarray], FoundResults]:
    """Read all results by bench id, in the bench's order. sizes_px: (width, height) by bench id.

    Holds every picture in memory (3,500 of 512 px: 2.8 GB); for larger sets, call `find_results` and then `read_result`
    per file. Raises like both; names are checked before the first picture is read.
    """
    found = find_results(folder, sizes_px.keys(), allow_missing=allow_missing)
    edits = {}
    for bench_id, path in found.paths.items():
        width_px, height_px = sizes_px[bench_id]
        edits[bench_id] = read_result(path, width_px=width_px, height_px=height_px)
    return edits, found


def _some(ids: Sequence[str]) -> str:
    """Format the count and the first five ids: `3 (a, b, c)`."""
    more = ", ..." if len(ids) > _LISTED else ""
    return f"{len(ids)} ({', '.join(ids[:_LISTED])}{more})"
