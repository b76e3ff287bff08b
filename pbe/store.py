"""Parts and manifests: where data is stored, and how a stage knows that work is already done.

A *unit* is one task's result: one shard of one stage. Its name contains the digest of its settings, its inputs and the
stage's VERSION (an integer, raised when the same input would give other bytes), so same name = same content = skip.
It is a folder in the storage,

    <storage>/parts/<stage>/<label>-<digest>/{<dataset>.parquet ..., record.json}

and is complete once `record.json`, which is written last, exists. Files are written under another name and renamed
(local disk) or put in one atomic request (S3), so a killed task leaves nothing that looks finished.
A *manifest* is a stage's list of units; it is the only thing DVC tracks. Storage is a local path or
s3://bucket/prefix, behind one pyarrow filesystem.
"""

import hashlib
import json
import mmap
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pbe.errors import UserError, one_line

COPY_BYTES = 8 << 20
UNITS_AT_ONCE = 16  # that are looked for


class StoreError(UserError):
    """A file of the storage is missing or cannot be written; the message names it."""


class PartError(StoreError):
    """A unit's file is missing or damaged. Callers know from `kind` which stage makes it again."""

    def __init__(self, uri: str, kind: str, damage: str | None) -> None:
        """kind: the folder of parts/ that the unit is in, or runs, of trainings. damage: the read error; None if the
        file is gone."""
        super().__init__(uri, kind, damage)
        self.uri, self.kind, self.damage = uri, kind, damage

    def __str__(self) -> str:
        if self.damage is None:
            return f"{self.uri}: this part is gone"
        return f"{self.uri}: this part cannot be read ({self.damage}); if it is damaged, delete its folder"


class ManifestError(StoreError):
    """A manifest is missing or damaged."""

    def __init__(self, path: Path, damage: str | None) -> None:
        """damage: what is wrong with it; None if it is missing."""
        super().__init__(path, damage)
        self.path, self.damage = path, damage

    def __str__(self) -> str:
        return f"{self.path}: " + ("not there" if self.damage is None else f"not a manifest ({self.damage})")


def inner_path(name: str, root: str) -> PurePosixPath:
    """`name` as a path below `root`. Raises StoreError for a name that would leave it.

    Names come from listings of a storage, manifests and markers, so whoever writes there chooses them; a key of S3 may
    have ".." in it.
    """
    if name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise StoreError(f"{root}: the name {name!r} leads out of this folder; remove it there")
    return PurePosixPath(name)


def digest(value: Any) -> str:
    """16 hex characters of SHA-256 over canonical JSON: equal values, equal digest, on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class File:
    """One Parquet file of a unit."""

    dataset: str
    path: str  # relative to the storage root
    rows: int
    bytes: int
    sha256: str
    # of the end of the file that locates its values, which some readers need alone; None in older records
    footer_sha256: str | None = None

    @property
    def kind(self) -> str:
        """The folder of parts/ that the file is in."""
        return PurePosixPath(self.path).parts[1]


@dataclass(frozen=True)
class FolderSize:
    files: int
    bytes: int
    age_s: float


@dataclass(frozen=True)
class Record:
    """Contents of a finished unit. `counts` are summed over units into counts.json.

    after: folders of earlier attempts at this unit; `pbe gc` keeps them, because each is found through the next.
    """

    unit: str
    files: tuple[File, ...]
    counts: Mapping[str, int]
    after: tuple[str, ...] = ()

    def file(self, dataset: str) -> File:
        for file in self.files:
            if file.dataset == dataset:
                return file
        raise StoreError(f"unit {self.unit} has no dataset '{dataset}'")


def record_from(raw: Mapping[str, Any]) -> Record:
    """Parse a Record from JSON. Raises KeyError, TypeError, ValueError or StoreError for anything else."""
    files = tuple(File(**file) for file in raw["files"])
    for file in files:
        if len(inner_path(file.path, "parts").parts) != 4:
            raise ValueError(f"{file.path}: not parts/<stage>/<unit>/<file>")
    return Record(unit=raw["unit"], files=files, counts=raw["counts"], after=tuple(raw.get("after", ())))


@dataclass(frozen=True)
class Manifest:
    """A stage's result: its units, and the settings and the VERSION that named them.

    digest: of the units' content, regardless of their names. The manifest does not record the code, or DVC would rerun
    all later stages for a comment.
    """

    stage: str
    digest: str
    config: Mapping[str, Any]
    version: int
    units: tuple[Record, ...]
    counts: Mapping[str, int]

    def files(self, dataset: str) -> list[File]:
        return [unit.file(dataset) for unit in self.units]


class Store:
    """Reads and writes units below one root. Cheap to make; picklable, so that tasks can carry it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        if uri.startswith("s3://"):
            try:
                self._fs, self._root = pafs.FileSystem.from_uri(uri)
            except (OSError, ValueError) as error:
                raise StoreError(f"PBE_STORAGE={uri} cannot be opened: {' '.join(str(error).split())}") from None
        else:
            self._fs, self._root = pafs.LocalFileSystem(), str(Path(uri))

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.uri,)

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, pafs.LocalFileSystem)

    def path(self, relative: str) -> str:
        """Path for this store's filesystem. Raises StoreError for a name that leads out of the storage."""
        return str(PurePosixPath(self._root) / inner_path(relative, self.uri))

    def full_uri(self, relative: str) -> str:
        """Absolute local path or s3:// address, for tools that take one."""
        return self.path(relative) if self.is_local else f"{self.uri}/{relative}"

    # -- bytes ----------------------------------------------------------------------------------------------

    def read_bytes(self, relative: str) -> bytes:
        """Contents of a file. Raises StoreError if it is missing."""
        try:
            with self._fs.open_input_stream(self.path(relative)) as stream:
                return stream.read()
        except FileNotFoundError:
            raise StoreError(f"{self.full_uri(relative)}: not found in the storage") from None

    def exists(self, relative: str) -> bool:
        return self._fs.get_file_info(self.path(relative)).type == pafs.FileType.File

    def write_bytes(self, relative: str, data: bytes | memoryview) -> None:
        """Write a file atomically. Raises StoreError if that fails, e.g. on a full disk."""
        try:
            if self.is_local:
                write_whole(Path(self.path(relative)), data)
            else:
                self._upload(self.path(relative), data)
        except OSError as error:
            reason = error.strerror or one_line(error, 300)
            raise StoreError(
                f"{self.full_uri(relative)}: cannot be written: {reason}; finished parts are kept; "
                "rerun the command to resume"
            ) from None

    def _upload(self, path: str, data: bytes | memoryview) -> None:
        """Put a file in one atomic request, or in several that are taken back if one fails. Raises OSError.

        pyarrow would leave the parts of a failed upload in the bucket, where nothing shows them but the bill.
        """
        from boto3.exceptions import Boto3Error  # only for a storage on S3
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = path.partition("/")
        try:
            self._s3.upload_fileobj(pa.BufferReader(data), bucket, key)
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise OSError(one_line(error)) from None

    @cached_property
    def _s3(self) -> Any:
        import boto3

        return boto3.client("s3", region_name=self._fs.region)

    def list_names(self, relative: str) -> list[str]:
        """Names of files and folders directly below `relative`, sorted; empty if there is no such folder."""
        return sorted(info.base_name for info in self._children(relative))

    def list_files(self, relative: str) -> list[str]:
        """Paths of all files below `relative`, relative to it, sorted."""
        selector = pafs.FileSelector(self.path(relative), recursive=True, allow_not_found=True)
        infos = [info for info in self._fs.get_file_info(selector) if info.type == pafs.FileType.File]
        return sorted(self._inner(info, relative).as_posix() for info in infos)

    def _inner(self, info: Any, relative: str) -> PurePosixPath:
        """The path of a listed file below `relative`. Raises StoreError if it leads out of it."""
        name = PurePosixPath(info.path).relative_to(self.path(relative)).as_posix()
        return inner_path(name, self.full_uri(relative))

    def list_folders(self, relative: str) -> list[str]:
        """Names of the folders directly below `relative`, sorted."""
        return sorted(info.base_name for info in self._children(relative) if info.type == pafs.FileType.Directory)

    def _children(self, relative: str) -> Any:
        return self._fs.get_file_info(pafs.FileSelector(self.path(relative), allow_not_found=True))

    def copy_tree_in(self, source: Path, relative: str) -> None:
        """Upload every file below the local folder `source`."""
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            self.copy_file_in(file, f"{relative}/{file.relative_to(source).as_posix()}")

    def copy_file_in(self, source: Path, relative: str) -> None:
        """Upload one file, atomically, without reading it into memory. Raises StoreError if that fails."""
        data: bytes | mmap.mmap = b""  # which nothing could be mapped to
        if source.stat().st_size:
            with source.open("rb") as stream:
                # never closed: the frames of a write that failed hold it, and the error of closing would hide theirs
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.write_bytes(relative, memoryview(data))

    def move_file_in(self, source: Path, relative: str) -> None:
        """Move one local file into the storage, without copying if both are on one disk."""
        if self.is_local:
            target = Path(self.path(relative))
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as stream:
                os.fsync(stream.fileno())
            shutil.move(source, target)
        else:
            self.copy_file_in(source, relative)
            source.unlink()

    def copy_tree_out(self, relative: str, target: Path) -> None:
        """Copy a folder of the storage to the local folder `target`.

        Raises PartError if there is none, StoreError if a name leads out of it.
        """
        selector = pafs.FileSelector(self.path(relative), recursive=True, allow_not_found=True)
        files = [info for info in self._fs.get_file_info(selector) if info.type == pafs.FileType.File]
        if not files:
            root, name = PurePosixPath(relative).parts[:2]
            raise PartError(self.full_uri(relative), name if root == "parts" else root, None)
        for info, inner in [(info, self._inner(info, relative)) for info in files]:  # all names before any file
            local = target / inner
            local.parent.mkdir(parents=True, exist_ok=True)
            with self._fs.open_input_stream(info.path) as stream, local.open("wb") as out:
                shutil.copyfileobj(stream, out, COPY_BYTES)

    def delete_file(self, relative: str) -> None:
        """Remove a file, if it exists."""
        if self.exists(relative):
            self._fs.delete_file(self.path(relative))

    def delete_tree(self, relative: str) -> None:
        """Remove a folder, if it exists."""
        if self._fs.get_file_info(self.path(relative)).type == pafs.FileType.Directory:
            self._fs.delete_dir(self.path(relative))

    def folder_size(self, relative: str) -> "FolderSize":
        """Files and bytes below a folder, and seconds since the newest was written."""
        infos = self._fs.get_file_info(pafs.FileSelector(self.path(relative), recursive=True, allow_not_found=True))
        files = [info for info in infos if info.type == pafs.FileType.File]
        newest = max((info.mtime_ns for info in files if info.mtime_ns), default=0) / 1e9
        return FolderSize(len(files), sum(info.size for info in files), time.time() - newest)

    def delete_unit(self, relative: str) -> None:
        """Remove a unit's folder, its record first, so that a half-removed unit does not look complete."""
        self.delete_file(f"{relative}/record.json")
        self.delete_tree(relative)

    # -- units ----------------------------------------------------------------------------------------------

    def find_unit(self, stage: str, unit: str) -> Record | None:
        """The record of a finished unit; None if it is missing, incomplete or unreadable."""
        relative = f"parts/{stage}/{unit}/record.json"
        if not self.exists(relative):
            return None
        try:
            raw = json.loads(self.read_bytes(relative))
            record = record_from(raw)
        except (ValueError, KeyError, TypeError, AttributeError, StoreError):
            return None
        return record if self._complete(record) else None

    def find_units(self, units: Sequence[tuple[str, str]]) -> list[Record | None]:
        """`find_unit` of many (stage, unit) at a time: on S3 each takes as many requests as the unit has files."""
        with ThreadPoolExecutor(UNITS_AT_ONCE) as pool:
            return list(pool.map(lambda named: self.find_unit(*named), units))

    def _complete(self, record: Record) -> bool:
        infos = self._fs.get_file_info([self.path(file.path) for file in record.files])
        sizes = [info.size if info.type == pafs.FileType.File else None for info in infos]
        return sizes == [file.bytes for file in record.files]

    def write_unit(
        self,
        stage: str,
        unit: str,
        tables: Mapping[str, pa.Table] | Iterator[tuple[str, pa.Table]],
        *,
        counts: Mapping[str, int],
        rows_per_group: int = 128,
        after: Sequence[str] = (),
    ) -> Record:
        """Write one Parquet file per dataset, then the record. The bytes depend only on the tables.

        tables: by dataset, or pairs that are made one by one where they are too large to be held at once.
        """
        files, writing = [], None
        with ThreadPoolExecutor(1) as beside:  # the disk, or an upload, works while bytes are hashed and the next made
            for dataset, table in tables.items() if isinstance(tables, Mapping) else tables:
                data = _parquet_bytes(table, rows_per_group)
                if writing is not None:
                    writing.result()  # so that two files are held at most
                writing = beside.submit(self.write_bytes, _path_of(stage, unit, dataset), data)
                files.append(_file_of(stage, unit, dataset, table, data))
                del table, data  # before the next are made
            if writing is not None:
                writing.result()
        record = Record(unit, tuple(files), dict(counts), tuple(after))
        self.write_bytes(f"parts/{stage}/{unit}/record.json", _json_bytes(asdict(record)))
        return record

    def write_unit_by_content(self, stage: str, label: str, tables: Mapping[str, pa.Table]) -> Record:
        """Write a unit named by the digest of its rows, unless the storage has it already.

        A digest of its files' bytes would change with pyarrow, whose version they contain, and rename all later parts.
        """
        unit = f"{label}-{digest([[dataset, _content_sha256(table)] for dataset, table in tables.items()])}"
        return self.find_unit(stage, unit) or self.write_unit(stage, unit, tables, counts={})

    def read_table(self, file: File, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one file of a unit. Raises PartError if it is missing or damaged.

        A whole file is compared with its recorded sha256. With `columns` only they are read, which is a thousandth of a
        part with photos: the footer is compared with its own sha256, and each page with the checksum in it.
        """
        with self._readable(file):
            if columns is None:
                # its sha256 says more than the pages' checksums
                return pq.read_table(pa.BufferReader(self._whole(file)))
            with self._opened(file, None, pre_buffer=True) as parquet:
                missing = [name for name in columns if name not in parquet.schema_arrow.names]
                if missing:
                    raise pa.ArrowInvalid(f"it has no column {missing[0]}")
                return parquet.read(columns=list(columns)).select(list(columns))

    def open_parquet(self, file: File, footer: bytes | None = None) -> pq.ParquetFile:
        """Open a file for its metadata; a `footer` from `read_footer` is not read again.

        Raises PartError if the file is missing or not the one that was written.
        """
        with self._readable(file):
            return self._opened(file, footer)

    def _opened(self, file: File, footer: bytes | None, *, pre_buffer: bool = False) -> pq.ParquetFile:
        """pre_buffer: read the columns of all row groups in few requests."""
        stream = self._fs.open_input_file(self.path(file.path))
        metadata = pq.read_metadata(pa.BufferReader(footer or _footer(stream, file)))
        return pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True, pre_buffer=pre_buffer)

    def read_row_group(self, file: File, group: int, footer: bytes, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one row group, or some of its columns. footer: from `read_footer`. Raises PartError if the file is
        missing or damaged."""
        parquet = self.open_parquet(file, footer)
        try:
            with self._readable(file):
                return parquet.read_row_group(group, columns=columns)
        finally:
            parquet.close(force=True)

    def read_footer(self, file: File) -> bytes:
        """Read the stored footer, for `open_parquet`. Raises PartError if the file is missing, or not as written."""
        with self._readable(file), self._fs.open_input_file(self.path(file.path)) as stream:
            footer = _footer(stream, file)
            pq.read_metadata(pa.BufferReader(footer))
            return footer

    def _whole(self, file: File) -> pa.Buffer:
        with self._fs.open_input_file(self.path(file.path)) as stream:
            data = stream.read_buffer()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise pa.ArrowInvalid("its bytes differ from the recorded sha256")
        return data

    @contextmanager
    def _readable(self, file: File) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise PartError(self.full_uri(file.path), file.kind, None) from None
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise PartError(self.full_uri(file.path), file.kind, one_line(error, 200)) from None


def _footer(stream: pa.NativeFile, file: File) -> bytes:
    """Read only the footer, as it was written; pyarrow would read the last 64 KiB, all of a small file."""
    size = stream.size()
    stream.seek(max(0, size - 8))
    length = _footer_bytes(stream.read(8), size)
    stream.seek(size - length)
    footer = stream.read(length)
    if file.footer_sha256 is not None and hashlib.sha256(footer).hexdigest() != file.footer_sha256:
        raise pa.ArrowInvalid("its footer differs from the recorded sha256")
    return footer


def _footer_bytes(end: bytes, size: int) -> int:
    """Length of a Parquet file's footer, of which `end` is the last 8 bytes."""
    length = int.from_bytes(end[:4], "little") + 8
    if end[4:] != b"PAR1" or length > size:
        raise pa.ArrowInvalid("not a Parquet file: no footer at its end")
    return length


def write_whole(target: Path, data: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Write a local file under another name and rename it; makes the folder. Raises OSError and leaves nothing.

    mode: who may read it, less the process's umask.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(target) as beside,
        open(beside, "wb", opener=lambda path, flags: os.open(path, flags, mode)) as stream,
    ):
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path beside the target to write a local file to; it becomes the target, or after an error nothing is left."""
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield beside
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _file_of(stage: str, unit: str, dataset: str, table: pa.Table, data: memoryview) -> File:
    footer = data[-_footer_bytes(bytes(data[-8:]), len(data)) :]
    sha256, footer_sha256 = (hashlib.sha256(part).hexdigest() for part in (data, footer))
    return File(dataset, _path_of(stage, unit, dataset), table.num_rows, len(data), sha256, footer_sha256)


def _path_of(stage: str, unit: str, dataset: str) -> str:
    return f"parts/{stage}/{unit}/{dataset}.parquet"


def _parquet_bytes(table: pa.Table, rows_per_group: int) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),  # or the page limits would follow the chunks
        sink,
        row_group_size=max(1, rows_per_group),
        compression={f.name: (f.metadata or {}).get(b"compression", b"zstd").decode() for f in table.schema},
        # dictionaries help only ids and names
        use_dictionary=[f.name for f in table.schema if pa.types.is_string(f.type)],
        write_statistics=False,
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def _content_sha256(table: pa.Table) -> str:
    """SHA-256 of schema and rows in Arrow's stream format."""
    sink = pa.BufferOutputStream()
    own = table.take(pa.array(range(table.num_rows), pa.int64()))  # a copy: a slice's stream shows where it was cut
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(own.combine_chunks(), max_chunksize=1 << 20)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by `write_whole`."""
    write_whole(path, _json_bytes(value))


def make_manifest(stage: str, *, config: Mapping[str, Any], version: int, units: Sequence[Record]) -> Manifest:
    """The manifest of finished units, in the order given; counts are summed."""
    counts = Counter[str]()
    for unit in units:
        counts.update(unit.counts)
    identity = digest([stage, [[f.dataset, f.sha256] for unit in units for f in unit.files]])
    return Manifest(stage, identity, dict(config), version, tuple(units), dict(sorted(counts.items())))


def save_manifest(path: Path, manifest: Manifest) -> None:
    write_json(path, asdict(manifest))


def load_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises ManifestError if it is missing or damaged."""
    try:
        raw = json.loads(path.read_text())
        units = tuple(record_from(unit) for unit in raw["units"])
        return Manifest(raw["stage"], raw["digest"], raw["config"], raw["version"], units, raw["counts"])
    except FileNotFoundError:
        raise ManifestError(path, None) from None
    except (ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise ManifestError(path, f"{type(error).__name__} {error}") from None
