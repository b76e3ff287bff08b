"""A descriptor of 192 bytes of what a photo shows, to find its near-duplicates by (pbe/data/duplicates.py).

The lowest 8 x 8 frequencies of a 16 x 16 thumbnail, of luma and two colour differences, each multiplied by its
frequency, without the mean. Without that weight a bright sky over dark ground is what most photos have in common.
Perceptual hashes (pHash, PDQ) keep the signs of such coefficients; their values tell more photos apart.
"""

import numpy as np

from pbe.data.images import resize
from pbe.data.schema import DESCRIPTOR_BYTES

SIDE_PX, FREQUENCIES = 16, 8  # 3 * FREQUENCIES^2 values
SCALE = 127  # of the unit vector, stored as int8
FLAT_LEVELS = 4.0  # standard deviation of a thumbnail, below which the photo shows nothing that could be compared
LUMA = np.array([0.299, 0.587, 0.114])

_wave = np.arange(FREQUENCIES)[:, None] * (2 * np.arange(SIDE_PX) + 1) * np.pi / (2 * SIDE_PX)
DCT = np.cos(_wave) * np.sqrt(np.array([[1.0]] + [[2.0]] * (FREQUENCIES - 1)) / SIDE_PX)
WEIGHT = np.hypot(np.arange(FREQUENCIES)[:, None], np.arange(FREQUENCIES))


def descriptor(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 to DESCRIPTOR_BYTES of int8; zeros for a flat picture, which resembles nothing."""
    height_px, width_px = picture.shape[:2]
    few = picture[:: max(1, height_px // 128), :: max(1, width_px // 128)]  # a twentieth of the cost for large photos
    thumbnail = resize(few, width_px=SIDE_PX, height_px=SIDE_PX).astype(np.float64)
    luma = thumbnail @ LUMA
    if luma.std() < FLAT_LEVELS:
        return bytes(DESCRIPTOR_BYTES)
    planes = np.stack([luma, thumbnail[..., 0] - luma, thumbnail[..., 2] - luma])
    weighted = DCT @ planes @ DCT.T * WEIGHT
    return np.round(weighted / np.linalg.norm(weighted) * SCALE).astype(np.int8).tobytes()
