"""COCOEE, the paper's bench, from the archive as it was published.

    test_bench/
      GT_3500/000000000042_GT.png            the photo, 512 x 512
      Mask_bbox_3500/000000000042_mask.png   white (255) where the edit goes
      Ref_3500/000000000042_ref.png          the exemplar, of any size
      id_list.npy                            the ids, int64, unsorted; in upstream's repository

Source: upstream README and ldm/data/test_bench_dataset.py. The ids are COCO annotation ids, not image ids: COCO's
instances JSON, if given, says what each item shows. The photo of an annotation is not in the archive, so each item
counts as a separate photo.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pbe.data import images
from pbe.data.boxfiles.coco import labels_by_id
from pbe.data.files import FileTree, SourceError, named
from pbe.data.masks import MaskError, pack_mask, read_hole_mask
from pbe.data.rng import row_rng, shard_of
from pbe.data.schema import BENCH
from pbe.errors import UserError, one_line
from pbe.evaluate.bench.scopes import WITH_OBJECT_MASKS

ITEMS = 3500
SIDE_PX = 512
HOW_TO_GET = (
    "get test_bench.zip from the link in the README of github.com/Fantasy-Studio/Paint-by-Example (section Test "
    "Benchmark), unpack it, copy id_list.npy of that repository's test_bench beside its three folders, and name the "
    "folder in bench.cocoee"
)
_PARTS = {"source": ("GT_3500", "GT"), "mask": ("Mask_bbox_3500", "mask"), "exemplar": ("Ref_3500", "ref")}


class CocoeeError(UserError, ValueError):
    """The folder is not COCOEE as published; the message says what is missing and how to get it."""


def read_cocoee(
    folder: Path,
    *,
    image_px: int,
    seed: int,
    max_items: int = ITEMS,
    expected_items: int = ITEMS,
    annotations: FileTree | None = None,
) -> pa.Table:
    """Return a BENCH table in the order of id_list.npy, with box holes and exemplars.

    annotations: the COCO instances JSON of the photos, which gives label_name; "" without.

    The archive must be whole; of its items at most `max_items` are taken, chosen by hash of their ids. Foreign
    references are exemplars of other items, drawn at random with `seed`. image_px must be SIDE_PX: nothing is resized.
    Raises CocoeeError.
    """
    ids = _ids(folder, expected_items)
    _refuse_missing(folder, ids)
    if image_px != SIDE_PX:
        raise CocoeeError(
            f"COCOEE is {SIDE_PX} px and is not resized; set materialize.image_px, now {image_px}, to {SIDE_PX}"
        )
    if len(ids) > max_items:
        taken = sorted(range(len(ids)), key=lambda at: shard_of(str(ids[at]), 2**61))[:max_items]
        ids = ids[sorted(taken)]
    labels = _labels(annotations, ids) if annotations is not None else {}
    exemplars = [_exemplar(folder / _file("exemplar", number)) for number in ids]
    rows = []
    for position, number in enumerate(ids):
        source_file, mask_file = folder / _file("source", number), folder / _file("mask", number)
        other = int(row_rng(seed, int(number), "foreign").integers(len(ids) - 1))
        source = _square(source_file)
        rows.append(
            {
                "bench_id": f"{number:012d}",
                "image_id": f"{number:012d}",
                "label_name": labels.get(int(number), ""),
                "source": images.encode_png(source),
                "box_hole_mask": pack_mask(_hole(mask_file)),
                "bezier_hole_mask": None,
                "exemplar": exemplars[position],
                "exemplar_image_id": f"{number:012d}",
                "exemplar_same_class": None,
                "own": None,
                "foreign": exemplars[other + (other >= position)],
            }
        )
    # without the columns that came later: the same bench keeps its bytes
    later = ["exemplar_caption", *(f"{kind}_object_mask" for kind in WITH_OBJECT_MASKS)]
    return pa.Table.from_pylist(rows, schema=BENCH).drop_columns(later)


def _ids(folder: Path, expected_items: int) -> np.ndarray:
    path = folder / "id_list.npy"
    if not folder.is_dir():
        raise CocoeeError(f"bench.cocoee = {folder}: no such folder; {HOW_TO_GET}")
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CocoeeError(f"{path}: not there; {HOW_TO_GET}") from None
    except (ValueError, OSError, EOFError) as error:
        raise CocoeeError(f"{path}: not an array of ids ({' '.join(str(error).split())[:150]})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(np.unique(ids)) != len(ids) or (ids < 0).any():
        raise CocoeeError(
            f"{path}: {ids.dtype} of shape {ids.shape}, expected a one-dimensional array of distinct whole numbers"
        )
    if len(ids) != expected_items:
        raise CocoeeError(f"{path}: {len(ids)} ids, COCOEE has {expected_items}")
    return ids


def _refuse_missing(folder: Path, ids: np.ndarray) -> None:
    missing = [file for part in _PARTS for number in ids if not (folder / (file := _file(part, int(number)))).is_file()]
    if missing:
        total = len(_PARTS) * len(ids)
        raise CocoeeError(f"{folder}: {len(missing)} of its {total} files are missing: {named(missing)}; {HOW_TO_GET}")


def _labels(annotations: FileTree, ids: np.ndarray) -> dict[int, str]:
    """Class name of every id. Raises CocoeeError."""
    numbers = [int(number) for number in ids]
    try:
        labels = labels_by_id(annotations, annotations.only_name, numbers)
    except (SourceError, OSError) as error:
        raise CocoeeError(f"{annotations.key}: {one_line(error)}") from None
    if missing := [str(number) for number in numbers if number not in labels]:
        raise CocoeeError(
            f"{annotations.key}: {annotations.where} has no annotation of {len(missing)} of {len(numbers)} ids: "
            f"{named(missing)}; name the instances JSON of COCOEE's photos, instances_val2017.json"
        )
    return labels


def _file(part: str, number: int) -> str:
    where, suffix = _PARTS[part]
    return f"{where}/{number:012d}_{suffix}.png"


def _exemplar(path: Path) -> bytes:
    """The file's bytes. A colour profile would change what they mean: upstream reads pixels as stored."""
    picture, pixels = _read(path)
    return images.encode_png(pixels) if images.colour_note(picture.data) else picture.data


def _square(path: Path) -> np.ndarray:
    _, pixels = _read(path)
    if pixels.shape[:2] != (SIDE_PX, SIDE_PX):
        raise CocoeeError(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} px, expected {SIDE_PX} x {SIDE_PX}")
    return pixels


def _read(path: Path) -> tuple[images.Picture, np.ndarray]:
    try:
        picture = images.open_picture(path)
        return picture, picture.stored()
    except images.ImageError as error:
        raise CocoeeError(f"{path}: {error}; unpack the archive again") from None


def _hole(path: Path) -> np.ndarray:
    """Return (S, S) bool from a white-on-black picture."""
    _square(path)
    try:
        hole = read_hole_mask(images.open_picture(path))
    except MaskError as error:
        raise CocoeeError(f"{path}: {error}") from None
    if not hole.any() or hole.all():
        raise CocoeeError(
            f"{path}: {'nothing' if not hole.any() else 'everything'} is white; white is where the edit goes"
        )
    return hole
