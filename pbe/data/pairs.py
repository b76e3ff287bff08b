"""Pairs of pictures as a source: a target with a hole, and another picture of the same object as its reference.

Tables in the schema of AnyInsertion: ref_image, ref_mask, tar_image, tar_mask, as Parquet (bytes, Hugging Face's
{bytes, path}, or paths) or CSV (paths below ingest.images). Masks may be missing: a target without one needs a box
(XMin, XMax, YMin, YMax, fractions), a reference without one is shown whole. Optional: label, split.
"""

import bisect
import errno
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pbe.data.annotations import split_of
from pbe.data.boxfiles.coordinates import ALLOWED, inside
from pbe.data.boxfiles.csv_rows import BLOCK_BYTES, read_dialect, read_rows
from pbe.data.boxfiles.photo_names import clean_ids
from pbe.data.download import PhotoError
from pbe.data.files import FileTree, SourceError
from pbe.data.frames import Frame
from pbe.data.images import ImageError, decode, open_picture
from pbe.data.object_masks import MaskRejected, ObjectMask, read_mask
from pbe.data.schema import ANNOTATIONS, FLAGS, PHOTOS, table_from_rows, with_optional
from pbe.data.sources import FolderSource
from pbe.errors import one_line

PICTURES = ("ref_image", "ref_mask", "tar_image", "tar_mask")
BOX = {"xmin": "XMin", "xmax": "XMax", "ymin": "YMin", "ymax": "YMax"}
COLUMNS = (*PICTURES, *BOX.values(), "label", "split")
WITHOUT_LABEL = "object"
ROWS_AT_ONCE = 256
_BYTES = "#"  # in an address: table#row#column
_READING = threading.Lock()  # the threads of a task would each hold a row group


class PairRejected(Exception):  # noqa: N818  it is no error of ours
    """A pair's reference cannot be used. `reason` is one of the schema's PAIR_REASONS; `str()` is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class PairsSource:
    """A Source. images: where paths of the tables begin. tables: a table or a folder of tables."""

    images: FileTree
    tables: FileTree
    lists_all: bool = False

    def photos(self) -> Iterator[pa.Table]:
        """Yield PHOTOS of the targets, one of several pairs once. Raises SourceError."""
        seen: set[tuple[str, str]] = set()
        photos: list[dict[str, Any]] = []
        for _, _, row in self._rows():
            if row["tar_image"] is not None and (row["image_id"], row["tar_image_version"]) not in seen:
                seen.add((row["image_id"], row["tar_image_version"]))
                photos.append(
                    {"image_id": row["image_id"], "address": row["tar_image"], "version": row["tar_image_version"]}
                )
            if len(photos) == ROWS_AT_ONCE:
                yield pa.Table.from_pylist(photos, schema=PHOTOS)
                photos = []
        yield pa.Table.from_pylist(photos, schema=PHOTOS)

    def annotations(self) -> Iterator[pa.Table]:
        """Yield ANNOTATIONS, a row a pair. Raises SourceError."""
        rows: list[dict[str, Any]] = []
        for name, line, row in self._rows():
            rows.append(_annotation(name, line, row))
            if len(rows) == ROWS_AT_ONCE:
                yield with_optional(table_from_rows(rows, ANNOTATIONS), ANNOTATIONS)
                rows = []
        yield with_optional(table_from_rows(rows, ANNOTATIONS), ANNOTATIONS)

    def address_without_photo(self, image_id: str, split: str) -> str | None:
        return None

    def read(self, address: str, max_bytes: int) -> bytes:
        if _BYTES not in address:
            return FolderSource(self.images).read(address, max_bytes)
        try:
            return self.read_file(address, max_bytes)
        except OSError as error:
            large = error.errno == errno.EFBIG
            reason = "image_too_large" if large else "image_unreadable"
            raise PhotoError(reason, f"{address}: {one_line(error.strerror or error)}") from None

    def read_file(self, address: str, max_bytes: int) -> bytes:
        """The bytes of a picture or mask. Raises OSError, also for more than `max_bytes`."""
        if _BYTES not in address:
            return self.images.read(address, max_bytes=max_bytes)
        name, number, column = address.rsplit(_BYTES, 2)
        ends = _group_ends(self.tables, name)
        group = bisect.bisect_right(ends, int(number))
        row = int(number) - (ends[group - 1] if group else 0)
        with _READING:
            data = _picture(_group(self.tables, name, group, column)[row].as_py())[1] or b""
        if len(data) > max_bytes:
            raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", address)
        return data

    def _rows(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Yield table, row number and row: PICTURES as addresses or None, their versions, and the other columns."""
        names = self.tables.names() if self.tables.is_folder else [self.tables.only_name]
        names = [name for name in names if name.lower().endswith((".parquet", ".csv"))]
        if not names:
            raise SourceError(f"ingest.boxes: no .parquet or .csv of pairs at {self.tables.where}")
        versions: dict[str, str] = {}  # of the first target of each id
        for name in names:
            found = self._of_parquet(name) if name.lower().endswith(".parquet") else self._of_csv(name)
            for line, row in found:
                version = row.get("tar_image_version", "")
                if row["image_id"] and versions.setdefault(row["image_id"], version) != version:
                    # another picture under the same file name, such as pair_002/tar.png
                    row["image_id"] += "-" + hashlib.sha256(version.encode()).hexdigest()[:8]
                yield name, line, row

    def _of_csv(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        dialect = read_dialect(self.tables, name, COLUMNS)
        self._require(name, dialect.header)
        columns = [column for column in COLUMNS if column in dialect.header]
        for rows in read_rows(self.tables, name, dialect, columns, block_bytes=BLOCK_BYTES):
            for line, cells in zip(rows.lines.tolist(), rows.cells.to_pylist(), strict=True):
                yield line, self._row({key: value or None for key, value in cells.items()})
            for row in rows.unreadable:
                yield row.line, {"image_id": "", "problem": row.detail, **dict.fromkeys(PICTURES)}

    def _of_parquet(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with self.tables.open_seekable(name) as stream, pq.ParquetFile(stream) as parquet:
                self._require(name, parquet.schema_arrow.names)
                columns = [column for column in COLUMNS if column in parquet.schema_arrow.names]
                number = 0
                for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
                    for cells in batch.to_pylist():
                        yield number, self._row(cells, f"{name}{_BYTES}{number}{_BYTES}")
                        number += 1
        except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
            raise SourceError(f"{self.tables.path_of(name)}: not a readable Parquet file: {one_line(error)}") from None

    def _require(self, name: str, header: Any) -> None:
        if missing := [column for column in ("ref_image", "tar_image") if column not in header]:
            raise SourceError(
                f"{self.tables.path_of(name)}: no table of pairs, it lacks {', '.join(missing)}; it has "
                f"{one_line(', '.join(header), 200)}"
            )

    def _row(self, cells: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        row: dict[str, Any] = {key: cells.get(key) for key in (*BOX.values(), "label", "split")}
        for column in PICTURES:
            path, data = _picture(cells.get(column))
            row[column] = prefix + column if data is not None else path
            version = hashlib.sha256(data).hexdigest() if data is not None else self._version(path)
            row[f"{column}_version"] = version
            if column == "tar_image":
                own = path.rpartition("/")[2] if path else version[:16]
                row["image_id"] = clean_ids(pa.array([own]))[0].as_py()
        return row

    def _version(self, path: str | None) -> str:
        """By content where it is local: the same pictures in another folder are the same input. Else as listed."""
        if not path:
            return ""
        if not self.images.is_local:
            return self._listed.get(path, "")
        if path not in self._hashed:
            try:
                self._hashed[path] = self.images.sha256(path)
            except OSError as error:
                self._hashed[path] = f"unreadable: {type(error).__name__}"
        return self._hashed[path]

    @cached_property
    def _hashed(self) -> dict[str, str]:
        """Versions of local files so far: tables are read twice, and may name a picture often."""
        return {}

    @cached_property
    def _listed(self) -> dict[str, str]:
        return {info.name: info.version for info in self.images.walk()}

    def __reduce__(self) -> tuple[type["PairsSource"], tuple[FileTree, FileTree]]:
        return PairsSource, (self.images, self.tables)  # workers need no versions


def _picture(cell: Any) -> tuple[str | None, bytes | None]:
    """Path and bytes of a cell."""
    if isinstance(cell, Mapping):
        return cell.get("path") or None, cell.get("bytes")
    if isinstance(cell, bytes):
        return None, cell or None
    return (str(cell) if cell else None), None


@functools.lru_cache(maxsize=64)
def _group_ends(tables: FileTree, name: str) -> list[int]:
    """Of each row group of a Parquet table, the number of the row after its last."""
    with tables.open_seekable(name) as stream, pq.ParquetFile(stream) as parquet:
        groups = range(parquet.metadata.num_row_groups)
        return list(itertools.accumulate(parquet.metadata.row_group(group).num_rows for group in groups))


@functools.lru_cache(maxsize=4)
def _group(tables: FileTree, name: str, group: int, column: str) -> pa.ChunkedArray:
    """The pictures of one column of a row group: the least that can be read of a Parquet file."""
    with tables.open_seekable(name) as stream, pq.ParquetFile(stream) as parquet:
        return parquet.read_row_group(group, columns=[column]).column(column)


def _annotation(name: str, line: int, row: Mapping[str, Any]) -> dict[str, Any]:
    label = str(row.get("label") or WITHOUT_LABEL)
    split = split_of(str(row.get("split") or name))
    out = {"image_id": row["image_id"] or "", "file": name, "line": line, "split": split, "listed_split": split}
    out |= {"label": label, "label_name": label} | dict.fromkeys(FLAGS, -1)
    if "problem" in row or row["tar_image"] is None:
        return out | {"reason": "box_unparsable", "detail": row.get("problem") or "tar_image is empty"}
    ends = {ours: row[theirs] for ours, theirs in BOX.items()}
    try:
        given = {key: float(value) for key, value in ends.items() if value not in (None, "")}
    except (TypeError, ValueError):
        return out | {"reason": "box_unparsable", "detail": f"{ends} are no numbers"}
    if len(given) == len(BOX):
        if not inside(np.array([[given[end]] for end in BOX])).all():
            return out | {"reason": "box_outside_image", "detail": f"{given}; {ALLOWED}"}
        out |= given
    elif row["tar_mask"] is None:
        return out | {
            "reason": "box_unparsable",
            "detail": "the target has neither tar_mask nor XMin, XMax, YMin, YMax",
        }
    if row["tar_mask"] is not None:
        out["mask"] = json.dumps({"file": row["tar_mask"], "version": row["tar_mask_version"]})
    pair = {"file": row["ref_image"], "version": row["ref_image_version"], "mask": row["ref_mask"]}
    pair |= {"mask_version": row["ref_mask_version"], "target": row["tar_image_version"]}
    return out | {"pair": json.dumps(pair)}


def pictures_of(said: str) -> list[str]:
    """Addresses of the pictures that ANNOTATIONS' column `pair` names."""
    pair = json.loads(said)
    return [address for address in (pair["file"], pair["mask"]) if address]


def read_reference(said: str, *, read: Callable[[str], bytes], max_pixels: int) -> dict[str, Any]:
    """A row of PAIRS without its keys, from ANNOTATIONS' column `pair`. read: an address to its bytes, raises OSError.

    The picture is kept as received, in its own frame upright, with its mask. Raises PairRejected.
    """
    pair = json.loads(said)
    if not pair["file"]:
        raise PairRejected("pair_unreadable", "ref_image is empty")
    if pair["version"] and pair["version"] == pair["target"]:
        raise PairRejected("pair_of_itself", f"{pair['file']} has the bytes of its target: fills would be pasted")
    try:
        data = read(pair["file"])
        picture = open_picture(data, max_pixels=max_pixels)
        orientation = picture.header.exif_orientation
        height_px, width_px = decode(data, exif_orientation=orientation, convert=False).shape[:2]
    except (OSError, ImageError) as error:
        raise PairRejected("pair_unreadable", f"{pair['file']}: {one_line(error)}") from None
    mask = None
    if pair["mask"]:
        frame = Frame(width_px, height_px, orientation, upright=True)
        shape = json.dumps({"file": pair["mask"]})
        try:
            mask = ObjectMask.of(read_mask(shape, stated=None, frame=frame, read=read)).packed()
        except MaskRejected as problem:
            raise PairRejected("pair_mask_unusable", f"{problem.reason}: {problem}") from None
    return {
        "picture": data,
        "exif_orientation": orientation,
        "mask": mask,
        "width_px": width_px,
        "height_px": height_px,
    }
