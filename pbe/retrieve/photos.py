"""Where an index finds its photos again: in the parts of a run, or in a folder."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from pbe.data import images
from pbe.data.download import PhotoError
from pbe.data.files import SourceError, file_tree
from pbe.data.settings import MAX_IMAGE_BYTES
from pbe.data.sources import FolderSource
from pbe.errors import UserError
from pbe.store import File, Store, StoreError


class PhotoGoneError(UserError):
    """The photo of a row is missing, or is another one now."""


class Photos(Protocol):
    """Reads the bytes of photos by rows of PHOTOS."""

    def read(self, photo: Mapping[str, Any]) -> bytes:
        """Raises UserError if they cannot be read."""
        ...

    def meta(self) -> dict[str, Any]:
        """JSON, from which `photos_of` makes it again."""
        ...


@dataclass(frozen=True)
class RunPhotos:
    """Photos in the images files of ingest's parts."""

    store: Store
    files: Sequence[File]

    def read(self, photo: Mapping[str, Any]) -> bytes:
        file, row = self.files[photo["part"]], photo["row"]
        footer = self.store.read_footer(file)
        parquet = self.store.open_parquet(file, footer)
        try:
            group = 0
            while row >= (rows := parquet.metadata.row_group(group).num_rows):
                row, group = row - rows, group + 1
        finally:
            parquet.close(force=True)
        return self.store.read_row_group(file, group, footer).column("bytes")[row].as_py()

    def meta(self) -> dict[str, Any]:
        return {"kind": "run", "files": [asdict(file) for file in self.files]}


@dataclass(frozen=True)
class FolderPhotos:
    """Photos in a folder, local (an absolute path) or s3://."""

    location: str

    def read(self, photo: Mapping[str, Any]) -> bytes:
        return FolderSource(file_tree(self.location, key="--photos")).read(photo["address"], MAX_IMAGE_BYTES)

    def meta(self) -> dict[str, Any]:
        return {"kind": "folder", "location": self.location}


def photos_of(meta: Mapping[str, Any], store: Store) -> Photos:
    """What `Photos.meta` describes. store: of the run, if it is one."""
    if meta["kind"] == "run":
        return RunPhotos(store, [File(**file) for file in meta["files"]])
    return FolderPhotos(meta["location"])


def read_photo(photos: Photos, photo: Mapping[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8, as the boxes refer to it. Raises PhotoGoneError."""
    try:
        data = photos.read(photo)
    except (StoreError, SourceError, PhotoError, OSError) as error:
        raise PhotoGoneError(f"photo {photo['image_id']}: its crop cannot be cut: {error}") from None
    if hashlib.sha256(data).hexdigest() != photo["sha256"]:
        raise PhotoGoneError(
            f"photo {photo['image_id']}: its crop cannot be cut: the file is another one than was indexed; "
            "run `pbe index` again"
        )
    return images.decode(data, exif_orientation=photo["exif_orientation"])
