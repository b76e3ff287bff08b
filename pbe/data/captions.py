"""Captions: an object in words of growing precision. A text-conditioned model reads them in the exemplar's place.

    label           a photo of a {label_name}              CLIP's template for class names
    label_colour    a photo of a {colour} {label_name}
    caption         what the data says of the object       as `label` where it says nothing

The paper compares such descriptions with exemplars (Fig. 8).
"""

import cv2
import numpy as np

from pbe.data.schema import CaptionForm
from pbe.errors import one_line

# The eleven basic colour terms with their light and dark shades, in sRGB as most of 200,000 people named them: the xkcd
# colour survey (public domain). Shades keep pale and dark objects from being grey and black.
_NAMED = {
    "black": ("000000",),
    "grey": ("929591", "d8dcd6", "363737"),
    "white": ("ffffff",),
    "red": ("e50000", "ff474c", "840000"),
    "orange": ("f97306", "fdaa48", "c65102"),
    "yellow": ("ffff14", "fffe7a", "d5b60a"),
    "green": ("15b01a", "96f97b", "033500"),
    "blue": ("0343df", "95d0fc", "00035b"),
    "purple": ("7e1e9c", "bf77f6", "35063e"),
    "pink": ("ff81c0", "ffd1df", "cb416b"),
    "brown": ("653700", "ad8150", "341c02"),
}
COLOUR_NAMES = tuple(_NAMED)
COLOUR_PX = 32  # side at which pixels are counted: noise and texture average out
WRITTEN_MAX = 400  # characters of a caption in the data; CLIP reads about 300

_JOINERS = {0x200C: None, 0x200D: None}  # do not print themselves; Persian and emoji need them


def caption(
    label_name: str, form: CaptionForm, reference: np.ndarray | None = None, *, written: str | None = None
) -> str:
    """The caption of an object.

    reference: its picture (h, w, 3) uint8, which `label_colour` needs. written: what the data says of it.
    """
    if form == "caption" and written is not None:
        return written
    name = label_name.lower()
    if form != "label_colour":
        return f"a photo of a {name}"
    if reference is None:
        raise ValueError("a caption with a colour needs the object's picture")
    return f"a photo of a {colour_name(reference)} {name}"


def written_caption(text: str) -> str | None:
    """A caption as data holds it, on one line; None if it is empty.

    Raises ValueError if it is too long, or has a character that does not print.
    """
    line = " ".join(text.split())
    if len(line) > WRITTEN_MAX:
        raise ValueError(f"the caption has {len(line)} characters, at most {WRITTEN_MAX} are read")
    if not line.translate(_JOINERS).isprintable():
        raise ValueError(f"the caption {one_line(ascii(line), 80)} has characters that do not print")
    return line or None


def colour_name(picture: np.ndarray) -> str:
    """The basic colour term of most pixels in the middle of a picture (h, w, 3) uint8.

    The middle is the ellipse that touches all four sides, as a box's corners are mostly background. A pixel has the
    term of the shade that is nearest in CIELAB.
    """
    small = cv2.resize(picture, (COLOUR_PX, COLOUR_PX), interpolation=cv2.INTER_AREA)
    offset = (np.arange(COLOUR_PX) + 0.5) / (COLOUR_PX / 2) - 1
    middle = _lab(small)[offset[:, None] ** 2 + offset[None] ** 2 <= 1]
    shades = [(term, shade) for term, found in enumerate(_NAMED.values()) for shade in found]
    terms = np.array([term for term, _ in shades])
    named = _lab(np.array([list(bytes.fromhex(shade)) for _, shade in shades], np.uint8)[None])[0]
    nearest = np.square(middle[:, None] - named[None]).sum(-1).argmin(1)
    return COLOUR_NAMES[np.bincount(terms[nearest]).argmax()]


def _lab(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 sRGB to float32 CIELAB: 0 to 100, then about -128 to 127."""
    return cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
