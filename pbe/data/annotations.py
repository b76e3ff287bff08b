"""Read box files as ANNOTATIONS tables: OpenImages CSVs in one streaming pass, and COCO instances JSON.

Every line becomes a row; an invalid one carries a reason and a detail (pbe/data/schema.py). The split comes from a
word of the file's name, as in upstream's read_bbox.py: train, else val or validation, else test; without one, train.
What is read in more than one form, and how it is told, is in pbe/data/boxfiles/.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.boxfiles.coco import coco_tables
from pbe.data.boxfiles.csv_rows import BLOCK_BYTES, two_columns
from pbe.data.boxfiles.findings import Findings
from pbe.data.boxfiles.openimages import box_dialect, csv_tables, has_boxes
from pbe.data.boxfiles.photo_names import PhotoNames
from pbe.data.files import FileTree, SourceError
from pbe.data.schema import SPLITS, without_empty
from pbe.errors import one_line

# words of a file's name, e.g. oidv6-train-annotations-bbox.csv, instances_val2017.json; not the "test" of "latest"
_SPLIT_WORDS = {
    r"(?<![a-z])train(ing)?(?![a-z])": "train",
    r"(?<![a-z])val(id|idation)?(?![a-z])": "validation",
    r"(?<![a-z])test(ing)?(?![a-z])": "test",
}


@dataclass(frozen=True)
class BoxFile:
    """A box file; `name` is its path below `ingest.boxes`."""

    name: str
    split: int  # index into SPLITS


def box_files(tree: FileTree, findings: Findings | None = None, *, required: bool = True) -> list[BoxFile]:
    """List the box files at `ingest.boxes` (a file or a folder) by name.

    Raises SourceError if there are none, unless `required` is false.

    CSVs without coordinates that lie beside box files, as FiftyOne's classifications.csv, are passed over.
    """
    names = [name for name in tree.names() if _is_box_file(name)] if tree.is_folder else [tree.only_name]
    if not names and not required:
        return []
    if not names:
        raise SourceError(
            f"ingest.boxes: no box CSV or COCO JSON at {tree.where}; in a folder, name it *.csv, or *.json with "
            "instances, boxes or annotations in its name, or labels.json; subfolders are not read"
        )
    tables = [name for name in names if name.lower().endswith(".csv")] if len(names) > 1 else []
    others = [name for name in tables if not has_boxes(box_dialect(tree, name))]
    if len(others) < len(names):  # else the first is read, and refused with what it lacks
        names = [name for name in names if name not in others]
        if findings is not None:
            findings.remarks += [f"{name}: passed over, it has no coordinates of boxes" for name in others]
    return [BoxFile(name, split_of(name)) for name in names]


def read_annotations(
    tree: FileTree,
    file: BoxFile,
    names: PhotoNames | None = None,
    findings: Findings | None = None,
    *,
    with_masks: bool = False,
) -> Iterator[pa.Table]:
    """Yield ANNOTATIONS tables of one box file; memory is bounded for CSV.

    names: of the photos there are; None takes names for ids. findings: collects what else the file says. with_masks:
    keep what a COCO file has as `segmentation`.
    Raises SourceError for a file that does not match its suffix, lacks columns, or holds no box.
    """
    names, findings = names or PhotoNames(), findings if findings is not None else Findings()
    if file.name.lower().endswith(".json"):
        tables = coco_tables(tree, file.name, file.split, names, findings, with_masks=with_masks)
    else:
        tables = csv_tables(tree, file.name, file.split, names, findings, block_bytes=BLOCK_BYTES)
    rows = 0
    for table in tables:
        rows += table.num_rows
        yield without_empty(table)
    if not rows:
        raise SourceError(f"{tree.path_of(file.name)}: no box in it")


def class_names(tree: FileTree) -> dict[str, str]:
    """Label id to name from class-descriptions*.csv beside the box files; COCO files name their classes themselves.

    Both the headerless V5 file and the V7 file with a header (LabelName,DisplayName or id,name) are read, and the
    ../metadata/classes.csv that FiftyOne writes.
    """
    names: dict[str, str] = {}
    files = [(tree, name) for name in tree.siblings() if _is_classes(name)]
    folder, _, last = tree.path_of("").rstrip("/").rpartition("/") if tree.is_folder else ("", "", "")
    if not files and last == "labels" and (fiftyone := FileTree(f"{folder}/metadata/classes.csv", tree.key)).exists:
        files = [(fiftyone, fiftyone.only_name)]
    for where, name in files:
        try:
            rows = two_columns(where.read(name))
            names.update({row[0]: row[1] for row in rows if len(row) >= 2})
        except (UnicodeDecodeError, csv.Error) as error:
            raise SourceError(f"{where.path_of(name)}: not a CSV in UTF-8: {one_line(error)}") from None
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
        return "instances" in lower or "boxes" in lower or "annotations" in lower or lower == "labels.json"
    return lower.endswith(".csv") and not ("images" in lower and ("rotation" in lower or "image-ids" in lower))


def split_of(name: str) -> int:
    """Index into SPLITS of the split that a word of the name says; train without one."""
    found = next((split for pattern, split in _SPLIT_WORDS.items() if re.search(pattern, name.lower())), "train")
    return SPLITS.index(found)
