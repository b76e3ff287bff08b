"""Does an edit follow its reference? Similarities, their gains over a foreign reference, and pixel fidelity.

Counterpart upstream: eval_tool/clip_score/region_clip_score.py (region of the result against the reference).
Deviations: the region keeps its last row and column (upstream's crop is end exclusive of an inclusive index),
and the gains compare two fills of the same hole, own reference R and foreign reference Q with the same noise,
because a similarity alone also rewards what the photo around the hole gives away.

`hole_mask` is (H, W), non-zero where the edit went. Images are (H, W, 3) uint8 RGB.
"""

from dataclasses import dataclass

import numpy as np

from pbe.data.images import resize

NEUTRAL = (124, 116, 104)  # ImageNet's mean colour in levels of 255: near 0 after every extractor's normalisation
TIE = 1e-6  # in cosine: float32 features of one picture differ by so much between batches


@dataclass(frozen=True, eq=False)
class Gains:
    """Per item, (N,) float64 each; positive means the fill follows the reference it was given.

    own  = sim(fill_R, R) - sim(fill_Q, R): rises too when a foreign reference merely damages the fill.
    swap = sim(fill_Q, Q) - sim(fill_R, Q): the fill moves towards the foreign reference.
    both = (own + swap) / 2.
    """

    own: np.ndarray
    swap: np.ndarray
    both: np.ndarray


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, d), (N, d) to (N,) float64 in -1..1. Raises ValueError for unequal shapes or a zero row."""
    _same_shape(a, b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not norms.all():
        raise ValueError("a feature row is all zeros: its cosine is not defined")
    return np.sum(a * b, axis=1) / norms


def exemplar_gain(
    own_edit: np.ndarray,
    foreign_edit: np.ndarray,
    own_reference: np.ndarray,
    foreign_reference: np.ndarray,
) -> Gains:
    """Gains in cosine, from features (N, d) of fill_R, fill_Q, R, Q, in this order. Raises like `cosine`."""
    return _gains(
        own=cosine(own_edit, own_reference) - cosine(foreign_edit, own_reference),
        swap=cosine(foreign_edit, foreign_reference) - cosine(own_edit, foreign_reference),
    )


def wins(gains: np.ndarray) -> np.ndarray:
    """Gains in cosine (N,) to (N,): 1 above 0, 0 below, 1/2 for a tie."""
    return (1 + np.sign(gains) * (np.abs(gains) > TIE)) / 2


def colour_gain(
    own_edit: np.ndarray,
    foreign_edit: np.ndarray,
    own_reference: np.ndarray,
    foreign_reference: np.ndarray,
) -> Gains:
    """Gains in levels of 255, from mean colours (N, 3) (`mean_colour`) of fill_R, fill_Q, R, Q in this order.

    The similarity is minus the mean absolute difference over the three channels.
    Raises ValueError for unequal shapes.
    """
    return _gains(
        own=_colour_distance(foreign_edit, own_reference) - _colour_distance(own_edit, own_reference),
        swap=_colour_distance(own_edit, foreign_reference) - _colour_distance(foreign_edit, foreign_reference),
    )


def mean_colour(image: np.ndarray, hole_mask: np.ndarray | None) -> np.ndarray:
    """(H, W, 3) uint8 to (3,) float64 in 0..255: the mean over the hole's pixels, or over all when None.

    Raises ValueError for an empty hole or one of another size.
    """
    if hole_mask is None:
        return image.mean((0, 1), dtype=np.float64)
    return image[_hole(image, hole_mask)].mean(0, dtype=np.float64)


def hole_psnr(edit: np.ndarray, photo: np.ndarray, hole_mask: np.ndarray) -> float:
    """10 log10(255^2 / MSE) in dB over the hole's pixels and channels; inf when they are equal.

    Raises ValueError for images of unequal size or dtype other than uint8, and for an empty hole.
    """
    _same_pictures(edit, photo)
    return _psnr(edit, photo, _hole(edit, hole_mask))


def background_psnr(edit: np.ndarray, photo: np.ndarray, hole_mask: np.ndarray) -> float:
    """The same outside the hole: what the edit changed where it should not; inf when nothing.

    inf for every edit that was pasted back; without that, the autoencoder's own loss counts too. Compare only
    edits made under the same rule. No counterpart upstream.
    Raises ValueError like `hole_psnr`, and for a hole that covers the whole photo.
    """
    _same_pictures(edit, photo)
    background = ~_hole(edit, hole_mask)
    if not background.any():
        raise ValueError("hole_mask covers the whole photo: there is no background")
    return _psnr(edit, photo, background)


def hole_region(image: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) to (h, w, 3): a view of the hole's bounding box, its last row and column included.

    Raises ValueError for an empty hole or one of another size.
    """
    hole = _hole(image, hole_mask)
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def neutral_outside(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 to a copy that is NEUTRAL where the mask (h, w) is 0, so that only the rest is compared.

    Raises ValueError for an empty mask or one of another size.
    """
    return np.where(_hole(picture, mask)[..., None], picture, np.array(NEUTRAL, np.uint8))


def upstream_region(image: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) to (h, w, 3): the region of upstream's CLIP score, for the paper's protocol alone.

    From the first hole pixel in reading order to the last one, exclusive: it lacks the last row and column, and it is
    the hole's box only where the hole is a rectangle. Source: eval_tool/clip_score/region_clip_score.py.
    Raises ValueError for an empty hole, one of another size, or one of which nothing is left.
    """
    ys, xs = np.nonzero(_hole(image, hole_mask))
    region = image[ys[0] : ys[-1], xs[0] : xs[-1]]
    if not region.size:
        raise ValueError(
            f"a hole from ({xs[0]}, {ys[0]}) to ({xs[-1]}, {ys[-1]}) leaves nothing of upstream's region, which lacks "
            "the last row and column; set evaluate.clip_region: whole"
        )
    return region


def match_resolution(reference: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height_px, width_px, 3): the reference at the pixel size of the region it fills.

    Without it a sharp reference is compared with a small region, and sharpness outweighs content. By `images.resize`.
    """
    return resize(reference, width_px=width_px, height_px=height_px)


def _gains(*, own: np.ndarray, swap: np.ndarray) -> Gains:
    return Gains(own=own, swap=swap, both=(own + swap) / 2)


def _colour_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, 3), (N, 3) to (N,) float64: mean absolute difference over the channels."""
    _same_shape(a, b)
    return np.abs(a.astype(np.float64) - b).mean(1)


def _psnr(edit: np.ndarray, photo: np.ndarray, region: np.ndarray) -> float:
    """dB over the pixels where region (H, W) bool is True."""
    error = np.mean((edit[region].astype(np.float64) - photo[region]) ** 2)
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")


def _same_pictures(edit: np.ndarray, photo: np.ndarray) -> None:
    _same_shape(edit, photo)
    if edit.dtype != np.uint8 or photo.dtype != np.uint8:
        raise ValueError(f"images: {edit.dtype} and {photo.dtype}, expected uint8")


def _hole(image: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    """(H, W) bool, True in the hole."""
    if hole_mask.shape != image.shape[:2]:
        raise ValueError(f"hole_mask {hole_mask.shape} does not match the image {image.shape}")
    hole = hole_mask != 0
    if not hole.any():
        raise ValueError("hole_mask is empty")
    return hole


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} must be equal")
