"""Decode, encode and resize images. Inside the project every image is RGB uint8 (H, W, 3).

simplejpeg (libjpeg-turbo) decodes JPEG straight to RGB; OpenCV decodes other formats; Pillow decodes what these two
reject. What a file says besides its pixels is in metadata.py, colour profiles are in colour.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from pbe.data.colour import Profile, lab_to_srgb, open_profile
from pbe.data.files import irregular
from pbe.data.metadata import UPRIGHT as UPRIGHT
from pbe.data.metadata import Buffer, open_header, read_orientation, read_profile, without_metadata
from pbe.data.settings import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, Chroma
from pbe.errors import UserError, one_line

Resampling = Literal["bilinear", "bicubic"]
BILINEAR_SHRINK_MAX = 4
BLACK, WHITE = 32, 224  # of 255, in masks; what lies between is grey
STRIP = 16  # longer side / shorter side, above which a picture is not resized as a whole
# EXIF orientation to the rotation that makes the stored picture upright
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TURNS = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}


class ImageError(UserError, ValueError):
    """The bytes are not a complete, readable image."""


class ImageTooLargeError(ImageError):
    """The file has more bytes, or its header claims more pixels, than is allowed."""


@dataclass(frozen=True)
class Header:
    """Size as stored, before any rotation; exif_orientation 1..8, 1 = upright or not stated."""

    width_px: int
    height_px: int
    exif_orientation: int


@dataclass(frozen=True)
class Picture:
    """A picture from outside within the limits; nothing is decoded before a method is called, all raise ImageError."""

    data: bytes
    header: Header

    def upright(self) -> np.ndarray:
        """(H, W, 3) uint8 sRGB as every viewer shows it."""
        return decode(self.data, exif_orientation=self.header.exif_orientation)

    def upright_alpha(self) -> np.ndarray | None:
        """Alpha of `upright`, (H, W) uint8, 255 = opaque; None if nothing is transparent."""
        return read_alpha(self.data)

    def on_white(self) -> np.ndarray:
        """`upright`, on white where it is transparent: what the editor takes of photos and references."""
        image, alpha = self.upright(), self.upright_alpha()
        if alpha is None:
            return image
        weight = alpha[..., None] / np.float32(255)
        return np.round(weight * image + (1 - weight) * 255).astype(np.uint8)

    def stored(self) -> np.ndarray:
        """(H, W, 3) uint8 as stored: neither rotated nor converted to sRGB, as upstream reads files."""
        return decode(self.data, convert=False)


def open_picture(
    source: Path | bytes, *, max_bytes: int = MAX_IMAGE_BYTES, max_pixels: int = MAX_IMAGE_PIXELS
) -> Picture:
    """Open a picture that somebody else made: a file or its bytes. All that the user names are read through this.

    Raises ImageError for what is no regular file (a pipe would never end) or no picture, ImageTooLargeError beyond the
    limits, and OSError for a file that is not there.
    """
    if isinstance(source, bytes):
        data = source
    else:
        if kind := irregular(source):
            raise ImageError(f"{kind}, not a file")
        with source.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ImageTooLargeError(f"more than {max_bytes} bytes")
    header = read_header(data)
    if header.width_px * header.height_px > max_pixels:
        raise ImageTooLargeError(f"{header.width_px} x {header.height_px} px, more than {max_pixels} pixels")
    return Picture(data, header)


def read_header(data: bytes) -> Header:
    """Read size and orientation without decoding. Raises ImageError."""
    try:
        with open_header(data) as image:
            return Header(*image.size, read_orientation(data, image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(str(error)) from None
    except Exception as error:
        raise ImageError(_what_it_is(data) or f"not a readable image ({type(error).__name__})") from None


def read_mode(data: bytes) -> str:
    """Pillow's mode of the stored pixels, read without decoding: RGB, RGBA, L (grey), P (palette), CMYK ...

    Raises ImageError.
    """
    read_header(data)  # raises the clearer error
    with open_header(data) as image:
        return image.mode


def colour_note(data: bytes) -> str:
    """What `decode` did to the colours, for a message; empty if the picture is sRGB. Raises ImageError."""
    icc = read_profile(data)
    profile = open_profile(icc) if icc else None
    if not icc or (profile is not None and profile.is_srgb):
        return ""
    if other_colours(data) is None or profile is None:
        return "its colour profile cannot be used; its colours are taken as sRGB"
    return f"colours converted from {profile.name or 'its profile'} to sRGB"


def decode(data: Buffer, *, exif_orientation: int = UPRIGHT, convert: bool = True) -> np.ndarray:
    """Decode to (H, W, 3) uint8 RGB, rotated by `exif_orientation`; 1 leaves the picture as stored.

    convert: to sRGB, from the embedded colour profile; an sRGB profile changes nothing. TIFF comes out upright: its
    decoders rotate it. Greyscale becomes three equal channels, alpha is dropped, 16 bits become 8, and only the first
    frame is read. Raises ImageError, also for a truncated image (it would be partly grey).
    """
    if isinstance(data, memoryview):
        data = data.cast("B")  # Arrow's has signed bytes: no JPEG would look like one
    profile = other_colours(data) if convert else None
    if profile is not None and profile.mode == "CMYK":
        image = _decode_tolerantly(data, profile)
    elif data[:3] == b"\xff\xd8\xff":
        image = _decode_jpeg(data)
    else:
        image = _decode_other(data)
    if profile is not None and profile.mode != "CMYK":
        image = profile.convert(Image.fromarray(image[..., 0] if profile.mode == "L" else image))
    return _upright(image, exif_orientation)


def other_colours(data: Buffer) -> Profile | None:
    """The profile that `decode` converts from; None if the picture is sRGB, or has a profile that does not fit it."""
    try:
        icc = read_profile(data)
        profile = open_profile(icc) if icc else None
        if profile is None or profile.is_srgb:
            return None
        with open_header(data) as image:
            return profile if profile.describes(image.mode) else None
    except Exception:  # damaged headers raise all kinds of errors; the decoder has the clear one
        return None


def read_alpha(data: Buffer) -> np.ndarray | None:
    """Alpha channel, upright, (H, W) uint8, 255 = opaque; None if nothing is transparent. Raises ImageError."""
    if data[:3] == b"\xff\xd8\xff":
        return None
    try:
        with open_header(data) as image:
            if not image.has_transparency_data:
                return None
            orientation = read_orientation(data, image)
            _leave_as_stored(image)
            layered = image if "A" in image.getbands() else image.convert("RGBA")
            alpha = np.asarray(layered.getchannel("A"))
    except Exception as error:
        raise ImageError(one_line(error) or type(error).__name__) from None
    return None if alpha.min() == 255 else _upright(alpha, orientation)


def read_palette_indices(data: Buffer) -> np.ndarray | None:
    """(H, W) uint8 of a picture with a palette, as stored: its indices, not its colours; None for any other picture.

    Raises ImageError.
    """
    with open_header(data) as image:
        if image.mode != "P":
            return None
        try:
            return np.array(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageError(f"damaged: {one_line(error)}") from None


def _leave_as_stored(image: Image.Image) -> None:
    """Pillow rotates a TIFF also by its XMP, OpenCV by its tag alone."""
    image.info.pop("xmp", None)


def _decode_jpeg(data: Buffer) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise ImageError("the end of the JPEG is missing") from None
        return _decode_tolerantly(data)  # CMYK, or harmless defects that libjpeg warns about


def _decode_tolerantly(data: Buffer, cmyk: Profile | None = None) -> np.ndarray:
    """Decode with Pillow, which ignores warnings but rejects a truncated image. cmyk: profile of a picture in CMYK."""
    try:
        with open_header(data) as image:
            if image.mode.startswith(("F", "I")):  # the value range is unknown: Pillow would clip it to black or white
                raise ImageError(f"pixels of 32 bits or floating point (mode {image.mode}); save it with 8 or 16 bits")
            _leave_as_stored(image)
            if image.mode == "LAB":
                return lab_to_srgb(image)
            return np.asarray(image.convert("RGB")) if cmyk is None else cmyk.convert(image)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_what_it_is(data) or one_line(error) or type(error).__name__) from None


def _decode_other(data: Buffer) -> np.ndarray:
    if not data:
        raise ImageError("empty file")
    if _opencv_errs(data):
        return _decode_tolerantly(data)
    try:
        pixels = np.frombuffer(without_metadata(data), np.uint8)
        image = cv2.imdecode(pixels, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    return _decode_tolerantly(data) if image is None else image


def _opencv_errs(data: Buffer) -> bool:
    """Whether OpenCV decodes wrong colours: TIFF in Lab, transparent TIFF (darkened) and AVIF (channels mixed up)."""
    if bytes(data[:4]) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and bytes(data[4:8]) != b"ftyp":
        return False
    try:
        with open_header(data) as image:
            return image.mode in ("LAB", "LA", "RGBA")
    except Exception:  # Pillow does not read it, OpenCV may
        return False


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
    if start.startswith((b"%!ps", b"%pdf", b"\xc5\xd0\xd3\xc6")):
        return "PostScript or PDF, not a picture; export it as PNG"
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
