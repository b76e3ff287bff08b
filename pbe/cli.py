"""`pbe`: the command line. Argument parsing only; the work is in `Editor`."""

import argparse
import sys
from pathlib import Path

import numpy as np


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pbe", description="Paint by Example: exemplar-based image editing")
    commands = parser.add_subparsers(dest="command", required=True)
    edit = commands.add_parser("edit", help="fill the hole of a photo after a reference image")
    edit.add_argument("photo", type=Path)
    edit.add_argument("--mask", type=Path, required=True, help="image of the photo's size, white where the edit goes")
    edit.add_argument("--reference", type=Path, required=True, help="image of what should appear there")
    edit.add_argument("--model", type=Path, required=True, help="model folder, e.g. models/full")
    edit.add_argument("--out", type=Path, required=True, help="PNG to write")
    edit.add_argument("--seed", type=int, default=42)
    edit.add_argument("--scale", type=float, default=None, help="guidance scale, 1 = none")
    edit.add_argument("--steps", type=int, default=None, help="sampling steps")
    args = parser.parse_args(argv)
    try:
        _edit(args)
    except (ValueError, OSError) as error:
        print(f"pbe: error: {error}", file=sys.stderr)
        return 1
    return 0


def _edit(args: argparse.Namespace) -> None:
    from pbe.data import images
    from pbe.edit import DEFAULT_SCALE, DEFAULT_STEPS, Editor

    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: must end in .png")
    photo, mask, reference = (_read(path) for path in (args.photo, args.mask, args.reference))
    if mask.shape != photo.shape:
        raise ValueError(
            f"{args.mask} is {mask.shape[1]} x {mask.shape[0]} px, the photo {photo.shape[1]} x {photo.shape[0]}"
        )
    edited = Editor.load(args.model).edit(
        photo,
        mask.max(axis=2) >= 128,
        reference,
        seed=args.seed,
        guidance_scale=DEFAULT_SCALE if args.scale is None else args.scale,
        steps=DEFAULT_STEPS if args.steps is None else args.steps,
    )
    args.out.write_bytes(images.encode_png(edited))
    print(f"wrote {args.out}")


def _read(path: Path) -> np.ndarray:
    from pbe.data import images

    try:
        return images.decode(path.read_bytes())
    except images.ImageError as error:
        raise ValueError(f"{path}: {error}") from None
