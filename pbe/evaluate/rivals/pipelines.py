"""Opens diffusers' pipelines, and converts what they take and give."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from pbe.errors import one_line
from pbe.evaluate.rivals.fill import FillTask, RivalError
from pbe.model.precision import TORCH_DTYPES
from pbe.model.settings import EditDtype
from pbe.model.tensors import WeightsError, read_json, refuse_non_finite, some_names

LOADING_ERRORS = (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError)


def quiet() -> None:
    """Turn off the libraries' progress bars and warnings in this process: errors are raised, withheld edits counted."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def open_pipeline(pipeline_class: Any, folder: Path, device: torch.device, dtype: EditDtype) -> Any:
    """A diffusers pipeline of a local folder, on `device`. No code of the folder runs.

    Networks are loaded one by one, because a pipeline would fill a missing tensor with random numbers and only warn.
    Raises RivalError, WeightsError.
    """
    try:
        index = read_json(folder / "model_index.json")
        networks = {
            part: _network(folder / part, network_class, TORCH_DTYPES[dtype])
            for part, entry in index.items()
            if (network_class := _network_class(entry)) is not None
        }
        pipeline = pipeline_class.from_pretrained(folder, **networks, dtype=TORCH_DTYPES[dtype], local_files_only=True)
    except (RivalError, WeightsError):
        raise
    except LOADING_ERRORS as error:
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise RivalError(f"{folder}: {pipeline_class.__name__} cannot open it ({reason})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _network_class(entry: Any) -> Any:
    """The class that an entry [library, name] of model_index.json names, if it is a network of one of the libraries."""
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
        return None
    library, name = entry
    known = {"diffusers": diffusers, "transformers": transformers}
    module = known.get(library) or importlib.import_module(f"diffusers.pipelines.{library}")
    found = getattr(module, name, None)  # a tokenizer's class may have been renamed; the pipeline knows
    return found if isinstance(found, type) and issubclass(found, torch.nn.Module) else None


def _network(folder: Path, network_class: Any, dtype: torch.dtype) -> torch.nn.Module:
    network, found = network_class.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    missing = [str(name) for name in (*found["missing_keys"], *found["mismatched_keys"])]
    if missing:
        raise RivalError(f"{folder}: {len(missing)} tensors are missing or misshapen, such as {some_names(missing)}")
    refuse_non_finite(network.state_dict(), str(folder))
    return network.eval().requires_grad_(False)


def pillow(picture: np.ndarray) -> Image.Image:
    """(H, W, 3) or (H, W) uint8 as a PIL picture, which diffusers takes."""
    return Image.fromarray(picture)


def generators(tasks: Sequence[FillTask]) -> list[torch.Generator]:
    """A generator per task, on the CPU, so that all devices draw the same."""
    return [torch.Generator().manual_seed(task.seed) for task in tasks]


def levels(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) float in 0..1 to uint8. Raises RivalError for NaN, which would become black pixels."""
    if not np.isfinite(picture).all():
        raise RivalError("the model gives NaN or infinite values: its weights are damaged, or set dtype: float32")
    return np.rint(picture * 255).astype(np.uint8)
