"""Convert pictures to sRGB from the colour profile (ICC) that they carry.

Everything here computes in sRGB, and a PNG without a profile is sRGB to every viewer. So is a picture without one.
Deviation: upstream ignores profiles, so that photos of a wide gamut (phones, cameras) look pale to its networks.
"""

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

SAME_LEVELS = 1  # of 255: sRGB profiles of different makers differ in their rounding
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


@dataclass(frozen=True)
class Profile:
    """An embedded profile. mode: Pillow's name for the pixels that it describes, RGB, L or CMYK."""

    name: str
    mode: str
    _to_srgb: ImageCms.ImageCmsTransform

    def describes(self, stored_mode: str) -> bool:
        """Whether it fits pixels of one of Pillow's modes; a profile of RGB fits grey and palettes too."""
        kinds = {"RGB": ("RGB", "L", "1", "P", "I;16"), "L": ("L", "1", "I;16"), "CMYK": ("CMYK",)}
        return stored_mode.startswith(kinds[self.mode]) and stored_mode != "LAB"

    def convert(self, picture: Image.Image) -> np.ndarray:
        """Return a picture of this mode as (H, W, 3) uint8 sRGB."""
        return np.asarray(ImageCms.applyTransform(picture, self._to_srgb))

    @functools.cached_property
    def is_srgb(self) -> bool:
        """Whether no level changes by more than SAME_LEVELS, whatever the profile is called."""
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        if self.mode == "CMYK":
            return False
        if self.mode == "L":
            grey = np.arange(256, dtype=np.uint8)[None]
            before, picture = np.repeat(grey[..., None], 3, axis=2), Image.fromarray(grey)
        else:
            before = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
            picture = Image.fromarray(before)
        return bool(np.abs(self.convert(picture).astype(int) - before).max() <= SAME_LEVELS)


@functools.lru_cache(maxsize=64)  # photos of one camera share theirs, and opening one takes milliseconds
def open_profile(icc: bytes) -> Profile | None:
    """Open an embedded profile; None if it is damaged or describes other pixels than RGB, grey or CMYK."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = _MODES[profile.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        return Profile(ImageCms.getProfileDescription(profile).strip(), mode, transform)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return None


def lab_to_srgb(picture: Image.Image) -> np.ndarray:
    """Return a picture of Pillow's mode LAB as (H, W, 3) uint8 sRGB."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB"))
