"""The data contracts: one pyarrow schema per dataset (DESIGN section 4). Start reading here.

images ----> boxes ----> triplets ----> encoded ----> (training)
  ingest      filter       materialize     encode

Units and polarity are in the names: `_px` pixels, `_frac` fractions of the image side, `hole_mask`
is 1 where the edit goes. Images are stored encoded (JPEG or as received), never as tensors, so that any
Parquet reader can open them. Masks are bit-packed rows (numpy.packbits, big-endian bit order).
Array columns of `encoded` are raw little-endian float16; their shape is in the field's metadata.
"""

import math

import pyarrow as pa

SPLITS = ("train", "validation", "test")

# Why a row may be dropped. A closed list: a reason that is not here is a bug.
REJECT_REASONS = (
    "image_missing",  # boxes name an image that the source does not have
    "image_without_box",  # the source has an image that no box names
    "image_unreadable",  # the bytes do not decode
    "box_outside_image",  # a coordinate is outside [0, 1] or min >= max
    "box_unparsable",  # a cell of the CSV is missing, left over or not a number
    "box_image_rejected",  # the box is fine, its image was rejected
    "area_below_min",
    "area_above_max",
    "image_without_kept_box",  # the filter left the photo no box
)

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("bytes", pa.binary(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("license", pa.string()),
        pa.field("author", pa.string()),
        pa.field("source_url", pa.string()),
        pa.field("rotation", pa.int16()),
    ]
)

BOXES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("box_index", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        pa.field("xmin", pa.float64(), nullable=False),
        pa.field("xmax", pa.float64(), nullable=False),
        pa.field("ymin", pa.float64(), nullable=False),
        pa.field("ymax", pa.float64(), nullable=False),
        # 1 yes, 0 no, -1 unknown (OpenImages)
        pa.field("is_occluded", pa.int8(), nullable=False),
        pa.field("is_truncated", pa.int8(), nullable=False),
        pa.field("is_group_of", pa.int8(), nullable=False),
        pa.field("is_depiction", pa.int8(), nullable=False),
        pa.field("is_inside", pa.int8(), nullable=False),
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
        pa.field("source", pa.binary(), nullable=False),  # JPEG, S x S
        pa.field("box_hole_mask", pa.binary(), nullable=False),  # packed bits, S x S
        pa.field("bezier_hole_mask", pa.binary(), nullable=False),  # packed bits, S x S
        pa.field("reference", pa.binary(), nullable=False),  # JPEG, R x R, clean (no augmentation)
        # the tight box in pixels of the S x S crop, half-open
        pa.field("box_x0_px", pa.float32(), nullable=False),
        pa.field("box_y0_px", pa.float32(), nullable=False),
        pa.field("box_x1_px", pa.float32(), nullable=False),
        pa.field("box_y1_px", pa.float32(), nullable=False),
    ]
)

# What the judges score: a held-out triplet with its own and a foreign reference.
BENCH = pa.schema(
    [
        pa.field("bench_id", pa.string(), nullable=False),
        # "item": to be edited. "real": an untouched photo crop that the metrics compare with.
        pa.field("role", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        pa.field("source", pa.binary(), nullable=False),
        pa.field("hole_mask", pa.binary(), nullable=False),
        pa.field("hole_kind", pa.string(), nullable=False),  # box | bezier
        pa.field("own_reference", pa.binary(), nullable=False),
        pa.field("foreign_reference", pa.binary(), nullable=False),
        pa.field("foreign_image_id", pa.string(), nullable=False),
    ]
)

EDITS = pa.schema(
    [
        pa.field("bench_id", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("guidance_scale", pa.float64(), nullable=False),
        pa.field("hole_kind", pa.string(), nullable=False),
        pa.field("own_edit", pa.binary(), nullable=False),  # PNG, S x S
        pa.field("foreign_edit", pa.binary(), nullable=False),  # PNG, S x S
    ]
)


def encoded_schema(latent_shape: tuple[int, int, int], token_shape: tuple[int, int, int]) -> pa.Schema:
    """Schema of what training reads.

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
            array_field("source_mean", latent_shape),
            array_field("source_std", latent_shape),
            array_field("box_masked_mean", latent_shape),
            array_field("box_masked_std", latent_shape),
            array_field("bezier_masked_mean", latent_shape),
            array_field("bezier_masked_std", latent_shape),
            # fraction of each latent cell that is hole, [0, 1]
            array_field("box_hole_mask_latent", mask_shape),
            array_field("bezier_hole_mask_latent", mask_shape),
            array_field("exemplar_tokens", token_shape),
        ]
    )


def array_field(name: str, shape: tuple[int, ...]) -> pa.Field:
    """A float16 array stored as fixed-size binary; the shape travels in the field's metadata."""
    metadata = {b"dtype": b"<f2", b"shape": ",".join(map(str, shape)).encode()}
    return pa.field(name, pa.binary(2 * math.prod(shape)), nullable=False, metadata=metadata)


def array_shape(field: pa.Field) -> tuple[int, ...]:
    """Shape of an `array_field`. Raises ValueError for any other field."""
    if not field.metadata or b"shape" not in field.metadata:
        raise ValueError(f"column {field.name} holds no array")
    return tuple(int(part) for part in field.metadata[b"shape"].split(b","))


def require(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return `table` when it has exactly `schema` (names, types, order); ValueError naming `where` otherwise."""
    if not table.schema.equals(schema, check_metadata=False):
        missing = [field.name for field in schema if field.name not in table.schema.names]
        wrong = [
            f"{field.name} is {table.schema.field(field.name).type}, expected {field.type}"
            for field in schema
            if field.name in table.schema.names and table.schema.field(field.name).type != field.type
        ]
        extra = [name for name in table.schema.names if name not in schema.names]
        raise ValueError(f"{where}: not the expected columns: missing {missing}, wrong {wrong}, unknown {extra}")
    return table
