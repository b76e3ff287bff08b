"""What a rival is given and gives back. None sees what the hole hides, and all keep every pixel outside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pbe.data.images import resize
from pbe.errors import UserError
from pbe.evaluate.bench.baselines import HOLE_GREY, nearest_outside


class RivalError(UserError, ValueError):
    """A rival's model cannot be opened, or does not do what its kind needs; the message names its folder."""


@dataclass(frozen=True)
class FillTask:
    """One hole: source (S, S, 3) uint8; hole_mask (S, S) of 0/1, 1 = hole; reference, any (h, w, 3) uint8; the class of
    the item, "" if unknown; the seed of its noise; object_mask (h, w), non-zero where the reference shows its object.
    """

    source: np.ndarray
    hole_mask: np.ndarray
    reference: np.ndarray
    label_name: str
    seed: int
    object_mask: np.ndarray | None = None


class Rival(Protocol):
    """A model that fills holes. reads_reference: False if its fills depend on the class alone."""

    reads_reference: bool

    def __call__(self, tasks: Sequence[FillTask]) -> list[np.ndarray | None]:
        """One edit (S, S, 3) uint8 per task; None where the model's own safety checker withheld it."""
        ...


def without_answer(source: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8: the photo with the nearest known colour in the hole, grey if nothing is known.

    A codec's cells at the hole's rim would otherwise carry what the hole hides.
    """
    hole = hole_mask != 0
    return np.full_like(source, HOLE_GREY) if hole.all() else nearest_outside(source, hole)


def sized(task: FillTask, side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The photo without the answer and the hole mask, as squares of side_px; a pixel with any hole in it is hole."""
    source = without_answer(task.source, task.hole_mask)
    if side_px == source.shape[0]:
        return source, (task.hole_mask != 0).astype(np.uint8)
    cover = resize((task.hole_mask != 0).astype(np.float32), width_px=side_px, height_px=side_px)
    return resize(source, width_px=side_px, height_px=side_px), (cover > 0).astype(np.uint8)


def whole_cells(hole_mask: np.ndarray, cell_px: int) -> np.ndarray:
    """(S, S) uint8 of 0/1: the hole of all latent cells with any hole in them."""
    cells = hole_mask.shape[0] // cell_px
    hole = hole_mask.reshape(cells, cell_px, cells, cell_px).max((1, 3))
    return np.kron(hole, np.ones((cell_px, cell_px), np.uint8))


def pasted(fill: np.ndarray, task: FillTask) -> np.ndarray:
    """(S, S, 3) uint8: the fill (h, w, 3) uint8, resized to the photo, in the hole; the photo elsewhere."""
    height_px, width_px = task.source.shape[:2]
    fill = fill if fill.shape == task.source.shape else resize(fill, width_px=width_px, height_px=height_px)
    return np.where(task.hole_mask[..., None] != 0, fill, task.source)
