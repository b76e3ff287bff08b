"""Turn one shard's annotations and photos into `images`, `boxes` and `rejects` tables."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pbe.data import images as image_codec
from pbe.data.boxfiles.findings import EVERY_FILE
from pbe.data.descriptor import descriptor
from pbe.data.download import PhotoError
from pbe.data.frames import Frame, NotOnPhotoError, place
from pbe.data.object_masks import MaskRejected, ObjectMask, ends_of, picture_of, read_mask, refuse_outside
from pbe.data.pairs import PairRejected, pictures_of, read_reference
from pbe.data.schema import (
    ANNOTATIONS,
    BOXES,
    ENDS,
    FLAGS,
    IMAGES,
    MASK_REASONS,
    PAIRS,
    REJECTS,
    SPLITS,
    table_from_rows,
    with_optional,
)

SHA256_DIGITS = 64
NO_IDS = ("", ".", "..")  # what remains of a file name like .jpg


@dataclass(frozen=True)
class PhotoLimits:
    """What ingest accepts. exif: boxes refer to the upright picture ("apply") or to the stored one ("ignore")."""

    exif: Literal["ignore", "apply"]
    max_pixels: int


@dataclass(frozen=True)
class Photo:
    """A row of PHOTOS, or the derived address of an image that only boxes name."""

    image_id: str
    address: str
    version: str = ""  # see PHOTOS; sha256 of the bytes if the source hashed them
    license: str | None = None
    author: str | None = None
    source_url: str | None = None
    rotation: int | None = None


@dataclass(frozen=True)
class _Read:
    """Exactly one of `row` and `error` is set. frame: set with `row`."""

    photo: Photo
    row: dict[str, Any] | None
    error: PhotoError | None
    frame: Frame | None = None


Statements = Mapping[tuple[str, str], Mapping[str, Any]]  # rows of STATED by image id and file


class _Shard:
    """Rejects and counts of the shard so far."""

    def __init__(self) -> None:
        self.rejects: list[dict[str, str]] = []
        self.counts = dict.fromkeys(("images_in", "images_rejected", "boxes_in", "boxes_rejected"), 0)

    def reject(self, kind: Literal["images", "boxes", "masks", "pairs"], key: str, reason: str, detail: str) -> None:
        self.rejects.append({"stage": "ingest", "key": key, "reason": reason, "detail": detail})
        self.count(f"{kind}_rejected")
        self.count(f"rejected_{reason}")

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def _no_file(name: str) -> bytes:
    raise FileNotFoundError(2, "no such file", name)


def read_shard(
    annotations: pa.Table,
    photos: pa.Table,
    *,
    read: Callable[[str, str], bytes],
    address_without_photo: Callable[[str, str], str | None],
    lists_all: bool,
    limits: PhotoLimits,
    threads: int,
    stated: pa.Table | None = None,
    read_file: Callable[[str], bytes] = _no_file,
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Check every box and read every photo that has one; every dropped row is in `rejects`.

    annotations: ANNOTATIONS. photos: PHOTOS. stated: STATED. read: takes image id and address, returns bytes, raises
    PhotoError. read_file: takes the address of a mask's or reference's picture, raises OSError. Both are called from
    `threads` threads. A mask or reference that cannot be used is rejected, and its box kept; a box without coordinates
    follows from its mask. lists_all: photos without a box count as input and are rejected.
    Returns tables by dataset name, and counts: <images|boxes>_<in|kept|rejected> and rejected_<reason>. Where there are
    any, also masks_ and pairs_<in|kept|rejected>, boxes_clipped, boxes_turned, and images_converted_to_srgb, of those
    kept, whose colours later stages convert.
    """
    shard = _Shard()
    known: dict[str, list[Photo]] = {}
    for row in photos.to_pylist():
        copies = known.setdefault(row["image_id"], [])
        if all(row["address"] != copy.address for copy in copies):  # a list may contain duplicates
            copies.append(Photo(**row))
    statements = {(row["image_id"], row["file"]): row for row in (stated.to_pylist() if stated is not None else ())}
    boxes = _usable_boxes(annotations, known, statements, address_without_photo, shard)
    wanted = sorted(known.items()) if lists_all else sorted((key, known[key]) for key in boxes)

    jobs = []
    for image_id, copies in wanted:
        shard.counts["images_in"] += len(copies)
        if boxes.get(image_id):
            jobs.append(copies)
            continue
        reason, detail = "image_without_box", "no line of the box files names it"
        if image_id in boxes:
            detail = "every line about it was rejected"
        elif image_id in NO_IDS:
            reason, detail = "image_id_invalid", "the file's name gives no id"
        for photo in copies:
            shard.reject("images", photo.address, reason, detail)
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda copies: [_read(photo, read, limits) for photo in copies], jobs))
        fetched = _fetched((box for copies in jobs for box in boxes[copies[0].image_id]), read_file, pool)

    kept_images, kept_boxes, kept_pairs = [], [], list[dict[str, Any]]()
    for tried in results:
        mine = boxes[tried[0].photo.image_id]
        found = _one_photo(tried, shard)
        if found is None:
            for box in mine:
                shard.reject("boxes", box["key"], "box_image_rejected", f"its image {box['image_id']} was rejected")
            continue
        placed = _placed(mine, found, statements, fetched, shard)
        if not placed:
            shard.reject("images", found.photo.address, "image_without_box", "every line about it was rejected")
            continue
        assert found.row is not None
        if image_codec.other_colours(found.row["bytes"]):
            shard.count("images_converted_to_srgb")
        kept_images.append(found.row | {"split": mine[0]["split"]})
        kept_boxes += [box | {"box_index": index} for index, box in enumerate(placed)]
        kept_pairs += _pairs(placed, fetched, limits, shard)
    tables = {
        "images": table_from_rows(kept_images, IMAGES),
        "boxes": table_from_rows(kept_boxes, BOXES),
        "rejects": pa.Table.from_pylist(shard.rejects, schema=REJECTS),
    }
    if kept_pairs:
        tables["pairs"] = table_from_rows(kept_pairs, PAIRS)
    return tables, shard.counts | {"images_kept": len(kept_images), "boxes_kept": len(kept_boxes)}


def _usable_boxes(
    annotations: pa.Table,
    known: dict[str, list[Photo]],
    statements: Statements,
    address_without_photo: Callable[[str, str], str | None],
    shard: _Shard,
) -> dict[str, list[dict[str, Any]]]:
    """Boxes by image id, in file order; images that only boxes name are added to `known`. An image whose
    lines are all invalid has an empty list."""
    boxes: dict[str, list[dict[str, Any]]] = {}
    seen: Counter[tuple[str, str]] = Counter()  # a box without a line is named as the n-th of its file and photo
    for row in with_optional(annotations, ANNOTATIONS).to_pylist():
        if row["reason"] in MASK_REASONS:  # a mask that no box has
            shard.count("masks_in")
            shard.reject("masks", row["file"], row["reason"], row["detail"])
            continue
        shard.count("boxes_in")
        image_id, split = row["image_id"], SPLITS[row["split"]]
        seen[row["file"], image_id] += 1
        place = row["line"] if row["line"] is not None else f"{image_id}#{seen[row['file'], image_id]}"
        key = f"{row['file']}:{place}"
        if row["reason"] == "box_image_id_invalid":
            shard.reject("boxes", key, row["reason"], row["detail"])
            continue
        if image_id not in known:
            address = address_without_photo(image_id, SPLITS[row["listed_split"]])
            if address is None:
                detail = row["detail"] or f"no image file with id '{image_id}'"
                shard.reject("boxes", key, row["reason"] or "image_missing", detail)
                continue
            known[image_id] = [Photo(image_id, address)]
        mine = boxes.setdefault(image_id, [])
        problem = _problem(statements, image_id, row["file"])
        if row["reason"]:
            shard.reject("boxes", key, row["reason"], row["detail"])
        elif problem:
            shard.reject("boxes", key, "box_image_ambiguous", problem)
        elif mine and mine[0]["split"] != split:
            detail = f"{key} puts '{image_id}' into {split}, an earlier line into {mine[0]['split']}"
            shard.reject("boxes", key, "box_in_other_split", detail)
        else:
            names = ("label", "label_name", *ENDS, *FLAGS, "mask", "pair", "caption")
            box = {"key": key, "file": row["file"], "image_id": image_id, "split": split}
            mine.append(box | {name: row[name] for name in names})
    return boxes


def _problem(statements: Statements, image_id: str, file: str) -> str | None:
    found = (statements.get((image_id, where)) for where in (file, EVERY_FILE))
    return next((row["problem"] for row in found if row is not None and row["problem"]), None)


def _pairs(
    boxes: Sequence[dict[str, Any]], read: Callable[[str], bytes], limits: PhotoLimits, shard: _Shard
) -> Iterator[dict[str, Any]]:
    """Rows of PAIRS of the boxes of one photo; where a reference cannot be used, its box has none."""
    for index, box in enumerate(boxes):
        if box["pair"] is None:
            continue
        shard.count("pairs_in")
        try:
            reference = read_reference(box["pair"], read=read, max_pixels=limits.max_pixels)
        except PairRejected as problem:
            shard.reject("pairs", box["key"], problem.reason, str(problem))
            continue
        shard.count("pairs_kept")
        yield {"image_id": box["image_id"], "box_index": index, **reference}


def _placed(
    boxes: Sequence[dict[str, Any]],
    photo: _Read,
    statements: Statements,
    read: Callable[[str], bytes],
    shard: _Shard,
) -> list[dict[str, Any]]:
    """The boxes in fractions of the photo as it is kept, with their masks; those that do not fit it are rejected."""
    assert photo.frame is not None
    out = []
    for box in boxes:
        stated = statements.get((box["image_id"], box["file"]))
        if stated is not None and box["xmin"] is not None:
            try:
                placed = place(box, stated, photo.frame)
            except NotOnPhotoError as error:
                shard.reject("boxes", box["key"], error.reason, str(error))
                continue
            if placed.clipped:
                shard.count("boxes_clipped")
            if placed.turned:
                shard.count("boxes_turned")
            box = box | dict(zip(ENDS, placed.ends, strict=True))
        if (complete := _with_mask(box, stated, photo.frame, read, shard)) is not None:
            out.append(complete)
    return out


def _with_mask(
    box: dict[str, Any], stated: Mapping[str, Any] | None, frame: Frame, read: Callable[[str], bytes], shard: _Shard
) -> dict[str, Any] | None:
    """The box, which is on its photo, with its mask as BOXES has it, or without if that is rejected.

    A box without coordinates gets those of its mask; without a mask it is None, and rejected.
    """
    if box["mask"] is None:
        return box
    shard.count("masks_in")
    size = (stated["width_px"], stated["height_px"]) if stated and stated["width_px"] else None
    try:
        mask = read_mask(box["mask"], stated=size, frame=frame, read=read)
        ends = ends_of(mask) if box["xmin"] is None else tuple(box[name] for name in ENDS)
        refuse_outside(mask, ends)
    except MaskRejected as problem:
        shard.reject("masks", box["key"], problem.reason, str(problem))
        if box["xmin"] is not None:
            return box | {"mask": None}
        shard.reject("boxes", box["key"], "box_without_mask", "its mask was rejected, and it has no coordinates")
        return None
    shard.count("masks_kept")
    return box | dict(zip(ENDS, ends, strict=True)) | {"mask": ObjectMask.of(mask).packed()}


def _fetched(
    boxes: Iterable[Mapping[str, Any]], read: Callable[[str], bytes], pool: ThreadPoolExecutor
) -> Callable[[str], bytes]:
    """Read the pictures of the boxes' masks and pairs, many at a time; return a function from address to bytes."""

    def attempt(address: str) -> bytes | OSError:
        try:
            return read(address)
        except OSError as error:
            return error

    def fetched(address: str) -> bytes:
        data = found[address]
        if isinstance(data, OSError):
            raise data
        return data

    wanted = list(dict.fromkeys(address for box in boxes for address in _addresses(box)))
    found = dict(zip(wanted, pool.map(attempt, wanted), strict=True))
    return fetched


def _addresses(box: Mapping[str, Any]) -> list[str]:
    addresses = [picture_of(box["mask"])] if box["mask"] is not None else []
    if box["pair"]:
        addresses += pictures_of(box["pair"])
    return [address for address in addresses if address]


def _read(photo: Photo, read: Callable[[str, str], bytes], limits: PhotoLimits) -> _Read:
    """Read a photo as an IMAGES row without its split; only decoding it in full shows that it is readable."""
    hashed = len(photo.version) == SHA256_DIGITS
    try:
        data = read(photo.image_id, photo.address)
    except PhotoError as error:
        changed = hashed and error.reason == "image_unreadable"  # it was readable when it was hashed
        return _Read(photo, None, PhotoError("image_changed", str(error)) if changed else error)
    sha256 = hashlib.sha256(data).hexdigest()
    if hashed and sha256 != photo.version:  # the part's name depends on the hashed bytes
        detail = f"{photo.address}: not the bytes that were there when ingest began"
        return _Read(photo, None, PhotoError("image_changed", detail))
    try:
        picture = image_codec.open_picture(data, max_bytes=len(data), max_pixels=limits.max_pixels)  # `read` bounds it
        orientation = picture.header.exif_orientation if limits.exif == "apply" else 1
        decoded = image_codec.decode(data, exif_orientation=orientation, convert=False)
    except image_codec.ImageError as error:
        large = isinstance(error, image_codec.ImageTooLargeError)
        reason = "image_too_large" if large else "image_unreadable"
        return _Read(photo, None, PhotoError(reason, f"{photo.address}: {error}"))
    height_px, width_px = decoded.shape[:2]
    row = {
        "image_id": photo.image_id,
        "bytes": data,
        "width_px": width_px,
        "height_px": height_px,
        "sha256": sha256,
        "license": photo.license,
        "author": photo.author,
        "source_url": photo.source_url,
        "rotation": photo.rotation,
        "exif_orientation": orientation,
        "descriptor": descriptor(decoded),
    }
    return _Read(photo, row, None, Frame(width_px, height_px, picture.header.exif_orientation, limits.exif == "apply"))


def _one_photo(copies: Sequence[_Read], shard: _Shard) -> _Read | None:
    """The first readable file of one id; None if no file is readable or the readable ones differ."""
    read = [copy for copy in copies if copy.row is not None]
    for copy in copies:
        if copy.error is not None:
            shard.reject("images", copy.photo.address, copy.error.reason, str(copy.error))
    if not read:
        return None
    ambiguous = len({copy.row["sha256"] for copy in read if copy.row}) > 1
    for copy in read if ambiguous else read[1:]:
        other = next(found for found in read if found is not copy)
        detail = f"{copy.photo.address} and {other.photo.address} have one id " + (
            "and differ: boxes could mean either" if ambiguous else "and the same bytes; the first is kept"
        )
        shard.reject("images", copy.photo.address, "image_id_duplicated", detail)
    return None if ambiguous else read[0]
