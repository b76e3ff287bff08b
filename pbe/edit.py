"""Editor, the only public entry to inference. `pbe edit`, the evaluate stage and your own code all use it.

    editor = Editor.load("models/full")
    edited, other = editor.edit(photo, hole_mask, reference, seed=7, n=2)
    [edited] = Editor.load("models/text").edit(photo, hole_mask, "a photo of a red car", seed=7)

Deliberate differences from upstream's scripts/inference.py: the square around the hole is edited and pasted back;
pixels outside the hole stay unchanged; each item has its own noise generator, so that its result does not depend on
its batch. By the protocols `UPSTREAM` and `DIFFUSERS` a photo of the model's size is edited as upstream's scripts and
diffusers' pipeline do, apart from that generator and from upstream's float16. A photo of another size, which both leave
to their user, is squashed to the model's square by Pillow, and its edit resized back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pbe.data.rng import row_rng
from pbe.diffusion.sampling import Condition, Sampling, sample
from pbe.encode import encode_masked, encode_references, to_device, to_images
from pbe.errors import UserError
from pbe.model.adapter import AdapterError, load_adapted, read_adapter
from pbe.model.folder import ModelError, is_adapter
from pbe.model.hub import is_on_hub, weights_folder
from pbe.model.precision import TORCH_DTYPES, default_dtype, float32_products
from pbe.model.settings import EditDtype
from pbe.model.text import PARTS as TEXT_PARTS
from pbe.model.text import TextEncoder
from pbe.model.weights import Model, load_model
from pbe.protocol import CONTEXT_FACTOR, OURS, Cut, EditProtocol, cut, fit_reference, paste

BATCH_ROWS = 8  # edits per forward
GREY = 128  # of the photo that `warm` edits

OnStep = Callable[[], object]
Reference = np.ndarray | str  # any (h, w, 3) uint8; for a model whose card says condition: text, a caption


@dataclass(frozen=True)
class EditTask:
    """One edit: photo (H, W, 3) uint8; hole_mask (H, W), non-zero in the hole; reference, a picture or a caption."""

    photo: np.ndarray
    hole_mask: np.ndarray
    reference: Reference
    seed: int


class ReferenceKindError(UserError, TypeError):
    """A caption for a model that reads pictures, or a picture for one that reads captions."""


class NonFiniteEditError(UserError, FloatingPointError):
    """The network's result has NaN or infinite values, which would become black pixels."""


def model_folder(model: Path | str) -> Path:
    """The folder of this path, or of org/name@revision on the hub. Raises WeightsError."""
    if Path(model).exists() or not is_on_hub(str(model)):
        return Path(model)
    return weights_folder(str(model), parts=["unet", "vae", "image_encoder", "scheduler", *TEXT_PARTS])


def default_sampling(guidance_scale: float | None) -> Sampling:
    """Upstream's settings, at the guidance scale that a model's card names, if it names one."""
    return Sampling() if guidance_scale is None else Sampling(guidance_scale)


def _opened(folder: Path, base: Path | str | None) -> Model:
    if base is not None:
        if not is_adapter(folder):
            raise AdapterError(f"{folder}: no adapter, so it has no base; leave base out")
        return load_adapted(folder, model_folder(base))
    if is_adapter(folder):
        raise AdapterError(
            f"{folder}: an adapter of {read_adapter(folder).base.name}; load it with that as its base, merge "
            "it by `pbe import --base`, or load the merged model, whose folder has the adapter in it"
        )
    return load_model(folder)


class Editor:
    """Edits photos with one model on one device."""

    def __init__(
        self, model: Model, device: torch.device, *, dtype: EditDtype | None = None, compile_unet: bool = False
    ) -> None:
        """Takes ownership of the model: its networks are moved to `device` and converted to `dtype`."""
        self.card = model.card
        self.default_sampling = default_sampling(model.card.guidance_scale)
        self.dtype: EditDtype = dtype or default_dtype(device)
        self._device = device
        torch_dtype = TORCH_DTYPES[self.dtype]
        self._codec = model.codec.to(device).compute_in(torch_dtype)
        self._backbone = model.backbone.to(device).compute_in(torch_dtype)
        for parameter in model.network.parameters():  # not buffers: features are standardised in float32
            parameter.data = parameter.data.to(torch_dtype)
        self._network = model.network.to(device).eval()  # converted first: a small GPU could not hold float32
        if compile_unet:
            self._network.unet.compile()

    @classmethod
    def load(
        cls,
        model: Path | str,
        *,
        base: Path | str | None = None,
        device: str | None = None,
        dtype: EditDtype | None = None,
        compile_unet: bool = False,
    ) -> "Editor":
        """Open a model folder, or org/name@revision on the hub, or an adapter's folder (pbe/model/adapter.py).

        base: the model that the adapter was trained on, named likewise; the adapter is merged into it. device: by
        default "cuda" if available, else "cpu". dtype: of the networks (pbe/model/precision.py); by default float32, on
        a GPU bfloat16, or float16 where it has no bfloat16. The sampler's own steps are always in float32. Upstream's
        scripts compute in float16 by autocast, which leaves some layers in float32. compile_unet: torch.compile, which
        takes minutes at the first edit and again if the number of edits per forward or their size changes. Raises
        AdapterError, ModelError, WeightsError.
        """
        folder = model_folder(model)
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(_opened(folder, base), torch.device(name), dtype=dtype, compile_unet=compile_unet)

    def warm(self, *, n: int = 1, sampling: Sampling | None = None, size_px: int | None = None) -> None:
        """Edit a grey photo in at most two steps, so that the first edit takes no longer than those after it.

        It compiles, lets cuDNN choose its kernels and fills torch's memory pools, for the sizes that it is given: n
        edits at once (more than BATCH_ROWS go through the network BATCH_ROWS at a time), a guidance scale of 1 or
        another, and size_px. Raises NonFiniteEditError if the model's numbers overflow, and the errors of `edit`.
        """
        side = self.card.image_px if size_px is None else size_px
        photo = np.full((side, side, 3), GREY, np.uint8)
        hole_mask = np.zeros((side, side), np.uint8)
        hole_mask[side // 4 : -(side // 4), side // 4 : -(side // 4)] = 1
        sampling = sampling or self.default_sampling
        short = replace(sampling, steps=min(2, sampling.steps))
        reference = "" if self.card.condition == "text" else photo
        self.edit(photo, hole_mask, reference, seed=0, n=min(n, BATCH_ROWS), sampling=short, size_px=size_px)

    @property
    def device(self) -> str:
        """Kind of the device: "cpu", "cuda"."""
        return self._device.type

    def edit(
        self,
        photo: np.ndarray,
        hole_mask: np.ndarray,
        reference: Reference,
        *,
        seed: int,
        n: int = 1,
        sampling: Sampling | None = None,
        size_px: int | None = None,
        context_factor: float | None = None,
        protocol: EditProtocol = OURS,
        on_step: OnStep | None = None,
    ) -> list[np.ndarray]:
        """n edits (H, W, 3) uint8 of one photo. Edit k uses seed + k and is the same for any n.

        photo (H, W, 3) uint8; hole_mask (H, W), non-zero in the hole; reference (h, w, 3) uint8, or a caption for a
        model that is conditioned on text. sampling: None: upstream's, at the guidance scale that the model's card
        names. size_px: side at which the network works; None: the model's own. context_factor: how much around the hole
        the network sees; see `edit_batch`. on_step: called after every forward. Raises ValueError for n < 1, and the
        errors of `edit_batch`.
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
        sampling: Sampling | None = None,
        size_px: int | None = None,
        context_factor: float | None = None,
        protocol: EditProtocol = OURS,
        on_step: OnStep | None = None,
    ) -> list[np.ndarray]:
        """One edit (H, W, 3) uint8 per task, BATCH_ROWS at a time; photos may differ in size.

        With `protocol.paste_back` an edit equals its photo outside the hole. sampling: None: `default_sampling`.
        size_px: side at which the network works; None: the model's own. context_factor: side of the edited square /
        longer side of the box around all holes, from 1, which leaves a rim of one pixel, to inf, the largest square of
        the photo; None: CONTEXT_FACTOR. on_step: called after every forward of BATCH_ROWS tasks; PLMS does one more
        than its steps. Raises ValueError if a hole is empty or the whole photo, if shapes do not match, or for a
        context_factor below 1 or with a protocol that edits the whole photo; ReferenceKindError, CaptionError,
        SamplerError, NonFiniteEditError.
        """
        side = self.card.image_px if size_px is None else size_px
        self._check_size(side)
        _check_context(context_factor, protocol)
        for task in tasks:
            _check_task(task)
            self._check_reference(task.reference)
        factor = CONTEXT_FACTOR if context_factor is None else context_factor
        sampling = sampling or self.default_sampling
        all_cuts = _cuts(tasks, side, factor, protocol)
        edits = []
        for start in range(0, len(tasks), BATCH_ROWS):
            batch, cuts = tasks[start : start + BATCH_ROWS], all_cuts[start : start + BATCH_ROWS]
            fills = self._fill(
                np.stack([part.source for part in cuts]),
                np.stack([part.hole_mask for part in cuts]),
                [task.reference for task in batch],
                seeds=[task.seed for task in batch],
                sampling=sampling,
                protocol=protocol,
                on_step=on_step,
            )
            edits += [
                paste(task.photo, task.hole_mask, part, fill, protocol)
                for task, part, fill in zip(batch, cuts, fills, strict=True)
            ]
        return edits

    def edit_crops(
        self,
        sources: np.ndarray,
        hole_masks: np.ndarray,
        references: Sequence[Reference],
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
        for reference in references:
            self._check_reference(reference)
        fills = self._fill(sources, hole_masks, references, seeds=seeds, sampling=sampling, protocol=protocol)
        return np.where(hole_masks[..., None] > 0, fills, sources) if protocol.paste_back else fills

    def _fill(
        self,
        sources: np.ndarray,
        hole_masks: np.ndarray,
        references: Sequence[Reference],
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        protocol: EditProtocol,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """The decoded squares (B, S, S, 3) uint8, before pasting back. Waits for the device once, at its end."""
        with float32_products(tf32=self.dtype == "tf32"):
            tokens = self._tokens(references, protocol)
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
            others = {"float16": "bfloat16 or float32", "bfloat16": "float32", "tf32": "float32"}
            other = others.get(self.dtype)
            raise NonFiniteEditError(
                f"the model gives NaN or infinite values (seeds {', '.join(map(str, seeds))}); its weights are damaged"
                + (f", or {self.dtype} is too narrow for it: try dtype {other}" if other else "")
            )
        return edited

    def _tokens(self, references: Sequence[Reference], protocol: EditProtocol) -> torch.Tensor:
        """(B, T, width) of references or captions, by the frozen encoder."""
        if isinstance(self._backbone, TextEncoder):
            return self._backbone([caption for caption in references if isinstance(caption, str)])
        pictures = [picture for picture in references if not isinstance(picture, str)]
        fitted = np.stack([fit_reference(picture, self.card.reference_px, protocol) for picture in pictures])
        return encode_references(self._backbone, fitted, tokens=self.card.tokens, device=self._device)

    def _check_reference(self, reference: Reference) -> None:
        reads_text = isinstance(self._backbone, TextEncoder)
        if isinstance(reference, str) != reads_text:
            wants, given = ("a caption", "a picture") if reads_text else ("a picture", "a caption")
            raise ReferenceKindError(
                f"this model's condition is {self.card.condition}: its reference is {wants}, not {given}"
            )
        if isinstance(self._backbone, TextEncoder) and isinstance(reference, str):
            self._backbone.refuse_long(reference)

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
        if isinstance(picture, str):
            continue
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
            raise ValueError(f"{name} must be (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    if hole_mask.shape != photo.shape[:2]:
        raise ValueError(f"hole_mask is {hole_mask.shape}, the photo {photo.shape[:2]}: the sizes must match")
    if not hole_mask.any():
        raise ValueError("hole_mask is empty: nothing to edit")
    if hole_mask.all():
        raise ValueError("hole_mask covers the whole photo, so there is no context for the edit; is it inverted?")


def _cuts(tasks: Sequence[EditTask], side_px: int, context_factor: float, protocol: EditProtocol) -> list[Cut]:
    """The cut of each task; tasks that share a photo and a hole share the cut."""
    made: dict[tuple[int, int], Cut] = {}
    cuts = []
    for task in tasks:
        key = id(task.photo), id(task.hole_mask)
        if key not in made:
            made[key] = cut(task.photo, task.hole_mask, side_px, context_factor, protocol)
        cuts.append(made[key])
    return cuts
