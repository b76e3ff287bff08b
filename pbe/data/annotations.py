"""Read box files as ANNOTATIONS tables: OpenImages CSVs in one streaming pass, and COCO instances JSON.

Every line becomes a row; an invalid one carries a reason and a detail (pbe/data/schema.py). The split comes from a
word of the file's name, as in upstream's read_bbox.py: train, else val or validation, else test; without one, train.
OpenImages has 21 columns for train, 13 for validation and test; they are read by name.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pbe.data.files import FileTree, SourceError
from pbe.data.schema import ANNOTATIONS, SPLITS
from pbe.errors import one_line

BLOCK_BYTES = 8 << 20  # of CSV text parsed at a time
FLAG_COLUMNS = {
    "is_occluded": "IsOccluded",
    "is_truncated": "IsTruncated",
    "is_group_of": "IsGroupOf",
    "is_depiction": "IsDepiction",
    "is_inside": "IsInside",
}
COORDINATES = {"xmin": "XMin", "xmax": "XMax", "ymin": "YMin", "ymax": "YMax"}
BOX_COLUMNS = ("ImageID", "LabelName", *COORDINATES.values())
NUMBER = r"^[ \t]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?[ \t]*$"
# words of a file's name, e.g. oidv6-train-annotations-bbox.csv, instances_val2017.json; not the "test" of "latest"
_SPLIT_WORDS = {
    r"(?<![a-z])train(ing)?(?![a-z])": "train",
    r"(?<![a-z])val(id|idation)?(?![a-z])": "validation",
    r"(?<![a-z])test(ing)?(?![a-z])": "test",
}
IMAGE_SUFFIX = (
    r"(?i)\.(jpe?g?|jfif|png|webp|avif|hei[cf]|bmp|gif|tiff?|jp2|jxl|dng)$"  # some tools write file names into ImageID
)


@dataclass(frozen=True)
class BoxFile:
    """A box file; `name` is its path below `ingest.boxes`."""

    name: str
    split: int  # index into SPLITS


def box_files(tree: FileTree) -> list[BoxFile]:
    """List the box files at `ingest.boxes` (a file or a folder) by name. Raises SourceError if there are none."""
    names = [name for name in tree.names() if _is_box_file(name)] if tree.is_folder else [tree.only_name]
    if not names:
        raise SourceError(
            f"ingest.boxes: no box CSV or COCO JSON at {tree.where}; in a folder, name it *.csv, or *.json with "
            "instances, boxes or annotations in its name; subfolders are not read"
        )
    return [BoxFile(name, _split_of(name)) for name in names]


def read_annotations(tree: FileTree, file: BoxFile) -> Iterator[pa.Table]:
    """Yield ANNOTATIONS tables of one box file, in file order; memory is bounded for CSV.

    Raises SourceError for a file that does not match its suffix, lacks columns, or holds no box.
    """
    rows = 0
    reader = _coco_tables if file.name.lower().endswith(".json") else _csv_tables
    for table in reader(tree, file):
        rows += table.num_rows
        yield table
    if not rows:
        raise SourceError(f"{tree.path_of(file.name)}: no box in it")


def class_names(tree: FileTree) -> dict[str, str]:
    """Label id to name from class-descriptions*.csv beside the box files; COCO files name their classes themselves.

    Both the headerless V5 file and the V7 file with a header (LabelName,DisplayName or id,name) are read.
    """
    names: dict[str, str] = {}
    for name in tree.siblings():
        if _is_classes(name):
            try:
                text = tree.read(name).decode("utf-8-sig")
                names.update({row[0]: row[1] for row in csv.reader(io.StringIO(text)) if len(row) >= 2})
            except (UnicodeDecodeError, csv.Error) as error:
                raise SourceError(f"{tree.path_of(name)}: not a CSV in UTF-8: {one_line(error)}") from None
    return names


def with_names(annotations: pa.Table, names: dict[str, str]) -> pa.Table:
    """Fill in label_name; a label without a name keeps its id."""
    encoded = pc.dictionary_encode(annotations.column("label").combine_chunks())
    named = pa.array([names.get(label, label) for label in encoded.dictionary.to_pylist()], pa.string())
    index = annotations.schema.get_field_index("label_name")
    return annotations.set_column(index, annotations.schema.field(index), named.take(encoded.indices))


def without_lines(annotations: pa.Table) -> pa.Table:
    """Drop the line numbers of valid rows, which then do not depend on their position in the file."""
    index = annotations.schema.get_field_index("line")
    lines = pc.if_else(annotations.column("reason").is_valid(), annotations.column("line"), None)
    return annotations.set_column(index, annotations.schema.field(index), lines)


def _is_classes(name: str) -> bool:
    return "class-descriptions" in name and name.lower().endswith(".csv")


def _is_box_file(name: str) -> bool:
    """True for box files; in OpenImages, file names distinguish them from class names and image lists."""
    if "/" in name or name.startswith(".") or _is_classes(name):
        return False
    lower = name.lower()
    if lower.endswith(".json"):
        return "instances" in lower or "boxes" in lower or "annotations" in lower
    return lower.endswith(".csv") and not ("images" in lower and ("rotation" in lower or "image-ids" in lower))


def _split_of(name: str) -> int:
    found = next((split for pattern, split in _SPLIT_WORDS.items() if re.search(pattern, name.lower())), "train")
    return SPLITS.index(found)


# -- OpenImages CSV ------------------------------------------------------------------------------------------------


def _csv_tables(tree: FileTree, file: BoxFile) -> Iterator[pa.Table]:
    header = csv_header(tree, file.name)
    missing = [name for name in BOX_COLUMNS if name not in header]
    if missing:
        raise SourceError(
            f"{tree.path_of(file.name)}: not an OpenImages box CSV, its header lacks {', '.join(missing)}; "
            f"it has {', '.join(header)[:200]}"
        )
    wanted = [*BOX_COLUMNS, *(name for name in FLAG_COLUMNS.values() if name in header)]
    irregular: list[pacsv.InvalidRow] = []
    rows_before = 0
    for batch in csv_batches(tree, file.name, wanted, irregular, quoted=False):
        lines = _line_numbers(rows_before, batch.num_rows, irregular)
        rows_before += batch.num_rows
        blank = np.ones(batch.num_rows, bool)
        for column in batch.columns:
            blank &= np.asarray(pc.equal(column, ""))
        if blank.any():
            batch, lines = batch.filter(pa.array(~blank)), lines.filter(pa.array(~blank))
        yield _typed(batch, file, lines)
    good, good_lines, still_irregular = _with_quoted_commas(irregular, header, wanted)
    if good.num_rows:
        yield _typed(good, file, good_lines)
    if still_irregular:
        yield _irregular_rows(still_irregular, file, header.index("ImageID"))


def _with_quoted_commas(
    irregular: Sequence[pacsv.InvalidRow], header: Sequence[str], wanted: Sequence[str]
) -> tuple[pa.RecordBatch, pa.Array, list[pacsv.InvalidRow]]:
    """Split irregular rows: those valid once commas inside quotes count as text, their line numbers, and the rest."""
    rows, lines, others = [], [], []
    for row in irregular:
        try:
            cells = next(csv.reader([row.text]), [])
        except csv.Error:  # a cell of more than 128 KiB
            cells = []
        if len(cells) == len(header):
            rows.append(dict(zip(header, cells, strict=True)))
            lines.append(row.number)
        else:
            others.append(row)
    columns = [pa.array([row[name] for row in rows], pa.string()) for name in wanted]
    return pa.record_batch(columns, names=list(wanted)), pa.array(lines, pa.int64()), others


def csv_header(tree: FileTree, name: str) -> list[str]:
    """Column names of a CSV. Raises SourceError for an empty file or a repeated name."""
    with tree.open(name) as stream:
        first = stream.read(1 << 16)
    try:
        header = [
            cell.strip() for cell in next(csv.reader([first.split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")]), [])
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{tree.path_of(name)}: not a CSV in UTF-8: {one_line(error)}") from None
    if not header:
        what = "its first line is empty; put the header there" if first else "the file is empty"
        raise SourceError(f"{tree.path_of(name)}: {what}")
    repeated = sorted({cell for cell in header if header.count(cell) > 1})
    if repeated:
        raise SourceError(f"{tree.path_of(name)}: the header contains {', '.join(map(repr, repeated))} more than once")
    return header


def csv_batches(
    tree: FileTree, name: str, columns: Sequence[str], irregular: list[pacsv.InvalidRow], *, quoted: bool
) -> Iterator[pa.RecordBatch]:
    """Yield string columns of a CSV, block by block; a blank line is a row of empty cells, so that lines are countable.

    quoted: False ends a row at every line end, so that a stray quote spoils only its own row; quotes around a cell are
    removed, and a row with a comma inside quotes is irregular.
    Rows of the wrong width go to `irregular`, with their number. Raises SourceError if the file is not a CSV in UTF-8.
    """
    try:
        for batch in _csv_batches(tree, name, columns, irregular, quoted):
            yield batch if quoted else _without_quotes(batch)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{tree.path_of(name)}: not a CSV in UTF-8: {one_line(error)}") from None


def _without_quotes(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = [
        pc.replace_substring_regex(column, pattern=r'^\s*"(.*)"\s*$', replacement=r"\1")
        if pc.any(pc.match_substring(column, '"')).as_py()
        else column
        for column in batch.columns
    ]
    return pa.record_batch(columns, names=batch.schema.names)


def _csv_batches(
    tree: FileTree, name: str, columns: Sequence[str], irregular: list[pacsv.InvalidRow], quoted: bool
) -> Iterator[pa.RecordBatch]:
    def keep(row: pacsv.InvalidRow) -> str:
        irregular.append(row)
        return "skip"

    header = csv_header(tree, name)
    with tree.open(name) as stream:
        reader = pacsv.open_csv(
            stream,
            # only a single thread gives an irregular row its number
            read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=header, skip_rows=1),
            parse_options=pacsv.ParseOptions(
                invalid_row_handler=keep, ignore_empty_lines=False, quote_char='"' if quoted else False
            ),
            convert_options=pacsv.ConvertOptions(
                include_columns=list(columns),
                column_types=dict.fromkeys(columns, pa.string()),
                strings_can_be_null=False,
            ),
        )
        yield from reader


def _line_numbers(rows_before: int, rows: int, irregular: Sequence[pacsv.InvalidRow]) -> pa.Array:
    """Line numbers in the file, the header being 1; irregular rows between the good ones are counted."""
    good_before_irregular = np.array([row.number for row in irregular], np.int64) - np.arange(len(irregular)) - 2
    index = rows_before + np.arange(rows)
    return pa.array(index + 2 + np.searchsorted(good_before_irregular, index, side="right"))


def _typed(batch: pa.RecordBatch, file: BoxFile, lines: pa.Array) -> pa.Table:
    """Parse one block of text columns to ANNOTATIONS, with a reason where a cell is invalid."""
    count = batch.num_rows
    columns: dict[str, pa.Array] = {}
    problems: list[tuple[np.ndarray, str, pa.Array]] = []  # where, reason, detail; the first one counts

    def problem(where: pa.Array, reason: str, detail: Any) -> None:
        mask = np.asarray(where)
        if mask.any():
            problems.append((mask, reason, detail if isinstance(detail, pa.Array) else pa.repeat(detail, count)))

    for ours, theirs in COORDINATES.items():
        text = batch.column(theirs)
        columns[ours], wrong = _numbers(text)
        if wrong is not None:
            problem(wrong, "box_unparsable", pc.binary_join_element_wise(theirs, text, "is not a number", " "))
    for ours, theirs in FLAG_COLUMNS.items():
        if theirs not in batch.schema.names:
            columns[ours] = pa.array(np.full(count, -1, np.int8))
            continue
        text = pc.utf8_trim_whitespace(batch.column(theirs))
        place = pc.index_in(text, pa.array(["1", "0", "-1", ""]))
        columns[ours] = pc.fill_null(pa.array([1, 0, -1, -1], pa.int8()).take(place), pa.scalar(-1, pa.int8()))
        wrong_flag = pc.binary_join_element_wise(theirs, text, "is not 1, 0 or -1", " ")
        problem(place.is_null(), "box_unparsable", wrong_flag)
    label = pc.utf8_trim_whitespace(batch.column("LabelName"))
    problem(pc.equal(label, ""), "box_unparsable", "LabelName is empty")
    image_id = clean_ids(batch.column("ImageID"))
    problem(invalid_ids(image_id), "box_image_id_invalid", pc.binary_join_element_wise("ImageID", image_id, " "))
    problem(_outside(columns), "box_outside_image", _outside_detail(columns) if _outside(columns).any() else "")

    reason, detail = _first_problem(problems, count)
    return _annotations(
        image_id=image_id,
        file=pa.repeat(file.name, count),
        line=lines,
        split=pa.array(np.full(count, file.split, np.int8)),
        listed_split=pa.array(np.full(count, file.split, np.int8)),
        label=label,
        label_name=label,
        **columns,
        reason=reason,
        detail=detail,
    )


def _annotations(**columns: pa.Array) -> pa.Table:
    return pa.table([columns[field.name] for field in ANNOTATIONS], schema=ANNOTATIONS)


def _numbers(text: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    """Parse to float64, null where the text is not a finite number; and a mask of those cells, or None."""
    try:
        values = pc.cast(text, pa.float64())  # fast, but one bad cell fails the whole column
        if not (values.null_count or not pc.all(pc.is_finite(values)).as_py()):
            return values, None
    except pa.ArrowInvalid:
        pass
    plain = pc.match_substring_regex(text, NUMBER)
    values = pc.cast(pc.utf8_trim_whitespace(pc.if_else(plain, text, None)), pa.float64())
    return values, ~np.asarray(plain)


# control characters (C0, C1), soft hyphen, zero-width and direction marks, BOM, tags; not the joiners that Persian and
# emoji need
_UNSEEN = (
    r"\x00-\x1f\x7f-\x9f\xad\x{61c}\x{180e}\x{200b}\x{200e}\x{200f}\x{2028}-\x{202e}\x{2060}-\x{206f}\x{feff}"
    r"\x{fff9}-\x{fffb}\x{e0000}-\x{e007f}"
)


def clean_ids(text: pa.Array) -> pa.Array:
    """Strip surrounding spaces and an image suffix from image ids."""
    return pc.replace_substring_regex(pc.utf8_trim_whitespace(text), pattern=IMAGE_SUFFIX, replacement="")


def invalid_ids(image_id: pa.Array) -> pa.Array:
    """True for ids that are empty, over 200 characters, or unsafe as a path or in a terminal: separators, "..", control
    characters, and characters that show nothing or turn the direction of text."""
    return pc.or_(
        pc.match_substring_regex(image_id, rf"[/\\{_UNSEEN}]|^\.*$"), pc.greater(pc.utf8_length(image_id), 200)
    )


def _outside(columns: dict[str, pa.Array]) -> np.ndarray:
    xmin, xmax, ymin, ymax = (_filled(columns[name]) for name in COORDINATES)
    with np.errstate(invalid="ignore"):
        inside = (xmin >= 0) & (xmin < xmax) & (xmax <= 1) & (ymin >= 0) & (ymin < ymax) & (ymax <= 1)
    return ~inside


def _filled(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)  # null becomes NaN


def _outside_detail(columns: dict[str, pa.Array]) -> pa.Array:
    xmin, xmax, ymin, ymax = (
        pc.fill_null(pc.cast(columns[name], pa.string()), "?") for name in ("xmin", "xmax", "ymin", "ymax")
    )
    return pc.binary_join_element_wise(
        "x ", xmin, "..", xmax, ", y ", ymin, "..", ymax, "; fractions 0 <= min < max <= 1 are allowed", ""
    )


def _first_problem(problems: Sequence[tuple[np.ndarray, str, pa.Array]], count: int) -> tuple[pa.Array, pa.Array]:
    reason, detail = pa.nulls(count, pa.string()), pa.nulls(count, pa.string())
    for where, name, text in reversed(problems):
        mask = pa.array(where)
        reason, detail = pc.if_else(mask, name, reason), pc.if_else(mask, text, detail)
    return reason, detail


def _irregular_rows(irregular: Sequence[pacsv.InvalidRow], file: BoxFile, id_column: int) -> pa.Table:
    """Rejected lines with too many or too few cells: a decimal comma, a truncated file, a comment."""
    cells = [row.text.split(",") for row in irregular]
    ids = pa.array([row[id_column].strip().strip('"') if id_column < len(row) else "" for row in cells], pa.string())
    count = len(irregular)
    flag = pa.array(np.full(count, -1, np.int8))
    nothing = pa.nulls(count, pa.float64())
    return _annotations(
        image_id=clean_ids(ids),
        file=pa.repeat(file.name, count),
        line=pa.array([row.number for row in irregular], pa.int64()),
        split=pa.array(np.full(count, file.split, np.int8)),
        listed_split=pa.array(np.full(count, file.split, np.int8)),
        label=pa.repeat("", count),
        label_name=pa.repeat("", count),
        **dict.fromkeys(COORDINATES, nothing),
        **dict.fromkeys(FLAG_COLUMNS, flag),
        reason=pa.repeat("box_unparsable", count),
        detail=pa.array(
            [
                f"{row.actual_columns} cells where the header has {row.expected_columns}: {row.text[:120]}"
                for row in irregular
            ]
        ),
    )


# -- COCO instances JSON -------------------------------------------------------------------------------------------


def _coco_tables(tree: FileTree, file: BoxFile) -> Iterator[pa.Table]:
    """Yield one table. A photo's id is its file name without folder and suffix; iscrowd becomes is_group_of."""
    where = tree.path_of(file.name)
    coco = load_coco(tree, file.name)
    try:
        photos = _by_id(coco["images"], "images", "file_name", where)
        named = _by_id(coco["categories"], "categories", "name", where)
        classes = {key: str(entry["name"]) for key, entry in named.items()}
        entries = coco["annotations"]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{where}: not a COCO instances JSON: no usable {error} in it") from None
    if not isinstance(entries, list):
        raise SourceError(f"{where}: not a COCO instances JSON: its annotations are not a list")
    rows = [_coco_row(entry, number, photos, classes) for number, entry in enumerate(entries)]
    if not rows:
        return
    table: dict[str, list[Any]] = {field.name: [row.get(field.name) for row in rows] for field in ANNOTATIONS}
    splits = [file.split] * len(rows)
    table |= {"file": [file.name] * len(rows), "split": splits, "listed_split": splits, "label_name": table["label"]}
    try:
        yield pa.table(table, schema=ANNOTATIONS)
    except UnicodeEncodeError as error:
        raise SourceError(f"{where}: it contains invalid Unicode: {one_line(error)}") from None


def _by_id(entries: Sequence[dict[str, Any]], what: str, name: str, where: str) -> dict[Any, dict[str, Any]]:
    """Entries by id. Raises SourceError if two different entries share an id: boxes could mean either."""
    found: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        other = found.setdefault(entry["id"], entry)
        if other.get(name) != entry.get(name):
            raise SourceError(
                f"{where}: {what}: id {entry['id']!r} is both {other.get(name)!r} and {entry.get(name)!r}"
            )
    return found


def load_coco(tree: FileTree, name: str) -> dict[str, Any]:
    """Parse a COCO file. Raises SourceError unless it is a JSON mapping."""
    try:
        coco = json.loads(tree.read(name))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{tree.path_of(name)}: not a JSON file: {one_line(error)}") from None
    if not isinstance(coco, dict):
        raise SourceError(f"{tree.path_of(name)}: not a COCO instances JSON: it must be a mapping")
    return coco


def _coco_row(entry: Any, number: int, photos: dict[Any, Any], classes: dict[Any, str]) -> dict[str, Any]:
    """Turn one annotation into a row. Boxes up to a pixel outside their photo, as in COCO itself, are clipped."""
    row: dict[str, Any] = {
        "image_id": "",
        "line": number,
        "label": "",
        **dict.fromkeys(FLAG_COLUMNS, -1),
        "reason": "box_unparsable",
    }
    if not isinstance(entry, dict):
        return row | {"detail": f"annotation number {number} is no mapping"}
    try:
        own = entry.get("id")
        if isinstance(own, int) and not isinstance(own, bool) and abs(own) < 2**63:  # it only names the row in messages
            row["line"] = own
        photo = photos.get(entry["image_id"])
        if photo is None:
            detail = f"image_id {entry['image_id']} is not among the file's images"
            return row | {"image_id": str(entry["image_id"]), "reason": "image_missing", "detail": detail}
        name = str(photo["file_name"]).replace("\\", "/").rpartition("/")[2]
        row["image_id"] = clean_ids(pa.array([name]))[0].as_py()
        row["label"] = classes.get(entry["category_id"], str(entry["category_id"]))
        row["is_group_of"] = 1 if entry.get("iscrowd") else 0
        x, y, width, height = (float(value) for value in entry["bbox"])
        photo_width, photo_height = float(photo["width"]), float(photo["height"])
        ends = [x / photo_width, (x + width) / photo_width, y / photo_height, (y + height) / photo_height]
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        return row | {"detail": f"annotation {row['line']}: {type(error).__name__} {error}"}
    if invalid_ids(pa.array([row["image_id"]]))[0].as_py():
        return row | {"reason": "box_image_id_invalid", "detail": f"file_name {photo['file_name']!r} gives no plain id"}
    slack = [1 / photo_width, 1 / photo_width, 1 / photo_height, 1 / photo_height]
    clipped = [min(max(end, 0.0), 1.0) if -by <= end <= 1 + by else end for end, by in zip(ends, slack, strict=True)]
    row |= dict(zip(COORDINATES, clipped, strict=True))
    xmin, xmax, ymin, ymax = clipped
    if not (0 <= xmin < xmax <= 1 and 0 <= ymin < ymax <= 1):
        detail = f"x {xmin}..{xmax}, y {ymin}..{ymax}; fractions 0 <= min < max <= 1 are allowed"
        return row | {"reason": "box_outside_image", "detail": detail}
    return row | {"reason": None, "detail": None}
