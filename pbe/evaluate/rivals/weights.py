"""The weights of rivals, stored by content and opened by every worker."""

from collections.abc import Mapping
from pathlib import Path

import torch

from pbe.errors import UserError
from pbe.evaluate.features.clip import ClipExtractor, load_clip_extractor
from pbe.evaluate.rivals.fill import Rival, RivalError
from pbe.evaluate.settings import BlendedImageBaseline, ByDiffusion, ByModel, DiffusersBaseline, HarmoniseBaseline
from pbe.model.folder import STEMS
from pbe.model.hub import weights_folder, whole_model
from pbe.model.network_file import open_network, store_network
from pbe.model.weight_store import store_weights, store_whole_model, stored_folder
from pbe.places import local_path
from pbe.store import Store

Weights = Mapping[str, str]  # by setting, the path of its stored copy below the storage root, which has its digest


def store_rival(store: Store, cfg: ByModel) -> Weights:
    """Copy the weights that a baseline names to the storage once. Raises RivalError, WeightsError."""
    if isinstance(cfg, HarmoniseBaseline):
        return {"network": store_network(store, local_path(cfg.file), sha256=cfg.sha256)}
    if isinstance(cfg, DiffusersBaseline):
        from pbe.evaluate.rivals.pipelines import quiet

        quiet()
        from pbe.evaluate.rivals.reference_inpaint import reference_pipeline

        reference_pipeline(cfg.pipeline)  # its name may be wrong: before anything is downloaded
    weights = {"model": store_whole_model(store, whole_model(cfg.model))}
    if isinstance(cfg, BlendedImageBaseline) and cfg.clip is not None:
        weights["clip"] = store_guide(store, cfg.clip)
    return weights


def store_guide(store: Store, name: str) -> str:
    """Copy a CLIP to the storage once; return its path there. Raises WeightsError."""
    return store_weights(store, weights_folder(name, parts=[""]), "clip", *STEMS)


def open_rival(store: Store, cfg: ByModel, weights: Weights, device: torch.device) -> Rival:
    """Load a rival onto `device`. Raises RivalError, StoreError, WeightsError."""
    if isinstance(cfg, HarmoniseBaseline):
        from pbe.evaluate.rivals.harmonise import Harmonise

        data = store.read_bytes(weights["network"])
        return Harmonise(open_network(data, where=cfg.file, sha256=cfg.sha256, device=device), cfg.file, device)
    guide = _guide(store, weights, device)
    with stored_folder(store, weights["model"]) as folder:
        try:
            return _opened(folder, cfg, guide, device)
        except UserError as error:  # the folder that the user named says more than its copy
            raise RivalError(str(error).replace(str(folder), cfg.model)) from error


def _opened(folder: Path, cfg: ByDiffusion, guide: ClipExtractor | None, device: torch.device) -> Rival:
    # imported here: diffusers takes seconds
    from pbe.evaluate.rivals.pipelines import quiet

    quiet()
    if isinstance(cfg, BlendedImageBaseline):
        from pbe.evaluate.rivals.blended_image import BlendedImage, open_unconditional

        return BlendedImage(open_unconditional(folder, device), guide, cfg, device)
    if isinstance(cfg, DiffusersBaseline):
        from pbe.evaluate.rivals.reference_inpaint import ReferenceInpaint

        return ReferenceInpaint(folder, cfg, device)
    from pbe.evaluate.rivals.inpaint import Inpaint

    return Inpaint(folder, cfg, device)


def _guide(store: Store, weights: Weights, device: torch.device) -> ClipExtractor | None:
    if "clip" not in weights:
        return None
    with stored_folder(store, weights["clip"]) as folder:
        return load_clip_extractor(folder, device=device)
