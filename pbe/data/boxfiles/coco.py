"""COCO instances JSON as ANNOTATIONS tables. An unusable entry costs no other."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pbe.data.boxfiles.coordinates import ALLOWED, clip, inside, pixel_slack
from pbe.data.boxfiles.findings import Findings, SizePx
from pbe.data.boxfiles.photo_names import PhotoNames, invalid_ids
from pbe.data.captions import written_caption
from pbe.data.files import FileTree, SourceError
from pbe.data.object_masks import POLYGON_POINTS_MIN, run_lengths
from pbe.data.schema import ANNOTATIONS, ENDS, FLAGS
from pbe.errors import one_line

_SHOWN = 80  # characters of an unusable value in a message
EndsPx = tuple[float, float, float, float]  # as ENDS
Key = tuple[bool, str]  # of an id: whether it is a text, and how it reads


@dataclass(frozen=True)
class _Photo:
    """An entry of `images`. reason: why boxes that name it are rejected."""

    image_id: str
    size: SizePx | None
    reason: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class _Row:
    """An annotation. ends_px and size: of usable ones."""

    line: int
    image_id: str = ""
    label: str = ""
    is_group_of: int = -1
    size: SizePx | None = None
    ends_px: EndsPx = (math.nan,) * 4
    mask: str | None = None  # JSON of the segmentation
    caption: str | None = None
    reason: str | None = None
    detail: str | None = None


class _EntryError(Exception):
    """Says why an annotation is not usable."""


def coco_tables(
    tree: FileTree, name: str, split: int, names: PhotoNames, findings: Findings, *, with_masks: bool = False
) -> Iterator[pa.Table]:
    """Yield one table; iscrowd becomes is_group_of. with_masks: the boxes have their segmentations as masks.

    Boxes are in fractions of the size that the file states of the photo, and in pixels where it states none: `findings`
    says which. Raises SourceError for a file that is no COCO instances JSON, or whose boxes are fractions already.
    """
    where = tree.path_of(name)
    coco = _load(tree, name, "images", "categories", "annotations")
    images = _ById(coco["images"], "images", "file_name", where)
    classes = _ById(coco["categories"], "categories", "name", where)
    photos = _photos(images, name, names, findings)
    entries = enumerate(coco["annotations"])
    rows = [_row(entry, number, images, photos, classes, with_masks) for number, entry in entries]
    named = {str(entry.get("name")) for entry in classes.entries.values()}
    findings.counts["boxes_without_class_name"] += sum(not row.reason and row.label not in named for row in rows)
    if rows:
        _refuse_fractions(rows, where)
        yield _table(rows, name, split, findings)


def labels_by_id(tree: FileTree, name: str, ids: Collection[int]) -> dict[int, str]:
    """Class names of the annotations that have these ids; those that the file lacks are left out.

    Raises SourceError for a file that is no COCO instances JSON, and where one of them has no class, or two.
    """
    where = tree.path_of(name)
    coco = _load(tree, name, "categories", "annotations")
    classes, wanted = _ById(coco["categories"], "categories", "name", where), set(ids)
    labels: dict[int, str] = {}
    for entry in coco["annotations"]:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or number not in wanted:
            continue
        try:
            label = _label(entry.get("category_id"), classes)
        except _EntryError as error:
            raise SourceError(f"{where}: annotation {number}: {error}") from None
        if labels.setdefault(number, label) != label:
            raise SourceError(f"{where}: annotation {number} is both {labels[number]!r} and {label!r}")
    return labels


def _load(tree: FileTree, name: str, *keys: str) -> dict[str, Any]:
    """Parse a COCO file; bytes that are not UTF-8 become lone surrogates.

    Raises SourceError for anything else, and for a file without a list under one of `keys`.
    """
    data, where = tree.read(name), tree.path_of(name)
    try:
        try:
            coco = json.loads(data, strict=False)  # a line end within a name costs nothing
        except UnicodeDecodeError:
            coco = json.loads(data.decode("utf-8-sig", errors="surrogateescape"), strict=False)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not a JSON file: {one_line(error)}") from None
    if not isinstance(coco, dict):
        raise SourceError(f"{where}: not a COCO instances JSON: it must be a mapping")
    for key in keys:
        if not isinstance(coco.get(key), list):
            raise SourceError(f"{where}: not a COCO instances JSON: it has no list of {key}")
    return coco


# -- images and categories --------------------------------------------------------------------------------------------


class _ById:
    """Entries by id. 1, 1.0 and "1" mean the same, unless the file has an entry for each.

    entries: the first of each id. again: later ones of the same name, which may say other things.
    """

    def __init__(self, entries: Sequence[Any], what: str, name: str, where: str) -> None:
        """Raises SourceError if entries of two names have one id: boxes could mean either."""
        self.entries: dict[Key, Mapping[str, Any]] = {}
        self.again = list[tuple[Key, Mapping[str, Any]]]()
        for entry in entries:
            key = _key(entry.get("id")) if isinstance(entry, dict) else None
            if key is None:
                continue  # no box can name it
            other = self.entries.setdefault(key, entry)
            if other is entry:
                continue
            if other.get(name) != entry.get(name):
                raise SourceError(
                    f"{where}: {what}: id {entry['id']!r} is both {other.get(name)!r} and {entry.get(name)!r}"
                )
            self.again.append((key, entry))
        self._alike: dict[str, list[Key]] = {}
        for key in self.entries:
            self._alike.setdefault(_plain(key[1]), []).append(key)

    def key_of(self, named: object) -> Key | None:
        """Key of this id, or of the only entry that reads alike; None for what is no id, or reads like several."""
        key = _key(named)
        alike = self._alike.get(_plain(key[1]), []) if key else []
        if key in self.entries or not alike:
            return key
        return alike[0] if len(alike) == 1 else None


def _key(named: object) -> Key | None:
    if isinstance(named, str):
        return (True, named.strip()) if _is_text(named) else None
    if isinstance(named, float) and math.isfinite(named):
        named = int(named) if named.is_integer() else named
    elif not isinstance(named, int) or isinstance(named, bool):
        return None
    return False, str(named)


def _plain(text: str) -> str:
    return (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else text


def _photos(images: _ById, file: str, names: PhotoNames, findings: Findings) -> dict[Key, _Photo]:
    """Photos by key. Notes in `findings` their sizes, and the photos that several entries name."""
    called = {key: entry["file_name"] for key, entry in images.entries.items() if _is_text(entry.get("file_name"))}
    ids = names.ids(pa.array(list(called.values()), pa.string()))
    photos, entries_of = {}, dict[str, list[Key]]()
    wrong = zip(names.missing(ids).to_pylist(), invalid_ids(ids).to_pylist(), strict=True)
    for key, image_id, (missing, invalid) in zip(called, ids.to_pylist(), wrong, strict=True):
        reason = "image_missing" if missing else "box_image_id_invalid" if invalid else None
        detail = f"file_name {_shown(called[key])}: {'no photo is called that' if missing else 'not a name of a photo'}"
        photos[key] = _Photo(image_id, _size(images.entries[key]), reason, detail if reason else None)
        entries_of.setdefault(image_id, []).append(key)
    for image_id, keys in entries_of.items():
        if len(keys) > 1:
            shown = ", ".join(key[1] for key in keys[:3])
            findings.problems[image_id, file] = f"{len(keys)} images of {file} are called that (id {shown})"
        elif photos[keys[0]].reason is None:
            findings.state_size(image_id, file, photos[keys[0]].size)
    for key, entry in images.again:
        if key in photos and photos[key].reason is None:
            findings.state_size(photos[key].image_id, file, _size(entry))
    return photos


def _is_text(value: object) -> bool:
    """False for what a COCO file may have in a name's place, and for text that is not Unicode."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(entry: Mapping[str, Any]) -> SizePx | None:
    """The stated width and height; None where they are missing, zero or no numbers."""
    try:
        width, height = (_number(entry.get(side)) for side in ("width", "height"))
    except _EntryError:
        return None
    return (width, height) if width > 0 and height > 0 else None


# -- annotations ----------------------------------------------------------------------------------------------------


def _row(
    entry: Any, number: int, images: _ById, photos: Mapping[Key, _Photo], classes: _ById, with_masks: bool
) -> _Row:
    if not isinstance(entry, dict):
        return _Row(number, reason="box_unparsable", detail=f"annotation number {number} is no mapping")
    own = entry.get("id")
    if isinstance(own, int) and not isinstance(own, bool) and abs(own) < 2**63:  # it only names the row in messages
        number = own
    key = images.key_of(entry.get("image_id"))
    if key is None or key not in images.entries:
        detail = f"annotation {number}: image_id {_shown(entry.get('image_id'))} is that of no image of the file"
        return _Row(number, key[1] if key else "", reason="image_missing" if key else "box_unparsable", detail=detail)
    photo = photos.get(key)
    if photo is None:
        said = _shown(images.entries[key].get("file_name"))
        detail = f"annotation {number}: image {key[1]} has no usable file_name: {said}"
        return _Row(number, reason="box_image_id_invalid", detail=detail)
    if photo.reason is not None:
        return _Row(number, photo.image_id, reason=photo.reason, detail=photo.detail)
    try:
        label = _label(entry.get("category_id"), classes)
        crowd = entry.get("iscrowd") not in (None, 0, "", "0", False)
        mask = _mask(entry.get("segmentation")) if with_masks else None
        ends_px, caption = _ends_px(entry), _caption(entry.get("caption"))
        return _Row(number, photo.image_id, label, int(crowd), photo.size, ends_px, mask, caption)
    except _EntryError as error:
        return _Row(number, photo.image_id, reason="box_unparsable", detail=f"annotation {number}: {error}")


def _label(category_id: object, classes: _ById) -> str:
    """The class's name; its id where the file has no name for it."""
    key = classes.key_of(category_id)
    if key is None:
        raise _EntryError(f"category_id {_shown(category_id)} is no id, or that of several categories")
    name = classes.entries.get(key, {}).get("name")
    if name is None or name == "":
        return key[1]
    text = name if isinstance(name, str) else str(name)
    if not _is_text(text):
        raise _EntryError(f"the name of category {key[1]} is not in UTF-8: {_shown(text)}")
    return text


def _mask(shape: object) -> str | None:
    """JSON of a segmentation. Only our own rows name a "file": one of a COCO JSON may lie anywhere on this machine."""
    if isinstance(shape, dict):
        return json.dumps({key: value for key, value in shape.items() if key != "file"}) if shape else None
    return json.dumps(shape) if shape else None


def _caption(said: object) -> str | None:
    if said is None:
        return None
    if not isinstance(said, str):
        raise _EntryError(f"caption {_shown(said)} is no text")
    try:
        return written_caption(said)
    except ValueError as error:
        raise _EntryError(str(error)) from None


def _ends_px(entry: Mapping[str, Any]) -> EndsPx:
    """Ends of the bbox, or where there is none, of the segmentation."""
    box = entry.get("bbox")
    is_empty = not box or (isinstance(box, list) and all(value is None for value in box))
    if not is_empty:
        if not isinstance(box, list) or len(box) != len(ENDS):
            raise _EntryError(f"bbox {_shown(box)} is not [x, y, width, height]")
        x, y, width, height = (_number(value) for value in box)
        return x, x + width, y, y + height
    shape = entry.get("segmentation")
    if isinstance(shape, dict):
        return _ends_of_runs(shape)
    if isinstance(shape, list) and shape:
        return _ends_of_polygons(shape)
    raise _EntryError("it has neither bbox nor segmentation")


def _ends_of_polygons(shape: Sequence[Any]) -> EndsPx:
    rings = shape if isinstance(shape[0], list) else [shape]  # some tools write a single one without its brackets
    points: list[float] = []
    for ring in rings:
        if not isinstance(ring, list) or len(ring) % 2:
            raise _EntryError(f"segmentation {_shown(ring)} is no polygon [x, y, x, y, ...]")
        points += [_number(value) for value in ring]
    if len(points) < 2 * POLYGON_POINTS_MIN:
        raise _EntryError(f"segmentation {_shown(shape)} has fewer than {POLYGON_POINTS_MIN} points")
    return min(points[::2]), max(points[::2]), min(points[1::2]), max(points[1::2])


def _ends_of_runs(shape: Mapping[str, Any]) -> EndsPx:
    """Ends of a run-length encoded mask."""
    try:
        lengths, (height, _) = run_lengths(shape)
    except ValueError as error:
        raise _EntryError(str(error)) from None
    ends = np.cumsum(lengths)
    filled = (np.arange(len(lengths)) % 2 == 1) & (lengths > 0)
    first, last = (ends - lengths)[filled], ends[filled] - 1
    if not len(first):
        raise _EntryError("its segmentation is empty")
    across = first // height != last // height  # such a run continues at the next column's top
    top, bottom = np.where(across, 0, first % height), np.where(across, height - 1, last % height)
    return float(first.min() // height), float(last.max() // height + 1), float(top.min()), float(bottom.max() + 1)


def _number(value: Any) -> float:
    """A finite number, which may be a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _EntryError(f"{_shown(value)} is not a number")
    return number


def _shown(value: object) -> str:
    """An unusable value in a message."""
    return one_line(ascii(value), _SHOWN)


# -- the table ------------------------------------------------------------------------------------------------------


def _refuse_fractions(rows: Sequence[_Row], where: str) -> None:
    """Raise SourceError if all boxes end within the first pixel."""
    ends = [row.ends_px for row in rows if row.reason is None]
    if ends and all(0 <= xmin < xmax <= 1 and 0 <= ymin < ymax <= 1 for xmin, xmax, ymin, ymax in ends):
        raise SourceError(
            f"{where}: every box ends within the first pixel; bbox is [x, y, width, height] in pixels of the photo, "
            "not in fractions of it"
        )


def _table(rows: Sequence[_Row], file: str, split: int, findings: Findings) -> pa.Table:
    count = len(rows)
    ends = np.array([row.ends_px for row in rows]).T
    usable = np.array([row.reason is None for row in rows])
    sized = usable & np.array([row.size is not None for row in rows])
    width, height = np.array([row.size or (1.0, 1.0) for row in rows]).T
    size = np.stack([width, width, height, height])
    fractions = ends / size  # of rows without a size: pixels
    clipped, changed = clip(fractions, pixel_slack(width, height))
    fractions = np.where(sized, clipped, fractions)
    xmin, xmax, ymin, ymax = fractions
    valid = np.where(sized, inside(fractions), (xmin < xmax) & (ymin < ymax))
    findings.counts["boxes_clipped"] += int((sized & changed & valid).sum())
    reasons = [row.reason for row in rows]
    details = [row.detail for row in rows]
    for place in np.flatnonzero(usable & ~valid).tolist():
        x0, x1, y0, y1 = fractions[:, place].tolist()
        reasons[place], details[place] = "box_outside_image", f"x {x0}..{x1}, y {y0}..{y1}; {ALLOWED}"
    labels = [row.label for row in rows]
    columns: dict[str, Any] = {
        "image_id": [row.image_id for row in rows],
        "file": [file] * count,
        "line": [row.line for row in rows],
        "split": [split] * count,
        "listed_split": [split] * count,
        "label": labels,
        "label_name": labels,
        **{name: pa.array(values, from_pandas=True) for name, values in zip(ENDS, fractions, strict=True)},
        **dict.fromkeys(FLAGS, [-1] * count),
        "is_group_of": [row.is_group_of for row in rows],
        "mask": [row.mask for row in rows],
        "pair": [None] * count,
        "caption": [row.caption for row in rows],
        "reason": reasons,
        "detail": details,
    }
    return pa.table(columns, schema=ANNOTATIONS)
