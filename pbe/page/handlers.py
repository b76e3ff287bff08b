"""What happens on a click. Every handler answers one visitor; its last output is the line that says what happened."""

import functools
import html
import random
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pbe.data import images
from pbe.data.contact import with_hole
from pbe.diffusion.sampling import Sampling
from pbe.diffusion.schedule import SamplerError
from pbe.edit import BATCH_ROWS, NonFiniteEditError, ReferenceKindError
from pbe.errors import UserError, one_line, printable
from pbe.page.models import Models
from pbe.page.samples import Samples
from pbe.page.uploads import (
    PageError,
    Upload,
    boxed_hole,
    brushed_hole,
    hole_picture,
    mask_of,
    masked_hole,
    open_upload,
    shown,
)
from pbe.page.visitors import Files, Result, StoppedError, Visitor, Visitors, refuse_if_set, stopping
from pbe.recipe import PROTOCOLS, Picture, ProtocolName, png_with_recipe, recipes_of
from pbe.retrieve.index import Index

BRUSH, BOX, MASK = "Brush", "Box", "Mask file"
OWN_SAMPLER = "the model's own"
ANY_CLASS = "any class"
REFERENCE_PX = 480
EXEMPLARS = 12
SEED_MAX = 2**31 - 1
CANCELLED = "Cancelled."
GONE = "That picture is gone; load the page again."
OF_THE_VISITOR = (PageError, NonFiniteEditError, ReferenceKindError, SamplerError)  # their messages name no folder
BUSY = "The page is busy: too many edits wait. Try again in a minute."


def guarded(handler: Callable[..., Any], outputs: int, *, emptied: int = 0) -> Callable[..., Any]:
    """The handler, with its errors as the last of its outputs, a line in the page.

    Of the other outputs the first `emptied` become empty, the rest stay as they are. Errors that are not the visitor's
    may say something of this machine; only its terminal shows them.
    """

    @functools.wraps(handler)
    def run(*inputs: Any, **named: Any) -> Any:
        wrong = True
        try:
            return handler(*inputs, **named)
        except StoppedError:
            said, wrong = CANCELLED, False
        except OF_THE_VISITOR as error:
            said = printable(one_line(error))
        except Exception as error:
            if isinstance(error, UserError):
                print(f"pbe page: error: {printable(one_line(error))}", flush=True)
            else:
                traceback.print_exception(error)
            said = "Something failed on the server; the terminal that runs `pbe page` says what."
        return [*[None] * emptied, *[gr.skip()] * (outputs - 1 - emptied), status(said, wrong=wrong)]

    return run


def status(text: str, *, wrong: bool = False, done: bool = False) -> str:
    """wrong: what was asked was not done. done: an edit was made."""
    kind = 'role="alert" class="wrong"' if wrong else 'role="status" class="done"' if done else 'role="status"'
    return f"<p {kind}>{html.escape(text)}</p>"


class Handlers:
    """The page's actions."""

    def __init__(self, models: Models, visitors: Visitors, samples: Samples, index: Index | None) -> None:
        self.models, self.samples, self.index = models, samples, index
        self._visitors = visitors
        # one edit at a time: the queue begins the next while a cancelled one still ends its step, or loads its model
        self._editing = threading.Lock()

    # ---- photo and hole

    def take_photo(self, path: Path | None, request: gr.Request) -> list[Any]:
        """Outputs: photo, brush, mask, status."""
        if path is None:
            return [gr.skip()] * 4
        visitor = self._visitor(request)
        return _use_photo(visitor, open_upload(visitor.take(path), "photo"))

    def take_sample_photo(self, chosen: gr.SelectData, request: gr.Request) -> list[Any]:
        """Outputs as of take_photo."""
        return _use_photo(self._visitor(request), _at(self.samples.photos, chosen.index))

    def take_result(self, request: gr.Request) -> list[Any]:
        """The chosen edit becomes the photo. Outputs as of take_photo."""
        visitor = self._visitor(request)
        pixels = _at(visitor.result.edits if visitor.result else (), visitor.chosen)
        return _use_photo(visitor, Upload(images.encode_png(pixels), pixels))

    def show_kind(self, kind: str) -> list[Any]:
        """Outputs: brush, box, mask, hole view."""
        seen = (kind == BRUSH, kind == BOX, kind == MASK, kind != BRUSH)
        return [gr.update(visible=True if there else "hidden") for there in seen]

    def show_hole(self, kind: str, box: str, request: gr.Request) -> str | None:
        """Output: hole view. Says nothing about a box that is still being typed; the edit does."""
        visitor = self._visitor(request)
        if visitor.photo is None or kind == BRUSH:
            return None
        pixels, hole_mask = visitor.photo.pixels, visitor.hole_mask
        if kind == BOX:
            try:
                hole_mask = mask_of(boxed_hole(box, pixels), pixels)
            except PageError:
                return None
        if hole_mask is None or hole_mask.shape != pixels.shape[:2]:  # another photo has just been chosen
            return None
        return str(visitor.write("hole.jpg", images.encode_jpeg(shown(with_hole(pixels, hole_mask)), 92)))

    def take_mask(self, path: Path | None, request: gr.Request) -> list[Any]:
        """Outputs: mask, status."""
        visitor = self._visitor(request)
        visitor.hole_mask = None
        if path is None:
            return [gr.skip(), status("No mask.")]
        visitor.hole_mask = masked_hole(visitor.take(path), _photo_of(visitor.photo).pixels)
        return [gr.skip(), status(f"The mask marks {100 * visitor.hole_mask.mean():.1f} % of the photo.")]

    # ---- reference

    def take_reference(self, path: Path | None, request: gr.Request) -> list[Any]:
        """Outputs: reference, status."""
        visitor = self._visitor(request)
        visitor.reference = None
        if path is None:
            return [None, status("No reference.")]
        return _use_reference(visitor, open_upload(visitor.take(path), "reference"))

    def take_sample_reference(self, chosen: gr.SelectData, request: gr.Request) -> list[Any]:
        """Outputs: reference, status."""
        return _use_reference(self._visitor(request), _at(self.samples.references, chosen.index))

    def find_exemplars(self, label: str, alike: bool, request: gr.Request) -> list[Any]:
        """Outputs: gallery of exemplars, status."""
        assert self.index is not None, "without an index the page has no such button"
        visitor = self._visitor(request)
        like, backbone = None, None
        if alike:
            if visitor.reference is None:
                raise PageError("Choose a reference first, to find others like it; or choose a class.")
            like, backbone = visitor.reference.pixels, self.index.backbone()
        elif label == ANY_CLASS:
            raise PageError('Choose a class, or tick "Like the reference above".')
        hits = self.index.find(like=like, label=None if label == ANY_CLASS else label, k=EXEMPLARS, backbone=backbone)
        found, thumbs = [], []
        for hit in hits:
            try:
                crop = self.index.crop_of(hit)
            except UserError:  # its photo is gone since
                continue
            found.append(Upload(images.encode_png(crop), crop))
            path = visitor.write("exemplar.jpg", images.encode_jpeg(shown(crop, REFERENCE_PX), 90))
            thumbs.append((str(path), f"{hit.label_name}, {hit.distance:.2f}; {hit.license or 'licence unknown'}"))
        visitor.exemplars, gone = found, len(hits) - len(thumbs)
        said = f"{len(thumbs)} exemplars, the nearest first" + (f"; the photos of {gone} are gone." if gone else ".")
        return [gr.Gallery(value=thumbs, visible=True), status(said)]

    def take_exemplar(self, chosen: gr.SelectData, request: gr.Request) -> list[Any]:
        """Outputs: reference, status."""
        visitor = self._visitor(request)
        return _use_reference(visitor, _at(visitor.exemplars, chosen.index))

    # ---- edit

    def take_model(self, label: str, *, scale_max: float) -> list[Any]:
        """Outputs: guidance scale, status."""
        return [self.models.guidance_scale(label, scale_max), gr.skip()]

    def new_seed(self) -> int:
        return random.SystemRandom().randrange(SEED_MAX)

    def edit(
        self,
        kind: str,
        layer: bytes,
        box: str,
        guidance_scale: float,
        n: int,
        seed: int | None,
        steps: int,
        sampler: str,
        protocol: ProtocolName,
        model: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, Gradio's way to ask for one
    ) -> list[Any]:
        """Outputs: results, gallery, comparison, PNG, recipe, status."""
        visitor = self._visitor(request)
        asked = visitor.begin()
        photo, reference = _photo_of(asked.photo), asked.reference
        if reference is None:
            raise PageError("Choose a reference: a picture of what should appear in the hole.")
        if kind == MASK and asked.hole_mask is None:
            raise PageError("Choose a mask file, or mark the hole by brush or box.")
        if seed is None or not 0 <= seed <= SEED_MAX:
            raise PageError(f"The seed is a whole number from 0 to {SEED_MAX}.")
        hole: Any
        if kind == BOX:
            hole = boxed_hole(box, photo.pixels)
        elif kind == MASK:
            hole = asked.hole_mask
        else:
            hole = brushed_hole(layer, photo.pixels)
        sampling = Sampling(
            guidance_scale=float(guidance_scale),
            steps=int(steps),
            sampler=None if sampler == OWN_SAMPLER else sampler,  # type: ignore[arg-type]  # Gradio has checked it
        )
        total, done = sampling.steps * -(-n // BATCH_ROWS), 0

        def count() -> None:
            nonlocal done
            done = min(done + 1, total)  # PLMS does one more
            progress((done, total), desc="Editing", unit="steps")

        progress((0, sampling.steps), desc="Preparing", unit="steps")  # until a model is loaded
        with self._editing:
            refuse_if_set(asked.stop)
            loaded = self.models.load(model)
            print(f"pbe page: begin {n} edits of {photo.size}, {total} steps", flush=True)
            try:
                edits = loaded.editor.edit(
                    photo.pixels,
                    mask_of(hole, photo.pixels),
                    reference.pixels,
                    seed=int(seed),
                    n=n,
                    sampling=sampling,
                    protocol=PROTOCOLS[protocol],
                    on_step=stopping(asked.stop, count),
                )
            except StoppedError:
                print(f"pbe page: an edit was stopped after {done} of {total} steps", flush=True)
                raise
        print(f"pbe page: made {n} edits", flush=True)
        recipes = recipes_of(
            edits,
            editor=loaded.editor,
            model=loaded.label,
            weights_sha256=loaded.weights_sha256,
            photo=Picture.embedded("photo", photo.data),
            hole=hole_picture(hole),
            reference=Picture.embedded("reference", reference.data),
            reference_box=None,
            seed=int(seed),
            sampling=sampling,
            size_px=None,
            context_factor=None,
            protocol=protocol,
            reference_fit=None,
        )
        thumbs = [
            (str(visitor.write("edit.jpg", images.encode_jpeg(shown(edit, REFERENCE_PX), 92))), f"seed {int(seed) + k}")
            for k, edit in enumerate(edits)
        ]
        refuse_if_set(asked.stop)  # the page has said that it was cancelled, and shows the edits before
        visitor.finish(Result(photo, edits, recipes))
        said = f"{len(edits)} edits are ready." if len(edits) > 1 else "The edit is ready."
        return [
            gr.update(visible=True),
            gr.Gallery(value=thumbs, selected_index=0),
            *_chosen(visitor, 0),
            status(said, done=True),
        ]

    def stop(self, request: gr.Request) -> list[Any]:
        """The edit ends after its step. Outputs: edit button, cancel button, status."""
        self._visitor(request).stop()
        return [*self.idle(), status(CANCELLED)]

    def busy(self, request: gr.Request) -> list[Any]:
        """The click, before the queue takes or refuses it. Outputs: edit button, cancel button."""
        self._visitor(request).ask()
        return [gr.update(interactive=False), gr.update(interactive=True)]

    def idle(self) -> list[Any]:
        """Outputs: edit button, cancel button."""
        return [gr.update(interactive=True), gr.update(interactive=False)]

    def refuse_edit(self, request: gr.Request) -> list[Any]:
        """The queue took no more; Gradio calls a cancelled edit a failure too. Outputs as of stop."""
        asked = self._visitor(request).asked
        return [*self.idle(), status(CANCELLED) if asked and asked.stop.is_set() else status(BUSY, wrong=True)]

    def refuse_picture(self) -> list[Any]:
        """The same for an upload. Outputs: photo or reference, status."""
        return [None, status(BUSY, wrong=True)]

    def choose(self, chosen: gr.SelectData, request: gr.Request) -> list[Any]:
        """Outputs: comparison, PNG, recipe, status."""
        return [*_chosen(self._visitor(request), chosen.index), gr.skip()]

    def leave(self, request: gr.Request) -> None:
        self._visitors.leave(request.session_hash)

    def _visitor(self, request: gr.Request) -> Visitor:
        return self._visitors.of(request.session_hash)


def _use_photo(visitor: Visitor, upload: Upload) -> list[Any]:
    visitor.photo, visitor.hole_mask = upload, None
    said = f"Photo of {upload.size}. Now mark the hole, and choose a reference."
    return [None, images.encode_jpeg(shown(upload.pixels), 92), None, status(said)]


def _use_reference(visitor: Visitor, upload: Upload) -> list[Any]:
    visitor.reference = upload
    path = visitor.write("reference.jpg", images.encode_jpeg(shown(upload.pixels, REFERENCE_PX), 92))
    return [str(path), status(f"Reference of {upload.size}.")]


def _chosen(visitor: Visitor, index: object) -> list[Any]:
    """Comparison, PNG and recipe of one of the result's edits."""
    result = visitor.result
    if result is None or not isinstance(index, int) or not 0 <= index < len(result.edits):
        raise PageError(GONE)
    if index not in result.files:
        recipe, edit = result.recipes[index], result.edits[index]
        name = f"edit-seed-{recipe.seed}"
        result.files[index] = Files(
            before=visitor.write("before.jpg", images.encode_jpeg(shown(result.photo.pixels), 95)),
            after=visitor.write("after.jpg", images.encode_jpeg(shown(edit), 95)),
            png=visitor.write(f"{name}.png", png_with_recipe(edit, recipe)),
            recipe=visitor.write(f"{name}.json", recipe.to_json().encode()),
        )
    visitor.chosen, files = index, result.files[index]
    return [(str(files.before), str(files.after)), str(files.png), str(files.recipe)]


def _photo_of(photo: Upload | None) -> Upload:
    if photo is None:
        raise PageError("Choose a photo first. After a lost connection, choose it again.")
    return photo


def _at(items: Sequence[Any], index: object) -> Any:
    if not isinstance(index, int) or not 0 <= index < len(items):
        raise PageError(GONE)
    return items[index]
