"""What the server keeps of each open page: what was chosen, what an edit was asked of, its result, files. No Gradio."""

import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pbe.page.uploads import UPLOAD_BYTES_MAX, PageError, Upload
from pbe.recipe import Recipe

VISITORS_MAX = 64  # beyond, the one who did nothing for longest is forgotten


class StoppedError(Exception):
    """The visitor cancelled the edit, or closed the page."""


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
