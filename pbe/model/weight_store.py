"""Stores the frozen networks of a run by content, and opens them as the encode manifest says.

If `params.yaml` names weights, the encode stage copies them once to `<storage>/parts/weights/<part>-<sha256>`. From
then on every worker reads the copy, even if the original changes or disappears.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pbe.model.backbone import Backbone, load_backbone
from pbe.model.codec import Codec, codec_from_bytes
from pbe.model.tensors import folder_digest, weight_files_of
from pbe.store import Store

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


def open_backbone(store: Store, entry: Entry) -> Backbone:
    """Open the backbone of an encode manifest. Raises BackboneError, StoreError or WeightsError."""
    if entry["kind"] == "clip":
        from pbe.model.clip import load_clip  # imported here: transformers takes seconds

        with stored_folder(store, str(entry["path"])) as folder:
            return load_clip(folder)
    return load_backbone(entry["kind"])
