"""`pbe index` and `pbe find`: arguments, the picture they name, and what is printed and written."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pbe.cli.arguments import at_least, box, read_file, refuse_unwritable_png
from pbe.cli.default_model import default_model
from pbe.errors import printable

if TYPE_CHECKING:
    from pbe.retrieve.index import Hit, Index


def add_index_parser(commands: Any) -> None:
    index = commands.add_parser("index", help="embed the boxes of a data set, so that `pbe find` finds exemplars")
    index.add_argument("--out", type=Path, default=Path("exemplars.index"), help="file to write; default: %(default)s")
    index.add_argument("--model", type=Path, help="model or CLIP folder with the backbone; default: as for pbe edit")
    index.add_argument("--photos", help="folder of photos, local or s3://, instead of this run's data")
    index.add_argument("--boxes", help="their boxes: CSV of OpenImages, COCO JSON, or a folder of such files")
    index.set_defaults(run=run_index)


def add_find_parser(commands: Any) -> None:
    find = commands.add_parser("find", help="find exemplars in an index, by likeness or class")
    find.add_argument("--index", type=Path, default=Path("exemplars.index"), help="default: %(default)s")
    find.add_argument("--like", type=Path, help="picture of an object; with --label only boxes of that class")
    find.add_argument("--like-box", type=box, metavar="X0,Y0,X1,Y1", help="the part of that picture to use, in pixels")
    find.add_argument("--label", help="class; without --like its most typical boxes")
    find.add_argument("--text", help="words, such as 'a red car'; only for an index made with a whole CLIP folder")
    find.add_argument("--k", type=at_least(1, int), default=12, help="number of exemplars; default: %(default)s")
    find.add_argument("--all-boxes", action="store_true", help="also several of one photo; default: its best alone")
    find.add_argument("--model", type=Path, help="folder with the index's backbone, if it has moved")
    find.add_argument("--sheet", type=Path, help="PNG to write: the crops in one picture, nearest first")
    find.add_argument("--out", type=Path, help="folder to write the crops to, each a PNG")
    find.add_argument("--json", action="store_true", help="print one JSON line per exemplar instead of a table")
    find.add_argument("--verify", action="store_true", help="compare also a large index with its sha256")
    find.set_defaults(run=run_find)


def run_index(args: argparse.Namespace) -> None:
    from pbe.model.weights import load_exemplar_backbone
    from pbe.places import repo_root, storage_uri
    from pbe.retrieve.build import Embedder, absolute, build_from_folder, build_from_run
    from pbe.retrieve.embed import default_device
    from pbe.store import Store, load_manifest

    if (args.photos is None) != (args.boxes is None):
        raise ValueError("--photos and --boxes go together")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: name a file in a folder that exists")
    root, bar = repo_root(), sys.stderr.isatty()
    model = Path(args.model or default_model()).resolve()
    backbone, pad_px = load_exemplar_backbone(model)
    device = default_device()
    embedder, store = Embedder(backbone.to(device), pad_px, device, str(model)), Store(storage_uri())
    if args.photos is not None:
        built = build_from_folder(args.out, store, absolute(args.photos), absolute(args.boxes), embedder, bar=bar)
    else:
        for stage in ("ingest", "filter"):
            if not (root / "data" / stage / "manifest.json").is_file():
                raise ValueError(f"this run has no data: `dvc repro {stage}` first, or give --photos and --boxes")
        ingested, filtered = (load_manifest(root / "data" / name / "manifest.json") for name in ("ingest", "filter"))
        built = build_from_run(args.out, store, ingested, filtered, embedder, bar=bar)
    size_mb = args.out.stat().st_size / 1e6
    print(f"wrote {args.out}: {built.boxes} boxes of {built.photos} photos, {size_mb:.1f} MB; {built.parts_made} of "
          f"{built.parts} parts made, the others were there")  # fmt: skip


def run_find(args: argparse.Namespace) -> None:
    from pbe.data import images
    from pbe.data.contact import sheet
    from pbe.data.inputs import decode_picture, part_of
    from pbe.retrieve.index import Index
    from pbe.store import write_whole

    if args.like is None and args.label is None and args.text is None:
        raise ValueError("say what to find: --like PICTURE, --label CLASS, both, or --text WORDS")
    if args.like is not None and args.text is not None:
        raise ValueError("--like and --text exclude each other")
    if args.like_box is not None and args.like is None:
        raise ValueError("--like-box: of which picture? --like is missing")
    if args.sheet is not None:
        refuse_unwritable_png(args.sheet)
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; the crops need a folder")
    like = None
    if args.like is not None:
        picture = decode_picture(read_file(args.like), str(args.like))
        like = part_of(picture, args.like_box, f"--like-box of {args.like}")
    index = Index.open(args.index, verify=args.verify)
    chosen: dict[str, Any] = {"label": args.label, "k": args.k, "one_per_photo": not args.all_boxes}
    if args.text is not None:
        hits = index.find_text(args.text, model=args.model, **chosen)
    else:
        backbone = None if like is None else index.backbone(args.model)
        hits = index.find(like=like, backbone=backbone, **chosen)
    print("\n".join(map(printable, _json_lines(hits) if args.json else _table(hits))))
    if args.sheet is None and args.out is None:
        return
    crops = _crops(index, hits)
    if hits and not crops:
        raise ValueError(f"none of the {len(hits)} crops can be cut, so no picture was written; see the lines above")
    if args.out is not None and crops:
        args.out.mkdir(parents=True, exist_ok=True)
        for rank, crop in crops.items():
            write_whole(args.out / _name(rank, hits[rank]), images.encode_png(crop))
        print(f"wrote {len(crops)} crops to {args.out}", file=sys.stderr)
    if args.sheet is not None and crops:
        tiles = [_tile(crop) for crop in crops.values()]
        rows = [tiles[start : start + 6] for start in range(0, len(tiles), 6)]
        write_whole(args.sheet, images.encode_png(sheet([[_tile(like)], *rows] if like is not None else rows)))
        print(f"wrote {args.sheet}", file=sys.stderr)


def _crops(index: "Index", hits: Sequence["Hit"]) -> dict[int, np.ndarray]:
    """Crops by rank; a line says which cannot be cut."""
    from pbe.retrieve.photos import PhotoGoneError

    crops = {}
    for rank, hit in enumerate(hits):
        try:
            crops[rank] = index.crop_of(hit)
        except PhotoGoneError as error:
            print(f"pbe: {printable(str(error))}", file=sys.stderr)
    return crops


def _name(rank: int, hit: "Hit") -> str:
    """A file's name in order of rank. Ids of photos come from others, so what could steer a path is left out."""
    plain = "".join(char if char.isalnum() or char in "-_" else "_" for char in hit.image_id)[:80]
    return f"{rank + 1:03d}-{plain}-{hit.box_index}.png"


def _tile(crop: np.ndarray) -> np.ndarray:
    """The crop in the middle of a white square, its proportions kept."""
    height_px, width_px = crop.shape[:2]
    side_px = max(height_px, width_px)
    out = np.full((side_px, side_px, 3), 255, np.uint8)
    top, left = (side_px - height_px) // 2, (side_px - width_px) // 2
    out[top : top + height_px, left : left + width_px] = crop
    return out


def _json_lines(hits: Sequence["Hit"]) -> list[str]:
    return [json.dumps(asdict(hit)) for hit in hits]


def _table(hits: Sequence["Hit"]) -> list[str]:
    head = ("distance", "photo", "box x0,y0,x1,y1", "class", "licence", "author")
    lines = [head]
    for hit in hits:
        sides = ",".join(f"{side:.3f}" for side in hit.box)
        lines.append(
            (f"{hit.distance:.3f}", hit.image_id, sides, hit.label_name, hit.license or "-", hit.author or "-")
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
