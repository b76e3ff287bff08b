"""Editor: the one public door to inference. `pbe edit`, the evaluate stage and your own code all use it.

    editor = Editor.load(Path("models/full"))
    edited, other = editor.edit(photo, hole_mask, reference, seed=7, n=2)

Differences from upstream's scripts/inference.py, on purpose: any photo size (the square around the hole is
edited and pasted back), pixels outside the hole are returned untouched, noise comes from one generator per item so
that an item's result does not depend on its batch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pbe.data import images
from pbe.data.boxes import Box
from pbe.data.rng import row_rng
from pbe.diffusion.sampling import forwards_per_step, sample
from pbe.diffusion.schedule import SamplerName, default_sampler, make_sampler
from pbe.encode import encode_masked, encode_references, to_images
from pbe.model.weights import Model, ModelError, load_model

DEFAULT_STEPS = 25
DEFAULT_SCALE = 3.0
CONTEXT_FACTOR = 1.6  # side of the edited square over the hole's longer side, when the photo has room


class Editor:
    def __init__(self, model: Model, device: torch.device) -> None:
        self.card = model.card
        self._device = device
        self._network = model.network.to(device).eval()
        self._codec, self._backbone = model.codec.to(device), model.backbone.to(device)

    @classmethod
    def load(cls, folder: Path, *, device: str | None = None) -> "Editor":
        """Open a model folder. device: default "cuda" when there is one, else "cpu". Raises ModelError."""
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_model(folder), torch.device(name))

    def edit(
        self,
        photo: np.ndarray,
        hole_mask: np.ndarray,
        reference: np.ndarray,
        *,
        seed: int,
        n: int = 1,
        guidance_scale: float = DEFAULT_SCALE,
        steps: int = DEFAULT_STEPS,
        sampler: SamplerName | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> list[np.ndarray]:
        """photo (H, W, 3) uint8; hole_mask (H, W), non-zero where the edit goes; reference any (h, w, 3) uint8.

        Returns n edits (H, W, 3) uint8, equal to `photo` outside the hole; edit k is the one of seed + k, drawn alone
        or with others. sampler: None for the one that the model names. on_step: called after every forward. Raises
        ValueError for an empty hole or shapes that do not fit.
        """
        if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
            raise ValueError(f"photo must be (H, W, 3) uint8, not {photo.shape} {photo.dtype}")
        if hole_mask.shape != photo.shape[:2]:
            raise ValueError(f"hole_mask is {hole_mask.shape}, the photo {photo.shape[:2]}: they must match")
        if n < 1:
            raise ValueError(f"n = {n}: at least one edit")
        if not hole_mask.any():
            raise ValueError("hole_mask is empty: nothing to edit")
        hole = (hole_mask != 0).astype(np.uint8)
        window = _window(hole)
        rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
        size_px = self.card.image_px
        source = images.resize(photo[rows, columns], width_px=size_px, height_px=size_px)
        # any cover counts: a cell that the model took for known would bring the old content back into the hole
        small_hole = images.resize(hole[rows, columns].astype(np.float32), width_px=size_px, height_px=size_px) > 0
        filled = self.edit_crops(
            np.repeat(source[None], n, axis=0),
            np.repeat(small_hole[None].astype(np.uint8), n, axis=0),
            [reference] * n,
            seeds=range(seed, seed + n),
            guidance_scale=guidance_scale,
            steps=steps,
            sampler=sampler,
            on_step=on_step,
        )
        edits = []
        for fill in filled:
            edit = photo.copy()
            grown = images.resize(fill, width_px=window.width_px, height_px=window.height_px)
            edit[rows, columns] = np.where(hole[rows, columns, None] > 0, grown, photo[rows, columns])
            edits.append(edit)
        return edits

    def edit_crops(
        self,
        sources: np.ndarray,
        hole_masks: np.ndarray,
        references: Sequence[np.ndarray],
        *,
        seeds: Sequence[int],
        guidance_scale: float,
        steps: int,
        sampler: SamplerName | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> np.ndarray:
        """A batch at the model's own size: sources (B, S, S, 3) uint8, hole_masks (B, S, S) of 0/1, 1 = hole.

        References are squashed to the size the encoder was trained on. Returns (B, S, S, 3) uint8 with the sources
        pasted back outside the holes.
        """
        size_px, reference_px = self.card.image_px, self.card.reference_px
        if sources.shape[1:] != (size_px, size_px, 3):
            raise ModelError(f"this model edits {size_px} x {size_px} crops, not {sources.shape[1:3]}")
        if steps < 1 or not np.isfinite(guidance_scale):
            raise ValueError(f"steps {steps}, guidance scale {guidance_scale}: at least one step, a finite scale")
        squashed = np.stack([images.resize(r, width_px=reference_px, height_px=reference_px) for r in references])
        tokens = encode_references(self._backbone, squashed, tokens=self.card.tokens, device=self._device)
        masked, keep = encode_masked(self._codec, sources, hole_masks, device=self._device)
        noise = [row_rng(seed, "edit").standard_normal(masked.mean.shape[1:], dtype=np.float32) for seed in seeds]
        copies = forwards_per_step(guidance_scale)
        drop = torch.arange(copies * len(sources), device=self._device) < (copies - 1) * len(sources)
        with torch.no_grad():
            context = self._network.exemplar(tokens.repeat(copies, 1, 1), drop)
        masked_latent, keep_mask = masked.mean.repeat(copies, 1, 1, 1), keep.repeat(copies, 1, 1, 1)
        latent = sample(
            lambda noisy, timestep: self._network.denoise(
                noisy, timestep, masked_latent=masked_latent, keep_mask_latent=keep_mask, context=context
            ),
            torch.from_numpy(np.stack(noise)).to(self._device),
            sampler=make_sampler(self.card.scheduler, sampler or default_sampler(self.card.scheduler)),
            steps=steps,
            guidance_scale=guidance_scale,
            project=self._codec.project,
            on_step=on_step,
        )
        return np.where(hole_masks[..., None] > 0, to_images(self._codec.decode(latent)), sources)


def _window(hole: np.ndarray) -> Box:
    """The square around the hole that is edited; the whole photo when no square holds the hole."""
    height_px, width_px = hole.shape
    ys, xs = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    x0, x1, y0, y1 = int(xs[0]), int(xs[-1]) + 1, int(ys[0]), int(ys[-1]) + 1
    longest = max(x1 - x0, y1 - y0)
    if longest > min(height_px, width_px):
        return Box(0, 0, width_px, height_px)
    side = min(round(longest * CONTEXT_FACTOR), height_px, width_px)
    left = min(max((x0 + x1 - side) // 2, 0), width_px - side)
    top = min(max((y0 + y1 - side) // 2, 0), height_px - side)
    return Box(left, top, left + side, top + side)
