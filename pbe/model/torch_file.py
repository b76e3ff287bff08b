"""Reads the tensors of files that torch.save wrote (.bin, .ckpt, .pt), without executing anything in them.

torch's own reader runs a list of allowed functions with any arguments, and a damaged byte can make them allocate
gigabytes. Here the pickle is data (pbe/pickles.py), and a tensor is a view of the mapped file: one that would reach
beyond its values is an error. So memory is bounded by the size of the file.

    zip, since torch 1.6   */data.pkl, and */data/<key> with the values of one storage each
    legacy                 five pickles (magic number, version, system, object, keys), then each storage: count, values
"""

import io
import math
import mmap
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from pbe.pickles import Made, Name, Pickle, PickleError, Stored, mapping_of, read_pickle

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.serialization
_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before name and extra field
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# of checkpoints that hold more than tensors: the first that is there holds the model
_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "generator", "params", "weights")


class TorchFileError(ValueError):
    """A file is damaged, or holds no tensors that can be read; the message says what."""


@dataclass(frozen=True)
class _Values:
    """Where a storage's values are in the file."""

    start: int
    size_bytes: int
    crc: int = 0  # 0: not recorded


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The model's tensors by name, as private copies of the mapped file, which cost memory once they are changed.

    Of a checkpoint these are the tensors below `state_dict`, `model`, `module` or the like. Raises TorchFileError.
    """
    try:
        mapped, pickled, values = _opened(path)
        file = _File(mapped, values)
        return {name: file.tensor(made, name) for name, made in _model_of(pickled.value).items()}
    except PickleError as error:
        raise _damage(str(error)) from None


def names_in(path: Path) -> frozenset[Name]:
    """The classes and functions that a file of torch.save names, and that another reader would call.

    Raises TorchFileError.
    """
    try:
        return _opened(path)[1].names
    except PickleError as error:
        raise _damage(str(error)) from None


def _opened(path: Path) -> tuple[mmap.mmap, Pickle, dict[str, _Values]]:
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return mapped, *(_read_zip if mapped[:4] == b"PK\x03\x04" else _read_legacy)(mapped)


def _damage(what: str) -> TorchFileError:
    return TorchFileError(f"damaged or incomplete weight file ({what})")


# -- the two formats -------------------------------------------------------------------------------------------------


def _read_zip(mapped: mmap.mmap) -> tuple[Pickle, dict[str, _Values]]:
    try:
        with zipfile.ZipFile(cast(IO[bytes], mapped)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError, IndexError) as error:
        raise _damage(f"no list of contents at its end ({error})") from None
    entries = {info.filename.partition("/")[2]: info for info in infos}
    if "constants.pkl" in entries:
        raise TorchFileError("a TorchScript program, not weights; save its state_dict with torch.save")
    if "data.pkl" not in entries:
        found = ", ".join(sorted(info.filename for info in infos)[:3]) or "nothing"
        raise TorchFileError(f"a zip archive without data.pkl, so torch.save did not write it; it holds {found}")
    records = {name: _record(mapped, info) for name, info in entries.items() if not info.is_dir()}
    if "byteorder" in records and bytes(_bytes_of(mapped, records["byteorder"], "byteorder")) != b"little":
        raise TorchFileError("written on a big-endian machine; save it again on another")
    pickled = read_pickle(io.BytesIO(_bytes_of(mapped, records["data.pkl"], "data.pkl")))
    return pickled, {name.removeprefix("data/"): at for name, at in records.items() if name.startswith("data/")}


def _record(mapped: mmap.mmap, info: zipfile.ZipInfo) -> _Values:
    """Where the bytes of a zip entry are; torch stores them without compression."""
    header = mapped[info.header_offset : info.header_offset + _LOCAL_HEADER] if info.header_offset >= 0 else b""
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise TorchFileError(f"{info.filename} in it is compressed, unlike torch.save's; load and save it again")
    if header[:4] != b"PK\x03\x04" or start + info.file_size > len(mapped):
        raise _damage(f"{info.filename} is not where its list of contents says")
    return _Values(start, info.file_size, info.CRC)


def _bytes_of(mapped: mmap.mmap, at: _Values, name: str) -> memoryview:
    """The bytes of a record. Raises TorchFileError if they differ from its CRC-32, which torch does not compare."""
    data = memoryview(mapped)[at.start : at.start + at.size_bytes]
    if at.crc and zlib.crc32(data) != at.crc:
        raise _damage(f"{name} does not match its checksum")
    return data


def _read_legacy(mapped: mmap.mmap) -> tuple[Pickle, dict[str, _Values]]:
    first = read_pickle(mapped)
    if first.value != _MAGIC:
        raise TorchFileError("a pickle that torch.save did not write; save its state_dict with torch.save")
    version, system, pickled, keys = (read_pickle(mapped) for _ in range(4))
    if version.value != _PROTOCOL or mapping_of(system.value).get("little_endian") is not True:
        raise TorchFileError("written by an unknown version of torch.save, or on a big-endian machine")
    sizes = {}
    for stored in pickled.stored:
        storage = _storage(stored)
        sizes[storage.key] = storage.dtype.itemsize
    values = {}
    for key in keys.value if isinstance(keys.value, list) else ():
        if not isinstance(key, str):
            raise _damage("a storage has no name")
        count = int.from_bytes(mapped.read(8), "little")
        at = _Values(mapped.tell(), count * sizes.get(key, 0))
        if at.start + at.size_bytes > len(mapped):
            raise _damage(f"the values of storage {key} are not all there")
        values[key] = at
        mapped.seek(at.start + at.size_bytes)
    return pickled, values


# -- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    """What a pickle says of a storage. offset and count: in elements, of the part of it that is meant."""

    key: str
    dtype: torch.dtype
    offset: int
    count: int


def _storage(stored: Any) -> _Storage:
    match stored:
        case Stored(("storage", Name(_, kind), str(key), _, int(count), *legacy_view)):
            view = legacy_view[0] if legacy_view else None
        case _:
            raise _damage("or it holds a whole module; then save its state_dict alone")
    if kind not in _STORAGES:
        raise _damage(f"its tensors are of the unknown kind {kind}")
    _, offset, size = view if isinstance(view, tuple) and len(view) == 3 else (None, 0, count)
    if not all(type(n) is int and n >= 0 for n in (offset, size, count)):
        raise _damage(f"storage {key} has an invalid size")
    return _Storage(key, _STORAGES[kind], offset, size)


class _File:
    def __init__(self, mapped: mmap.mmap, values: Mapping[str, _Values]) -> None:
        self._mapped, self._values = mapped, values
        self._known: dict[tuple[str, torch.dtype], Tensor] = {}

    def tensor(self, made: Made, name: str) -> Tensor:
        """The tensor that a pickle describes. Raises TorchFileError if it reaches beyond its storage."""
        match _unwrapped(made):
            case Made(
                Name("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3" as how),
                tuple((stored, int() as offset, tuple(size), tuple(stride), *rest)),
            ):
                storage = _storage(stored)
            case _:
                raise _damage(f"{name} is not a plain tensor")
        dtype = _dtype(rest[2], name) if how.endswith("v3") and len(rest) > 2 else storage.dtype
        flat = self._flat(storage, dtype)
        if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise _damage(f"{name} has an invalid shape")
        elements = math.prod(size)
        if not elements:
            return torch.empty(size, dtype=dtype)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        # an expanded tensor has more elements than its storage, but one larger than the file is damage
        if last >= len(flat) or elements * dtype.itemsize > len(self._mapped):
            raise _damage(f"{name} has the shape {size}, more than its storage holds")
        return flat.as_strided(size, stride, flat.storage_offset() + offset)

    def _flat(self, storage: _Storage, dtype: torch.dtype) -> Tensor:
        """The values of a storage as (count,), checked once."""
        at = self._values.get(storage.key)
        start, size_bytes = storage.offset * storage.dtype.itemsize, storage.count * storage.dtype.itemsize
        if at is None or start + size_bytes > at.size_bytes:
            raise _damage(f"the values of storage {storage.key} are not all there")
        if (storage.key, dtype) not in self._known:
            data = _bytes_of(self._mapped, at, f"storage {storage.key}")
            aligned = data if at.start % dtype.itemsize == 0 else bytearray(data)
            count = at.size_bytes // dtype.itemsize
            self._known[storage.key, dtype] = (
                torch.frombuffer(aligned, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
            )
        return self._known[storage.key, dtype][start // dtype.itemsize : (start + size_bytes) // dtype.itemsize]


def _unwrapped(made: Any) -> Any:
    """The plain tensor inside a parameter or a tensor with attributes."""
    while True:
        match made:
            case Made(Name("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"), tuple((inner, *_))):
                made = inner
            case Made(Name("torch._tensor", "_rebuild_from_type_v2"), tuple((function, _, args, *_))):
                made = Made(function, args)
            case _:
                return made


def _dtype(value: Any, name: str) -> torch.dtype:
    found = getattr(torch, value.name, None) if isinstance(value, Name) and value.module == "torch" else None
    if not isinstance(found, torch.dtype):
        raise _damage(f"{name} has an unknown type of numbers")
    return found


# -- which tensors are the model's -----------------------------------------------------------------------------------


def _model_of(value: Any) -> dict[str, Made]:
    """The mapping of names to tensors that is the model's state. Raises TorchFileError if it cannot be told."""
    found = dict(_mappings(value))
    if not found:
        whole = isinstance(value, Made) and "_modules" in mapping_of(value.state)
        what = "a whole module is pickled in it; save its state_dict alone" if whole else "no tensors in it"
        raise TorchFileError(what)
    known = [path for path in found if path and path[0] in _MODEL_KEYS]
    if known:
        return found[min(known, key=_rank)]
    below = {path: tensors for path, tensors in found.items() if path}
    if () in found and all(len(found[()]) >= len(tensors) for tensors in below.values()):
        return found[()]
    if len(below) == 1:
        return next(iter(below.values()))
    raise TorchFileError(
        f"its tensors are below {', '.join(sorted('.'.join(path) for path in below)[:5])}, and none of these is known "
        "to be the model; save the right one alone with torch.save"
    )


def _rank(path: tuple[str, ...]) -> list[int]:
    return [_MODEL_KEYS.index(key) if key in _MODEL_KEYS else len(_MODEL_KEYS) for key in path]


def _mappings(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Made]]]:
    """Mappings with tensors: the value itself, and those one or two keys below it, by their keys."""
    entries = {key: inner for key, inner in mapping_of(value).items() if isinstance(key, str)}
    tensors = {key: inner for key, inner in entries.items() if _is_tensor(inner)}
    if tensors:
        yield path, tensors
    if len(path) < 2:
        for key, inner in entries.items():
            yield from _mappings(inner, (*path, key))


def _is_tensor(value: Any) -> bool:
    match value:
        case Made(Name("torch._utils" | "torch._tensor", name), tuple()):
            return name.startswith("_rebuild")
    return False
