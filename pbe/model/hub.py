"""Weights named in params.yaml or on the command line: a folder here, or a model on the Hugging Face hub.

    /models/sd-v1-4                               a folder; relative to the repository
    CompVis/stable-diffusion-v1-4@133a221b...     the hub, at a revision; downloaded once, to the hub's own cache

A revision must be given: a name alone would be other weights next year. Nothing is downloaded at import or in a loop.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from pbe.model.tensors import WeightsError
from pbe.places import repo_root

# what the paper starts from
STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b"
OTHER_PRECISION = ("*.fp16.*", "*.non_ema.*")
PARTS = ("unet", "vae", "image_encoder", "text_encoder", "safety_checker")  # of diffusers' layout, those with weights
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def is_on_hub(name: str) -> bool:
    return not _folder(name).exists() and _HUB.fullmatch(name) is not None


def weights_folder(name: str, *, parts: Sequence[str]) -> Path:
    """The folder of the named weights. parts: its subfolders that may hold what is needed, "" the folder itself; of a
    hub model only they are downloaded. Raises WeightsError."""
    folder = _folder(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise WeightsError(f"{name}: is a file; `pbe import {name} --out FOLDER` makes a folder of it")
    found = _HUB.fullmatch(name)
    if found is None:
        raise WeightsError(
            f"{name}: no such folder ({folder}), and no name on the hub either, which is written org/name@revision"
        )
    try:
        return _download(found["repo"], found["revision"], parts)
    except RepositoryNotFoundError:
        raise WeightsError(f"{name}: the hub has no such model, or does not show it without a login") from None
    except (HfHubHTTPError, OSError) as error:
        raise WeightsError(
            f"{name}: not in the hub's cache and not to be had now ({' '.join(str(error).split())[:200]}); name a "
            "folder instead, or try again with a network"
        ) from None


def _download(repo: str, revision: str, parts: Sequence[str]) -> Path:
    """Safetensors, or pickles where a part has none of them: a model usually has both, and others in half precision."""
    for suffix in (".safetensors", ".bin"):
        wanted = ["*.json", *(f"{part}/*{suffix}".removeprefix("/") for part in parts)]
        # a pattern's * reaches into subfolders, so those that are not wanted are named
        unwanted = [*OTHER_PRECISION, *(f"{part}/*" for part in PARTS if part not in parts)]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
        there = [folder / part for part in parts if (folder / part / "config.json").is_file()]
        if there and all(any(part.glob(f"*{suffix}")) for part in there):
            break
    return folder


def part_folder(folder: Path, part: str) -> Path:
    """`folder/part` of a whole model's folder, or the folder itself where it is that part."""
    return folder / part if (folder / part / "config.json").is_file() else folder


def _folder(name: str) -> Path:
    return repo_root() / Path(name).expanduser()
