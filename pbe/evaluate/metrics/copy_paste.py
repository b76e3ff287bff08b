"""Measures how well an affine copy of the reference explains the fill: the trivial solution that the paper avoids.

The paper describes it in section 3.2: a model trained on patches of its own photo learns to paste them. Neither the
paper nor upstream measures it; this metric is ours. It aligns with the enhanced correlation coefficient of Evangelidis
and Psarakis 2008, as in OpenCV.

Measured on crops of coco256 (boxes as references, photos of 40, 64, 256 and 512 px with box and ellipse holes; 60, 60,
40 and 20 items per row). Medians at 64 px, with the 10 % quantile for copies, and the 90 % quantile and maximum for the
rest. AUC: the row against the first three non-copy rows, the lowest of the four sizes.

    copies                           median   10 %     AUC    not copies                       median   90 %    max
    pasted, or mirrored                0.99   0.97   1.000    another place of its photo         0.05   0.13   0.28
    turned 10 to 20 degrees            0.90   0.82   1.000    another box of the class           0.06   0.15   0.35
    scaled 1.3                         0.86   0.75   1.000    another box                        0.04   0.12   0.22
    scaled 0.7 (covers half the hole)  0.61   0.27   0.986    3 x 3 random colours, enlarged     0.02   0.08   0.14
    other gain and offset per channel  0.98   0.95   1.000    linear gradient                    0.00   0.03   0.05
    the same, turned 12, scaled        0.87   0.72   0.999    one colour                         0.00   0.00   0.00
    blurred 1.5 % of the side          0.85   0.76   1.000
    JPEG quality 50                    0.88   0.78   1.000    reference reduced to 3 x 3 px      0.15   0.25   0.56
    mirrored, turned, scaled, shifted  0.84   0.57   0.980    Poisson-blended reference          0.86   0.75 (10 %)

Takes about 20 ms at any size. Limits of the search (64 px, median): rotated by 30 degrees 0.87, by 40 degrees 0.26;
shifted by 0.1 of its side 0.92, by 0.2: 0.23; scaled by 1.6: 0.83, by 2.0: 0.57; upside down 0.08, like a non-copy.

Copies of textureless references (sky) are detected less reliably, above all after JPEG.
A reference cut from the edited photo itself resembles the true content: there a perfect restoration scores as a copy.
Report this metric for foreign references.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

import cv2
import numpy as np

from pbe.evaluate.metrics.similarity import hole_region

# Maximum longer side for the comparison: enough to detect copies, and 512 px then cost no more than 64.
FINE_PX, COARSE_PX = 64, 32
# Grid of starting points on the coarse level; ECC refines the best of them.
_SCALES = (0.6, 0.75, 0.9, 1.0, 1.15, 1.35, 1.6)
_TURNS_DEG = (-16.0, -8.0, 0.0, 8.0, 16.0)
_REFINED_STARTS = 3
_ECC_STEPS, _ECC_GAIN, _ECC_BLUR_PX = 40, 1e-4, 3
# Beyond this range the "copy" is a stretched detail, which explains anything smooth.
_SINGULAR_VALUES = (0.4, 2.5)
# Structure coarser than this fraction of the region's side is removed: two smooth pictures nearly always match.
_DETAIL_SIGMA = 0.12
_NOISE_LEVELS = 2.0  # of 255: weaker detail is rounding and JPEG noise
_MIN_OVERLAP = 0.5
_MIN_PIXELS = 12  # twice the parameters of an affine map


def copy_paste_score(edit: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray) -> float:
    """Return the fraction (0..1) of the fill's detail that an affine copy of the reference explains; copies: about 1.

    edit (S, T, 3) uint8 RGB with the fill in the hole; hole_mask (S, T), non-zero there; reference (h, w, 3) uint8 RGB
    of any size. With f and c the fill and the copy over the hole's pixels that the copy covers, each minus its own
    low frequencies:

        score = max(0, mean(f c))^2 / ((mean(f^2) + s^2) (mean(c^2) + s^2)) * sqrt(covered part of the hole)

    with s = 2 levels: the squared zero-normalised correlation, or R^2 under one gain, where colour shifts cost nothing
    as offsets and little as gains. s lets a fill without detail score 0 instead of the chance correlation of its
    noise. The copy is the best of a grid of flips, scales and rotations about the centre, both squeezed to the hole's
    box and in the reference's own shape, then refined by ECC in all six parameters; a start that ECC cannot improve (it
    raises where the two do not correlate) counts unrefined. The maximum of many is above 0 by chance: compare with the
    values of unrelated photos in the table above. A hole of fewer than 12 pixels scores 0.
    Deterministic. Raises ValueError for an empty hole, a hole of another size, and other shapes or dtypes.
    """
    for name, image in (("edit", edit), ("reference", reference)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"{name}: {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    fill = hole_region(edit, hole_mask)
    hole = hole_region((hole_mask != 0)[..., None], hole_mask)[..., 0]
    starts = []
    for fit in _fits(hole.shape, reference.shape):
        coarse, fine = _level(fill, hole, reference, fit, COARSE_PX), _level(fill, hole, reference, fit, FINE_PX)
        starts += [(coarse.score(warp), warp, coarse, fine) for warp in _starts(coarse)]
    starts.sort(key=lambda start: start[0], reverse=True)
    best = 0.0
    for _, coarse_warp, coarse, fine in starts[:_REFINED_STARTS]:
        warp = _rescaled(coarse_warp, coarse, fine)
        best = max(best, fine.score(warp), fine.score(fine.refined(warp)))
    return min(best, 1.0)


@dataclass(frozen=True, eq=False)
class _Level:
    """One resolution and fit. fill (h, w, 3) and reference (r, c, 3) float32 in 0..255; hole (h, w) bool.

    A warp is (2, 3) float32: from pixel centres (x, y) of the fill to those of the reference.
    """

    fill: np.ndarray
    hole: np.ndarray
    reference: np.ndarray
    _overlaps: dict[bytes, "_Overlap"] = field(default_factory=dict)

    def score(self, warp: np.ndarray) -> float:
        """Return the score of one warp, by the formula of `copy_paste_score`."""
        height, width = self.hole.shape
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        covered = cv2.warpAffine(self._inside, warp, (width, height), flags=flags) > 0.5
        both = covered & self.hole
        pixels = np.count_nonzero(both)
        part = pixels / self._hole_pixels
        if part < _MIN_OVERLAP or pixels < _MIN_PIXELS:
            return 0.0
        copy = cv2.warpAffine(self.reference, warp, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        over = self._overlap(both)
        f, c = over.fill, over.average.detail(copy).reshape(-1, 3).take(over.at, 0)
        noise = _NOISE_LEVELS**2
        explained = np.maximum(_mean(f * c), 0.0) ** 2 / ((over.power + noise) * (_mean(c * c) + noise))
        return float(explained * np.sqrt(part))

    def _overlap(self, both: np.ndarray) -> "_Overlap":
        """Return what is the same for all warps that cover the same pixels, as half of the starts do."""
        key = both.tobytes()
        if key not in self._overlaps:
            average = _Average(both)
            at = np.flatnonzero(both)
            fill = average.detail(self.fill).reshape(-1, 3).take(at, 0)
            self._overlaps[key] = _Overlap(average, at, fill, _mean(fill * fill))
        return self._overlaps[key]

    @cached_property
    def _hole_pixels(self) -> int:
        return int(np.count_nonzero(self.hole))

    @cached_property
    def _inside(self) -> np.ndarray:
        return np.ones(self.reference.shape[:2], np.float32)

    @cached_property
    def _details(self) -> tuple[np.ndarray, np.ndarray]:
        """The grey details of fill and reference, which ECC aligns."""
        reference = _Average(np.ones(self.reference.shape[:2], bool)).detail(self.reference)
        return _Average(self.hole).detail(self.fill).mean(2), reference.mean(2)

    def refined(self, warp: np.ndarray) -> np.ndarray:
        """Return the warp after ECC, or unchanged if ECC raises or leaves the range of plausible copies."""
        fill, reference = self._details
        stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, _ECC_STEPS, _ECC_GAIN)
        try:
            found = cv2.findTransformECC(
                fill, reference, warp.copy(), cv2.MOTION_AFFINE, stop, np.empty(0, np.uint8), _ECC_BLUR_PX
            )[1]
        except cv2.error:  # how ECC reports that it did not converge
            return warp
        if not np.isfinite(found).all():
            return warp
        largest, smallest = np.linalg.svd(found[:, :2].astype(np.float64), compute_uv=False)
        return found if _SINGULAR_VALUES[0] <= smallest and largest <= _SINGULAR_VALUES[1] else warp


def _fits(region: tuple[int, ...], reference: tuple[int, ...]) -> list[tuple[float, float]]:
    """Return heights and widths of the reference relative to the region: squeezed to the region's box, and in its own
    shape, large enough to cover it.
    """
    cover = max(region[0] / reference[0], region[1] / reference[1])
    own_shape = (reference[0] * cover / region[0], reference[1] * cover / region[1])
    return [(1.0, 1.0)] if own_shape == (1, 1) else [(1.0, 1.0), own_shape]


def _level(
    fill: np.ndarray, hole: np.ndarray, reference: np.ndarray, fit: tuple[float, float], longer_side_px: int
) -> _Level:
    """Resize the region to at most longer_side_px, never enlarging it, and the reference to `fit` times its size."""
    shrink = min(1.0, longer_side_px / max(hole.shape))
    height, width = (max(1, round(side * shrink)) for side in hole.shape)
    part = _resized(hole.astype(np.float32), height, width)
    # Limits the time for a reference far longer than the region.
    rows, columns = (max(1, round(side * min(times, 8.0))) for side, times in zip((height, width), fit, strict=True))
    return _Level(
        fill=_resized(fill.astype(np.float32), height, width),
        hole=part >= min(0.5, float(part.max())),  # a hole of thin lines keeps its densest pixels
        reference=_resized(reference.astype(np.float32), rows, columns),
    )


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize; average when shrinking, so that aliasing does not count as texture."""
    shrinks = image.shape[0] > height and image.shape[1] > width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


class _Average:
    """Gaussian averages over a mask (h, w) bool."""

    def __init__(self, mask: np.ndarray) -> None:
        weights = mask.astype(np.float32)
        self._sigma = max(_DETAIL_SIGMA * float(np.sqrt(mask.size)), 1.0)
        self._weights = weights[..., None]
        self._total = np.maximum(self._blurred(weights), 1e-6)[..., None]

    def detail(self, image: np.ndarray) -> np.ndarray:
        """Return image (h, w, 3) minus its average; 0 outside the mask."""
        return (image - self._blurred(image * self._weights) / self._total) * self._weights

    def _blurred(self, image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (0, 0), self._sigma, borderType=cv2.BORDER_CONSTANT)


@dataclass(frozen=True, eq=False)
class _Overlap:
    """Pixels that lie in the hole and are covered. at: (P,) their places; fill: (P, 3) its detail, of mean square
    `power`."""

    average: _Average
    at: np.ndarray
    fill: np.ndarray
    power: np.floating


def _mean(values: np.ndarray) -> np.floating:
    return values.sum() / values.size  # np.mean takes three times as long for so few


def _starts(level: _Level) -> Iterator[np.ndarray]:
    """Yield warps that map centre to centre: flips, scales and rotations."""
    centre, reference_centre = ((np.array(x.shape[1::-1]) - 1) / 2 for x in (level.fill, level.reference))
    for matrix in _matrices():
        warp = np.empty((2, 3), np.float32)
        warp[:, :2], warp[:, 2] = matrix, reference_centre - matrix @ centre
        yield warp


@cache
def _matrices() -> tuple[np.ndarray, ...]:
    return tuple(
        np.diag([flip, 1.0]) @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / scale
        for flip in (1.0, -1.0)
        for scale in _SCALES
        for turn in np.deg2rad(_TURNS_DEG)
    )


def _rescaled(warp: np.ndarray, level: _Level, to: _Level) -> np.ndarray:
    """Convert a warp from one level to another."""
    back = np.linalg.inv(_zoom(level.fill, to.fill))
    return (_zoom(level.reference, to.reference) @ np.vstack([warp, [0, 0, 1]]) @ back)[:2].astype(np.float32)


def _zoom(image: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Return the (3, 3) map from pixel centres of one size to those of another; centres are at halves."""
    x, y = to.shape[1] / image.shape[1], to.shape[0] / image.shape[0]
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
