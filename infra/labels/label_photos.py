"""The photos of labels, for what only they know: their size, upright as viewers and labelling tools show it."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from pbe.data.boxfiles.photo_names import IMAGE_SUFFIX
from pbe.data.images import ImageError, open_picture

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations


@dataclass
class Photos:
    """Finds photos by folder and name without suffix; lists every folder once."""

    _listed: dict[Path, dict[str, list[Path]]] = field(default_factory=dict)

    def find(self, folder: Path, stem: str) -> Path:
        """Raises ValueError unless there is exactly one."""
        found = self._by_stem(folder).get(stem, [])
        if len(found) != 1:
            raise ValueError(f"{len(found)} photos {folder / stem}.*, one is needed for its size")
        return found[0]

    def _by_stem(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listed:
            listed = self._listed[folder] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if re.search(IMAGE_SUFFIX, path.name):
                    listed.setdefault(path.stem, []).append(path)
        return self._listed[folder]


def upright_size(photo: Path) -> tuple[int, int]:
    """Width and height in pixels. Raises ValueError."""
    try:
        header = open_picture(photo).header
    except (ImageError, OSError) as error:
        raise ValueError(f"its photo {photo} cannot be read: {error}") from None
    sideways = header.exif_orientation in SIDEWAYS
    return (header.height_px, header.width_px) if sideways else (header.width_px, header.height_px)
