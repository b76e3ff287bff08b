"""Writes safetensors, and reads weight files by their content: these, and what torch.save wrote, executing nothing.

Every reader here also checks that the values are finite: a NaN in one weight makes every picture black.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbe.errors import UserError, one_line
from pbe.model.file_kind import weight_format
from pbe.model.torch_file import read_torch_file

M = TypeVar("M", bound=torch.nn.Module)
# of a file's name, after its stem: as trained, or a copy in half precision
VARIANTS = ("", ".fp16", ".bf16")
PYTORCH = MappingProxyType({"format": "pt"})  # metadata that transformers asks for
_WRAPPERS = ("module.", "_orig_mod.")  # before every name, from data parallelism and torch.compile


class WeightsError(UserError, ValueError):
    """A weight file is missing, damaged or of the wrong kind; the message names the file."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The model's tensors of one file by name, on the CPU; of a checkpoint, those of `state_dict` or the like.

    The suffix does not matter. Raises WeightsError.
    """
    try:
        # the file's own message comes first: safetensors' and torch's do not say that it is a web page
        tensors = load_file(path) if weight_format(path) == "safetensors" else read_torch_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged or incomplete weight file ({one_line(error, 200)})") from None
    except (ValueError, RuntimeError, OSError) as error:
        raise WeightsError(f"{path}: {one_line(error, 300)}") from None
    if not tensors:
        raise WeightsError(f"{path}: no tensors in it")
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def refuse_non_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError that names the tensors with NaN or infinite values, which damage every result."""
    bad = [name for name, value in tensors.items() if not _is_finite(value)]
    if bad:
        raise WeightsError(
            f"{where}: {len(bad)} of {len(tensors)} tensors have NaN or infinite values, such as {some_names(bad)}; "
            "the file is damaged, or its training diverged"
        )


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] = PYTORCH,
) -> None:
    """Write a safetensors file of contiguous copies in `dtype`, and its folder.

    Raises WeightsError for NaN, and for values beyond the range of `dtype`.

    metadata: of the file; with two keys or more its bytes vary, because safetensors writes them in any order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_non_finite(tensors, f"{path}: not written")
    plain = {name: value.detach().to(dtype).cpu().contiguous().clone() for name, value in tensors.items()}
    if beyond := [name for name, value in plain.items() if not _is_finite(value)]:
        raise WeightsError(f"{path}: not written: {some_names(beyond)} has values beyond {dtype}; keep float32")
    save_file(plain, path, metadata=dict(metadata))


def _is_finite(value: Tensor) -> bool:
    if not value.numel() or not (value.is_floating_point() or value.is_complex()):
        return True
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.dtype.itemsize == 1:  # float8, which has few operations
        value = value.half()
    low, high = torch.aminmax(value)  # 20 times as fast as isfinite, and without a copy
    return bool(low.float().isfinite() and high.float().isfinite())  # networks compute in float32, or less


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder: one, or shards and their index."""

    files: list[Path]
    index: Path | None = None


def weight_files(folder: Path, *stems: str) -> WeightFiles:
    """The weight files named by the first of `stems` that exists. Prefers safetensors to pickles, and both to copies in
    half precision. Raises WeightsError if there are none."""
    for stem in stems:
        for variant in VARIANTS:
            for suffix in (".safetensors", ".bin"):
                one = folder / f"{stem}{variant}{suffix}"
                if one.is_file():
                    return WeightFiles([one])
                for index in (f"{one.name}.index.json", f"{stem}{suffix}.index{variant}.json"):
                    if (folder / index).is_file():
                        return WeightFiles(_shards(folder / index), folder / index)
    similar = sorted(path.name for path in folder.glob("*") if path.name.startswith(stems) and path.is_file())
    wanted = f"no {stems[0]}.safetensors and no {stems[0]}.bin in it"
    if similar:
        wanted += f", only {', '.join(similar[:3])}; rename the right one"
    raise WeightsError(f"{folder}: {wanted}")


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Raises WeightsError for a name that is not of a file beside it."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise WeightsError(f"{index}: not an index of weight files ({_named(error)})") from None
    if not names:
        raise WeightsError(f"{index}: names no files")
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or Path(name).name != name:
            raise WeightsError(f"{index}: names a file outside its folder ({name!r})")
    return [index.with_name(name) for name in sorted(names)]


def read_folder(folder: Path, *stems: str) -> dict[str, Tensor]:
    """All tensors of a folder's weight files, named by the first of `stems` that exists; all are finite.

    Raises WeightsError.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, *stems).files:
        tensors |= read_tensors(path)
    refuse_non_finite(tensors, str(folder))
    return tensors


def folder_digest(folder: Path, *stems: str) -> str:
    """16 hex digits of the sha256 over the sha256 of the files that `read_folder` reads. Raises WeightsError."""
    digest = hashlib.sha256()
    for path in weight_files(folder, *stems).files:
        try:
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:16]


def weight_files_of(folder: Path, *stems: str) -> list[Path]:
    """The files that `read_folder` reads, and the index if they are shards. Raises WeightsError."""
    found = weight_files(folder, *stems)
    return [*found.files, *([found.index] if found.index else [])]


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
    """Load tensors into a module after `check_fit`, which is all for one on the meta device. Raises WeightsError."""
    own = module.state_dict()
    check_fit(own, tensors, where)
    if not any(value.is_meta for value in own.values()):  # torch would warn of each
        module.load_state_dict(tensors)


def new_loaded(make: Callable[[], M], tensors: Mapping[str, Tensor], where: str) -> M:
    """The module that `make` builds, with these tensors in its own type. Raises WeightsError.

    Shapes are compared before memory is taken: a damaged digit in a config would ask for any amount.
    """
    with torch.device("meta"):
        skeleton = make()
    check_fit(skeleton.state_dict(), tensors, where)
    module = make()
    module.load_state_dict(tensors)
    return module


def some_names(names: Iterable[str]) -> str:
    """The first three names in alphabetical order, used in messages."""
    return ", ".join(sorted(names)[:3])


def _named(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)
