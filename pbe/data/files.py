"""A file or folder of the user's, local or s3://, behind one pyarrow filesystem."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from pbe.errors import UserError, one_line
from pbe.places import local_path

_NAMED = 5  # entries that an error names one by one


class SourceError(UserError):
    """A source of photos or boxes cannot be read; the message names the file, folder or package and what to do."""


@dataclass(frozen=True)
class FileInfo:
    """A file below a tree. name: path below it, with "/". version: size and date, changes when the file does."""

    name: str
    size: int
    version: str


def irregular(path: Path) -> str:
    """What `path` is, in words, if it is no regular file, else "". Links are followed. Raises OSError.

    Opening a named pipe waits for a writer, and reading a device may never end.
    """
    return _kind(path.stat().st_mode)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


@dataclass(frozen=True)
class FileTree:
    """A file or folder. where: absolute local path or s3://bucket/prefix. key: the setting that messages name."""

    where: str
    key: str

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        if not self.where.startswith("s3://"):
            return pafs.LocalFileSystem(), self.where
        try:
            return pafs.FileSystem.from_uri(self.where)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.key} = {self.where} cannot be opened: {' '.join(str(error).split())}") from None

    def __reduce__(self) -> tuple[type["FileTree"], tuple[str, str]]:
        return FileTree, (self.where, self.key)  # the open filesystem is not pickled

    @property
    def is_local(self) -> bool:
        return isinstance(self._opened[0], pafs.LocalFileSystem)

    @cached_property
    def is_folder(self) -> bool:
        """False for a file. Raises SourceError if it does not exist."""
        kind = self._info(self._opened[1]).type
        if kind == pafs.FileType.NotFound:
            raise SourceError(f"{self.key}: {self.where} does not exist")
        if kind == pafs.FileType.Unknown:
            raise SourceError(f"{self.key}: {self.where} is {irregular(Path(self.where))}, not a file or folder")
        return bool(kind == pafs.FileType.Directory)

    @property
    def exists(self) -> bool:
        return bool(self._info(self._opened[1]).type != pafs.FileType.NotFound)

    def require(self) -> None:
        """Raises SourceError if the file or folder does not exist."""
        _ = self.is_folder

    def _info(self, path: str) -> Any:
        try:
            return self._opened[0].get_file_info(path)
        except OSError as error:
            raise SourceError(f"{self.key} = {self.where}: {' '.join(str(error).split())[:300]}") from None

    def _list(self, selector: Any) -> Any:
        try:
            return self._opened[0].get_file_info(selector)
        except OSError as error:
            raise SourceError(f"{self.key} = {self.where}: {' '.join(str(error).split())[:300]}") from None

    @property
    def _folder(self) -> str:
        path = self._opened[1]
        return path if self.is_folder else str(PurePosixPath(path).parent)

    @property
    def only_name(self) -> str:
        """Name of the file, if this is a file."""
        return PurePosixPath(self._opened[1]).name

    def path_of(self, name: str) -> str:
        """Full path of a file, for messages."""
        return f"{self.where.rstrip('/')}/{name}" if self.is_folder else self.where

    def siblings(self) -> list[str]:
        """Sorted names of the files in the folder, or beside the file."""
        infos = self._list(pafs.FileSelector(self._folder))
        return sorted(PurePosixPath(self._text(info)).name for info in infos if info.type == pafs.FileType.File)

    def names(self) -> list[str]:
        """Sorted names of the files in the folder, which this must be."""
        return self.siblings()

    def walk(self) -> list[FileInfo]:
        """All files below the folder and its subfolders, sorted by name.

        Raises SourceError that names what DVC cannot watch: links to folders, which it does not follow, and what is
        neither a file nor a folder, at which it would wait forever.
        """
        found = list(self._walk_locally() if self.is_local else self._walk_remotely())
        return sorted(found, key=lambda info: info.name)

    def _walk_remotely(self) -> Iterator[FileInfo]:
        root = self._opened[1]
        for info in self._list(pafs.FileSelector(root, recursive=True)):
            if info.type == pafs.FileType.File:
                inner = PurePosixPath(self._text(info)).relative_to(root).as_posix()
                yield FileInfo(inner, info.size, f"{info.size}:{info.mtime_ns}")

    def _walk_locally(self) -> Iterator[FileInfo]:
        refused, pending = [], [self.where]
        while pending:
            folder = pending.pop()
            try:
                with os.scandir(folder) as listed:
                    entries = list(listed)
            except OSError as error:
                refused.append(f"{folder} ({one_line(error.strerror)})")
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                    continue
                try:
                    info = entry.stat()
                except OSError as error:
                    broken = isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP
                    refused.append(f"{entry.path} ({'a broken link' if broken else one_line(error.strerror)})")
                    continue
                if kind := _kind(info.st_mode):
                    refused.append(f"{entry.path} ({'a link to ' if entry.is_symlink() else ''}{kind})")
                else:
                    inner = self._decoded(entry.path.removeprefix(self.where).lstrip("/"))
                    yield FileInfo(inner, info.st_size, f"{info.st_size}:{info.st_mtime_ns}")
        if refused:
            raise SourceError(
                f"{self.key}: {named(sorted(refused))}: DVC can watch only plain files and folders; remove these, and "
                "copy what a link points to (cp -al makes hard links, which take no space)"
            )

    def _decoded(self, name: str) -> str:
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(name).decode(errors="backslashreplace")
            raise SourceError(f"{self.key}: {shown}: the name is not UTF-8; rename the file") from None
        return name

    def _text(self, info: Any) -> str:
        try:
            return str(info.path)
        except UnicodeDecodeError as error:
            name = error.object.decode(errors="backslashreplace")
            raise SourceError(f"{self.key}: {name}: the name is not UTF-8; rename the file") from None

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Contents of a file. Raises OSError, also for one of more than `max_bytes`, of which no more is read."""
        with self.open(name) as stream:
            data = bytes(stream.read(None if max_bytes is None else max_bytes + 1))
        if max_bytes is not None and len(data) > max_bytes:
            raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", name)
        return data

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, in hex. Raises OSError."""
        digest = hashlib.sha256()
        with self.open(name) as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()

    def open(self, name: str) -> Any:
        """Open a file as a stream of bytes. Raises OSError, also for what is no regular file."""
        return self._opened[0].open_input_stream(self._regular(name), compression=None)

    def open_seekable(self, name: str) -> Any:
        """Open a file to read parts of it, as Parquet is read. Raises OSError as `open`."""
        return self._opened[0].open_input_file(self._regular(name))

    def _regular(self, name: str) -> str:
        path = Path(self._folder, name)
        if self.is_local and (kind := irregular(path)):
            raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))
        return str(PurePosixPath(self._folder) / name)


def is_hidden(name: str) -> bool:
    """Whether a path lies in a hidden folder (.thumbnails/), or is what macOS writes beside a file (._photo.jpg)."""
    *folders, last = name.split("/")
    return last.startswith("._") or any(folder.startswith(".") for folder in folders)


def named(entries: Sequence[str]) -> str:
    """The first of a list, for a message, and how many more there are."""
    more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
    return ", ".join(entries[:_NAMED]) + more


def file_tree(location: str, *, key: str) -> FileTree:
    """Tree of `location`: s3://..., or a local path. Raises SourceError."""
    if location.startswith("s3://"):
        if not location.removeprefix("s3://").strip("/"):
            raise SourceError(f"{key} = {location}: names no bucket")
        return FileTree(location.rstrip("/"), key)
    try:
        return FileTree(str(local_path(location).resolve()), key)
    except (OSError, RuntimeError) as error:  # a symlink to itself
        raise SourceError(f"{key} = {location}: {' '.join(str(error).split())}") from None
