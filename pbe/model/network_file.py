"""A network as one file: TorchScript, or torch.export. Loading it runs code of the file, so its SHA-256 names it."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbe.errors import one_line
from pbe.model.file_kind import HEAD_BYTES, other_kind
from pbe.model.tensors import WeightsError, refuse_non_finite
from pbe.store import Store

Network = Callable[..., Any]


def store_network(store: Store, file: Path, *, sha256: str) -> str:
    """Copy a file to the storage, unless it has it; returns the path there. Raises WeightsError."""
    path = f"parts/weights/network-{sha256[:16]}"
    if not store.exists(f"{path}/record.json"):
        refuse_other_content(read_network(file), str(file), sha256)
        store.copy_file_in(file, f"{path}/{file.name}")
        # written last, so that an interrupted copy does not look complete
        store.write_bytes(f"{path}/record.json", json.dumps({"files": [file.name]}).encode())
    [name] = json.loads(store.read_bytes(f"{path}/record.json"))["files"]
    return f"{path}/{name}"


def read_network(file: Path) -> bytes:
    """Raises WeightsError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror})") from None


def refuse_other_content(data: bytes, where: str, sha256: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WeightsError(f"{where}: its SHA-256 is {found}, params.yaml expects {sha256}: it is another file")


def open_network(data: bytes, *, where: str, sha256: str, device: torch.device) -> Network:
    """Load a TorchScript or torch.export file onto `device`; its content says which it is. where: for messages.

    Raises WeightsError for another content than `sha256`, for what is neither, and for NaN or infinite weights.
    """
    refuse_other_content(data, where, sha256)
    try:
        names = {name.partition("/")[2] for name in zipfile.ZipFile(io.BytesIO(data)).namelist()}
    except zipfile.BadZipFile:
        names = set()
    if "archive_format" in names:
        return _exported(data, where, device)
    if "constants.pkl" in names:
        return open_torchscript(data, where=where, sha256=sha256, device=device)
    what = other_kind(data[:HEAD_BYTES]) or ("weights without code" if "data.pkl" in names else "something else")
    raise WeightsError(f"{where}: neither a TorchScript nor a torch.export file: {what}")


def open_torchscript(data: bytes, *, where: str, sha256: str, device: torch.device) -> Any:
    """Load a TorchScript file onto `device`, to evaluate. Raises WeightsError as `open_network`."""
    refuse_other_content(data, where, sha256)
    try:
        network = torch.jit.load(io.BytesIO(data), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{where}: not a TorchScript file ({one_line(error, 150)})") from None
    refuse_non_finite(network.state_dict(), where)
    return network


def _exported(data: bytes, where: str, device: torch.device) -> Network:
    from torch.export.passes import move_to_device_pass  # imported here: it takes seconds

    try:
        program = torch.export.load(io.BytesIO(data))
    except (RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{where}: torch {torch.__version__} cannot load it ({one_line(error, 150)})") from None
    tensors = {name: value for name, value in program.state_dict.items() if isinstance(value, Tensor)}
    refuse_non_finite(tensors, where)
    return move_to_device_pass(program, device).module()
