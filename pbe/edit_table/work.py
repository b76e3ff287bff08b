"""The edits of a table's jobs, in this process or a group at a time.

    plan = read_table(Path("edits.csv"), Defaults(seed=42, n=1, scales=(5.0,)), models=["models/full"])
    for there, results in edit_here(plan.groups, Work(...), ResultsFolder(Path("out"))): ...

A group is what goes through the network at once.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.boxes import Box
from pbe.data.images import ImageError, open_picture
from pbe.data.inputs import decode_picture, hole_of_box, hole_of_mask, part_of
from pbe.diffusion.sampling import Sampling
from pbe.diffusion.settings import SamplerName
from pbe.edit import BATCH_ROWS, Editor, EditTask
from pbe.edit_table.results import Result, ResultsFolder
from pbe.edit_table.rows import Job
from pbe.errors import UserError, one_line
from pbe.model.settings import EditDtype
from pbe.protocol import Fit
from pbe.recipe import (
    Picture,
    ProtocolName,
    png_with_recipe,
    protocol_of,
    recipes_of,
)

READERS = 2  # threads that read and decode pictures while the model works


@dataclass(frozen=True)
class EditSettings:
    """What all rows have in common."""

    steps: int
    sampler: SamplerName | None
    size_px: int | None
    context_factor: float | None
    protocol: ProtocolName
    reference_fit: Fit | None
    dtype: EditDtype | None


@dataclass(frozen=True)
class Opened:
    """A job's pictures as files; identity: digest of all that its edits depend on."""

    job: Job
    photo: Picture
    hole: Picture | Box
    reference: Picture
    identity: str


@dataclass(frozen=True)
class Ready:
    """A job whose pictures are decoded."""

    opened: Opened
    photo: np.ndarray
    hole_mask: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Work:
    """How jobs become results. folder: the table's; out: the results'; models, weights: each one's folder and sha256.

    All paths are absolute, for processes that work elsewhere.
    """

    folder: Path
    out: Path
    settings: EditSettings
    models: dict[str, Path]
    weights: dict[str, str]

    def editor(self, model: str, device: str | None = None) -> Editor:
        """Raises ModelError, WeightsError."""
        return Editor.load(self.models[model], device=device, dtype=self.settings.dtype)

    def open(self, job: Job) -> Opened:
        """Read the job's files. Raises ImageError and OSError that name the file."""
        row = job.row
        photo, reference = self._picture(row.photo), self._picture(row.reference)
        hole: Picture | Box | None = row.box if row.mask is None else self._picture(row.mask)
        assert hole is not None
        parts = [
            photo.sha256,
            asdict(hole) if isinstance(hole, Box) else hole.sha256,
            reference.sha256,
            None if row.reference_box is None else asdict(row.reference_box),
            [job.scale, job.seed, len(job.pngs), self.weights[job.model], asdict(self.settings)],
        ]
        identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return Opened(job, photo, hole, reference, identity)

    def _picture(self, name: str) -> Picture:
        path = self.folder / name
        try:
            data = open_picture(path).data
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
        except OSError as error:
            raise ImageError(f"{name}: {one_line(error.strerror)}") from None
        return Picture.named(path, data, folder=self.out).model_copy(update={"data": data})

    def decode(self, opened: Opened) -> Ready:
        """Raises RecipeError, EditInputError."""
        row, hole = opened.job.row, opened.hole
        photo = decode_picture(opened.photo.read(None), row.photo)
        hole_mask = (
            hole_of_box(hole, photo, row.photo)
            if isinstance(hole, Box)
            else hole_of_mask(hole.read(None), photo, row.mask or "")
        )
        reference = part_of(
            decode_picture(opened.reference.read(None), row.reference), row.reference_box, row.reference
        )
        return Ready(opened, photo, hole_mask, reference)

    def edit(self, group: Sequence[Ready], editor: Editor) -> list[Result]:
        """The results of jobs of one model and scale. If one of several fails, the others are done without it."""
        if not group:
            return []
        job, started = group[0].opened.job, time.monotonic()
        sampling = Sampling(job.scale, self.settings.steps, self.settings.sampler)
        tasks = [
            EditTask(ready.photo, ready.hole_mask, ready.reference, ready.opened.job.seed + k)
            for ready in group
            for k in range(len(ready.opened.job.pngs))
        ]
        try:
            edits = editor.edit_batch(
                tasks,
                sampling=sampling,
                size_px=self.settings.size_px,
                context_factor=self.settings.context_factor,
                protocol=protocol_of(self.settings.protocol, self.settings.reference_fit),
            )
        except (UserError, ValueError) as error:
            if len(group) == 1:
                return self.failed(job, error)
            return [result for ready in group for result in self.edit([ready], editor)]
        seconds = (time.monotonic() - started) / len(edits)
        results, start = [], 0
        for ready in group:
            own = edits[start : start + len(ready.opened.job.pngs)]
            results += self._results(ready, own, sampling, editor, rows=min(BATCH_ROWS, len(tasks)), seconds=seconds)
            start += len(own)
        return results

    def _results(
        self, ready: Ready, edits: list[np.ndarray], sampling: Sampling, editor: Editor, *, rows: int, seconds: float
    ) -> list[Result]:
        opened, job, settings = ready.opened, ready.opened.job, self.settings
        hole = opened.hole if isinstance(opened.hole, Box) else opened.hole.model_copy(update={"data": None})
        recipes = recipes_of(
            edits,
            editor=editor,
            model=job.model,
            weights_sha256=self.weights[job.model],
            photo=opened.photo.model_copy(update={"data": None}),
            hole=hole,
            reference=opened.reference.model_copy(update={"data": None}),
            reference_box=job.row.reference_box,
            seed=job.seed,
            sampling=sampling,
            size_px=settings.size_px,
            context_factor=settings.context_factor,
            protocol=settings.protocol,
            reference_fit=settings.reference_fit,
        )
        if len(edits) < rows:  # other jobs' edits were in the same forward
            recipes = [recipe.model_copy(update={"batch_rows": rows}) for recipe in recipes]
        settings_said = asdict(settings) | {"context_factor": recipes[0].model_dump(mode="json")["context_factor"]}
        about = self.about(job) | settings_said | {"identity": opened.identity, "seconds": round(seconds, 4)}
        return [
            Result({"png": png, "seed": job.seed + k, **about}, png_with_recipe(edit, recipe))
            for k, (png, edit, recipe) in enumerate(zip(job.pngs, edits, recipes, strict=True))
        ]

    def about(self, job: Job) -> dict[str, Any]:
        row = job.row
        boxes = {"box": row.box, "reference_box": row.reference_box}
        ends = {key: None if box is None else [box.x0, box.y0, box.x1, box.y1] for key, box in boxes.items()}
        named = {"row": row.number, "photo": row.photo, "mask": row.mask, "reference": row.reference}
        return named | ends | {"model": job.model, "scale": job.scale}

    def failed(self, job: Job, error: Exception) -> list[Result]:
        """A line for each of the job's edits."""
        said = self.about(job) | {"error": one_line(error)}
        return [Result({"png": png, "seed": job.seed + k, **said}) for k, png in enumerate(job.pngs)]


def edit_here(groups: Sequence[tuple[Job, ...]], work: Work, done: ResultsFolder) -> Iterator[tuple[int, list[Result]]]:
    """How many edits of each group are there already, and the results of the others.

    The pictures of the next group are read and decoded while the model edits one, so those of two are in memory.
    """
    editor, loaded = None, ""
    with ThreadPoolExecutor(READERS) as pool:
        ahead: list[list[Future[Ready | list[Result] | None]]] = []
        for index in range(len(groups)):
            while len(ahead) < 2 and index + len(ahead) < len(groups):
                ahead.append([pool.submit(_ready, work, job, done) for job in groups[index + len(ahead)]])
            outcomes = [future.result() for future in ahead.pop(0)]
            ready = [outcome for outcome in outcomes if isinstance(outcome, Ready)]
            results = [result for outcome in outcomes if isinstance(outcome, list) for result in outcome]
            there = [job for job, outcome in zip(groups[index], outcomes, strict=True) if outcome is None]
            model = groups[index][0].model
            if ready and (editor is None or model != loaded):
                editor = None  # frees the other model
                editor, loaded = work.editor(model), model
            if editor is not None:
                results += work.edit(ready, editor)
            yield sum(len(job.pngs) for job in there), results


def _ready(work: Work, job: Job, done: ResultsFolder) -> Ready | list[Result] | None:
    """None: the job's edits are there."""
    try:
        opened = work.open(job)
        return None if done.has(job.pngs, opened.identity, work.about(job)) else work.decode(opened)
    except UserError as error:
        return work.failed(job, error)


def pending_of(
    groups: Sequence[tuple[Job, ...]], work: Work, done: ResultsFolder
) -> Iterator[tuple[tuple[Job, ...], int, list[Result]]]:
    """Of each group: the jobs to do, how many edits are there, and the results of rows that cannot be read."""
    with ThreadPoolExecutor(READERS) as pool:
        for group in groups:
            there, failed, todo = 0, [], []
            for job, outcome in zip(group, pool.map(lambda job: _opened(work, job), group), strict=True):
                if isinstance(outcome, list):
                    failed += outcome
                elif done.has(job.pngs, outcome.identity, work.about(job)):
                    there += len(job.pngs)
                else:
                    todo.append(job)
            yield tuple(todo), there, failed


def _opened(work: Work, job: Job) -> Opened | list[Result]:
    try:
        opened = work.open(job)
        bare = {name: getattr(opened, name).model_copy(update={"data": None}) for name in ("photo", "reference")}
        return replace(opened, **bare)
    except UserError as error:
        return work.failed(job, error)


def edit_group(group: Sequence[Job], work: Work, editor: Editor) -> list[Result]:
    """Read and edit one group, as `edit_here` does."""
    ready, results = [], []
    for job in group:
        try:
            ready.append(work.decode(work.open(job)))
        except UserError as error:
            results += work.failed(job, error)
    return results + work.edit(ready, editor)
