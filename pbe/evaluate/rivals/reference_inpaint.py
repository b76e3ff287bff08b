"""diffusers: a pipeline of the installed diffusers that takes image, mask_image and image_reference.

Such are the inpainting pipelines of Flux Kontext and Flux.2 klein. Unlike by hand, the photo is given without what the
hole hides, because these models also read it as a reference, and is put back outside the hole.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from pbe.evaluate.rivals.fill import FillTask, RivalError, pasted, without_answer
from pbe.evaluate.rivals.pipelines import generators, levels, open_pipeline, pillow
from pbe.evaluate.settings import DiffusersBaseline
from pbe.model.precision import float32_products

PICTURES = ("image", "mask_image", "image_reference")


def reference_pipeline(name: str) -> Any:
    """The named class of diffusers. Raises RivalError, with those that there are, for one that takes no reference."""
    if name in dir(diffusers) and takes_reference(name):
        return getattr(diffusers, name)
    problem = f"takes no {' or no '.join(PICTURES)}" if name in dir(diffusers) else "is not in it"
    usable = [other for other in dir(diffusers) if "Inpaint" in other and takes_reference(other)]
    raise RivalError(
        f"kind diffusers: pipeline {name}: diffusers {diffusers.__version__}: {problem}; usable are {', '.join(usable)}"
    )


def takes_reference(name: str) -> bool:
    """Whether a name in diffusers is a pipeline whose call takes PICTURES."""
    found = getattr(diffusers, name)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        return False
    return set(PICTURES) <= inspect.signature(found.__call__).parameters.keys()


class ReferenceInpaint:
    """The pipeline of a folder, as a Rival."""

    reads_reference = True

    def __init__(self, folder: Path, cfg: DiffusersBaseline, device: torch.device) -> None:
        """Raises RivalError."""
        self._pipeline = open_pipeline(reference_pipeline(cfg.pipeline), folder, device, cfg.dtype)
        self._cfg = cfg
        own = {"strength": cfg.strength, "guidance_scale": cfg.guidance_scale}
        known = inspect.signature(self._pipeline.__call__).parameters
        self._settings = {key: value for key, value in own.items() if key in known and value is not None}

    def __call__(self, tasks: Sequence[FillTask]) -> list[np.ndarray | None]:
        return [self._one(task) for task in tasks]  # their batches share one reference

    def _one(self, task: FillTask) -> np.ndarray | None:
        with float32_products(tf32=self._cfg.dtype == "tf32"):
            result = self._pipeline(
                prompt=self._cfg.prompt.format(label_name=task.label_name),
                image=pillow(without_answer(task.source, task.hole_mask)),
                mask_image=pillow((task.hole_mask != 0).astype(np.uint8) * np.uint8(255)),
                image_reference=pillow(task.reference),
                num_inference_steps=self._cfg.steps,
                generator=generators([task])[0],
                output_type="np",
                **self._settings,
            )
        withheld = getattr(result, "nsfw_content_detected", None) or [False]
        return None if withheld[0] else pasted(levels(result.images[0]), task)
