"""One visitor's edit: pictures as uploaded, the hole in the photo's own pixels, results with their recipes. No Gradio.

Bytes that a browser sends are opened by pbe/data/images.py alone, within the limits below, and kept as they came: the
recipe of an edit contains them.
"""

import re
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pbe.data import images
from pbe.data.boxes import Box
from pbe.data.masks import MaskError, read_hole_mask
from pbe.edit import Editor, model_folder
from pbe.errors import UserError
from pbe.model.weights import weights_sha256
from pbe.recipe import Picture, Recipe

UPLOAD_BYTES_MAX = 32 << 20
PHOTO_PIXELS_MAX = 50_000_000
SHOWN_PX = 1024  # longer side of the photo under the brush
VISITORS_MAX = 64  # beyond, the one who did nothing for longest is forgotten
_BOX = re.compile(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")


class PageError(UserError, ValueError):
    """What the visitor has to do; the page shows the message."""


class StoppedError(Exception):
    """The visitor cancelled the edit, or closed the page."""


@dataclass(frozen=True)
class Upload:
    """A picture as it came: its bytes; and its pixels, upright (H, W, 3) uint8 sRGB, on white where transparent."""

    data: bytes
    pixels: np.ndarray

    @property
    def size(self) -> str:
        return f"{self.pixels.shape[1]} x {self.pixels.shape[0]} px"


def open_upload(data: bytes, what: str) -> Upload:
    """what: "photo", for the message. Raises PageError for what is no picture or beyond the limits."""
    try:
        return Upload(data, _within_limits(data).on_white())
    except images.ImageTooLargeError:
        raise PageError(f"The {what} is too large: at most {limits_text()}.") from None
    except images.ImageError as error:
        raise PageError(f"The {what} cannot be read: {error}.") from None


def limits_text() -> str:
    return f"{UPLOAD_BYTES_MAX >> 20} MiB and {PHOTO_PIXELS_MAX // 1_000_000} megapixels"


def _within_limits(data: bytes) -> images.Picture:
    return images.open_picture(data, max_bytes=UPLOAD_BYTES_MAX, max_pixels=PHOTO_PIXELS_MAX)


def shown(pixels: np.ndarray, longest_px: int = SHOWN_PX) -> np.ndarray:
    """The picture with its longer side at most `longest_px`."""
    scale = longest_px / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    high, wide = (max(1, round(scale * side)) for side in pixels.shape[:2])
    return images.resize(pixels, width_px=wide, height_px=high)


def brushed_hole(layer: bytes, photo: np.ndarray) -> np.ndarray:
    """(H, W) bool of the photo's own pixels, from what the brush painted over `shown(photo)`.

    layer: a picture of that size, hole where half opaque or more; empty if nothing is painted. A pixel of the photo is
    hole where the pixel of the layer under its centre is; for a photo of at most SHOWN_PX these are the same pixels.
    Raises PageError.
    """
    nothing = "Paint over the part of the photo that should change."
    if not layer:
        raise PageError(nothing)
    height_px, width_px = photo.shape[:2]
    high, wide = shown(photo).shape[:2]
    try:
        picture = images.open_picture(layer, max_bytes=UPLOAD_BYTES_MAX, max_pixels=SHOWN_PX**2)
        if (picture.header.height_px, picture.header.width_px) != (high, wide):
            raise PageError("The brush was used on another photo; clear it and paint again.")
        alpha = picture.upright_alpha()
    except images.ImageError as error:
        raise PageError(f"What was painted cannot be read ({error}); clear it and paint again.") from None
    painted = np.ones((high, wide), bool) if alpha is None else alpha >= 128
    rows = ((np.arange(height_px) + 0.5) * high / height_px).astype(int)
    columns = ((np.arange(width_px) + 0.5) * wide / width_px).astype(int)
    return _usable(painted[rows[:, None], columns], nothing)


def boxed_hole(text: str, photo: np.ndarray) -> Box:
    """The box x0,y0,x1,y1 in pixels of the photo, half-open. Raises PageError."""
    height_px, width_px = photo.shape[:2]
    found = _BOX.fullmatch(text)
    if found is None:
        raise PageError("A box is four whole numbers, left, top, right and bottom in pixels, such as 140,60,480,330.")
    x0, y0, x1, y1 = map(int, found.groups())
    if not (x0 < x1 <= width_px and y0 < y1 <= height_px):
        raise PageError(f"The box {x0},{y0},{x1},{y1} is not inside the photo of {width_px} x {height_px} px.")
    if (x0, y0, x1, y1) == (0, 0, width_px, height_px):
        raise PageError("The box covers the whole photo; leave a part that the model can see.")
    return Box(x0, y0, x1, y1)


def masked_hole(data: bytes, photo: np.ndarray) -> np.ndarray:
    """(H, W) bool from a mask file, white where the edit goes. Raises PageError."""
    try:
        hole_mask = read_hole_mask(_within_limits(data))
    except (images.ImageError, MaskError) as error:
        raise PageError(f"The mask cannot be used: {error}.") from None
    if hole_mask.shape != photo.shape[:2]:
        size, photo_size = (f"{array.shape[1]} x {array.shape[0]} px" for array in (hole_mask, photo))
        raise PageError(f"The mask is {size}, the photo {photo_size}; they must be the same.")
    return _usable(hole_mask, "The mask is black everywhere; it must be white where the edit goes.")


def _usable(hole_mask: np.ndarray, if_empty: str) -> np.ndarray:
    if not hole_mask.any():
        raise PageError(if_empty)
    if hole_mask.all():
        raise PageError("The hole covers the whole photo; leave a part that the model can see.")
    return hole_mask


def mask_of(hole: np.ndarray | Box, photo: np.ndarray) -> np.ndarray:
    """(H, W) bool."""
    if isinstance(hole, Box):
        hole_mask = np.zeros(photo.shape[:2], bool)
        hole_mask[hole.y0 : hole.y1, hole.x0 : hole.x1] = True
        return hole_mask
    return hole


@dataclass(frozen=True)
class Asked:
    """What the visitor had chosen when they clicked on Edit, however long the edit then waits. stop: set, it ends.

    hole_mask: (H, W) bool, of the mask file.
    """

    photo: Upload | None
    hole_mask: np.ndarray | None
    reference: Upload | None
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Result:
    """The edits of one photo, each with its recipe. files: what the page shows of an edit that was chosen."""

    photo: Upload
    edits: Sequence[np.ndarray]
    recipes: Sequence[Recipe]
    files: dict[int, "Files"] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """Of one edit: the photo before and after, as shown; what can be downloaded."""

    before: Path
    after: Path
    png: Path
    recipe: Path


@dataclass
class Visitor:
    """What the server keeps of one open page. folder: private, for the files that this page shows."""

    folder: Path
    photo: Upload | None = None
    hole_mask: np.ndarray | None = None  # (H, W) bool, of the mask file
    reference: Upload | None = None
    exemplars: list[Upload] = field(default_factory=list)  # found last
    result: Result | None = None
    chosen: int = 0  # of the result's edits
    files: int = 0
    uploads: list[Path] = field(default_factory=list)
    asked: Asked | None = None  # last
    _new: bool = False  # whether no edit has begun yet that was asked for last
    _gone: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self) -> None:
        """The click on Edit."""
        self.asked, self._new = Asked(self.photo, self.hole_mask, self.reference), True

    def begin(self) -> Asked:
        """What was asked for; an edit that no click came before takes what is chosen now."""
        if self.asked is None or not self._new:
            self.ask()
        assert self.asked is not None, "asked for above"
        self._new = False
        return self.asked

    def stop(self) -> None:
        """End the edit that was asked for last."""
        if self.asked is not None:
            self.asked.stop.set()

    def take(self, path: Path) -> bytes:
        """The bytes of an uploaded file, which goes with the visitor: the browser still shows it for a moment.

        One byte beyond the limit tells `open_upload` that there are more. Raises PageError.
        """
        self.uploads.append(path)
        try:
            with path.open("rb") as stream:
                return stream.read(UPLOAD_BYTES_MAX + 1)
        except OSError:
            raise PageError("The uploaded file is gone; choose it again.") from None

    def write(self, name: str, data: bytes) -> Path:
        """A file for the browser. Each write has its own folder, so that no name is used twice.

        Raises StoppedError if the page has been closed: nothing would remove the file.
        """
        with self._lock:
            if self._gone:
                raise StoppedError
            self.files += 1
            folder = self.folder / str(self.files)
            folder.mkdir(parents=True, mode=0o700)
            path = folder / name
            path.write_bytes(data)
            return path

    def finish(self, result: Result) -> None:
        """Keep this result in place of the one before, whose files go."""
        before, self.result = self.result, result
        for files in before.files.values() if before else ():
            for path in (files.before, files.after, files.png, files.recipe):
                shutil.rmtree(path.parent, ignore_errors=True)

    def forget(self) -> None:
        """The page was closed: its edit stops, its files and pictures go."""
        self.stop()
        with self._lock:
            self._gone = True
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.uploads:
            path.unlink(missing_ok=True)


class Visitors:
    """The open pages, by the name that each gave itself."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, OrderedDict[str, Visitor]()
        self._lock = threading.Lock()

    def of(self, name: str | None) -> Visitor:
        if not name:
            raise PageError("This request comes from no open page.")
        with self._lock:
            if name not in self._open:
                self._open[name] = Visitor(self._folder / secrets.token_hex(16))  # a name that no other page guesses
            self._open.move_to_end(name)
            visitor = self._open[name]
            gone = self._open.popitem(last=False)[1] if len(self._open) > VISITORS_MAX else None
        if gone is not None:
            gone.forget()
        return visitor

    def leave(self, name: str | None) -> None:
        """The page was closed."""
        with self._lock:
            gone = self._open.pop(name or "", None)
        if gone is not None:
            gone.forget()


@dataclass(frozen=True)
class Loaded:
    """A model at work. label: what the page calls it; it names no folder of this machine."""

    label: str
    weights_sha256: str
    editor: Editor


class Models:
    """The models that the page offers; one is loaded at a time."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: folders, or org/name@revision. Raises PageError for two of the same label."""
        self._names = {_label(name): name for name in names}
        if len(self._names) < len(names):
            raise PageError(f"--model {' '.join(names)}: two would have the same name in the page; rename one folder")
        self._loaded: Loaded | None = None

    @property
    def labels(self) -> list[str]:
        return list(self._names)

    def load(self, label: str) -> Loaded:
        """Raises PageError for a label that is not offered, and the errors of Editor.load."""
        if label not in self._names:
            raise PageError("This page does not offer that model.")
        if self._loaded is None or self._loaded.label != label:
            self._loaded = None  # two large models may not fit
            folder = model_folder(self._names[label])
            self._loaded = Loaded(label, weights_sha256(folder), Editor.load(folder))
        return self._loaded


def _label(name: str) -> str:
    """The last two folders; a hub name has as many."""
    return "/".join(Path(name).parts[-2:])


def hole_picture(hole: np.ndarray | Box) -> Picture | Box:
    """The hole as a recipe has it: a box, or a mask (H, W) bool as a picture, white where the edit goes."""
    if isinstance(hole, Box):
        return hole
    level = np.where(hole, np.uint8(255), np.uint8(0))
    return Picture.embedded("mask.png", images.encode_png(np.repeat(level[..., None], 3, axis=2)))


def stopping(stop: threading.Event, on_step: Callable[[], object]) -> Callable[[], None]:
    """An `on_step` that ends the edit by StoppedError once `stop` is set."""

    def step() -> None:
        refuse_if_set(stop)
        on_step()

    return step


def refuse_if_set(stop: threading.Event) -> None:
    """Raises StoppedError."""
    if stop.is_set():
        raise StoppedError
