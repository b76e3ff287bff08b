"""OpenImages box CSVs as ANNOTATIONS tables. Train has 21 columns, validation and test 13; they are read by name."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.boxfiles.coordinates import ALLOWED, FRACTION_SLACK, clip, inside
from pbe.data.boxfiles.csv_rows import Dialect, Rows, UnreadableRow, read_dialect, read_rows
from pbe.data.boxfiles.findings import Findings
from pbe.data.boxfiles.photo_names import PhotoNames, clean_ids, invalid_ids
from pbe.data.captions import written_caption
from pbe.data.files import FileTree, SourceError
from pbe.data.schema import ANNOTATIONS, with_optional

FLAG_COLUMNS = {
    "is_occluded": "IsOccluded",
    "is_truncated": "IsTruncated",
    "is_group_of": "IsGroupOf",
    "is_depiction": "IsDepiction",
    "is_inside": "IsInside",
}
COORDINATES = {"xmin": "XMin", "xmax": "XMax", "ymin": "YMin", "ymax": "YMax"}
BOX_COLUMNS = ("ImageID", "LabelName", *COORDINATES.values())
# not OpenImages': the size in pixels of the photo that was labelled. infra/labels/from_voc.py writes them
SIZE_COLUMNS = ("ImageWidth", "ImageHeight")
CAPTION_COLUMN = "Caption"  # likewise: the object in words
NUMBER = r"^[ \t]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?[ \t]*$"
_MAY_LACK = (*FLAG_COLUMNS.values(), *SIZE_COLUMNS, CAPTION_COLUMN)
_FLAGS = {"1": 1, "0": 0, "-1": -1, "": -1}
_FLAGS_ELSEWHERE = {"1.0": 1, "0.0": 0, "-1.0": -1, "true": 1, "false": 0}  # spreadsheets, pandas


def box_dialect(tree: FileTree, name: str) -> Dialect:
    """Dialect of a box CSV. Raises SourceError if its first lines are no text, or name a column twice."""
    return read_dialect(tree, name, (*BOX_COLUMNS, *_MAY_LACK))


def has_boxes(dialect: Dialect) -> bool:
    """False for CSVs without any coordinate: image-level labels, and other files that lie beside boxes."""
    return any(column in dialect.header for column in COORDINATES.values())


def csv_tables(
    tree: FileTree, name: str, split: int, photos: PhotoNames, findings: Findings, *, block_bytes: int
) -> Iterator[pa.Table]:
    """Yield ANNOTATIONS tables of a file. Raises SourceError if it lacks columns."""
    dialect = box_dialect(tree, name)
    missing = [column for column in BOX_COLUMNS if column not in dialect.header]
    if missing:
        shown = "".join(letter if letter.isprintable() else "?" for letter in ", ".join(dialect.header)[:200])
        raise SourceError(
            f"{tree.path_of(name)}: not an OpenImages box CSV, its header lacks {', '.join(missing)}; it has {shown}"
        )
    if dialect.remark:
        findings.remarks.append(f"{name}: read with {dialect.remark}")
    optional = [column for column in _MAY_LACK if column in dialect.header]
    for rows in read_rows(tree, name, dialect, [*BOX_COLUMNS, *optional], block_bytes=block_bytes):
        if rows.cells.num_rows:
            yield _typed(rows, name, split, photos, findings)
        if rows.unreadable:
            yield _unreadable_rows(rows.unreadable, name, split, dialect)


def _typed(rows: Rows, file: str, split: int, photos: PhotoNames, findings: Findings) -> pa.Table:
    """Parse one block of text columns to ANNOTATIONS, with a reason where a cell is invalid."""
    cells, count = rows.cells, rows.cells.num_rows
    columns: dict[str, pa.Array] = {}
    problems: list[tuple[np.ndarray, str, pa.Array]] = []  # where, reason, detail; the first one counts

    def problem(where: pa.Array, reason: str, detail: Any) -> None:
        mask = np.asarray(where)
        if mask.any():
            problems.append((mask, reason, detail if isinstance(detail, pa.Array) else pa.repeat(detail, count)))

    for ours, theirs in COORDINATES.items():
        text = cells.column(theirs)
        columns[ours], wrong = numbers(text)
        if wrong is not None:
            problem(wrong, "box_unparsable", pc.binary_join_element_wise(theirs, text, "is not a number", " "))
    for ours, theirs in FLAG_COLUMNS.items():
        if theirs in cells.schema.names:
            columns[ours], wrong_flag = _flags(pc.utf8_trim_whitespace(cells.column(theirs)))
            said = pc.binary_join_element_wise(theirs, cells.column(theirs), "is not 1, 0 or -1", " ")
            problem(wrong_flag, "box_unparsable", said)
    label = pc.utf8_trim_whitespace(cells.column("LabelName"))
    problem(pc.equal(label, ""), "box_unparsable", "LabelName is empty")
    image_id = photos.ids(cells.column("ImageID"))
    invalid = invalid_ids(image_id)
    if pc.any(invalid).as_py():
        problem(
            photos.missing(image_id), "image_missing", pc.binary_join_element_wise("no photo is called", image_id, " ")
        )
        problem(invalid, "box_image_id_invalid", pc.binary_join_element_wise("ImageID", image_id, " "))
    outside = ~_clip(columns, findings)
    if outside.any():
        problem(outside, "box_outside_image", _outside_detail(columns))
    if set(SIZE_COLUMNS) <= set(cells.schema.names):
        _state_sizes(image_id, cells, file, findings)
    if CAPTION_COLUMN in cells.schema.names:
        columns["caption"], unusable = _captions(cells.column(CAPTION_COLUMN))
        problem(pc.is_valid(unusable), "box_unparsable", unusable)

    reason, detail = first_problem(problems, count)
    columns |= {"image_id": image_id, "line": pa.array(rows.lines), "label": label, "reason": reason, "detail": detail}
    return _annotations(columns, file, split)


def _annotations(columns: dict[str, pa.Array], file: str, split: int) -> pa.Table:
    """ANNOTATIONS of a file; flags that it does not state are unknown."""
    count = len(columns["image_id"])
    constant = {"file": pa.repeat(file, count)} | dict.fromkeys(FLAG_COLUMNS, _repeat_int8(-1, count))
    constant |= dict.fromkeys(("split", "listed_split"), _repeat_int8(split, count))
    columns = constant | columns | {"label_name": columns["label"]}
    schema = pa.schema([field for field in ANNOTATIONS if field.name in columns])
    return with_optional(pa.table([columns[field.name] for field in schema], schema=schema), ANNOTATIONS)


def _repeat_int8(value: int, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.int8()), count)


def numbers(text: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    """Parse to float64, null where the text is not a finite number; and a mask of those cells, or None.

    A comma is a decimal point: no fraction has thousands.
    """
    try:
        values = pc.cast(text, pa.float64())  # fast, but one bad cell fails the whole column
        if not (values.null_count or not pc.all(pc.is_finite(values)).as_py()):
            return values, None
    except pa.ArrowInvalid:
        pass
    text = pc.replace_substring(text, ",", ".", max_replacements=1)
    plain = pc.match_substring_regex(text, NUMBER)
    values = pc.cast(pc.utf8_trim_whitespace(pc.if_else(plain, text, None)), pa.float64())
    return values, ~np.asarray(plain)


def _flags(text: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Flags as int8, -1 where unknown; and a mask of the cells that are none."""
    place = pc.index_in(text, pa.array(list(_FLAGS)))
    values = pa.array(list(_FLAGS.values()), pa.int8()).take(place)
    if place.null_count:
        other = pc.index_in(pc.utf8_lower(text), pa.array(list(_FLAGS_ELSEWHERE)))
        values = pc.coalesce(values, pa.array(list(_FLAGS_ELSEWHERE.values()), pa.int8()).take(other))
    return pc.fill_null(values, pa.scalar(-1, pa.int8())), values.is_null()


def _captions(text: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Captions, null where there is none; and of the unusable ones what is wrong."""
    captions: list[str | None] = []
    wrong: list[str | None] = []
    for cell in text.to_pylist():
        caption, problem = None, None
        try:
            caption = written_caption(cell)
        except ValueError as error:
            problem = str(error)
        captions.append(caption)
        wrong.append(problem)
    return pa.array(captions, pa.string()), pa.array(wrong, pa.string())


def _clip(columns: dict[str, pa.Array], findings: Findings) -> np.ndarray:
    """Clip the coordinates in `columns`, within the tolerance; returns (N,) bool: True for valid boxes."""
    ends = np.stack([columns[name].to_numpy(zero_copy_only=False) for name in COORDINATES])  # null becomes NaN
    valid = inside(ends)
    if valid.all():
        return valid
    clipped, changed = clip(ends, FRACTION_SLACK)
    for name, values in zip(COORDINATES, clipped, strict=True):
        columns[name] = pa.array(values, from_pandas=True)
    valid = inside(clipped)
    findings.counts["boxes_clipped"] += int((changed & valid).sum())
    return valid


def _outside_detail(columns: dict[str, pa.Array]) -> pa.Array:
    ends = (pc.fill_null(pc.cast(columns[name], pa.string()), "?") for name in COORDINATES)
    xmin, xmax, ymin, ymax = ends
    return pc.binary_join_element_wise("x ", xmin, "..", xmax, ", y ", ymin, "..", ymax, f"; {ALLOWED}", "")


def _state_sizes(image_id: pa.Array, cells: pa.RecordBatch, file: str, findings: Findings) -> None:
    sizes = pa.table([image_id, *(numbers(cells.column(name))[0] for name in SIZE_COLUMNS)], names=["id", "w", "h"])
    for row in sizes.group_by(["id", "w", "h"]).aggregate([]).to_pylist():
        if (row["w"] or 0) > 0 and (row["h"] or 0) > 0:
            findings.state_size(row["id"], file, (row["w"], row["h"]))


def first_problem(problems: Sequence[tuple[np.ndarray, str, pa.Array]], count: int) -> tuple[pa.Array, pa.Array]:
    reason, detail = pa.nulls(count, pa.string()), pa.nulls(count, pa.string())
    for where, name, text in reversed(problems):
        mask = pa.array(where)
        reason, detail = pc.if_else(mask, name, reason), pc.if_else(mask, text, detail)
    return reason, detail


def _unreadable_rows(unreadable: Sequence[UnreadableRow], file: str, split: int, dialect: Dialect) -> pa.Table:
    """Rejected lines with too many or too few cells: decimal commas between commas, a truncated file, a comment."""
    place, count = dialect.header.index("ImageID"), len(unreadable)
    columns = {
        "image_id": clean_ids(pa.array([row.cell(place) for row in unreadable], pa.string())),
        "line": pa.array([row.line for row in unreadable], pa.int64()),
        "label": pa.repeat("", count),
        "reason": pa.repeat("box_unparsable", count),
        "detail": pa.array([row.detail for row in unreadable]),
    }
    return _annotations(columns | dict.fromkeys(COORDINATES, pa.nulls(count, pa.float64())), file, split)
