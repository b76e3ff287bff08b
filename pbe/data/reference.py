"""A(x_r): the augmentation of the reference (paper section 4.1; upstream ldm/data/open-images.py).

Order and effective values of upstream's pinned albumentations 0.4.3: HorizontalFlip p 0.5, Rotate +-20 degrees
p 0.5 (reflect-101 border), Blur with box kernel 3, 5 or 7 p 0.3, ElasticTransform p 0.3. The elastic field itself
(alpha 1, sigma 50) moves pixels by 0.003; what shows is its random affine part (alpha_affine 50). Current
albumentations dropped that part, so OpenCV's getAffineTransform does it here.
"""

import random

import albumentations as A
import cv2
import numpy as np

AFFINE_SHIFT_PX = 50.0  # at 224 px, albumentations 0.4.3 ElasticTransform.alpha_affine
AFFINE_PROB = 0.3


def make_augmenter() -> A.Compose:
    """Make the albumentations steps; `augment_reference` re-seeds them per row."""
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Rotate(limit=(-20, 20), p=0.5, interpolation=cv2.INTER_LINEAR, border_mode=cv2.BORDER_REFLECT_101),
            A.Blur(blur_limit=(3, 7), p=0.3),
        ]
    )


def augment_reference(reference: np.ndarray, *, augmenter: A.Compose, rng: np.random.Generator) -> np.ndarray:
    """Augment an (R, R, 3) uint8 RGB image, same shape out; a pure function of the image and the generator's state."""
    seed = int(rng.integers(0, 2**31))
    # one stream for all steps: set_random_seed gives each its own copy, which couples flip, rotation and blur
    augmenter.set_random_state(np.random.default_rng(seed), random.Random(seed))
    image = augmenter(image=reference)["image"]
    if rng.random() < AFFINE_PROB:
        image = _random_affine(image, rng)
    return image


def _random_affine(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Warp so that three points at the centre +- a third of the side move by U(-50, 50) px (scaled from 224 px)."""
    side = image.shape[0]
    centre, third, shift = side // 2, side // 3, AFFINE_SHIFT_PX * side / 224
    before = np.array(
        [[centre + third, centre + third], [centre + third, centre - third], [centre - third, centre - third]],
        np.float32,
    )
    after = before + rng.uniform(-shift, shift, size=before.shape).astype(np.float32)
    matrix = cv2.getAffineTransform(before, after)
    return cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
