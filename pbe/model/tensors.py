"""Reads tensors by name from safetensors and from pickles (.bin, .ckpt, .pt), without executing the pickle.

A pickle is a program. torch's weights_only reader, which is pure Python, rejects classes that it does not know, and the
official checkpoint names Lightning's. So every such name is replaced by a class that makes an empty mapping.
"""

import hashlib
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pbe.errors import UserError, one_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class WeightsError(UserError, ValueError):
    """A weight file is missing, damaged or of the wrong kind; the message names the file."""


class _Ignored:
    """Replaces a class or function named in a pickle: takes any arguments, makes an empty mapping."""

    def __new__(cls, *_: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()  # the reader sets items and attributes on this class only


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, on the CPU; of a checkpoint, those of `state_dict`. Raises WeightsError."""
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except pickle.UnpicklingError:  # torch's message is a page on how to execute the file
        raise WeightsError(
            f"{path}: damaged, or it holds Python objects that torch's weights_only reader rejects; save its "
            "state_dict alone and use that file"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, *_DAMAGE) as error:
        raise WeightsError(f"{path}: damaged or incomplete weight file ({_named(error)})") from None
    tensors = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {str(key): value.detach() for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: no tensors in it")
    return tensors


# what reading a damaged pickle may raise
_DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError, MemoryError, RecursionError)


def _read_pickle(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # written by torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True)
    foreign: list[Any] = [(_Ignored, name) for name in get_unsafe_globals_in_checkpoint(path)]
    with safe_globals(foreign):  # mmap, because a checkpoint may also hold an optimizer
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return the weight file `folder/stem.*`, or the shards in its index; prefers safetensors to pickles.

    Raises WeightsError if neither exists.
    """
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise WeightsError(f"{index}: not an index of weight files ({_named(error)})") from None
            if any(Path(name).name != name for name in names):
                raise WeightsError(f"{index}: names a file outside its folder")
            return [folder / name for name in names]
    raise WeightsError(f"{folder}: no {stem}.safetensors and no {stem}.bin in it")


def read_folder(folder: Path, *stems: str) -> dict[str, Tensor]:
    """All tensors of a folder's weight files, named by the first of `stems` that exists. Raises WeightsError."""
    tensors: dict[str, Tensor] = {}
    for path in _first_files(folder, stems):
        tensors |= read_tensors(path)
    return tensors


def folder_digest(folder: Path, *stems: str) -> str:
    """16 hex digits of the sha256 over the sha256 of the files that `read_folder` reads. Raises WeightsError."""
    digest = hashlib.sha256()
    for path in _first_files(folder, stems):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def weight_files_of(folder: Path, *stems: str) -> list[Path]:
    """The files that `read_folder` reads, and the index if they are shards. Raises WeightsError."""
    files = _first_files(folder, stems)
    stem = next(stem for stem in stems if files[0].name.startswith(stem))
    return [*files, *folder.glob(f"{stem}{files[0].suffix}.index.json")]


def _first_files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    missing: list[WeightsError] = []
    for stem in stems:
        try:
            return weight_files(folder, stem)
        except WeightsError as error:
            missing.append(error)
    raise missing[0]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping. Raises WeightsError."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path.parent}: no {path.name} in it") from None
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path}: not JSON ({_named(error)})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected a JSON mapping")
    return value


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError unless names and shapes are the same. The message has `where` and the first few names."""
    wrong = {
        "missing": own.keys() - tensors.keys(),
        "unexpected": tensors.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape},
    }
    if any(wrong.values()):
        parts = (f"{what} {len(names)} such as {some_names(names)}" for what, names in wrong.items() if names)
        raise WeightsError(f"{where}: these weights do not fit: {'; '.join(parts)}")


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load tensors into a module after `check_fit`. Raises WeightsError."""
    check_fit(module.state_dict(), tensors, where)
    module.load_state_dict(tensors)


def some_names(names: Iterable[str]) -> str:
    """The first three names in alphabetical order, used in messages."""
    return ", ".join(sorted(names)[:3])


def _named(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)
