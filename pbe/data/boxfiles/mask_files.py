"""Pictures of masks beside box files: masks/ID_N.png; N counts the photo's boxes from 0 in the box file's order."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa

from pbe.data.files import FileInfo, FileTree
from pbe.data.schema import ANNOTATIONS, FLAGS, table_from_rows, with_optional

FOLDER = "masks/"
WITHOUT_LABEL = "object"
_NAME = re.compile(r"(?P<photo>.+)_(?P<number>[0-9]+)\.png", re.IGNORECASE)


@dataclass
class MaskFiles:
    """The pictures by photo and number of the box, and how many boxes of each photo went by."""

    files: dict[str, dict[int, FileInfo]] = field(default_factory=lambda: defaultdict(dict))
    seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __bool__(self) -> bool:
        return bool(self.files)

    def added_to(self, boxes: pa.Table) -> pa.Table:
        """ANNOTATIONS with the masks of its boxes, which come in their files' order, each once."""
        ids, masks = boxes.column("image_id").to_pylist(), boxes.column("mask").to_pylist()
        for place, image_id in enumerate(ids):
            if image_id in self.files:
                file = self.files[image_id].pop(self.seen[image_id], None)
                self.seen[image_id] += 1
                masks[place] = masks[place] if file is None else _said(file)
        index = boxes.schema.get_field_index("mask")
        return boxes.set_column(index, ANNOTATIONS.field("mask"), pa.array(masks, pa.string()))

    def left(self, split: int) -> pa.Table:
        """ANNOTATIONS of the pictures without a box: of photos without any, as boxes; of others, as rejects."""
        return with_optional(table_from_rows(list(self._left(split)), ANNOTATIONS), ANNOTATIONS)

    def _left(self, split: int) -> Iterator[dict[str, object]]:
        for image_id, files in sorted(self.files.items()):
            for number, file in sorted(files.items()):
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


def mask_files(tree: FileTree) -> MaskFiles:
    """The pictures in the folder `masks` of ingest.boxes and below it; none if that is a file. Raises SourceError."""
    found = MaskFiles()
    for file in tree.walk() if tree.is_folder else ():
        match = _NAME.fullmatch(file.name.rpartition("/")[2])
        if file.name.startswith(FOLDER) and match:
            if tree.is_local:  # by content: the same masks in another folder are the same input
                file = replace(file, version=hashlib.sha256(tree.read(file.name)).hexdigest())
            found.files[match["photo"]][int(match["number"])] = file
    return found


def _said(file: FileInfo) -> str:
    return json.dumps({"file": file.name, "version": file.version})
