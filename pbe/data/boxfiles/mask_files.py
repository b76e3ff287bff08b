"""Pictures of masks beside box files: masks/ID_N.png, where N counts the photo's boxes from 0 in the box file's order,
or those that OpenImages' segmentation CSVs name.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.boxfiles.findings import Findings
from pbe.data.boxfiles.openimages_masks import places_of_boxes
from pbe.data.files import FileInfo, FileTree, SourceError, is_hidden, named
from pbe.data.schema import ANNOTATIONS, FLAGS, table_from_rows, with_optional

FOLDER = "masks/"
WITHOUT_LABEL = "object"
_NAME = re.compile(r"(?P<photo>.+)_(?P<number>[0-9]{1,9})\.png", re.IGNORECASE)


@dataclass
class MaskFiles:
    """The pictures by photo and number of the box, and how many boxes of each photo went by."""

    files: dict[str, dict[int, list[FileInfo]]] = field(default_factory=lambda: defaultdict(dict))
    seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __bool__(self) -> bool:
        return bool(self.files)

    def added_to(self, boxes: pa.Table) -> pa.Table:
        """ANNOTATIONS with the masks of its boxes, which come in their files' order, each once.

        Raises SourceError where two pictures have the number of one box.
        """
        ids, masks = boxes.column("image_id").to_pylist(), boxes.column("mask").to_pylist()
        for place, image_id in enumerate(ids):
            if image_id in self.files:
                files = self.files[image_id].pop(self.seen[image_id], [])
                if len(files) > 1:
                    raise SourceError(
                        f"ingest.boxes: {files[0].name} and {files[1].name} are both mask {self.seen[image_id]} of "
                        f"{image_id}; number a photo's masks through all folders, in the box file's order"
                    )
                self.seen[image_id] += 1
                masks[place] = _said(files[0]) if files else masks[place]
        index = boxes.schema.get_field_index("mask")
        return boxes.set_column(index, ANNOTATIONS.field("mask"), pa.array(masks, pa.string()))

    def left(self, split: int) -> pa.Table:
        """ANNOTATIONS of the pictures without a box: of photos without any, as boxes; of others, as rejects."""
        return with_optional(table_from_rows(list(self._left(split)), ANNOTATIONS), ANNOTATIONS)

    def _left(self, split: int) -> Iterator[dict[str, object]]:
        for image_id, files in sorted(self.files.items()):
            numbered = ((number, file) for number, found in sorted(files.items()) for file in found)
            for number, file in numbered:
                label = file.name.removeprefix(FOLDER).rpartition("/")[0].rpartition("/")[2] or WITHOUT_LABEL
                row: dict[str, object] = {
                    "image_id": image_id,
                    "file": file.name,
                    "line": number,
                    "split": split,
                    "listed_split": split,
                }
                row |= {"label": label, "label_name": label} | dict.fromkeys(FLAGS, -1)
                if not self.seen[image_id]:
                    yield row | {"mask": _said(file)}
                else:
                    detail = (
                        f"{file.name}: the box files have {self.seen[image_id]} boxes of {image_id}, counted from 0"
                    )
                    yield row | {"reason": "mask_without_box", "detail": detail}


def segmentation_files(tree: FileTree) -> list[str]:
    """OpenImages' *-annotations-object-segmentation.csv beside the box files."""
    names = tree.names() if tree.is_folder else []
    return [name for name in names if "object-segmentation" in name.lower() and name.lower().endswith(".csv")]


def png_versions(tree: FileTree) -> dict[str, FileInfo]:
    """The PNGs below `masks`, in whatever folders, by name."""
    files = (file for file in tree.walk() if file.name.startswith(FOLDER) and file.name.lower().endswith(".png"))
    return {file.name.rpartition("/")[2]: _by_content(tree, file) for file in files}


def with_segmentations(boxes: pa.Table, rows: pa.Table, files: Mapping[str, FileInfo]) -> pa.Table:
    """One shard's ANNOTATIONS with the masks that its MASK_ROWS name; rows without a box of theirs become rejects.

    Masks of photos without boxes here are passed over: those photos were not selected. files: of png_versions.
    """
    ids = boxes.column("image_id").to_pylist()
    said, rejects = boxes.column("mask").to_pylist(), list[dict[str, object]]()
    places: dict[str, list[int]] = defaultdict(list)
    for place, image_id in enumerate(ids):
        places[image_id].append(place)
    masks: dict[str, list[int]] = defaultdict(list)
    for number, image_id in enumerate(rows.column("image_id").to_pylist()):
        if image_id in places:
            masks[image_id].append(number)
    for image_id, numbers in masks.items():
        mine, usable = rows.take(numbers), boxes.take(places[image_id])
        fine = mine.filter(pc.is_null(mine.column("problem")))
        for mask, found in zip(fine.to_pylist(), places_of_boxes(fine, usable), strict=True):
            name = str(mask["mask_path"])
            if found is not None:
                said[places[image_id][found]] = _said(files.get(name) or FileInfo(f"{FOLDER}{name}", 0, ""))
                continue
            detail = f"{name}, line {mask['line']}: no box of {image_id} has its label and coordinates"
            rejects.append(_reject(image_id, mask, "mask_without_box", detail))
        for mask in mine.filter(pc.is_valid(mine.column("problem"))).to_pylist():
            rejects.append(_reject(image_id, mask, "mask_unreadable", f"line {mask['line']}: {mask['problem']}"))
    index = boxes.schema.get_field_index("mask")
    boxes = boxes.set_column(index, ANNOTATIONS.field("mask"), pa.array(said, pa.string()))
    if not rejects:
        return boxes
    return pa.concat_tables([boxes, with_optional(table_from_rows(rejects, ANNOTATIONS), ANNOTATIONS)])


def _reject(image_id: str, mask: Mapping[str, object], reason: str, detail: str) -> dict[str, object]:
    row: dict[str, object] = {"image_id": image_id, "file": mask["mask_path"] or "segmentation", "line": mask["line"]}
    row |= {"split": 0, "listed_split": 0, "label": mask["label"], "label_name": mask["label"]}
    return row | dict.fromkeys(FLAGS, -1) | {"reason": reason, "detail": detail}


def mask_files(tree: FileTree, findings: Findings) -> MaskFiles:
    """The pictures in the folder `masks` of ingest.boxes and below it; none if that is a file. Raises SourceError.

    Without box files every picture is an object, so two folders may count a photo's from 0 each. Files with other names
    are noted in `findings`: nothing else would tell that a cup.png is no mask of the photo cup.
    """
    found, others = MaskFiles(), list[str]()
    for file in tree.walk() if tree.is_folder else ():
        if not file.name.startswith(FOLDER) or is_hidden(file.name):
            continue
        if match := _NAME.fullmatch(file.name.rpartition("/")[2]):
            numbered = found.files[match["photo"]]
            numbered.setdefault(int(match["number"]), []).append(_by_content(tree, file))
        else:
            others.append(file.name)
    if others:
        findings.remarks.append(f"{named(others)}: passed over, a mask is called ID_N.png")
    return found


def _by_content(tree: FileTree, file: FileInfo) -> FileInfo:
    """The same masks in another folder are the same input; a storage's own version stands for the bytes there."""
    return replace(file, version=tree.sha256(file.name)) if tree.is_local else file


def _said(file: FileInfo) -> str:
    return json.dumps({"file": file.name, "version": file.version})
