"""The one image backend: OpenCV. Everything is RGB uint8 (H, W, 3) inside the project."""

import cv2
import numpy as np

from pbe.errors import UserError


class ImageError(UserError, ValueError):
    """The bytes are not an image that we can read."""


def decode(data: bytes) -> np.ndarray:
    """Bytes to (H, W, 3) uint8 RGB, as stored: the EXIF orientation is not applied, because OpenImages' boxes
    match the stored file. Greyscale becomes three equal channels; alpha is dropped. Raises ImageError.
    """
    if not data:
        raise ImageError("empty file")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(str(error).strip()) from None
    if image is None:
        raise ImageError("not a readable image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """(H, W, 3) uint8 RGB to JPEG, 4:4:4 chroma so that small crops keep their colours."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB to PNG, lossless."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def resize(image: np.ndarray, *, width_px: int, height_px: int) -> np.ndarray:
    """Area averaging when shrinking, bilinear when growing; aspect ratio is the caller's business.

    Deviation: upstream shrinks bilinearly without antialias (torchvision 0.12 on tensors). At 64 px that
    aliases; area averaging does not.
    """
    shrinks = width_px <= image.shape[1] and height_px <= image.shape[0]
    return cv2.resize(image, (width_px, height_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
