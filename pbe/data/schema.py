"""The data contracts: one pyarrow schema per dataset. Start reading here.

images ----> boxes ----> triplets ----> encoded ----> (training)
  ingest      filter       materialize     encode

Units and polarity are in the names: `_px` pixels, `_frac` fractions of the image side, `hole_mask`
is 1 where the edit goes. Images are stored encoded (JPEG or as received), never as tensors, so that any
Parquet reader can open them. Masks are bit-packed rows (numpy.packbits, big-endian bit order).
Array columns of `encoded` are raw little-endian float16 (or float32); shape and type are in the field's metadata.
An optional column (of masks, pairs, captions and LPIPS, which most data lack) is there only in parts in which a
row has a value.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from pbe.settings import Dtype

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
ENDS = ("xmin", "xmax", "ymin", "ymax")  # of a box
Flag = Literal["is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside"]
FLAGS: tuple[Flag, ...] = get_args(Flag)  # of a box: 1 yes, 0 no, -1 unknown (OpenImages)
HoleKind = Literal["box", "bezier", "segmentation"]
ReferenceKind = Literal["exemplar", "own", "foreign", "pair"]  # what fills a bench item's hole, see BENCH
REFERENCE_KINDS: tuple[ReferenceKind, ...] = get_args(ReferenceKind)
CaptionForm = Literal["label", "label_colour", "caption"]  # what a caption says, see pbe/data/captions.py
CAPTION_FORMS: tuple[CaptionForm, ...] = get_args(CaptionForm)
LpipsNet = Literal["alex", "vgg"]
LPIPS_NETS: tuple[LpipsNet, ...] = get_args(LpipsNet)

OPTIONAL = {b"optional": b"true"}  # metadata of a field

# Why ingest and materialize may drop a row; any other reason is a bug. The filter's reasons are in its RULES.
IMAGE_REASONS = (
    "image_id_invalid",  # empty, or not a plain name: it must not reach a path or an address
    "image_without_box",  # no usable line names it
    "image_id_duplicated",  # two files have this id and differ: the boxes could mean either
    "image_unreadable",  # the bytes do not decode, or only in part
    "image_too_large",  # more bytes or pixels than ingest.max_image_bytes, ingest.max_image_pixels
    "image_unpublished",  # the server has no such image (404, 410) or denies access (401, 403)
    "download_failed",  # no answer, an incomplete one, 429 or 5xx, after all attempts
    "image_changed",  # the file was replaced or vanished (an unplugged drive) while ingest ran
    "image_without_kept_box",  # the filter left the photo no box
)
INGEST_BOX_REASONS = (
    "box_image_id_invalid",  # a line of a box file has an id like image_id_invalid
    "box_unparsable",  # a cell is missing, surplus or not a number
    "box_outside_image",  # a coordinate is outside [0, 1] or min >= max
    "image_missing",  # the box names an image that the source does not have
    "box_image_ambiguous",  # what the box file says fits several photos, or several entries fit one
    "box_size_mismatch",  # the box file states a size that its photo has neither as stored nor upright
    "box_in_other_split",  # an earlier line put its image into another split
    "box_image_rejected",  # the box is fine, its image was rejected
    "box_without_mask",  # only its mask says where it is, and that was rejected
)
# Why ingest may drop a box's mask; the box stays.
MASK_REASONS = (
    "mask_unreadable",  # its file or run lengths do not decode, or its polygons are none
    "mask_size_mismatch",  # of another shape than its photo
    "mask_empty",  # no pixel of it is set
    "mask_full",  # every pixel of the photo is set
    "mask_outside_box",  # less than nine tenths of it are in its box
    "mask_ambiguous",  # greys where it should be black and white, or several objects in one picture
    "mask_without_box",  # no box of the photo has its number
)
# Why ingest may drop a pair's reference; its target stays, with a reference of its own.
PAIR_REASONS = (
    "pair_unreadable",  # the reference is missing, or does not decode
    "pair_of_itself",  # reference and target are the same picture
    "pair_mask_unusable",  # the reference's mask, for one of MASK_REASONS
)
# Transient: `ingest.retry_rejected` retries these.
TRANSIENT_REASONS = ("download_failed", "image_changed")


def picture_field(name: str, *, nullable: bool = False, optional: bool = False) -> pa.Field:
    """Field of encoded images: JPEG, PNG or as received. Its metadata stops the store from compressing them again."""
    metadata = {b"compression": b"none"} | (OPTIONAL if optional else {})
    return pa.field(name, pa.binary(), nullable=nullable or optional, metadata=metadata)


# Annotations as ingest reads them, one row per box, typed but not yet joined to an image. An invalid line
# carries a reason and a detail; its coordinates may be null.
ANNOTATIONS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),  # name of the box file
        # in that file, or the annotation's id in COCO JSON. Parts have it only beside a reason: an inserted line, which
        # shifts those after it, must not change every shard
        pa.field("line", pa.int64()),
        pa.field("split", pa.int8(), nullable=False),  # index into SPLITS; ingest.val_frac may decide it
        pa.field("listed_split", pa.int8(), nullable=False),  # what the file says: where OpenImages keeps the photo
        pa.field("label", pa.string(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        *(pa.field(end, pa.float64()) for end in ENDS),
        *(pa.field(flag, pa.int8(), nullable=False) for flag in FLAGS),
        # the object's mask as the source has it: JSON of a COCO segmentation, or {"file": NAME} below ingest.boxes
        pa.field("mask", pa.string(), metadata=OPTIONAL),
        # another picture of the object, as the source has it: JSON of its address, its mask's, and their versions
        pa.field("pair", pa.string(), metadata=OPTIONAL),
        pa.field("caption", pa.string(), metadata=OPTIONAL),  # the object in words: captions.written_caption
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
# What box files say of photos, by image id and file ("": every file). Boxes are in fractions of the stated size;
# without one, the file's boxes of that photo are in pixels. Of a photo without a row, they are in fractions.
STATED = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("width_px", pa.float64()),
        pa.field("height_px", pa.float64()),
        pa.field("problem", pa.string()),  # why its boxes are rejected as box_image_ambiguous
    ]
)
# What a source knows about its photos without reading them.
PHOTOS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("address", pa.string(), nullable=False),  # relative to the source's base; its `read` takes it
        pa.field("version", pa.string(), nullable=False),  # changes when the file does: sha256, or size and date
        pa.field("license", pa.string()),
        pa.field("author", pa.string()),
        pa.field("source_url", pa.string()),
        pa.field("rotation", pa.int16()),
    ]
)

DESCRIPTOR_BYTES = 192  # of a photo: pbe/data/descriptor.py

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        picture_field("bytes"),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("license", pa.string()),
        pa.field("author", pa.string()),
        pa.field("source_url", pa.string()),
        pa.field("rotation", pa.int16()),  # degrees, as OpenImages states it; never applied
        # EXIF orientation 1..8 that readers must apply to `bytes`; 1 with ingest.exif: ignore. width and height are
        # those of the upright picture
        pa.field("exif_orientation", pa.int8(), nullable=False),
        pa.field("descriptor", pa.binary(DESCRIPTOR_BYTES), nullable=False),
    ]
)

BOXES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("box_index", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        *(pa.field(end, pa.float64(), nullable=False) for end in ENDS),
        *(pa.field(flag, pa.int8(), nullable=False) for flag in FLAGS),
        # the object's mask, of the photo's size: object_masks.ObjectMask.packed. Only ingest's boxes have it
        pa.field("mask", pa.binary(), metadata=OPTIONAL),
        pa.field("caption", pa.string(), metadata=OPTIONAL),  # the object in words, as the box file has it
    ]
)

# Another picture of a box's object, which becomes its reference.
PAIRS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("box_index", pa.int32(), nullable=False),
        picture_field("picture"),  # as received
        pa.field("exif_orientation", pa.int8(), nullable=False),  # to apply to it
        pa.field("width_px", pa.int32(), nullable=False),  # upright, like height and mask
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("mask", pa.binary()),  # as in BOXES; null: the whole picture is the object
    ]
)

REJECTS = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)

TRIPLETS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),
        pa.field("box_index", pa.int32(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        pa.field("caption", pa.string(), metadata=OPTIONAL),  # of the box, hence of its reference
        picture_field("source"),  # JPEG, S x S
        pa.field("box_hole_mask", pa.binary(), nullable=False),  # packed bits, S x S
        pa.field("bezier_hole_mask", pa.binary(), nullable=False),  # packed bits, S x S
        pa.field("segmentation_hole_mask", pa.binary(), metadata=OPTIONAL),  # packed bits, S x S
        picture_field("reference"),  # JPEG, R x R, clean (no augmentation)
        picture_field("pair_reference", optional=True),  # likewise, of the pair
        # the tight box in pixels of the S x S crop, half-open
        pa.field("box_x0_px", pa.float32(), nullable=False),
        pa.field("box_y0_px", pa.float32(), nullable=False),
        pa.field("box_x1_px", pa.float32(), nullable=False),
        pa.field("box_y1_px", pa.float32(), nullable=False),
    ]
)

# What is edited and scored: a crop, its holes, and the references that fill them. Null: the bench has none;
# COCOEE has only box holes and exemplars.
BENCH = pa.schema(
    [
        pa.field("bench_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),  # items of one photo have correlated errors
        pa.field("label_name", pa.string(), nullable=False),
        picture_field("source"),  # PNG, S x S
        pa.field("box_hole_mask", pa.binary(), nullable=False),  # packed bits, S x S
        pa.field("bezier_hole_mask", pa.binary()),  # packed bits, S x S
        pa.field("segmentation_hole_mask", pa.binary(), metadata=OPTIONAL),  # packed bits, S x S
        picture_field("exemplar"),  # an object like the hidden one, from another photo
        pa.field("exemplar_image_id", pa.string(), nullable=False),
        # false: no other photo has the class, so the nearest object of any class is used
        pa.field("exemplar_same_class", pa.bool_()),
        pa.field("exemplar_caption", pa.string(), metadata=OPTIONAL),
        picture_field("own", nullable=True),  # the hidden object itself, as in training
        picture_field("foreign", nullable=True),  # a random object from another photo
        picture_field("pair", optional=True),  # the true other view
        # packed bits, R x R, of the references made here: where each shows its object
        pa.field("exemplar_object_mask", pa.binary(), metadata=OPTIONAL),
        pa.field("own_object_mask", pa.binary(), metadata=OPTIONAL),
        pa.field("foreign_object_mask", pa.binary(), metadata=OPTIONAL),
    ]
)
# What one shard gives to the bench: its items without the references, which other shards may have.
BENCH_ITEMS = pa.schema(
    [
        *(BENCH.field(name) for name in ("bench_id", "image_id", "label_name", "source")),
        *(BENCH.field(name) for name in ("box_hole_mask", "bezier_hole_mask", "segmentation_hole_mask", "pair")),
    ]
)
# And its candidates, one row for each box in the order of BOXES.
BENCH_CANDIDATES = pa.schema(
    [
        picture_field("reference"),  # JPEG, R x R
        pa.field("vector", pa.binary(), nullable=False),  # little-endian float32
        pa.field("object_mask", pa.binary(), metadata=OPTIONAL),  # packed bits, R x R
        pa.field("caption", pa.string(), metadata=OPTIONAL),
    ]
)
# Unedited crops that edits are compared with.
REAL_IMAGES = pa.schema([pa.field("real_id", pa.string(), nullable=False), picture_field("picture")])

NO_SEED = 0  # of edits by methods without noise
# One edit of one item. Its key is (bench_id, hole_kind, reference_kind, seed).
EDITS = pa.schema(
    [
        pa.field("bench_id", pa.string(), nullable=False),
        pa.field("hole_kind", pa.string(), nullable=False),  # a HoleKind
        pa.field("reference_kind", pa.string(), nullable=False),  # of REFERENCE_KINDS; of captions, of CAPTION_FORMS
        pa.field("seed", pa.int64(), nullable=False),  # of the noise, or NO_SEED
        picture_field("edit"),  # PNG, S x S
    ]
)

# An extractor's features of one picture; `view` says which part of which picture.
FEATURES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("view", pa.string(), nullable=False),
        pa.field("vector", pa.binary(), nullable=False),  # little-endian float32
    ]
)

# Pixel measurements of one edit, with the key of EDITS.
PIXELS = pa.schema(
    [
        pa.field("bench_id", pa.string(), nullable=False),
        pa.field("hole_kind", pa.string(), nullable=False),
        pa.field("reference_kind", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("hole_psnr_db", pa.float64(), nullable=False),
        pa.field("background_psnr_db", pa.float64(), nullable=False),
        pa.field("background_max_error", pa.float64(), nullable=False),  # levels of 255
        pa.field("background_ssim", pa.float64(), nullable=False),
        pa.field("seam", pa.float64(), nullable=False),  # levels of 255
        pa.field("copy_paste", pa.float64(), nullable=False),
        pa.field("colour_r", pa.float64(), nullable=False),  # mean over the hole, 0..255
        pa.field("colour_g", pa.float64(), nullable=False),
        pa.field("colour_b", pa.float64(), nullable=False),
        pa.field("reference_r", pa.float64(), nullable=False),  # of the reference that was given
        pa.field("reference_g", pa.float64(), nullable=False),
        pa.field("reference_b", pa.float64(), nullable=False),
        # by the network that evaluate.lpips names
        *(
            pa.field(name, pa.float64(), metadata=OPTIONAL)
            for net in LPIPS_NETS
            for name in (f"background_lpips_{net}", f"hole_lpips_{net}")
        ),
    ]
)

# One item's score, mean over seeds, for paired tests and for finding the worst edits.
SCORES = pa.schema(
    [
        pa.field("method", pa.string(), nullable=False),
        pa.field("hole_kind", pa.string(), nullable=False),
        pa.field("reference_kind", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("bench_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


def encoded_schema(
    latent_shape: tuple[int, int, int], token_shape: tuple[int, int, int], dtype: Dtype = "float16"
) -> pa.Schema:
    """Schema of the encoded rows that training reads.

    latent_shape: (channels, height, width) of one latent. token_shape: (draws, tokens, width) of the
    frozen backbone's output for the K reference draws; draw 0 is the clean reference.
    """
    mask_shape = (1, *latent_shape[1:])
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("slot", pa.int32(), nullable=False),
            pa.field("box_index", pa.int32(), nullable=False),
            # posterior of the codec: training draws mean + std * noise at every step
            array_field("source_mean", latent_shape, dtype),
            array_field("source_std", latent_shape, dtype),
            array_field("box_masked_mean", latent_shape, dtype),
            array_field("box_masked_std", latent_shape, dtype),
            array_field("bezier_masked_mean", latent_shape, dtype),
            array_field("bezier_masked_std", latent_shape, dtype),
            # fraction of each latent cell that is hole, [0, 1]
            array_field("box_hole_mask_latent", mask_shape, dtype),
            array_field("bezier_hole_mask_latent", mask_shape, dtype),
            array_field("segmentation_masked_mean", latent_shape, dtype, optional=True),
            array_field("segmentation_masked_std", latent_shape, dtype, optional=True),
            array_field("segmentation_hole_mask_latent", mask_shape, dtype, optional=True),
            array_field("exemplar_tokens", token_shape, dtype),
            array_field("pair_tokens", token_shape, dtype, optional=True),
        ]
    )


_STORED: dict[Dtype, str] = {"float16": "<f2", "float32": "<f4"}


def array_field(name: str, shape: tuple[int, ...], dtype: Dtype = "float16", *, optional: bool = False) -> pa.Field:
    """Field of arrays stored as fixed-size binary; its metadata holds their shape and type."""
    stored = _STORED[dtype]
    metadata = {b"dtype": stored.encode(), b"shape": ",".join(map(str, shape)).encode()}
    kind = pa.binary(np.dtype(stored).itemsize * math.prod(shape))
    return pa.field(name, kind, nullable=optional, metadata=metadata | (OPTIONAL if optional else {}))


def holds_array(field: pa.Field) -> bool:
    """Return whether the field is an `array_field`."""
    return b"shape" in (field.metadata or {})


def array_shape(field: pa.Field) -> tuple[int, ...]:
    """Shape of an `array_field`. Raises ValueError for any other field."""
    return tuple(int(part) for part in _array_metadata(field)[b"shape"].split(b","))


def array_bytes(field: pa.Field, value: np.ndarray) -> bytes:
    """Encode `value`, which has the field's shape, as the field stores it. Raises ValueError if that holds no array."""
    return value.astype(_array_dtype(field)).tobytes()


def array_value(field: pa.Field, stored: bytes) -> np.ndarray:
    """Decode to a float32 array of the field's shape. Raises ValueError if the field holds no array."""
    flat = np.frombuffer(stored, _array_dtype(field))
    return flat.reshape(array_shape(field)).astype(np.float32)


def array_column(table: pa.Table, name: str) -> np.ndarray:
    """An `array_field` of all rows as a view (rows, *shape) of the table's memory, in the stored type, read-only.

    The column has at most one chunk, as a row group has; rows of nulls are undefined. Raises ValueError if it holds no
    array.
    """
    field = table.schema.field(name)
    shape, stored = array_shape(field), _array_dtype(field)
    chunks = table.column(name).chunks
    if not chunks:
        return np.empty((0, *shape), stored)
    [chunk] = chunks
    values = np.frombuffer(chunk.buffers()[1], stored)
    return values.reshape(-1, *shape)[chunk.offset : chunk.offset + len(chunk)]


def _array_dtype(field: pa.Field) -> np.dtype:
    return np.dtype(_array_metadata(field)[b"dtype"].decode())


def _array_metadata(field: pa.Field) -> dict[bytes, bytes]:
    if not holds_array(field):
        raise ValueError(f"column {field.name} holds no array")
    return field.metadata


def table_from_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Like pa.Table.from_pylist, but joins binary columns (megabytes of pictures) in one step.

    pyarrow appends value by value to a buffer that doubles: 0.25 ms per triplet in a fresh process, a tenth of all
    the work.
    """
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        columns.append(_joined(values) if field.type == pa.binary() else pa.array(values, field.type))
    return without_empty(pa.Table.from_arrays(columns, schema=schema))


def _joined(values: list[bytes | None]) -> pa.Array | pa.ChunkedArray:
    present = [value for value in values if value is not None]
    ends = np.cumsum([0, *map(len, present)])
    if len(present) < len(values) or ends[-1] > np.iinfo(np.int32).max:  # pyarrow splits it into chunks
        return pa.array(values, pa.binary())
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(present))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def is_optional(field: pa.Field) -> bool:
    """Return whether the field's column may be absent."""
    return b"optional" in (field.metadata or {})


def without_empty(table: pa.Table) -> pa.Table:
    """Drop the optional columns in which no row has a value."""
    empty = [
        field.name
        for index, field in enumerate(table.schema)
        if is_optional(field) and table.column(index).null_count == table.num_rows
    ]
    return table.drop_columns(empty)


def with_optional(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Add the schema's optional columns that `table` lacks, without values, each in its place."""
    for index, field in enumerate(schema):
        if is_optional(field) and field.name not in table.schema.names:
            table = table.add_column(min(index, table.num_columns), field, pa.nulls(table.num_rows, field.type))
    return table


def require(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return `table` with exactly `schema` (names, types, order), of which optional columns may have been missing.

    Raises ValueError naming `where` for any other table.
    """
    table = with_optional(table, schema)
    if not table.schema.equals(schema, check_metadata=False):
        missing = [field.name for field in schema if field.name not in table.schema.names]
        wrong = [
            f"{field.name} is {table.schema.field(field.name).type}, expected {field.type}"
            for field in schema
            if field.name in table.schema.names and table.schema.field(field.name).type != field.type
        ]
        extra = [name for name in table.schema.names if name not in schema.names]
        detail = f"missing {missing}, wrong {wrong}, unknown {extra}"
        if not (missing or wrong or extra):
            detail = f"order or nullability differ: {table.schema.to_string(show_field_metadata=False)!r}"
        raise ValueError(f"{where}: not the expected columns: {detail}")
    return table
