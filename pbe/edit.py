"""Editor, the only public entry to inference. `pbe edit`, the evaluate stage and your own code all use it.

    editor = Editor.load("models/full")
    edited, other = editor.edit(photo, hole_mask, reference, seed=7, n=2)

Deliberate differences from upstream's scripts/inference.py: the square around the hole is edited and pasted back;
pixels outside the hole stay unchanged; each item has its own noise generator, so that its result does not depend on
its batch. By the protocols `UPSTREAM` and `DIFFUSERS` a photo of the model's size is edited as upstream's scripts and
diffusers' pipeline do, apart from that generator and from upstream's float16. A photo of another size, which both leave
to their user, is squashed to the model's square by Pillow, and its edit resized back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

from pbe.data import images
from pbe.data.boxes import Box, context_side_px
from pbe.data.images import Resampling
from pbe.data.masks import MaskResize
from pbe.data.rng import row_rng
from pbe.diffusion.sampling import Condition, Sampling, sample
from pbe.encode import Levels, encode_masked, encode_references, to_device, to_images
from pbe.errors import UserError
from pbe.model.hub import is_on_hub, weights_folder
from pbe.model.precision import float32_products
from pbe.model.settings import Precision
from pbe.model.weights import Model, ModelError, load_model

DEFAULT_SAMPLING = Sampling()
CONTEXT_FACTOR = 1.6  # by default: side of the edited square / longer side of the hole, if the photo has room
BATCH_ROWS = 8  # edits per forward
PAD_GREY = 128
HOLE_LEVEL = 128  # of a mask's 0 to 255; what is less is kept

Fit = Literal["squash", "pad", "crop"]
OnStep = Callable[[], object]


@dataclass(frozen=True)
class EditProtocol:
    """How inputs and outputs are processed before and after the network."""

    area: Literal["window", "photo"] = "window"  # what is edited: the square around the hole, or the squashed photo
    paste_back: bool = True  # keep pixels outside the hole; False: all that the codec decodes replaces the photo
    feather_frac: float = 0.01  # width of the blend inside the hole's edge / side of the square
    resampling: Resampling = "bilinear"  # of photo and reference: as in training, or Pillow's bicubic
    reference_fit: Fit = "squash"  # how references become the encoder's square
    masked_latent: Literal["mean", "sample"] = "mean"  # of the codec's posterior
    mask_resize: MaskResize = "bilinear"  # to latent cells
    timesteps: Literal["asked", "upstream"] = "asked"  # upstream: more than asked where steps do not divide 1000
    levels: Levels = "nearest"  # decoded values to whole levels


OURS = EditProtocol()
_SCRIPT = EditProtocol(area="photo", paste_back=False, resampling="bicubic", masked_latent="sample")
UPSTREAM = replace(_SCRIPT, timesteps="upstream", levels="below")  # scripts/inference.py, inference_test_bench.py
DIFFUSERS = replace(_SCRIPT, reference_fit="crop", mask_resize="nearest")  # PaintByExamplePipeline


@dataclass(frozen=True)
class EditTask:
    """One edit: photo (H, W, 3) uint8; hole_mask (H, W), non-zero in the hole; reference, any (h, w, 3) uint8."""

    photo: np.ndarray
    hole_mask: np.ndarray
    reference: np.ndarray
    seed: int


class NonFiniteEditError(UserError, FloatingPointError):
    """The network's result has NaN or infinite values, which would become black pixels."""


@dataclass(frozen=True)
class _Cut:
    """The part of a photo that is edited, resized to the model's square."""

    window: Box  # in the photo
    source: np.ndarray  # (S, S, 3) uint8
    hole_mask: np.ndarray  # (S, S) of 0/1


class Editor:
    """Edits photos with one model on one device."""

    def __init__(
        self, model: Model, device: torch.device, *, precision: Precision = "fp32", compile_unet: bool = False
    ) -> None:
        """Takes ownership of the model: its networks are moved to `device` and converted to `precision`."""
        self.card = model.card
        self._device, self._precision = device, precision
        self._network = model.network.to(device).eval()
        self._codec, self._backbone = model.codec.to(device), model.backbone.to(device)
        if precision == "bf16":
            self._codec, self._backbone = self._codec.bfloat16(), self._backbone.bfloat16()
            for parameter in self._network.parameters():  # not buffers: features are standardised in float32
                parameter.data = parameter.data.bfloat16()
        if compile_unet:
            self._network.unet.compile()

    @classmethod
    def load(
        cls,
        model: Path | str,
        *,
        device: str | None = None,
        precision: Precision = "fp32",
        compile_unet: bool = False,
    ) -> "Editor":
        """Open a model folder, or org/name@revision on the hub.

        device: "cuda" by default if available, else "cpu". precision: pbe/model/precision.py; upstream's scripts
        compute in float16 by autocast. compile_unet: torch.compile, which takes minutes at the first edit and again
        if the number of edits per forward or their size changes. Raises ModelError, WeightsError.
        """
        parts = ["unet", "vae", "image_encoder", "scheduler"]
        on_hub = not Path(model).exists() and is_on_hub(str(model))
        folder = weights_folder(str(model), parts=parts) if on_hub else Path(model)
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_model(folder), torch.device(name), precision=precision, compile_unet=compile_unet)

    def edit(
        self,
        photo: np.ndarray,
        hole_mask: np.ndarray,
        reference: np.ndarray,
        *,
        seed: int,
        n: int = 1,
        sampling: Sampling = DEFAULT_SAMPLING,
        size_px: int | None = None,
        context_factor: float | None = None,
        protocol: EditProtocol = OURS,
        on_step: OnStep | None = None,
    ) -> list[np.ndarray]:
        """n edits (H, W, 3) uint8 of one photo. Edit k uses seed + k and is the same for any n.

        photo (H, W, 3) uint8; hole_mask (H, W), non-zero in the hole; reference (h, w, 3) uint8. size_px: side at which
        the network works; None: the model's own. context_factor: how much around the hole the network sees; see
        `edit_batch`. on_step: called after every forward. Raises ValueError for n < 1, and the errors of `edit_batch`.
        """
        if n < 1:
            raise ValueError(f"n = {n}: must be at least 1")
        return self.edit_batch(
            [EditTask(photo, hole_mask, reference, seed + k) for k in range(n)],
            sampling=sampling,
            size_px=size_px,
            context_factor=context_factor,
            protocol=protocol,
            on_step=on_step,
        )

    def edit_batch(
        self,
        tasks: Sequence[EditTask],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        size_px: int | None = None,
        context_factor: float | None = None,
        protocol: EditProtocol = OURS,
        on_step: OnStep | None = None,
    ) -> list[np.ndarray]:
        """One edit (H, W, 3) uint8 per task, BATCH_ROWS at a time; photos may differ in size.

        With `protocol.paste_back` an edit equals its photo outside the hole. size_px: side at which the network works;
        None: the model's own. context_factor: side of the edited square / longer side of the box around all holes, from
        1, which leaves a rim of one pixel, to inf, the largest square of the photo; None: CONTEXT_FACTOR. on_step:
        called after every forward of BATCH_ROWS tasks; PLMS does one more than its steps. Raises ValueError if a hole
        is empty or the whole photo, if shapes do not match, or for a context_factor below 1 or with a protocol that
        edits the whole photo; SamplerError, NonFiniteEditError.
        """
        side = self.card.image_px if size_px is None else size_px
        self._check_size(side)
        _check_context(context_factor, protocol)
        for task in tasks:
            _check_task(task)
        factor = CONTEXT_FACTOR if context_factor is None else context_factor
        all_cuts = _cuts(tasks, side, factor, protocol)
        edits = []
        for start in range(0, len(tasks), BATCH_ROWS):
            batch, cuts = tasks[start : start + BATCH_ROWS], all_cuts[start : start + BATCH_ROWS]
            fills = self._fill(
                np.stack([cut.source for cut in cuts]),
                np.stack([cut.hole_mask for cut in cuts]),
                [task.reference for task in batch],
                seeds=[task.seed for task in batch],
                sampling=sampling,
                protocol=protocol,
                on_step=on_step,
            )
            edits += [_pasted(*item, protocol) for item in zip(batch, cuts, fills, strict=True)]
        return edits

    def edit_crops(
        self,
        sources: np.ndarray,
        hole_masks: np.ndarray,
        references: Sequence[np.ndarray],
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        protocol: EditProtocol = OURS,
    ) -> np.ndarray:
        """Edit crops at the model's own size: sources (B, S, S, 3) uint8, hole_masks (B, S, S) of 0/1, 1 = hole.

        Returns (B, S, S, 3) uint8. With `protocol.paste_back` the hole has a hard edge. Raises ModelError for another
        size.
        """
        if sources.shape[1:] != (self.card.image_px, self.card.image_px, 3):
            raise ModelError(
                f"this model edits {self.card.image_px} x {self.card.image_px} crops, not {sources.shape[1:3]}"
            )
        fills = self._fill(
            sources,
            hole_masks,
            references,
            seeds=seeds,
            sampling=sampling,
            protocol=protocol,
            on_step=None,
        )
        return np.where(hole_masks[..., None] > 0, fills, sources) if protocol.paste_back else fills

    def _fill(
        self,
        sources: np.ndarray,
        hole_masks: np.ndarray,
        references: Sequence[np.ndarray],
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        protocol: EditProtocol,
        on_step: OnStep | None,
    ) -> np.ndarray:
        """The decoded squares (B, S, S, 3) uint8, before pasting back. Waits for the device once, at its end."""
        with float32_products(tf32=self._precision == "tf32"):
            side = self.card.reference_px
            fitted = np.stack([_fitted(reference, side, protocol) for reference in references])
            tokens = encode_references(self._backbone, fitted, tokens=self.card.tokens, device=self._device)
            masked, keep = encode_masked(
                self._codec, sources, hole_masks, mask_resize=protocol.mask_resize, device=self._device
            )
            shape = masked.mean.shape[1:]
            masked_latent = masked.mean
            if protocol.masked_latent == "sample":
                masked_latent = masked.mean + masked.std * self._noise(seeds, "masked photo", shape)
            dtype = self._network.unet.dtype
            given = Condition.of_rows(masked_latent, keep, tokens, sampling=sampling, dtype=dtype)
            with torch.no_grad():
                context = self._network.exemplar(given.exemplar_tokens, given.drop_condition)
            finite = torch.ones((), dtype=torch.bool, device=self._device)  # read once, at the end

            def denoise(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                prediction = self._network.denoise(
                    noisy.to(dtype),
                    timestep,
                    masked_latent=given.masked_latent,
                    keep_mask_latent=given.keep_mask_latent,
                    context=context,
                ).float()
                finite.logical_and_(prediction.isfinite().all())
                return prediction

            latent = sample(
                denoise,
                self._noise(seeds, "edit", shape),
                scheduler=self.card.scheduler,
                sampling=sampling,
                upstream_timesteps=protocol.timesteps == "upstream",
                project=self._codec.project,
                on_step=on_step,
            )
            pixels = self._codec.decode(latent)
            finite.logical_and_(pixels.isfinite().all())
            edited = to_images(pixels, levels=protocol.levels)
        if not finite:
            narrow = "" if self._precision == "fp32" else f", or {self._precision} is too narrow for it: try fp32"
            raise NonFiniteEditError(
                f"the model gives NaN or infinite values (seeds {', '.join(map(str, seeds))}); its weights are damaged"
                f"{narrow}"
            )
        return edited

    def _noise(self, seeds: Sequence[int], purpose: str, shape: Sequence[int]) -> torch.Tensor:
        """Noise (B, *shape), each row from its own seed; drawn on the CPU, so that all devices get the same."""
        rows = [row_rng(seed, purpose).standard_normal(shape, dtype=np.float32) for seed in seeds]
        return to_device(torch.from_numpy(np.stack(rows)), self._device)

    def _check_size(self, side_px: int) -> None:
        levels = len(self._network.unet.config.block_out_channels)
        multiple = self._codec.patch_px * 2 ** (levels - 1)
        if side_px < multiple or side_px % multiple:
            raise ValueError(f"size {side_px} px: this model needs a multiple of {multiple} px")


def _check_context(context_factor: float | None, protocol: EditProtocol) -> None:
    if context_factor is None:
        return
    if not context_factor >= 1:  # also NaN
        raise ValueError(f"context_factor {context_factor:g}: must be 1 or more; the default is {CONTEXT_FACTOR}")
    if protocol.area == "photo":
        raise ValueError(
            f"context_factor {context_factor:g}: this protocol edits the whole photo, not a square around the hole; "
            "leave one of the two out"
        )


def _check_task(task: EditTask) -> None:
    photo, hole_mask = task.photo, task.hole_mask
    for name, picture in (("photo", photo), ("reference", task.reference)):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
            raise ValueError(f"{name} must be (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    if hole_mask.shape != photo.shape[:2]:
        raise ValueError(f"hole_mask is {hole_mask.shape}, the photo {photo.shape[:2]}: the sizes must match")
    if not hole_mask.any():
        raise ValueError("hole_mask is empty: nothing to edit")
    if hole_mask.all():
        raise ValueError("hole_mask covers the whole photo, so there is no context for the edit; is it inverted?")


def _cuts(tasks: Sequence[EditTask], side_px: int, context_factor: float, protocol: EditProtocol) -> list[_Cut]:
    """The cut of each task; tasks that share a photo and a hole share the cut."""
    made: dict[tuple[int, int], _Cut] = {}
    for task in tasks:
        key = id(task.photo), id(task.hole_mask)
        if key not in made:
            made[key] = _cut(task.photo, task.hole_mask, side_px, context_factor, protocol)
    return [made[id(task.photo), id(task.hole_mask)] for task in tasks]


def _cut(photo: np.ndarray, hole_mask: np.ndarray, side_px: int, context_factor: float, protocol: EditProtocol) -> _Cut:
    height_px, width_px = hole_mask.shape
    window = Box(0, 0, width_px, height_px) if protocol.area == "photo" else _window(hole_mask, context_factor)
    rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
    source = _resized(photo[rows, columns], side_px, side_px, protocol)
    hole = hole_mask[rows, columns] != 0
    if protocol.area == "photo":  # as masks are resized for both: the picture by Pillow, its middle grey splits it
        level = images.resize_antialiased(
            np.where(hole, np.uint8(255), np.uint8(0)), width_px=side_px, height_px=side_px, resampling="bicubic"
        )
        if level.max() < HOLE_LEVEL:
            raise ValueError(f"hole_mask vanishes where the photo becomes {side_px} x {side_px} px; enlarge the hole")
        return _Cut(window, source, (level >= HOLE_LEVEL).astype(np.uint8))
    # a pixel with any hole in it is hole: if the model saw it as known, hidden content would return
    cover = images.resize(hole.astype(np.float32), width_px=side_px, height_px=side_px)
    return _Cut(window, source, (cover > 0).astype(np.uint8))


def _resized(picture: np.ndarray, width_px: int, height_px: int, protocol: EditProtocol) -> np.ndarray:
    if protocol.resampling == "bilinear":
        return images.resize(picture, width_px=width_px, height_px=height_px)
    return images.resize_antialiased(picture, width_px=width_px, height_px=height_px, resampling="bicubic")


def _pasted(task: EditTask, cut: _Cut, fill: np.ndarray, protocol: EditProtocol) -> np.ndarray:
    window = cut.window
    rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
    grown = _resized(fill, window.width_px, window.height_px, protocol)
    edit = task.photo.copy()
    if protocol.paste_back:
        hole = (task.hole_mask[rows, columns] != 0).astype(np.uint8)
        _feather(grown, edit[rows, columns], hole, round(protocol.feather_frac * max(hole.shape)))
        edit[rows, columns][hole > 0] = grown[hole > 0]
    else:
        edit[rows, columns] = grown
    return edit


def _feather(fill: np.ndarray, photo: np.ndarray, hole: np.ndarray, feather_px: int) -> None:
    """Inside the hole's edge, blend the fill in place with the colour of the nearest known pixel.

    Never with the hidden pixels, which must not reappear.
    """
    if not feather_px or hole.all():
        return
    distance, nearest = cv2.distanceTransformWithLabels(hole, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    known, ring = hole == 0, (hole > 0) & (distance <= feather_px)
    colours = np.zeros((int(nearest.max()) + 1, 3), np.uint8)
    colours[nearest[known]] = photo[known]
    weight = (distance[ring] / (feather_px + 1))[:, None]
    fill[ring] = np.round(weight * fill[ring] + (1 - weight) * colours[nearest[ring]]).astype(np.uint8)


def _fitted(reference: np.ndarray, side_px: int, protocol: EditProtocol) -> np.ndarray:
    """The reference as (side, side, 3): squashed, as upstream; padded with grey; or centre-cropped, as in diffusers."""
    height_px, width_px = reference.shape[:2]
    if protocol.reference_fit == "squash":
        return _resized(reference, side_px, side_px, protocol)
    if protocol.reference_fit == "crop" and protocol.resampling == "bicubic":
        return images.centre_square(reference, side_px, resampling="bicubic", odd="down")
    if protocol.reference_fit == "crop":  # crop first: resizing a whole narrow strip would make it enormous
        side = min(height_px, width_px)
        top, left = (height_px - side) // 2, (width_px - side) // 2
        return images.resize(reference[top : top + side, left : left + side], width_px=side_px, height_px=side_px)
    scale = side_px / max(height_px, width_px)
    high, wide = max(1, round(scale * height_px)), max(1, round(scale * width_px))
    out = np.full((side_px, side_px, 3), PAD_GREY, np.uint8)
    top, left = (side_px - high) // 2, (side_px - wide) // 2
    out[top : top + high, left : left + wide] = _resized(reference, wide, high, protocol)
    return out


def _window(hole_mask: np.ndarray, context_factor: float) -> Box:
    """The square to edit around all of the hole (H, W); the whole photo if no square holds it with a known pixel."""
    height_px, width_px = hole_mask.shape
    ys, xs = np.flatnonzero(hole_mask.any(axis=1)), np.flatnonzero(hole_mask.any(axis=0))
    hole = Box(int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
    side = context_side_px(hole, context_factor, width_px=width_px, height_px=height_px)
    left = min(max((hole.x0 + hole.x1 - side) // 2, 0), width_px - side)
    top = min(max((hole.y0 + hole.y1 - side) // 2, 0), height_px - side)
    window = Box(left, top, left + side, top + side)
    known = not hole_mask[window.y0 : window.y1, window.x0 : window.x1].all()
    return window if known and window.contains(hole) else Box(0, 0, width_px, height_px)
