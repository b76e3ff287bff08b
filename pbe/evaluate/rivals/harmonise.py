"""harmonise: the reference pasted into the hole, and its colours and light matched to the photo by a network of a file.

The network, such as DCCF or PCTNet, is called with a composite (1, 3, S, S) float32 RGB in 0..1 and a mask (1, 1, S, S)
float32, 1 where the reference lies, and returns an image (1, 3, S, S) in 0..1. S is the bench's own size,
materialize.image_px, and nothing is resized: a network of a fixed size resizes within the file. Its image fills the
hole; the photo stays elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbe.errors import one_line
from pbe.evaluate.bench.baselines import composite
from pbe.evaluate.rivals.fill import FillTask, RivalError, pasted
from pbe.model.network_file import Network
from pbe.model.precision import float32_products

_OVERSHOOT = 0.5  # beyond 0..1, where a network may overshoot a little: -1..1 or 0..255 lie further


class Harmonise:
    """A network of a file, as a Rival. name: the file, for messages."""

    reads_reference = True

    def __init__(self, network: Network, name: str, device: torch.device) -> None:
        self._network, self._name, self._device = network, name, device

    def __call__(self, tasks: Sequence[FillTask]) -> list[np.ndarray | None]:
        """Raises RivalError for a network that breaks the contract."""
        return [pasted(self._harmonised(task), task) for task in tasks]

    def _harmonised(self, task: FillTask) -> np.ndarray:
        picture, lies = composite(task.source, task.hole_mask, task.reference, task.object_mask)
        image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        mask = torch.from_numpy(lies)[None, None].float()
        given = f"a composite {tuple(image.shape)} and a mask {tuple(mask.shape)}"
        try:
            with torch.no_grad(), float32_products(tf32=False):
                found = self._network(image.to(self._device), mask.to(self._device))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # AssertionError: torch.export's guards
            raise RivalError(f"{self._name}: it fails on {given}: {one_line(error, 300)}") from error
        return self._levels(found, image, given)

    def _levels(self, found: Any, image: Tensor, given: str) -> np.ndarray:
        if not isinstance(found, Tensor) or found.shape != image.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RivalError(f"{self._name}: of {given} it makes {what}, expected an image {tuple(image.shape)}")
        low, high = found.min().item(), found.max().item()
        if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):  # NaN fails both
            raise RivalError(f"{self._name}: its image has values from {low:.3g} to {high:.3g}, expected 0 to 1")
        return (found[0].float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
