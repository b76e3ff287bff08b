"""What an edit changed outside its hole, where it should change nothing: the largest error, and SSIM.

Both are blind to the fill: the photo's own pixels go into the hole first. `hole_mask` is (H, W), non-zero where the
edit went. Images are (H, W, 3) uint8 RGB.
"""

import cv2
import numpy as np

_SIGMA_PX, _WINDOW_PX = 1.5, 11  # Wang et al. 2004, section III-B; scikit-image truncates at 3.5 sigma, the same window
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # Wang et al. 2004, section III-B


def fill_hole(image: np.ndarray, fill: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    """`fill` inside the hole, `image` outside, (H, W, 3) uint8.

    Raises ValueError for images of unequal size or dtype other than uint8, and for a hole of another size, an empty
    one, or one that covers the whole photo.
    """
    if image.shape != fill.shape or image.dtype != np.uint8 or fill.dtype != np.uint8:
        raise ValueError(f"images: {image.dtype} {image.shape} and {fill.dtype} {fill.shape}, expected equal uint8")
    if hole_mask.shape != image.shape[:2]:
        raise ValueError(f"hole_mask {hole_mask.shape} does not match the image {image.shape}")
    hole = hole_mask != 0
    if not hole.any():
        raise ValueError("hole_mask is empty")
    if hole.all():
        raise ValueError("hole_mask covers the whole photo: there is no background")
    return cv2.copyTo(fill, hole.view(np.uint8), image.copy())


def background_max_error(edit: np.ndarray, photo: np.ndarray, hole_mask: np.ndarray) -> float:
    """The largest difference of any pixel and channel outside the hole, in levels of 255; 0 where nothing changed.

    Raises ValueError like `fill_hole`.
    """
    return float(cv2.absdiff(fill_hole(edit, photo, hole_mask), photo).max())


def background_ssim(edit: np.ndarray, photo: np.ndarray, hole_mask: np.ndarray) -> float:
    """SSIM (Wang et al. 2004) of the background, -1..1; 1 where nothing changed.

    The mean over the channels, and over the pixels outside the hole, of scikit-image's map (`structural_similarity`
    with gaussian_weights, sigma 1.5, use_sample_covariance False, data_range 255). Windows that reach into the hole see
    the photo there in both pictures: leaving them out would leave nothing of small photos. Deviation: scikit-image's
    mean drops 5 px along the picture's border, ours keeps them, for they may be all that is left beside a hole.
    Raises ValueError like `fill_hole`.
    """
    composite = fill_hole(edit, photo, hole_mask)
    if np.array_equal(composite, photo):
        return 1.0  # of edits that were pasted back: most of them
    background = (hole_mask == 0).view(np.uint8)
    channels = zip(cv2.split(composite), cv2.split(photo), strict=True)
    return float(np.mean([cv2.mean(ssim_map(one, other), background)[0] for one, other in channels]))


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(H, W) uint8 twice, one channel each, to the SSIM of every pixel, (H, W) float32.

    From the sum and the difference, whose variances give both variances and the covariance: one blur less, and float32
    suffices. The picture continues as its mirror image beyond its border, as in scikit-image.
    """
    mean_total, var_total = _moments(cv2.add(a, b, dtype=cv2.CV_32F) - 256)
    mean_difference, var_difference = _moments(cv2.subtract(a, b, dtype=cv2.CV_32F))
    mean_total += 256  # of the pictures themselves again
    mean_total *= mean_total
    mean_difference *= mean_difference
    agreement = _agreement(mean_total, mean_difference, 2 * _C1)
    agreement *= _agreement(var_total, var_difference, 2 * _C2)
    return agreement


def _agreement(total: np.ndarray, difference: np.ndarray, constant: float) -> np.ndarray:
    """(total - difference + constant) / (total + difference + constant). Overwrites its arguments, for speed."""
    total += difference
    total += constant
    difference /= total
    difference *= -2
    difference += 1
    return difference


def _moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every pixel's window, (H, W) float32 each."""
    mean, variance = _blur(image), _blur(image * image)
    variance -= mean * mean
    return mean, variance


def _blur(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image, (_WINDOW_PX, _WINDOW_PX), _SIGMA_PX, borderType=cv2.BORDER_REFLECT)
