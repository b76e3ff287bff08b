"""Stores the frozen networks of a run by content, and opens them as the encode manifest says.

If `params.yaml` names weights, the encode stage copies them once to `<storage>/parts/weights/<part>-<sha256>`. From
then on every worker reads the copy, even if the original changes or disappears.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.model.backbone import Backbone, load_backbone
from pbe.model.codec import Codec, codec_from_bytes
from pbe.model.tensors import WeightsError, folder_digest, weight_files_of
from pbe.store import Store

if TYPE_CHECKING:
    from pbe.model.text import TextEncoder

PART_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")  # weights, configs, tokenizers
OTHER_COPIES = ("*.fp16.*", "*.fp16-*", "*.non_ema*")


Entry = Mapping[str, Any]  # in the encode manifest's config: "kind", and "path" below the storage root


def store_weights(store: Store, folder: Path, part: str, *stems: str) -> str:
    """Copy config.json and the weight files of `folder` to the storage, unless it has them; returns the path there.

    stems: names of the weight files; the first that exists is used. Raises WeightsError.
    """
    path = f"parts/weights/{part}-{folder_digest(folder, *stems)}"
    if not store.exists(f"{path}/record.json"):
        files = [folder / "config.json", *weight_files_of(folder, *stems)]
        for file in files:
            store.copy_file_in(file, f"{path}/{file.name}")
        # written last, so that an interrupted copy does not look complete
        store.write_bytes(f"{path}/record.json", json.dumps({"files": [file.name for file in files]}).encode())
    return path


def store_text_encoder(store: Store, encoder: "TextEncoder") -> str:
    """Write a text encoder to the storage, unless it has it; returns the path there."""
    from pbe.model.text import save_text_encoder, text_encoder_digest

    with tempfile.TemporaryDirectory(prefix="pbe-weights-") as local:
        save_text_encoder(Path(local), encoder)
        path = f"parts/weights/text-{text_encoder_digest(Path(local))}"
        if not store.exists(f"{path}/record.json"):
            store.copy_tree_in(Path(local), path)
            store.write_bytes(f"{path}/record.json", json.dumps({"files": store.list_files(path)}).encode())
    return path


def store_adapter(store: Store, folder: Path) -> str:
    """Copy an adapter to the storage, unless it has it; returns the path there. Raises WeightsError."""
    from pbe.model.adapter import FILES  # imported here: diffusers takes seconds

    identity = hashlib.sha256()
    for name in FILES:
        if not (folder / name).is_file():
            raise WeightsError(f"{folder}: no {name} in it; an adapter has {', '.join(FILES)}")
        identity.update(hashlib.sha256((folder / name).read_bytes()).digest())
    path = f"parts/weights/adapter-{identity.hexdigest()[:16]}"
    if not store.exists(f"{path}/record.json"):
        for name in FILES:
            store.copy_file_in(folder / name, f"{path}/{name}")
        store.write_bytes(f"{path}/record.json", json.dumps({"files": list(FILES)}).encode())
    return path


def store_whole_model(store: Store, folder: Path) -> str:
    """Copy a whole model, a folder with one subfolder per part, to the storage, unless it has it; returns the path.

    Only what a pipeline loads is copied: no code, no copies in half precision, no pickle beside safetensors. Raises
    WeightsError for a folder without weights in subfolders.
    """
    files = _files_of_model(folder)
    identity = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        identity.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    path = f"parts/weights/model-{identity.hexdigest()[:16]}"
    if not store.exists(f"{path}/record.json"):
        names = [file.relative_to(folder).as_posix() for file in files]
        for file, name in zip(files, names, strict=True):
            store.copy_file_in(file, f"{path}/{name}")
        store.write_bytes(f"{path}/record.json", json.dumps({"files": names}).encode())
    return path


def _files_of_model(folder: Path) -> list[Path]:
    """Files of the parts, and JSON beside them, sorted."""
    inside = [file for file in folder.glob("*/*") if file.suffix in PART_SUFFIXES and file.parent.name[0] != "."]
    kept = sorted(file for file in (*inside, *folder.glob("*.json")) if file.is_file())
    kept = [file for file in kept if not any(fnmatch(file.name, pattern) for pattern in OTHER_COPIES)]
    safe = {file.parent for file in kept if file.suffix == ".safetensors"}
    kept = [file for file in kept if file.suffix != ".bin" or file.parent not in safe]
    if not any(file.suffix in (".bin", ".safetensors") for file in kept):
        raise WeightsError(f"{folder}: no weights in subfolders, as a whole model has them (unet/, vae/, ...)")
    return kept


@contextmanager
def stored_folder(store: Store, path: str) -> Iterator[Path]:
    """A local folder with the contents of a stored one: the folder itself, or for a remote storage a temporary copy."""
    if store.is_local:
        yield Path(store.path(path))
        return
    with tempfile.TemporaryDirectory(prefix="pbe-weights-") as local:
        store.copy_tree_out(path, Path(local))
        yield Path(local)


def open_codec(store: Store, entry: Entry) -> Codec:
    """Open the codec of an encode manifest. Raises CodecError, StoreError or WeightsError."""
    path = str(entry["path"])
    if entry["kind"] == "patch":
        return codec_from_bytes(store.read_bytes(path), store.full_uri(path))
    from pbe.model.vae import load_vae  # imported here: diffusers takes seconds

    with stored_folder(store, path) as folder:
        return load_vae(folder)


def stored_codec_sha256(store: Store, entry: Entry) -> str | None:
    """SHA-256 in hex of a patch codec's file; None for AutoencoderKL, which is the same for all models."""
    return hashlib.sha256(store.read_bytes(str(entry["path"]))).hexdigest() if entry["kind"] == "patch" else None


def open_text_encoder(store: Store, path: str) -> "TextEncoder":
    """Open what `store_text_encoder` wrote. Raises StoreError or WeightsError."""
    from pbe.model.text import load_text_encoder

    with stored_folder(store, path) as folder:
        return load_text_encoder(folder)


def open_backbone(store: Store, entry: Entry) -> Backbone:
    """Open the backbone of an encode manifest. Raises BackboneError, StoreError or WeightsError."""
    if entry["kind"] == "clip":
        from pbe.model.clip import load_clip  # imported here: transformers takes seconds

        with stored_folder(store, str(entry["path"])) as folder:
            return load_clip(folder)
    return load_backbone(entry["kind"])
