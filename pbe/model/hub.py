"""Finds weights named in params.yaml or on the command line: a local folder, or a model on the Hugging Face hub.

    /models/sd-v1-4                               a folder; a relative one is in the repository
    CompVis/stable-diffusion-v1-4@133a221b...     the hub, at a revision; downloaded once, to the hub's cache

A revision is required, because a name alone may mean other weights next year. Nothing is downloaded
at import or in a loop.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from pbe.errors import one_line
from pbe.model.tensors import WeightsError
from pbe.places import local_path

# the paper's initial weights
STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b"
OTHER_WEIGHTS = ["*.non_ema.*", "*.non_ema-*"]  # of the model before its running mean
PARTS = ("unet", "vae", "image_encoder", "text_encoder", "safety_checker")  # diffusers' parts that have weights
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def is_on_hub(name: str) -> bool:
    return not local_path(name).exists() and _HUB.fullmatch(name) is not None


def weights_folder(name: str, *, parts: Sequence[str]) -> Path:
    """The local folder of the named weights, downloaded from the hub if necessary.

    parts: the subfolders needed, "" for the folder itself; only these are downloaded. Raises WeightsError.
    """
    folder = local_path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise WeightsError(f"{name}: this is a file; convert it with `pbe import {name} --out FOLDER`")
    found = _HUB.fullmatch(name)
    if found is None:
        raise WeightsError(f"{name}: no such folder ({folder}); a model on the hub is written org/name@revision")
    try:
        return _download(found["repo"], found["revision"], parts)
    except RepositoryNotFoundError:
        raise WeightsError(f"{name}: the hub has no such model, or requires a login for it") from None
    except (HfHubHTTPError, OSError) as error:
        raise WeightsError(
            f"{name}: not in the hub's cache, and cannot be downloaded now ({one_line(error, 200)}); connect to the "
            "network and try again, or name a folder"
        ) from None


def _download(repo: str, revision: str, parts: Sequence[str]) -> Path:
    """Download safetensors; for parts without them pickles; for parts without either, copies in half precision."""
    for suffix in (".safetensors", ".bin", ".fp16*.safetensors", ".fp16*.bin"):
        wanted = ["*.json", *(f"{part}/*{suffix}".removeprefix("/") for part in parts)]
        if "tokenizer" in parts:
            wanted.append("*.txt")  # older ones have their merges or words in it
        # `*` also matches across subfolders, so exclude the unwanted ones
        unwanted = [f"{part}/*" for part in PARTS if part not in parts]
        unwanted += OTHER_WEIGHTS if suffix.startswith(".fp16") else [*OTHER_WEIGHTS, "*.fp16.*", "*.fp16-*"]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
        there = [part for part in parts if (folder / part / "config.json").is_file()]
        parts = [part for part in there or parts if not any((folder / part).glob(f"*{suffix}"))]
        if not parts:
            break
    return folder


def whole_model(name: str) -> Path:
    """The local folder of a whole diffusers model, with all that its pipeline loads, downloaded if necessary.

    Raises WeightsError.
    """
    if not is_on_hub(name):
        return weights_folder(name, parts=[])
    from diffusers import DiffusionPipeline  # imported here: it takes seconds

    found = _HUB.fullmatch(name)
    assert found is not None
    try:
        return Path(DiffusionPipeline.download(found["repo"], revision=found["revision"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise WeightsError(
            f"{name}: not in the hub's cache, and cannot be downloaded now ({one_line(error, 200)}); connect to the "
            "network and try again, or name a folder"
        ) from None


def part_folder(folder: Path, part: str) -> Path:
    """`folder/part` in the folder of a whole model; otherwise the folder itself, which is that part."""
    return folder / part if (folder / part / "config.json").is_file() else folder
