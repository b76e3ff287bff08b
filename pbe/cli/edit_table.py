"""`pbe edit --table`: every row, in this process or in Ray actors, into a folder."""

import argparse
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pbe.edit_table.results import Result
    from pbe.edit_table.rows import Job, Plan
    from pbe.edit_table.work import Work

    # groups of jobs, how, number of actors -> the results of one group after the other, in any order
    OnRay = Callable[[Sequence[tuple[Job, ...]], Work, int], Iterator[list[Result]]]

SHEET_ROWS = 12  # of sheet.png


def run_table(args: argparse.Namespace, on_ray: "OnRay | None") -> int:
    """Exit code 1 if a row has an error. Raises ValueError, TableError, OSError."""
    from tqdm import tqdm

    from pbe.diffusion.sampling import Sampling
    from pbe.edit import default_sampling, model_folder
    from pbe.edit_table.results import ResultsFolder
    from pbe.edit_table.rows import Defaults, read_table
    from pbe.edit_table.work import EditSettings, Work, edit_here, pending_of
    from pbe.model.folder import guidance_scale_of
    from pbe.model.weights import weights_sha256

    actors = _actors(args, on_ray)
    defaults = [default_sampling(guidance_scale_of(model_folder(model))) for model in args.model]
    default = defaults[0]
    if not args.scale and any(other != default for other in defaults):
        pairs = zip(args.model, defaults, strict=True)
        said = ", ".join(f"{sampling.guidance_scale:g} of {model}" for model, sampling in pairs)
        raise ValueError(f"the models' guidance scales differ ({said}); name one, or several, with --scale")
    scales = args.scale or [default.guidance_scale]
    settings = EditSettings(
        steps=default.steps if args.steps is None else args.steps,
        sampler=args.sampler,
        size_px=args.size,
        context_factor=args.context,
        protocol=args.protocol,
        reference_fit=args.reference_fit,
        dtype=args.dtype,
    )
    for scale in scales:
        Sampling(scale, settings.steps)  # raises for numbers that no row can have
    for what, given in (("--model", [Path(model).name for model in args.model]), ("--scale", scales)):
        if twice := [value for value in given if given.count(value) > 1]:
            raise ValueError(f"{what} {twice[0]}: twice; the files of its edits would have the same name")
    plan = read_table(args.table, Defaults(args.seed, args.n, tuple(scales)), models=args.model)
    folders = {model: model_folder(model).resolve() for model in args.model}
    weights = {model: weights_sha256(folder) for model, folder in folders.items()}
    work = Work(args.table.parent.resolve(), args.out.resolve(), settings, folders, weights)
    total = sum(len(job.pngs) for job in _jobs(plan))
    there = failed = written = 0
    _refuse_replaced(args, plan, work)
    done = ResultsFolder(args.out, {png for job in _jobs(plan) for png in job.pngs})
    try:
        done.refuse(plan.refused)
        with tqdm(total=total, unit="edit", disable=not sys.stderr.isatty()) as bar:
            rounds: Iterator[tuple[int, list[Result]]]
            if actors and on_ray is not None:
                groups = []
                for todo, found, unread in pending_of(plan.groups, work, done):
                    done.add(unread)
                    there, failed = there + found, failed + len(unread)
                    groups += [todo] if todo else []
                bar.update(there)
                rounds = ((0, results) for results in on_ray(groups, work, actors))
            else:
                rounds = edit_here(plan.groups, work, done)
            for found, results in rounds:
                done.add(results)
                there += found
                failed += sum(result.png is None for result in results)
                written += sum(result.png is not None for result in results)
                bar.update(found + len(results))
    finally:
        done.close()
    failed += len(plan.refused)
    if len(args.model) * len(scales) > 1:
        _write_sheet(plan, work, failed={line["row"] for line in done.errors()})
    print(f"{args.out}: {written} edits written, {there} were there, {failed} failed; each has a line in edits.jsonl")
    for said in list(dict.fromkeys(f"row {line['row']}: {line['error']}" for line in done.errors()))[:3]:
        print(f"pbe: error: {args.table}: {said}", file=sys.stderr)
    return 1 if failed else 0


def _actors(args: argparse.Namespace, on_ray: "OnRay | None") -> int:
    """How many Ray actors; 0: this process. Raises ValueError."""
    address = os.environ.get("RAY_ADDRESS", "")
    if args.actors is None and address in ("", "local"):
        return 0
    asked = f"--actors {args.actors}" if args.actors is not None else f"RAY_ADDRESS={address}"
    if address.startswith(("http://", "https://", "ray://")):
        raise ValueError(
            f"RAY_ADDRESS={address}: a table's pictures are files, which a job would not find; run this on a node of "
            "the cluster, with RAY_ADDRESS set to its head's host:port, or unset it to work here"
        )
    if on_ray is None:
        raise ValueError(f"{asked}: only the command `pbe` starts Ray, not `python -m pbe.cli`")
    return args.actors or 1


def _jobs(plan: "Plan") -> "list[Job]":
    return [job for group in plan.groups for job in group]


def _refuse_replaced(args: argparse.Namespace, plan: "Plan", work: "Work") -> None:
    """Raise ValueError if an edit would be written over a picture that the table names."""
    jobs = _jobs(plan)
    named = {
        (work.folder / name).resolve(): name
        for job in jobs
        for name in (job.row.photo, job.row.mask, job.row.reference)
        if name is not None
    }
    for job in jobs:
        for png in job.pngs:
            if (work.out / png).resolve() in named:
                raise ValueError(
                    f"{args.table}: row {job.row.number}: its edit {png} would replace "
                    f"{named[(work.out / png).resolve()]}, which the table names; choose another --out or name"
                )


def _write_sheet(plan: "Plan", work: "Work", *, failed: Collection[int]) -> None:
    """DIR/sheet.png: of the first rows photo with hole, reference, and the first edit of each model and scale.

    failed: rows left out.
    """
    import numpy as np

    from pbe.data import images
    from pbe.data.contact import edits_sheet
    from pbe.store import write_whole

    firsts: dict[tuple[int, str, float], Job] = {}
    for job in _jobs(plan):
        firsts.setdefault((job.row.number, job.model, job.scale), job)
    jobs = list(firsts.values())
    strips: list[np.ndarray] = []
    for number in sorted({job.row.number for job in jobs} - set(failed)):
        own = [job for job in jobs if job.row.number == number]
        paths = [work.out / job.pngs[0] for job in own]
        if len(strips) == SHEET_ROWS or not all(path.is_file() for path in paths):
            continue
        ready = work.decode(work.open(own[0]))
        edits = [images.decode(path.read_bytes()) for path in paths]
        strips.append(edits_sheet(ready.photo, ready.hole_mask, ready.reference, edits))
    if not strips:
        return
    width_px = max(strip.shape[1] for strip in strips)
    wide = [np.pad(strip, ((0, 4), (0, width_px - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
    write_whole(work.out / "sheet.png", images.encode_png(np.concatenate(wide)))
    columns = ", ".join(f"{Path(job.model).name} at scale {job.scale:g}" for job in own)
    print(f"{work.out / 'sheet.png'}: photo, reference, then {columns}")
