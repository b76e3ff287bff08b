"""`pbe`: the command line. Argument parsing and printing; the work is in the modules it calls."""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from pbe.errors import UserError, printable

Number = TypeVar("Number", int, float)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pbe", description="Paint by Example: exemplar-based image editing")
    commands = parser.add_subparsers(dest="command", required=True)
    edit = commands.add_parser("edit", help="fill a hole in a photo after a reference image")
    edit.add_argument("photo", type=Path)
    hole = edit.add_mutually_exclusive_group(required=True)
    hole.add_argument("--mask", type=Path, help="image of the photo's size, white where the edit goes")
    hole.add_argument("--box", type=_box, metavar="X0,Y0,X1,Y1", help="pixels of the photo, instead of a mask")
    edit.add_argument("--reference", type=Path, required=True, help="image of what should appear there")
    edit.add_argument("--reference-box", type=_box, metavar="X0,Y0,X1,Y1", help="the part of the reference to use")
    edit.add_argument("--model", required=True, help="model folder, e.g. models/full, or org/name@revision on the hub")
    edit.add_argument("--out", type=Path, required=True, help="PNG to write; with --n, a folder, or a PNG with --grid")
    edit.add_argument("--n", type=_at_least(1, int), default=1, help="number of edits, with seeds SEED, SEED + 1 ...")
    edit.add_argument("--grid", action="store_true", help="photo with its hole, reference and edits in one picture")
    edit.add_argument("--seed", type=_at_least(0, int), default=42)
    edit.add_argument("--scale", type=float, default=None, help="guidance scale, 1 = none")
    edit.add_argument("--steps", type=int, default=None, help="sampling steps")
    edit.add_argument("--sampler", choices=["pndm", "ddim", "dpm++", "unipc"], help="default: the model's own")
    edit.add_argument(
        "--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the networks on a GPU; default: fp32"
    )
    edit.add_argument("--size", type=_at_least(1, int), help="px at which the network works; default: the model's")
    edit.add_argument(
        "--context",
        type=_at_least(1, float),
        metavar="FACTOR",
        help="side of the edited square / longer side of the hole, 1 to inf (the largest square); default: 1.6",
    )
    edit.add_argument("--reference-fit", choices=["squash", "pad", "crop"], help="how to fit the encoder's square")
    edit.add_argument(
        "--protocol",
        choices=["ours", "upstream", "diffusers"],
        default="ours",
        help="upstream, diffusers: as they do, the whole photo squashed, nothing pasted back; see pbe/README.md",
    )
    edit.set_defaults(run=_edit)
    export = commands.add_parser("export", help="write a trained model as a folder of the hub's layout, with a card")
    export.add_argument("model", help="variant, e.g. full, or a model folder")
    export.add_argument("--out", type=Path, required=True, help="new folder")
    export.set_defaults(run=_export)
    rejects = commands.add_parser("rejects", help="list what the data stages dropped, by reason, with examples")
    rejects.add_argument("--examples", type=_at_least(0, int), default=3, help="rows shown per reason")
    rejects.add_argument("--out", type=Path, default=None, help="CSV to write, with every row")
    rejects.set_defaults(run=_rejects)
    show = commands.add_parser("show", help="show what a stage made as a picture")
    show.add_argument("what", choices=["triplets"])
    show.add_argument("--ids", nargs="+", default=[], metavar="ID", help="photos to show; default: random rows")
    show.add_argument("--rows", type=_at_least(1, int), default=12, help="number of columns in the picture")
    show.add_argument("--seed", type=_at_least(0, int), default=0, help="seed of the random rows")
    show.add_argument("--out", type=Path, required=True, help="PNG to write")
    show.set_defaults(run=_show)
    doctor = commands.add_parser("doctor", help="check this machine and the settings before a run")
    doctor.add_argument("--gpu", action="store_true", help="also check nccl, bf16, sdpa; train briefly on all GPUs")
    doctor.add_argument("--ranks", type=_at_least(1, int), help="also train briefly with this many ranks (CPU: gloo)")
    doctor.set_defaults(run=_doctor)
    collect = commands.add_parser(
        "gc", help="remove parts and runs of the storage that no manifest in git's history refers to"
    )
    collect.add_argument("--yes", action="store_true", help="remove; without it, only list")
    collect.add_argument("--older-than-h", type=_at_least(0, float), default=24.0, help="least age, hours; default: 24")
    collect.add_argument(
        "--no-run-cache",
        action="store_true",
        help="also remove what only DVC's run cache refers to",
    )
    collect.add_argument(
        "--forget-missing", action="store_true", help="ignore manifests that DVC's cache lacks, and what only they name"
    )
    collect.set_defaults(run=_gc)
    imports = commands.add_parser("import", help="convert published weights to a folder that pbe opens")
    imports.add_argument("source", type=Path, help="a checkpoint of Paint by Example or SD 1.x, or a hub folder")
    imports.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    imports.set_defaults(run=_import)
    mixture = commands.add_parser("import-mixture", help="convert the published mixture of QS, a pickle, to arrays")
    mixture.add_argument("source", type=Path, help="a pickled GaussianMixture of scikit-learn; its code is not run")
    mixture.add_argument("--out", type=Path, required=True, help=".npz to write, for `mixture` of the extractor clip")
    mixture.set_defaults(run=_import_mixture)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (UserError, ValueError, OSError) as error:
        print(f"pbe: error: {printable(' '.join(_with_cure(error).splitlines()))}", file=sys.stderr)
        return 1
    return 0


def _with_cure(error: Exception) -> str:
    from pbe.store import PartError

    if isinstance(error, PartError):  # the commands here read parts of data stages, whose kind is the stage
        return f"{error}; `dvc repro -f -s {error.kind}` makes it again"
    return str(error)


def _at_least(least: int, kind: type[Number]) -> Callable[[str], Number]:
    """An argparse type: a number that is at least `least`."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more")
        return value

    parse.__name__ = kind.__name__  # argparse's own message for other text names it
    return parse


def _export(args: argparse.Namespace) -> None:
    from pbe.export import export_model
    from pbe.model.weights import opens_in_diffusers
    from pbe.places import repo_root

    model = export_model(repo_root(), args.model, args.out)
    where = "diffusers and pbe open it" if opens_in_diffusers(model) else "pbe opens it, diffusers has no class for it"
    print(f"wrote {args.out}; {where}")


def _rejects(args: argparse.Namespace) -> None:
    from pbe.places import repo_root, storage_uri
    from pbe.rejects import count_rejects, made_from_earlier_input, stages_with_rejects, table_text, write_rejects
    from pbe.store import Store

    manifests, store = stages_with_rejects(repo_root()), Store(storage_uri())
    if not manifests:
        raise ValueError("no data stage has run here; run `dvc repro ingest` first")
    reasons = count_rejects(store, manifests, examples=args.examples)
    print(table_text(reasons, manifests, made_from_earlier_input(repo_root())))
    if args.out is not None:
        print(f"wrote {write_rejects(store, manifests, args.out)} rows to {args.out}")


def _show(args: argparse.Namespace) -> None:
    from pbe.data import images
    from pbe.places import repo_root, storage_uri
    from pbe.show import show_triplets
    from pbe.store import Store, load_manifest

    _must_be_writable_png(args.out)
    path = repo_root() / "data" / "materialize" / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path}: not there; run `dvc repro materialize` first")
    manifest = load_manifest(path)
    sheet, names = show_triplets(Store(storage_uri()), manifest, image_ids=args.ids, rows=args.rows, seed=args.seed)
    args.out.write_bytes(images.encode_png(sheet))
    print("\n".join(map(printable, names)))
    print(f"wrote {args.out}")


def _gc(args: argparse.Namespace) -> None:
    from pbe.gc import find_unused, remove
    from pbe.places import repo_root, storage_uri
    from pbe.store import Store

    store = Store(storage_uri())
    unused = find_unused(
        store,
        repo_root(),
        older_than_s=3600 * args.older_than_h,
        run_cache=not args.no_run_cache,
        forget_missing=args.forget_missing,
    )
    for entry in unused:
        print(f"{entry.bytes / 1e6:>10.1f} MB  {entry.age_s / 3600:>7.1f} h old  {printable(entry.path)}")
    total = f"{len(unused)} folders, {sum(entry.bytes for entry in unused) / 1e6:.1f} MB in {store.uri}"
    if args.yes:
        remove(store, unused)
        print(f"removed {total}")
    else:
        print(f"{total} that no manifest of this repository refers to; `pbe gc --yes` removes them")


def _import(args: argparse.Namespace) -> None:
    from pbe.import_weights import import_weights, table_text

    print("\n".join(map(printable, table_text(import_weights(args.source, args.out)).split("\n"))))
    print(f"wrote {args.out}")


def _import_mixture(args: argparse.Namespace) -> None:
    from pbe.evaluate.import_mixture import import_mixture

    mixture = import_mixture(args.source, args.out)
    count, d = mixture.means.shape
    print(f"{args.out}: {count} components, {d} dimensions, {mixture.covariance_type} covariances")


def _edit(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from pbe.data import images
    from pbe.data.contact import edits_sheet
    from pbe.edit import BATCH_ROWS, DEFAULT_SAMPLING, DIFFUSERS, OURS, UPSTREAM, Editor

    one_file = args.n == 1 or args.grid
    if one_file:
        _must_be_writable_png(args.out)
    elif args.out.suffix or args.out.is_file():
        raise ValueError(f"--out {args.out}: {args.n} edits need a folder, or --grid for one picture")
    photo, reference = _read(args.photo), _read(args.reference)
    if args.reference_box is not None:
        reference = reference[_slices(args.reference_box, reference, f"--reference-box of {args.reference}")]
    hole_mask = _hole_mask(args, photo)
    sampling = replace(
        DEFAULT_SAMPLING,
        guidance_scale=DEFAULT_SAMPLING.guidance_scale if args.scale is None else args.scale,
        steps=DEFAULT_SAMPLING.steps if args.steps is None else args.steps,
        sampler=args.sampler,
    )
    editor = Editor.load(args.model, precision=args.precision)
    protocol = {"ours": OURS, "upstream": UPSTREAM, "diffusers": DIFFUSERS}[args.protocol]
    if args.reference_fit is not None:
        protocol = replace(protocol, reference_fit=args.reference_fit)
    with tqdm(total=sampling.steps * -(-args.n // BATCH_ROWS), unit="step", disable=not sys.stderr.isatty()) as bar:
        edits = editor.edit(
            photo,
            hole_mask,
            reference,
            seed=args.seed,
            n=args.n,
            sampling=sampling,
            size_px=args.size,
            context_factor=args.context,
            protocol=protocol,
            on_step=bar.update,
        )
    pictures = {args.out: edits_sheet(photo, hole_mask, reference, edits) if args.grid else edits[0]}
    if not one_file:
        args.out.mkdir(parents=True, exist_ok=True)
        pictures = {args.out / f"seed-{args.seed + k}.png": edit for k, edit in enumerate(edits)}
    for path, picture in pictures.items():
        path.write_bytes(images.encode_png(picture))
        print(f"wrote {path}")


def _hole_mask(args: argparse.Namespace, photo: np.ndarray) -> np.ndarray:
    """(H, W) bool, True where the edit goes: the box or the mask. Raises ValueError for an unsuitable one."""
    if args.box is not None:
        hole_mask = np.zeros(photo.shape[:2], bool)
        hole_mask[_slices(args.box, photo, f"--box in {args.photo}")] = True
        return hole_mask
    from pbe.data import images
    from pbe.data.masks import MaskError, read_hole_mask

    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns above 89 megapixels
            hole_mask = read_hole_mask(images.open_picture(args.mask))
    except (images.ImageError, MaskError) as error:
        raise ValueError(f"{args.mask}: {error}") from None
    if hole_mask.shape != photo.shape[:2]:
        size, photo_size = (f"{array.shape[1]} x {array.shape[0]}" for array in (hole_mask, photo))
        raise ValueError(f"{args.mask} is {size} px, the photo {photo_size}")
    return hole_mask


def _doctor(args: argparse.Namespace) -> int:
    from pbe.doctor import examine
    from pbe.places import repo_root

    levels = []
    for finding in examine(repo_root(), gpu=args.gpu, ranks=args.ranks):
        print(printable(str(finding)), flush=True)
        levels.append(finding.level)
    print(f"{levels.count('fail')} fail, {levels.count('warn')} warn, {levels.count('ok')} ok")
    return 1 if "fail" in levels else 0


def _box(text: str) -> tuple[int, int, int, int]:
    """An argparse type: x0,y0,x1,y1 in pixels, half-open."""
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: four whole numbers are needed, such as 10,20,200,180") from None
    return x0, y0, x1, y1


def _slices(box: tuple[int, int, int, int], image: np.ndarray, what: str) -> tuple[slice, slice]:
    x0, y0, x1, y1 = box
    height_px, width_px = image.shape[:2]
    if not (0 <= x0 < x1 <= width_px and 0 <= y0 < y1 <= height_px):
        raise ValueError(f"{what}: {x0},{y0},{x1},{y1} is not inside its {width_px} x {height_px} px")
    return slice(y0, y1), slice(x0, x1)


def _read(path: Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 sRGB, upright, on white where it is transparent. Raises ValueError."""
    from pbe.data import images

    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns above 89 megapixels
            picture = images.open_picture(path)
        image, alpha = picture.upright(), picture.upright_alpha()
        if note := images.colour_note(picture.data):
            print(f"{path}: {printable(note)}")
    except images.ImageError as error:
        raise ValueError(f"{path}: {error}") from None
    if alpha is None:
        return image
    weight = alpha[..., None] / np.float32(255)
    return np.round(weight * image + (1 - weight) * 255).astype(np.uint8)


def _must_be_writable_png(out: Path) -> None:
    """Check --out before any work starts. Raises ValueError."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: must end in .png")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")


if __name__ == "__main__":
    sys.exit(main())
