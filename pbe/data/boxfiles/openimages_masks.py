"""Segmentations of OpenImages V5 to V7: rows of *-annotations-object-segmentation.csv, and the boxes they belong to.

A row names a PNG and the box in which the mask was drawn, which is not the mask's own bounding box. Source: the
description of the data formats at storage.googleapis.com/openimages/web/download_v5.html, "Instance segmentation".
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.boxfiles.coordinates import ALLOWED, FRACTION_SLACK, clip, inside
from pbe.data.boxfiles.csv_rows import BLOCK_BYTES, Dialect, Rows, UnreadableRow, read_dialect, read_rows
from pbe.data.boxfiles.openimages import first_problem, numbers
from pbe.data.boxfiles.photo_names import PhotoNames, invalid_ids
from pbe.data.files import FileTree, SourceError

BOX_ENDS = {"xmin": "BoxXMin", "xmax": "BoxXMax", "ymin": "BoxYMin", "ymax": "BoxYMax"}
MASK_COLUMNS = ("MaskPath", "ImageID", "LabelName", *BOX_ENDS.values())
# Mask files have six digits of a coordinate, box files six or those of a float32. Two numbers that round or cut off the
# same one at the sixth digit differ by at most 1e-6; half a digit more is for float32. Two pixels of a photo of 1024 px
# differ by 1e-3.
TOLERANCE = 1.5e-6

# problem: why a line is no usable mask, else null. Where it is not null, all other columns but `line` may be empty.
MASK_ROWS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        *(pa.field(end, pa.float64()) for end in BOX_ENDS),  # fractions of the photo
        pa.field("mask_path", pa.string(), nullable=False),  # the PNG's name, without folders
        pa.field("line", pa.int64(), nullable=False),
        pa.field("problem", pa.string()),
    ]
)


def mask_rows(tree: FileTree, name: str, photos: PhotoNames, *, block_bytes: int = BLOCK_BYTES) -> Iterator[pa.Table]:
    """Yield MASK_ROWS tables of a file, block by block. Raises SourceError if it lacks columns.

    photos: finds them by name, as for the box files.
    Coordinates are clipped as those of box files are, so that they still fit.
    """
    dialect = read_dialect(tree, name, MASK_COLUMNS)
    missing = [column for column in MASK_COLUMNS if column not in dialect.header]
    if missing:
        raise SourceError(
            f"{tree.path_of(name)}: not an OpenImages segmentation CSV, its header lacks {', '.join(missing)}"
        )
    for rows in read_rows(tree, name, dialect, MASK_COLUMNS, block_bytes=block_bytes):
        if rows.cells.num_rows:
            yield _typed(rows, photos)
        if rows.unreadable:
            yield _unsplit(rows.unreadable, dialect, photos)


def places_of_boxes(masks: pa.Table, boxes: pa.Table) -> list[int | None]:
    """Row of `boxes` that each row of `masks` belongs to, or None; no two masks have one box.

    It is the nearest box of the same label, all four of its ends within TOLERANCE. Both tables are of one photo, with
    columns label, xmin, xmax, ymin and ymax; `masks` without problems.
    """
    places: list[int | None] = [None] * masks.num_rows
    if not masks.num_rows or not boxes.num_rows:
        return places
    difference = np.abs(_ends(masks)[:, :, None] - _ends(boxes)[:, None, :]).max(axis=0)
    labels, box_labels = (np.array(table.column("label").to_pylist(), object) for table in (masks, boxes))
    fits = (difference <= TOLERANCE) & (labels[:, None] == box_labels)
    mask, box = np.nonzero(fits)
    taken = set[int]()
    for pair in np.argsort(difference[fits], kind="stable").tolist():
        at, place = int(mask[pair]), int(box[pair])
        if places[at] is None and place not in taken:
            places[at] = place
            taken.add(place)
    return places


def _ends(table: pa.Table) -> np.ndarray:
    """(4, N) float64."""
    return np.stack([table.column(end).to_numpy() for end in BOX_ENDS])


def _typed(rows: Rows, photos: PhotoNames) -> pa.Table:
    cells, count = rows.cells, rows.cells.num_rows
    problems: list[tuple[np.ndarray, str, pa.Array]] = []
    parsed = {}
    for ours, theirs in BOX_ENDS.items():
        parsed[ours], wrong = numbers(cells.column(theirs))
        if wrong is not None:
            said = pc.binary_join_element_wise(theirs, cells.column(theirs), "is not a number", " ")
            problems.append((wrong, "", said))
    label = pc.utf8_trim_whitespace(cells.column("LabelName"))
    problems.append((np.asarray(pc.equal(label, "")), "", pa.repeat("LabelName is empty", count)))
    image_id, path = photos.ids(cells.column("ImageID")), pc.utf8_trim_whitespace(cells.column("MaskPath"))
    for column, text in (("ImageID", image_id), ("MaskPath", path)):  # both become names of files
        said = pc.binary_join_element_wise(column, text, "is no plain name", " ")
        problems.append((np.asarray(invalid_ids(text)), "", said))
    ends = np.stack([parsed[end].to_numpy(zero_copy_only=False) for end in BOX_ENDS])  # null becomes NaN
    if not inside(ends).all():
        ends, _ = clip(ends, FRACTION_SLACK)
        shown = pc.binary_join_element_wise(*(cells.column(theirs) for theirs in BOX_ENDS.values()), " ")
        said = pc.binary_join_element_wise("box", shown, f"(x x y y); {ALLOWED}", " ")
        problems.append((~inside(ends), "", said))
    _, problem = first_problem([found for found in problems if found[0].any()], count)
    columns = [image_id, label, *(pa.array(end, from_pandas=True) for end in ends), path, pa.array(rows.lines), problem]
    return pa.table(columns, schema=MASK_ROWS)


def _unsplit(unreadable: Sequence[UnreadableRow], dialect: Dialect, photos: PhotoNames) -> pa.Table:
    """Lines with too many or too few cells, or with bytes that are no text."""
    place = dialect.header.index("ImageID")
    ids = [row.cell(place) for row in unreadable]
    empty, nothing = pa.repeat("", len(unreadable)), pa.nulls(len(unreadable), pa.float64())
    problem = pa.array([row.detail for row in unreadable])
    lines = pa.array([row.line for row in unreadable], pa.int64())
    columns = [photos.ids(pa.array(ids, pa.string())), empty, *[nothing] * len(BOX_ENDS), empty, lines, problem]
    return pa.table(columns, schema=MASK_ROWS)
