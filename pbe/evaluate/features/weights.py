"""The weights of a run's feature extractors, stored by content and opened by every worker.

An entry identifies an extractor by its kind and the digest of its weights. For weights that params.yaml names, it has
the path of their stored copy below the storage root; that path contains the digest.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pbe.errors import UserError
from pbe.evaluate.features.extractors import (
    EfficientNetExtractor,
    Extractor,
    load_inception_extractor,
)
from pbe.evaluate.features.lpips import Lpips, load_lpips, lpips_bytes, lpips_from_bytes
from pbe.evaluate.settings import (
    ClipExtractorConfig,
    DinoExtractorConfig,
    ExtractorConfig,
    InceptionExtractorConfig,
    LpipsConfig,
)
from pbe.model.backbone import load_backbone, weights_digest
from pbe.model.hub import is_on_hub, weights_folder
from pbe.model.tensors import WeightsError, weight_files
from pbe.model.weight_store import store_weights, stored_folder
from pbe.places import local_path
from pbe.store import Store

Entry = Mapping[str, Any]
CPU = torch.device("cpu")


class ExtractorError(UserError, ValueError):
    """An extractor's file is missing or differs from what params.yaml states."""


def store_extractor(store: Store, cfg: ExtractorConfig) -> Entry:
    """Copy the weights that params.yaml names to the storage once. Raises WeightsError, ExtractorError."""
    if isinstance(cfg, ClipExtractorConfig | DinoExtractorConfig):
        from pbe.model.folder import STEMS

        try:
            folder = weights_folder(cfg.weights, parts=[""])
        except WeightsError as error:
            raise ExtractorError(f"evaluate.extractors: {error}") from None
        return {"kind": cfg.kind, "path": store_weights(store, folder, cfg.kind, *STEMS)}
    if isinstance(cfg, InceptionExtractorConfig):
        return {"kind": "inception", "path": _store_inception(store, cfg), "sha256": cfg.sha256}
    return {"kind": cfg.kind, "digest": weights_digest(cfg.kind)}


def open_extractor(store: Store, entry: Entry, *, device: torch.device = CPU) -> Extractor:
    """Load an extractor onto `device`. Raises BackboneError, ExtractorError, StoreError or WeightsError."""
    if entry["kind"] == "clip":
        from pbe.evaluate.features.clip import load_clip_extractor

        with stored_folder(store, str(entry["path"])) as folder:
            return load_clip_extractor(folder, device=device)
    if entry["kind"] == "dino":
        from pbe.evaluate.features.dino import load_dino_extractor

        with stored_folder(store, str(entry["path"])) as folder:
            return load_dino_extractor(folder, device=device)
    if entry["kind"] == "inception":
        with tempfile.TemporaryDirectory(prefix="pbe-inception-") as local:
            file = Path(local) / "inception.pt"
            file.write_bytes(store.read_bytes(str(entry["path"])))
            return load_inception_extractor(file, sha256=str(entry["sha256"]), device=device)
    backbone = load_backbone(entry["kind"])
    if backbone.digest != entry["digest"]:
        raise ExtractorError(
            f"the weights of {entry['kind']} installed here are {backbone.digest}, the run was started with "
            f"{entry['digest']}; install the same packages on all nodes (requirements.lock)"
        )
    return EfficientNetExtractor(backbone.to(device))


def store_lpips(store: Store, cfg: LpipsConfig) -> Entry:
    """Write the weights of LPIPS to the storage once: one file of the two. Raises WeightsError, ExtractorError."""
    backbone, heads = (_weight_file(name, key) for key, name in (("backbone", cfg.backbone), ("heads", cfg.heads)))
    try:
        lpips = load_lpips(cfg.net, backbone, heads)
    except WeightsError as error:
        raise ExtractorError(f"evaluate.lpips: {error}") from None
    folder = f"parts/weights/lpips-{cfg.net}-{lpips.digest}"
    if not store.exists(f"{folder}/record.json"):
        store.write_bytes(f"{folder}/lpips.safetensors", lpips_bytes(lpips))
        store.write_bytes(f"{folder}/record.json", b'{"files": ["lpips.safetensors"]}')
    return {"kind": "lpips", "net": cfg.net, "digest": lpips.digest, "path": f"{folder}/lpips.safetensors"}


def open_lpips(store: Store, entry: Entry, *, device: torch.device = CPU) -> Lpips:
    """Load what `store_lpips` wrote onto `device`. Raises StoreError or WeightsError."""
    path = str(entry["path"])
    return lpips_from_bytes(store.read_bytes(path), entry["net"], store.full_uri(path)).to(device)


def _weight_file(name: str, key: str) -> Path:
    """The file that a setting names, or the one weight file of a folder or a model on the hub."""
    if not is_on_hub(name) and not local_path(name).is_dir():
        return local_path(name)  # reading it says what is wrong with it
    try:
        files = weight_files(weights_folder(name, parts=[""]), "model", "pytorch_model").files
    except WeightsError as error:
        raise ExtractorError(f"evaluate.lpips.{key}: {error}") from None
    if len(files) > 1:
        raise ExtractorError(f"evaluate.lpips.{key}: {name}: its weights are {len(files)} files; name one file")
    return files[0]


def _store_inception(store: Store, cfg: InceptionExtractorConfig) -> str:
    file = local_path(cfg.file)
    if not file.is_file():
        raise ExtractorError(f"evaluate.extractors: {file}: no such file; FID needs this TorchScript Inception")
    path = f"parts/weights/inception-{cfg.sha256[:16]}/inception.pt"
    if not store.exists(f"{path.rpartition('/')[0]}/record.json"):
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != cfg.sha256:
            raise ExtractorError(
                f"evaluate.extractors: {file}: its sha256 is {found}, params.yaml expects {cfg.sha256}"
            )
        store.copy_file_in(file, path)
        store.write_bytes(f"{path.rpartition('/')[0]}/record.json", b'{"files": ["inception.pt"]}')
    return path
