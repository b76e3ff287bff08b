"""`pbe edit`: arguments, the pictures they name, and what is written."""

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pbe.cli.arguments import at_least, box, read_file, refuse_unwritable_png
from pbe.cli.default_model import KEPT, TRAINED, default_model

# in the rows of a table, or not with one
IN_ROWS = {"photo", "mask", "box", "reference", "caption", "reference_box", "recipe", "grid"}


def add_edit_parser(commands: Any) -> None:
    edit = commands.add_parser("edit", help="fill a hole in a photo from a reference image or a caption")
    edit.add_argument("photo", type=Path, nargs="?")
    hole = edit.add_mutually_exclusive_group()
    hole.add_argument("--mask", type=Path, help="image of the photo's size, white where the edit goes")
    hole.add_argument("--box", type=box, metavar="X0,Y0,X1,Y1", help="pixels of the photo, instead of a mask")
    what = edit.add_mutually_exclusive_group()
    what.add_argument("--reference", type=Path, help="image of what should appear there")
    what.add_argument("--caption", help='its description, e.g. "a photo of a red car", for a model trained on text')
    edit.add_argument("--reference-box", type=box, metavar="X0,Y0,X1,Y1", help="the part of the reference to use")
    edit.add_argument(
        "--model",
        action="append",
        help=f"model folder, or org/name@revision on the hub; default: {TRAINED} if trained, otherwise {KEPT}",
    )
    edit.add_argument(
        "--out", type=Path, required=True, help="PNG to write; with --n or --table a folder, or a PNG with --grid"
    )
    edit.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="edit every row of a .csv, .jsonl or .parquet: photo, mask or box, reference, and if you like "
        "reference_box, seed, n, scale, name; with several --model or --scale, each of them",
    )
    edit.add_argument("--actors", type=at_least(1, int), help="with --table: number of Ray actors that edit its rows")
    edit.add_argument(
        "--recipe", type=Path, metavar="FILE", help="an edit's PNG, or its recipe as JSON: make that edit again"
    )
    edit.add_argument("--n", type=at_least(1, int), default=1, help="number of edits, with seeds SEED, SEED + 1 ...")
    edit.add_argument("--grid", action="store_true", help="photo with its hole, reference and edits in one picture")
    edit.add_argument("--seed", type=at_least(0, int), default=42)
    edit.add_argument(
        "--scale", type=float, action="append", help="guidance scale, 1 = none; default: the model's, or 5"
    )
    edit.add_argument("--steps", type=int, default=None, help="sampling steps; default: 50")
    edit.add_argument("--sampler", choices=["pndm", "ddim", "dpm++", "unipc"], help="default: the model's own")
    edit.add_argument(
        "--dtype",
        choices=["float32", "tf32", "bfloat16", "float16"],
        help="of the networks; default: float32, on a GPU bfloat16, or float16 where it is too old for that",
    )
    edit.add_argument("--size", type=at_least(1, int), help="px at which the network works; default: the model's")
    edit.add_argument(
        "--context",
        type=at_least(1, float),
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
    edit.set_defaults(run=run, defaults={action.dest: action.default for action in edit._actions})


def run(args: argparse.Namespace) -> int:
    if args.recipe is not None:
        _refuse_beside("recipe", args, {"recipe", "out", "model"})  # --model: where the recipe's weights are now
    elif args.table is not None:
        _refuse_beside("table", args, vars(args).keys() - IN_ROWS)
    else:
        needed = {"a photo": args.photo, "--mask or --box": args.mask or args.box}
        needed |= {"--reference or --caption": args.reference if args.caption is None else args.caption}
        if missing := [name for name, value in needed.items() if value is None]:
            raise ValueError(f"an edit needs {' and '.join(missing)}; or --recipe FILE, or --table FILE")
    if args.table is None:
        if args.actors is not None:
            raise ValueError("--actors: only with --table")
        for name in ("model", "scale"):
            if len(getattr(args, name) or []) > 1:
                raise ValueError(f"--{name} several times: only with --table")
    if args.recipe is not None:
        return _again(args)
    args.model = args.model or [default_model()]
    if args.table is not None:
        from pbe.cli.edit_table import run_table

        return run_table(args, args.on_ray)
    return _edit(args)


def _refuse_beside(mode: str, args: argparse.Namespace, allowed: Collection[str]) -> None:
    """Raise ValueError for an argument that `--mode` would ignore."""
    for name, default in args.defaults.items():
        if name not in allowed and getattr(args, name, default) != default:
            option = "a photo" if name == "photo" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} cannot be combined with --{mode}; leave {option} out")


def _edit(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pbe.data import images
    from pbe.data.contact import edits_sheet
    from pbe.data.inputs import decode_picture, hole_of_box, hole_of_mask
    from pbe.edit import BATCH_ROWS, Editor, default_sampling, model_folder
    from pbe.model.folder import guidance_scale_of
    from pbe.model.weights import weights_sha256
    from pbe.recipe import Picture, png_with_recipe, protocol_of, recipes_of
    from pbe.store import write_whole

    one_file = args.n == 1 or args.grid
    if one_file:
        refuse_unwritable_png(args.out)
    elif args.out.suffix or args.out.is_file():
        raise ValueError(f"--out {args.out}: {args.n} edits need a folder, or --grid for one picture")
    _refuse_replaced(args, [args.out] if one_file else [args.out / f"seed-{args.seed + k}.png" for k in range(args.n)])
    photo_bytes, mask_bytes = read_file(args.photo), read_file(args.mask) if args.mask else b""
    photo = decode_picture(photo_bytes, str(args.photo))
    reference, reference_bytes = _reference(args)
    hole_mask = (
        hole_of_mask(mask_bytes, photo, str(args.mask))
        if args.mask
        else hole_of_box(args.box, photo, f"--box in {args.photo}")
    )
    model = args.model[0]
    scale = guidance_scale_of(model_folder(model)) if args.scale is None else args.scale[0]
    sampling = replace(default_sampling(scale), sampler=args.sampler)
    if args.steps is not None:
        sampling = replace(sampling, steps=args.steps)
    editor = Editor.load(model, dtype=args.dtype)
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
            protocol=protocol_of(args.protocol, args.reference_fit),
            on_step=bar.update,
        )
    if args.grid:
        shown = None if isinstance(reference, str) else reference
        write_whole(args.out, images.encode_png(edits_sheet(photo, hole_mask, shown, edits)))
        print(f"wrote {args.out}")
        return 0
    folder = args.out.parent if one_file else args.out
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(reference, str):  # recipes are of pictures
        for k, edit in enumerate(edits):
            path = args.out if one_file else folder / f"seed-{args.seed + k}.png"
            write_whole(path, images.encode_png(edit))
            print(f"wrote {path}, without a recipe")
        return 0
    recipes = recipes_of(
        edits,
        editor=editor,
        model=model,
        weights_sha256=weights_sha256(model_folder(model)),
        photo=Picture.named(args.photo, photo_bytes, folder=folder),
        hole=Picture.named(args.mask, mask_bytes, folder=folder) if args.mask else args.box,
        reference=Picture.named(args.reference, reference_bytes, folder=folder),
        reference_box=args.reference_box,
        seed=args.seed,
        sampling=sampling,
        size_px=args.size,
        context_factor=args.context,
        protocol=args.protocol,
        reference_fit=args.reference_fit,
    )
    for recipe, edit in zip(recipes, edits, strict=True):
        path = args.out if one_file else args.out / f"seed-{recipe.seed}.png"
        write_whole(path, png_with_recipe(edit, recipe))
        print(f"wrote {path}")
    return 0


def _refuse_replaced(args: argparse.Namespace, pngs: Sequence[Path]) -> None:
    """Raise ValueError if an edit would be written over its own photo, mask or reference."""
    for name in ("photo", "mask", "reference"):
        given = getattr(args, name)
        if given is not None and Path(given).resolve() in {png.resolve() for png in pngs}:
            raise ValueError(f"--out {args.out}: the edit would replace its own {name}, {given}; choose another --out")


def _reference(args: argparse.Namespace) -> tuple[np.ndarray | str, bytes]:
    """The picture (h, w, 3) uint8, cut to its box, and its file's bytes; or the caption."""
    from pbe.data.inputs import decode_picture, part_of

    if args.caption is not None:
        if args.reference_box is not None:
            raise ValueError("--reference-box needs --reference; it cannot be used with --caption")
        return args.caption, b""
    data = read_file(args.reference)
    reference = decode_picture(data, str(args.reference))
    return part_of(reference, args.reference_box, f"--reference-box of {args.reference}"), data


def _again(args: argparse.Namespace) -> int:
    """Make the edit of a recipe again; exit code 1 if its pixels differ."""
    from pbe.edit import Editor, model_folder
    from pbe.model.hub import is_on_hub
    from pbe.model.weights import weights_sha256
    from pbe.recipe import is_same, png_with_recipe, read_recipe, remake
    from pbe.store import write_whole

    refuse_unwritable_png(args.out)
    recipe = read_recipe(args.recipe)
    model = args.model[0] if args.model else recipe.model
    if args.model is None and is_on_hub(model):
        raise ValueError(f"{args.recipe}: made with {model} from the hub; to allow the download, add --model {model}")
    folder = model_folder(model)
    if weights_sha256(folder) != recipe.weights_sha256:
        raise ValueError(
            f"{args.recipe}: the weights of {model} differ from the recipe's; name the original model with --model"
        )
    editor = Editor.load(folder, dtype=recipe.dtype)
    edit = remake(recipe, editor, folder=args.recipe.parent)
    write_whole(args.out, png_with_recipe(edit, recipe))
    same = is_same(recipe, edit)
    print(f"wrote {args.out}; {'the same, bit for bit' if same else 'not the same pixels'}")
    if not same:
        made = ", ".join(f"{name} {number}" for name, number in recipe.made_with.items())
        print(f"pbe: error: {args.recipe}: made on {recipe.device} with {made}", file=sys.stderr)
    return 0 if same else 1
