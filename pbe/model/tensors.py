"""Weight files to tensors by name: safetensors, and pickles (.bin, .ckpt, .pt) of which nothing is executed.

A pickle is a program. torch's weights_only reader, which is pure Python, refuses every class it does not know, and the
official checkpoint names Lightning's: to that reader every such name is a class that makes an empty mapping.
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

from pbe.errors import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class WeightsError(UserError, ValueError):
    """A weight file is missing, damaged, or not what it should be; the message names the file."""


class _Ignored:
    """Stands for a class or function that a pickle names: takes everything, makes an empty mapping."""

    def __new__(cls, *_: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()  # of which the reader sets items and attributes, as it does not of other classes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one file, by name, on the CPU; of a checkpoint those of its `state_dict`. Raises WeightsError."""
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except pickle.UnpicklingError:  # its text is a page on how to run the file
        raise WeightsError(
            f"{path}: damaged, or it holds Python objects that torch's weights_only reader refuses; a file of its "
            "state_dict alone can be read"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, *_ODD) as error:
        raise WeightsError(f"{path}: not a whole weight file ({_one_line(error)})") from None
    tensors = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {str(key): value.detach() for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: no tensors in it")
    return tensors


# what a damaged pickle may raise while it is taken apart
_ODD = (ValueError, KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError, MemoryError, RecursionError)


def _read_pickle(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # of torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True)
    foreign: list[Any] = [(_Ignored, name) for name in get_unsafe_globals_in_checkpoint(path)]
    with safe_globals(foreign):  # tensors are mapped, not read: a checkpoint may hold an optimizer too
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of `folder/stem.*` or, in shards, those that its index names; safetensors before pickles.

    Raises WeightsError when there is none.
    """
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise WeightsError(f"{index}: not an index of weight files ({_one_line(error)})") from None
            if any(Path(name).name != name for name in names):
                raise WeightsError(f"{index}: names a file outside its folder")
            return [folder / name for name in names]
    raise WeightsError(f"{folder}: no {stem}.safetensors and no {stem}.bin in it")


def read_folder(folder: Path, *stems: str) -> dict[str, Tensor]:
    """All tensors of a folder's weights, under the first of `stems` that is there. Raises WeightsError."""
    tensors: dict[str, Tensor] = {}
    for path in _first_files(folder, stems):
        tensors |= read_tensors(path)
    return tensors


def folder_digest(folder: Path, *stems: str) -> str:
    """16 hex digits of the sha256 over those files' sha256. Raises WeightsError."""
    digest = hashlib.sha256()
    for path in _first_files(folder, stems):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def weight_files_of(folder: Path, *stems: str) -> list[Path]:
    """The weight files under the first of `stems` that is there, and the index where they are shards. Raises
    WeightsError."""
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
    """A JSON mapping. Raises WeightsError."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path.parent}: no {path.name} in it") from None
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path}: not JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: a JSON mapping is expected")
    return value


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises WeightsError unless both have the same names and shapes: one line with `where` and the first few names."""
    wrong = {
        "missing": own.keys() - tensors.keys(),
        "unexpected": tensors.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape},
    }
    if any(wrong.values()):
        told = (f"{what} {len(names)} such as {some_names(names)}" for what, names in wrong.items() if names)
        raise WeightsError(f"{where}: these weights do not fit: {'; '.join(told)}")


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """load_state_dict after check_fit."""
    check_fit(module.state_dict(), tensors, where)
    module.load_state_dict(tensors)


def some_names(names: Iterable[str]) -> str:
    """The first three in order, for a message."""
    return ", ".join(sorted(names)[:3])


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
