"""Decode, encode and resize images. Inside the project every image is RGB uint8 (H, W, 3).

simplejpeg (libjpeg-turbo) decodes JPEG straight to RGB; OpenCV decodes other formats; Pillow decodes what these two
reject. Pillow also reads headers, without decoding.
"""

import io
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from pbe.data.settings import Chroma
from pbe.errors import UserError, one_line

Buffer = bytes | memoryview
Resampling = Literal["bilinear", "bicubic"]
UPRIGHT = 1
BILINEAR_SHRINK_MAX = 4
STRIP = 16  # longer side / shorter side, above which a picture is not resized as a whole
# EXIF orientation to the rotation that makes the stored picture upright
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TURNS = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}


class ImageError(UserError, ValueError):
    """The bytes are not a complete, readable image."""


class ImageTooLargeError(ImageError):
    """The header claims more pixels than Pillow accepts."""


@dataclass(frozen=True)
class Header:
    """Size as stored, before any rotation; exif_orientation 1..8, 1 = upright or not stated."""

    width_px: int
    height_px: int
    exif_orientation: int


def read_header(data: bytes) -> Header:
    """Read size and orientation without decoding. Raises ImageError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = _orientation(image)
            width_px, height_px = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(str(error)) from None
    except Exception as error:
        raise ImageError(_what_it_is(data) or f"not a readable image ({type(error).__name__})") from None
    return Header(width_px, height_px, orientation if orientation in range(1, 9) else UPRIGHT)


def read_mode(data: bytes) -> str:
    """Pillow's mode of the stored pixels, read without decoding: RGB, RGBA, L (grey), P (palette), CMYK ...

    Raises ImageError.
    """
    read_header(data)  # raises the clearer error
    with Image.open(io.BytesIO(data)) as image:
        return image.mode


def _orientation(image: Image.Image) -> int:
    """Orientation from the EXIF block before the pixels; Pillow's getexif() decodes a PNG to search after them too."""
    if image.format == "TIFF":
        return UPRIGHT  # its decoders rotate it themselves
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return exif.get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:
        return UPRIGHT


def decode(data: Buffer, *, exif_orientation: int = UPRIGHT) -> np.ndarray:
    """Decode to (H, W, 3) uint8 RGB, rotated by `exif_orientation`; 1 leaves the picture as stored.

    TIFF comes out upright: its decoders rotate it. Greyscale becomes three equal channels, alpha is dropped, 16 bits
    become 8, and only the first frame is read. Raises ImageError, also for a truncated image (it would be partly grey).
    """
    if data[:3] == b"\xff\xd8\xff":
        image = _decode_jpeg(data)
    else:
        image = _decode_other(data)
    return image if exif_orientation == UPRIGHT else _upright(image, exif_orientation)


def read_alpha(data: Buffer) -> np.ndarray | None:
    """Alpha channel, (H, W) uint8, 255 = opaque; None if nothing is transparent. Raises ImageError."""
    if data[:3] == b"\xff\xd8\xff":
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not image.has_transparency_data:
                return None
            alpha = np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))
    except Exception as error:
        raise ImageError(one_line(error) or type(error).__name__) from None
    return None if alpha.min() == 255 else alpha


def _decode_jpeg(data: Buffer) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise ImageError("the end of the JPEG is missing") from None
        return _decode_tolerantly(data)  # CMYK, or harmless defects that libjpeg warns about


def _decode_tolerantly(data: Buffer) -> np.ndarray:
    """Decode with Pillow, which ignores warnings but rejects a truncated image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("F", "I")):  # the value range is unknown: Pillow would clip it to black or white
                raise ImageError(f"pixels of 32 bits or floating point (mode {image.mode}); save it with 8 or 16 bits")
            return np.asarray(image.convert("RGB"))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_what_it_is(data) or one_line(error) or type(error).__name__) from None


def _decode_other(data: Buffer) -> np.ndarray:
    if not data:
        raise ImageError("empty file")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    return _decode_tolerantly(data) if image is None else image


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    mirrored = orientation in (2, 4, 5, 7)
    turn = _TURNS.get({4: 3, 5: 8, 7: 6}.get(orientation, orientation))
    if mirrored:
        image = cv2.flip(image, 1)
    return image if turn is None else cv2.rotate(image, turn)


def _what_it_is(data: Buffer) -> str:
    """Name what is often found in place of an image; "" for anything else."""
    start = bytes(data[:512]).lstrip().lower()
    if not data:
        return "empty file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        return "a web page or an error message, not an image"
    if start[4:8] == b"ftyp" and start[8:12] in (
        b"heic",
        b"heix",
        b"heim",
        b"heis",
        b"hevc",
        b"hevx",
        b"mif1",
        b"msf1",
    ):
        return "HEIC, the format of phones, which nothing here reads; export it as JPEG"
    if start.startswith((b"ii*", b"mm\0*")):
        return "a TIFF of a kind that nothing here reads; save it with three channels of 8 or 16 bits"
    return ""


def encode_jpeg(image: np.ndarray, quality: int, chroma: Chroma = "444") -> bytes:
    """Encode (H, W, 3) uint8 RGB as JPEG. chroma: "444" keeps full colour resolution, "420" halves it both ways."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", chroma, fastdct=False)


def encode_png(image: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 RGB as PNG, lossless."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def resize(image: np.ndarray, *, width_px: int, height_px: int) -> np.ndarray:
    """Resize bilinearly without antialias, as upstream (torchvision 0.12 on tensors); the aspect ratio may change.

    Deviation: where both sides shrink to less than a quarter, pixels are averaged by area. Bilinear reads two of every
    `shrink` pixels per side and would skip most of a photo at the sample profile's 64 px. The paper's sizes (1024 px
    photos to 512 and 224 px) shrink less and match upstream.
    """
    shrink = min(image.shape[1] / width_px, image.shape[0] / height_px)
    interpolation = cv2.INTER_AREA if shrink > BILINEAR_SHRINK_MAX else cv2.INTER_LINEAR
    return cv2.resize(image, (width_px, height_px), interpolation=interpolation)


def resize_antialiased(
    image: np.ndarray,
    *,
    width_px: int,
    height_px: int,
    resampling: Resampling,
    area: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize (H, W, 3) or (H, W) uint8 with antialias by Pillow, as torchvision's Resize of a picture and CLIP do.

    area: x0, y0, x1, y1 in pixels, fractions included, of the part to resize; the pixels around it take part in the
    antialiasing, so that the result is a cut of the whole resized image. None: the whole.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.array(picture.resize((width_px, height_px), _FILTERS[resampling], box=area))


def centre_square(
    image: np.ndarray, side_px: int, *, resampling: Resampling, odd: Literal["down", "even"] = "even"
) -> np.ndarray:
    """Cut the middle (side, side, 3) out of the image, its shorter side resized to `side_px` with antialias.

    As torchvision's Resize and CenterCrop of a picture, the longer side rounded down. odd: where half a pixel goes that
    is left over on each side, "even" as torchvision rounds, "down" as transformers.
    """
    height_px, width_px = image.shape[:2]
    high, wide = (side_px * size_px // min(height_px, width_px) for size_px in (height_px, width_px))
    left, top = ((px - side_px) // 2 if odd == "down" else round((px - side_px) / 2) for px in (wide, high))
    if max(high, wide) <= STRIP * side_px:
        whole = resize_antialiased(image, width_px=wide, height_px=high, resampling=resampling)
        return whole[top : top + side_px, left : left + side_px]
    # a whole strip would become enormous; its middle alone is the same but for rounding, for Pillow's box is float32
    x0, x1 = (x * width_px / wide for x in (left, left + side_px))
    y0, y1 = (y * height_px / high for y in (top, top + side_px))
    return resize_antialiased(image, width_px=side_px, height_px=side_px, resampling=resampling, area=(x0, y0, x1, y1))
