"""What reading the box files shows besides boxes: sizes that they state, names that are ambiguous, what was decided."""

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa

from pbe.data.boxfiles.photo_names import PhotoNames
from pbe.data.schema import STATED

SizePx = tuple[float, float]  # width, height
EVERY_FILE = ""  # in place of a box file's name


@dataclass
class Findings:
    """Readers add to it; ingest reports it.

    counts: boxes by what was done to them, e.g. boxes_clipped. remarks: one line per file read in another way than
    OpenImages' own. sizes: by image id and box file, None where the file has boxes in pixels but no size of the photo.
    problems: why the boxes of an image id and file mean no single photo.
    """

    counts: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    sizes: dict[tuple[str, str], SizePx | None] = field(default_factory=dict)
    problems: dict[tuple[str, str], str] = field(default_factory=dict)

    def state_size(self, image_id: str, file: str, size: SizePx | None) -> None:
        """Note the size that `file` states of a photo. Two sizes of one photo are a problem of that photo."""
        known = self.sizes.setdefault((image_id, file), size)
        if known != size:
            self.problems[image_id, file] = f"{file} states two sizes of it: {_text(known)} and {_text(size)}"

    def stated(self, names: PhotoNames) -> pa.Table:
        """STATED table, with what is ambiguous in `names` once all box files are read."""
        self.problems |= {(image_id, EVERY_FILE): problem for image_id, problem in names.ambiguous()}
        keys = sorted({*self.sizes, *self.problems})
        sizes = [self.sizes.get(key) or (None, None) for key in keys]
        columns = {
            "image_id": [image_id for image_id, _ in keys],
            "file": [file for _, file in keys],
            "width_px": [width for width, _ in sizes],
            "height_px": [height for _, height in sizes],
            "problem": [self.problems.get(key) for key in keys],
        }
        return pa.table(columns, schema=STATED)


def _text(size: SizePx | None) -> str:
    return "none" if size is None else f"{size[0]:g} x {size[1]:g} px"
