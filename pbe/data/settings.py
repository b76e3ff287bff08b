"""Settings of ingest and materialize. Those of filter are in pbe/data/filter.py."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pbe.data.schema import SPLITS, Split
from pbe.places import refuse_credentials
from pbe.settings import Float, Frac, Int, LocalOrS3, LocalPath, PositiveInt, Settings, TaskResources

Chroma = Literal["444", "420"]
# what is accepted of a picture that somebody else made, where no setting says otherwise
MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 89_000_000


class DownloadConfig(Settings):
    """Limits of a download. Half of each wait is random, so that many clients do not retry at the same moment."""

    connections: Int = Field(16, ge=1, le=256, description="connections at once, per shard. Ours")
    attempts: Int = Field(5, ge=1, le=20, description="attempts per photo, the first included. Ours")
    connect_timeout_s: Float = Field(10, gt=0, description="seconds to connect. Ours")
    read_timeout_s: Float = Field(30, gt=0, description="seconds without a byte. Ours")
    attempt_timeout_s: Float = Field(
        120, gt=0, description="seconds per attempt; also bounds a server's Retry-After. Ours"
    )
    backoff_s: Float = Field(
        0.5, ge=0, description="seconds to wait before the second attempt, doubled before each later one. Ours"
    )


class IngestConfig(Settings):
    source: Literal["sample", "folder", "openimages", "pairs"]
    images: LocalOrS3
    boxes: LocalOrS3
    image_base: str | None = Field(
        None,
        description="URL of the images for source openimages: s3://open-images-dataset, read unsigned, or a mirror",
    )
    splits: tuple[Split, ...] = Field(
        SPLITS, min_length=1, description="splits to read; a box file's name says its split"
    )
    limit: PositiveInt | None = Field(None, description="photos per split, the first in file order; null: all")
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="labels or names of the classes whose boxes are read; null: all"
    )
    image_ids: LocalPath | None = Field(None, description="file of the image ids to read, one per line; null: all")
    val_frac: Float = Field(ge=0, lt=1)
    exif: Literal["ignore", "apply"]
    masks: Literal["ignore", "read"] = Field(
        "ignore",
        description="read: masks of objects, for holes and references, from COCO segmentations, OpenImages' "
        "segmentation CSVs and the pictures masks/ID_N.png below ingest.boxes. Ours; upstream has boxes only",
    )
    max_image_bytes: PositiveInt = Field(MAX_IMAGE_BYTES, description="bytes above which a file is rejected. Ours")
    # Pillow, which reads the headers, warns from 89,478,485 on
    max_image_pixels: Int = Field(
        MAX_IMAGE_PIXELS,
        ge=1,
        le=89_478_485,
        description="pixels above which a picture is rejected, before it is decoded. Ours",
    )
    shards: Int = Field(ge=1, le=65536)
    per_shard: TaskResources = Field(
        TaskResources(cpus=0.5, memory_gib=0.5),
        description="what Ray reserves for a task; half a CPU, because reading mostly waits. Ours",
    )
    max_reject_frac: Frac = Field(0.05, description="share of rejected images or boxes above which ingest fails. Ours")
    retry_rejected: bool = Field(
        False, description="true: retry the photos that were rejected for a transient reason, and only those. Ours"
    )
    download: DownloadConfig = DownloadConfig()

    @model_validator(mode="after")
    def _fits_its_source(self) -> "IngestConfig":
        if (self.source == "openimages") != (self.image_base is not None):
            raise ValueError(
                "image_base: source 'openimages' needs the address of the images, s3://open-images-dataset or a mirror"
                if self.source == "openimages"
                else f"image_base: must be null with source '{self.source}'; its photos are at ingest.images"
            )
        if self.image_base and not self.image_base.startswith(("s3://", "https://", "http://")):
            raise ValueError(f"image_base: {self.image_base} must begin with s3://, https:// or http://")
        if self.image_base:
            refuse_credentials("ingest.image_base", self.image_base)
        for key, location in (("images", self.images), ("boxes", self.boxes)):
            if "://" in location:
                refuse_credentials(f"ingest.{key}", location)
            if location.startswith("~"):
                raise ValueError(f"{key}: {location}: use an absolute path: DVC does not expand ~")
        if self.images == self.boxes:
            raise ValueError(
                "images and boxes must differ (DVC watches both): name the box file itself, or a folder for each"
            )
        return self


class MaterializeConfig(Settings):
    image_px: Int = Field(ge=8, le=2048, multiple_of=8)
    slots: Int = Field(ge=1, le=4096)
    reference_px: Int = Field(ge=16, le=1024)
    reference_pad_px: Int = Field(10, ge=0, description="px of the photo kept around the box. Upstream: open-images.py")
    box_extend_frac: Frac = Field(
        0.4,
        description="greatest share of the room beside it by which each side grows. Upstream: open-images.py",
    )
    context_factor: Annotated[Float, Field(ge=1)] | None = Field(
        None,
        description="a box is cut, and its hole grown, in a square of this many times its longer side, at a random "
        "place around it, if the photo is larger; 2 suits a filter.min_area_frac below 0.02, as in profile "
        "small-holes; null: in the photo, as upstream. Ours",
    )
    crop_shrink_frac: Frac = Field(
        0.6, description="greatest share of its free margin by which the square crop shrinks. Upstream: open-images.py"
    )
    bezier_points_per_side: Int = Field(
        18, ge=2, le=200, description="points per side of a Bezier hole. Upstream's code; the paper says 20"
    )
    bezier_jitter_px: Int = Field(
        5,
        ge=0,
        le=100,
        description="px by which each point moves at most, uniformly. Upstream's code; the paper says 1 to 5",
    )
    segmentation_dilate_px: Int = Field(
        3,
        ge=0,
        le=256,
        description="px of the crop by which a segmentation hole is larger than its object's mask. Ours",
    )
    segmentation_jitter_px: Int = Field(
        0, ge=0, le=100, description="px by which points of its outline move at most, as of a Bezier hole. Ours"
    )
    reference_background: Literal["kept", "white", "grey"] = Field(
        "kept",
        description="what is around the object in its reference, where it has a mask: kept, as upstream | white | grey",
    )
    jpeg_chroma: Chroma = Field(
        "444",
        description="of source crops; references are 444. 444: keeps the colours of small ones | 420: a seventh "
        "smaller, for 512 px. Ours",
    )
    jpeg_quality: Int = Field(
        95, ge=1, le=100, description="JPEG quality, 1 to 100. Ours; upstream crops from the original"
    )
    per_shard: TaskResources = Field(
        TaskResources(cpus=1, memory_gib=0.5), description="what Ray reserves for a task. Ours"
    )
