"""The one reader of params.yaml: frozen models, one per stage, unknown keys refused.

`load_params` turns the file into a `Params`; below this module nobody sees a dict. Every message
names the key, the value that was given and what is allowed. Relative paths in params.yaml resolve
against the repository root (`repo_root`), and per-user values come from the environment:
PBE_STORAGE, MLFLOW_TRACKING_URI, RAY_ADDRESS.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pbe.errors import UserError

Prob = Annotated[float, Field(ge=0, le=1)]
Frac = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Flag = Literal["is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside"]
Split = Literal["train", "validation", "test"]
Weights = Annotated[str, Field(min_length=1)]  # a folder, or org/name@revision on the Hugging Face hub
Tokens = Literal["class", "all"]
Precision = Literal["fp32", "tf32", "bf16"]  # of networks that are not trained: pbe/model/precision.py
Dtype = Literal["float16", "float32"]
GuidanceScale = Annotated[float, Field(ge=1, le=50)]
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]


class ParamsError(UserError, ValueError):
    """A key of params.yaml is unknown, missing or out of range; the message is for the user."""


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and _is_number(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("number", "input should be a number")
        return value


def _is_number(annotation: Any) -> bool:
    """int, float, or either of them or None."""
    kinds = {getattr(kind, "__origin__", kind) for kind in get_args(annotation) or (annotation,)}
    return bool(kinds & {int, float}) and bool not in kinds


class TaskResources(Strict):
    """What Ray reserves for one task: it runs where this much is free. A promise between tasks, not a limit."""

    cpus: Annotated[float, Field(gt=0)]
    memory_gib: Annotated[float, Field(ge=0)]  # 0: none reserved


class ActorResources(TaskResources):
    """For one actor or training worker; with a GPU it computes there, without on the CPU."""

    gpus: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _whole_or_a_share(self) -> "ActorResources":
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus: {self.gpus} must be a share of one GPU, or a whole number")
        return self


class DownloadConfig(Strict):
    connections: Annotated[int, Field(ge=1, le=256)]
    attempts: Annotated[int, Field(ge=1, le=20)]
    connect_s: Annotated[float, Field(gt=0)]
    idle_s: Annotated[float, Field(gt=0)]
    whole_s: Annotated[float, Field(gt=0)]
    backoff_s: Annotated[float, Field(ge=0)]


class IngestConfig(Strict):
    source: Literal["sample", "folder", "openimages"]
    images: Annotated[str, Field(min_length=1)]
    boxes: Annotated[str, Field(min_length=1)]
    image_base: str | None
    splits: Annotated[tuple[Split, ...], Field(min_length=1)]
    limit: PositiveInt | None
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None
    image_ids: str | None
    val_frac: Annotated[float, Field(ge=0, lt=1)]
    exif: Literal["ignore", "apply"]
    max_image_bytes: PositiveInt
    max_image_pixels: Annotated[int, Field(ge=1, le=89_478_485)]  # Pillow, which reads the headers, warns from there on
    buckets: Annotated[int, Field(ge=1, le=65536)]
    per_bucket: TaskResources
    max_reject_frac: Frac
    retry_rejected: bool
    download: DownloadConfig

    @model_validator(mode="after")
    def _goes_with_its_source(self) -> "IngestConfig":
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
                raise ValueError(f"{key}: {location}: write the path in full; DVC, which watches it, knows no ~")
        if self.images == self.boxes:
            raise ValueError(
                "images and boxes must differ (DVC watches both): name the box file itself, or a folder for each"
            )
        return self


class FilterConfig(Strict):
    min_area_frac: Frac
    max_area_frac: Frac
    min_side_px: Annotated[int, Field(ge=0)]
    max_aspect: Annotated[float, Field(ge=1)] | None
    include_classes: Annotated[tuple[str, ...], Field(min_length=1)] | None
    exclude_classes: tuple[str, ...]
    exclude_flags: tuple[Flag, ...]
    max_iou: Annotated[float, Field(gt=0, le=1)] | None
    exclude_images: tuple[str, ...]

    @model_validator(mode="after")
    def _ordered(self) -> "FilterConfig":
        if self.min_area_frac >= self.max_area_frac:
            raise ValueError(f"min_area_frac {self.min_area_frac} must be below max_area_frac {self.max_area_frac}")
        return self


class MaterializeConfig(Strict):
    image_px: Annotated[int, Field(ge=8, le=2048, multiple_of=8)]
    slots: Annotated[int, Field(ge=1, le=4096)]
    reference_px: Annotated[int, Field(ge=16, le=1024)]
    reference_pad_px: Annotated[int, Field(ge=0)]
    box_extend_frac: Frac
    crop_shrink_frac: Frac
    bezier_points_per_side: Annotated[int, Field(ge=2, le=200)]
    bezier_jitter_px: Annotated[int, Field(ge=0, le=100)]
    jpeg_chroma: Literal["444", "420"]
    jpeg_quality: Annotated[int, Field(ge=1, le=100)]
    per_bucket: TaskResources


def _kind_of(value: Any) -> Any:
    """Which of several models a mapping in params.yaml is for; by a function, since pydantic's discriminator by field
    name does not go with Strict's validator."""
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


class PatchCodecConfig(Strict):
    """The closed-form codec, fitted on the run's own crops."""

    kind: Literal["patch"]
    patch_px: Annotated[int, Field(ge=1, le=32)]
    channels: PositiveInt
    fit_crops: PositiveInt

    @model_validator(mode="after")
    def _keeps_at_most_all(self) -> "PatchCodecConfig":
        if self.channels > 3 * self.patch_px**2:
            raise ValueError(f"channels {self.channels} exceeds 3 * patch_px^2 = {3 * self.patch_px**2}")
        return self


class PretrainedCodecConfig(Strict):
    """AutoencoderKL as Stable Diffusion has it, or the codec of a model folder."""

    kind: Literal["pretrained"]
    weights: Weights


class EfficientNetConfig(Strict):
    kind: Literal["efficientnet_lite0"]
    tokens: Tokens


class ClipConfig(Strict):
    kind: Literal["clip"]
    weights: Weights
    tokens: Tokens


class EncodeConfig(Strict):
    codec: Annotated[
        Annotated[PatchCodecConfig, Tag("patch")] | Annotated[PretrainedCodecConfig, Tag("pretrained")],
        Discriminator(_kind_of),
    ]
    backbone: Annotated[
        Annotated[EfficientNetConfig, Tag("efficientnet_lite0")] | Annotated[ClipConfig, Tag("clip")],
        Discriminator(_kind_of),
    ]
    reference_draws: Annotated[int, Field(ge=1, le=256)]
    precision: Precision
    dtype: Dtype
    rows_per_group: PositiveInt
    batch_rows: PositiveInt
    actors: PositiveInt
    per_actor: ActorResources


class UNetConfig(Strict):
    block_channels: tuple[PositiveInt, ...] = Field(min_length=1)
    attention: tuple[bool, ...]
    layers_per_block: PositiveInt
    attention_heads: PositiveInt
    norm_groups: PositiveInt
    context_width: PositiveInt
    class_embedding: bool

    @model_validator(mode="after")
    def _divides(self) -> "UNetConfig":
        if len(self.attention) != len(self.block_channels):
            raise ValueError(f"attention: {len(self.attention)} levels, block_channels has {len(self.block_channels)}")
        for channels in self.block_channels:
            if channels % self.norm_groups or channels % self.attention_heads:
                raise ValueError(
                    f"block_channels: {channels} must be divisible by norm_groups ({self.norm_groups}) "
                    f"and attention_heads ({self.attention_heads})"
                )
        return self


class ExemplarConfig(Strict):
    tokens: Tokens
    mapper_width: PositiveInt
    mapper_blocks: Annotated[int, Field(ge=0, le=48)]


class KernelsConfig(Strict):
    """How the same mathematics runs; no part of a run's digest."""

    sdpa: bool
    tf32: bool
    channels_last: bool
    compile: bool
    fused_adamw: bool
    activation_checkpointing: bool


class TrainConfig(Strict):
    input: Literal["encoded", "pixels"]
    init: Weights  # or: random, sd
    resume_from: Annotated[str, Field(pattern=r"^[a-z0-9_]+-[0-9a-f]+(@[0-9]+)?$")] | None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None
    steps: Annotated[int, Field(ge=0)]  # 0: the untrained model
    batch: PositiveInt
    lanes: PositiveInt
    workers: PositiveInt
    per_worker: ActorResources
    micro_batch: PositiveInt
    lr: Annotated[float, Field(gt=0, le=1)]
    warmup_steps: Annotated[int, Field(ge=0)]
    final_lr_frac: Frac
    weight_decay: Annotated[float, Field(ge=0)]
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    adam_eps: Annotated[float, Field(gt=0)]
    grad_clip: Annotated[float, Field(gt=0)] | None
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    precision: Literal["fp32", "bf16_autocast", "bf16", "bf16_pure"]
    objective: Literal["x0", "eps", "v"]
    min_snr_gamma: Annotated[float, Field(gt=0)] | None
    beta_schedule: Literal["squaredcos_cap_v2", "scaled_linear"]
    bezier_prob: Prob
    condition_dropout_prob: Prob
    context_dropout_prob: Prob
    reference_augmentation: bool
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt
    log_every: PositiveInt
    validate_every: PositiveInt
    validation_rows: PositiveInt
    grid_rows: Annotated[int, Field(ge=0, le=64)]
    max_failures: Annotated[int, Field(ge=0)]
    kernels: KernelsConfig
    unet: UNetConfig
    exemplar: ExemplarConfig

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        if self.lanes % self.workers:
            raise ValueError(f"workers {self.workers} must divide lanes {self.lanes}")
        if self.batch % self.lanes:
            raise ValueError(f"lanes {self.lanes} must divide batch {self.batch}")
        if (self.batch // self.workers) % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} must divide the rows per worker, batch / workers = "
                f"{self.batch // self.workers}"
            )
        if self.per_worker.gpus not in (0, 1):
            raise ValueError(f"per_worker.gpus: {self.per_worker.gpus:g} must be 0 or 1: a rank drives one GPU at most")
        if self.precision == "bf16_pure" and self.zero_stage == 0:
            raise ValueError("precision bf16_pure needs zero_stage 1, 2 or 3: DeepSpeed has it nowhere else")
        if self.kernels.compile and self.zero_stage == 3:
            raise ValueError("kernels.compile does not go with zero_stage 3, which gathers weights as modules run")
        return self

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step on one worker: batch / (workers * micro_batch)."""
        return self.batch // (self.workers * self.micro_batch)


class EfficientNetJudge(Strict):
    """From a pip package."""

    kind: Literal["efficientnet_lite0", "efficientnet_lite2"]


class ClipJudge(Strict):
    """CLIP: clip_fid, clip_score and, with a mixture, qs."""

    kind: Literal["clip"]
    weights: Weights
    mixture: str | None  # what `pbe import-mixture` wrote


class InceptionJudge(Strict):
    """Inception as a TorchScript file: fid."""

    kind: Literal["inception"]
    file: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


MatcherConfig = (
    Annotated[EfficientNetJudge, Tag("efficientnet_lite0")]
    | Annotated[EfficientNetJudge, Tag("efficientnet_lite2")]
    | Annotated[ClipJudge, Tag("clip")]
)
JudgeConfig = MatcherConfig | Annotated[InceptionJudge, Tag("inception")]


class BenchConfig(Strict):
    source: Literal["heldout", "cocoee"]
    cocoee: str | None
    split: Split
    crops_per_box: PositiveInt
    max_items: PositiveInt
    matcher: Annotated[MatcherConfig, Discriminator(_kind_of)]

    @model_validator(mode="after")
    def _has_its_folder(self) -> "BenchConfig":
        if self.source == "cocoee" and not self.cocoee:
            raise ValueError("cocoee: source 'cocoee' needs the folder of the unpacked archive")
        return self


class EditConfig(Strict):
    protocol: Literal["ours", "upstream"]
    sampler: Literal["ddim", "pndm", "dpm++", "unipc"] | None
    guidance_scale: GuidanceScale
    steps: Annotated[int, Field(ge=1, le=1000)]
    precision: Precision
    compile: bool
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**62)], ...] = Field(min_length=1)
    holes: tuple[Literal["box", "bezier"], ...] = Field(min_length=1)
    references: tuple[Literal["exemplar", "own", "foreign"], ...] = Field(min_length=1)
    batch_rows: PositiveInt
    items_per_unit: PositiveInt
    actors: PositiveInt
    per_actor: ActorResources

    @model_validator(mode="after")
    def _names_each_once(self) -> "EditConfig":
        for key in ("seeds", "holes", "references"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {list(values)} names one twice")
        if "exemplar" not in self.references:
            raise ValueError("references: exemplar must be among them, every score is of it")
        return self


class EvaluateConfig(Strict):
    judges: tuple[Annotated[JudgeConfig, Discriminator(_kind_of)], ...] = Field(min_length=1)
    reals: str | None
    reals_px: Annotated[int, Field(ge=8, le=2048)] | None
    clip_region: Literal["whole", "upstream"]
    quality_components: PositiveInt
    quality_pca_dims: PositiveInt
    resamples: Annotated[int, Field(ge=100, le=1_000_000)]
    subsets: Annotated[int, Field(ge=20, le=100_000)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # scikit-learn takes no larger one
    batch_rows: PositiveInt
    actors: PositiveInt
    per_actor: ActorResources

    @model_validator(mode="after")
    def _names_each_once(self) -> "EvaluateConfig":
        kinds = [judge.kind for judge in self.judges]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"judges: {kinds} names one twice")
        if (self.reals is None) != (self.reals_px is None):
            raise ValueError(
                "reals and reals_px go together: a folder of photos and the side of the square cut from each"
            )
        return self


class DiversityConfig(Strict):
    items: Annotated[int, Field(ge=2)]
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**62)], ...] = Field(min_length=2)


class SweepConfig(Strict):
    variant: VariantName
    scales: tuple[GuidanceScale, ...] = Field(min_length=1)
    items: Annotated[int, Field(ge=2)]
    diversity: DiversityConfig

    @model_validator(mode="after")
    def _names_each_once(self) -> "SweepConfig":
        for key, values in (("scales", self.scales), ("diversity.seeds", self.diversity.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {list(values)} names one twice")
        return self


class FilledBaseline(Strict):
    """A fill that needs no model."""

    kind: Literal["hole_kept", "copy_paste", "poisson"]


class FolderBaseline(Strict):
    """Somebody else's results: one picture per bench item, named by its id."""

    kind: Literal["folder"]
    folder: Annotated[str, Field(min_length=1)]
    allow_missing: bool = False  # score what there is


BaselineConfig = (
    Annotated[FilledBaseline, Tag("hole_kept")]
    | Annotated[FilledBaseline, Tag("copy_paste")]
    | Annotated[FilledBaseline, Tag("poisson")]
    | Annotated[FolderBaseline, Tag("folder")]
)


class VariantEdit(Strict):
    """What of `edit` a variant may set for itself; the rest must be equal, or rows of the table do not compare."""

    guidance_scale: GuidanceScale | None = None


class VariantConfig(Strict):
    """One row of the ablation: the train keys, and the guidance scale, that differ from `train` and `edit`."""

    train: dict[str, Any] = {}
    edit: VariantEdit = VariantEdit()


class Params(Strict):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    ingest: IngestConfig
    filter: FilterConfig
    materialize: MaterializeConfig
    encode: EncodeConfig
    train: TrainConfig
    bench: BenchConfig
    edit: EditConfig
    evaluate: EvaluateConfig
    sweep: SweepConfig
    variants: dict[VariantName, VariantConfig] = Field(min_length=1)
    baselines: dict[VariantName, Annotated[BaselineConfig, Discriminator(_kind_of)]]

    @model_validator(mode="after")
    def _fits_together(self) -> "Params":
        codec = self.encode.codec
        if codec.kind == "patch" and self.materialize.image_px % codec.patch_px:
            raise ValueError(
                f"encode.codec.patch_px {codec.patch_px} must divide materialize.image_px {self.materialize.image_px}"
            )
        if "card" in self.variants or "card" in self.baselines:
            raise ValueError("card: no name for a variant or a baseline, metrics.json has its own under it; rename it")
        folders = [name for name, baseline in self.baselines.items() if isinstance(baseline, FolderBaseline)]
        if folders and self.edit.holes[0] != "box":
            raise ValueError(
                f"edit.holes {list(self.edit.holes)}: baselines.{folders[0]} is a folder of results, which are of box "
                "holes; name box first"
            )
        if both := sorted(self.variants.keys() & self.baselines.keys()):
            raise ValueError(f"{both[0]} is both a variant and a baseline; rename one")
        if self.sweep.variant not in self.variants:
            raise ValueError(f"sweep.variant {self.sweep.variant} is no variant; there are {', '.join(self.variants)}")
        return self

    def train_variant(self, name: str) -> TrainConfig:
        """The train config of one variant. Raises ParamsError for an unknown name."""
        return TrainConfig.model_validate(_merged(self.train.model_dump(), self._variant(name).train))

    def edit_variant(self, name: str) -> EditConfig:
        """The edit config of one variant. Raises ParamsError for an unknown name."""
        scale = self._variant(name).edit.guidance_scale
        return self.edit if scale is None else self.edit.model_copy(update={"guidance_scale": scale})

    def _variant(self, name: str) -> VariantConfig:
        if name not in self.variants:
            raise ParamsError(f"variant '{name}' is not in params.yaml; it names: {', '.join(self.variants)}")
        return self.variants[name]


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def repo_root() -> Path:
    """The folder of params.yaml: the one above this package."""
    return Path(__file__).resolve().parent.parent


def home_root() -> Path:
    """Where relative defaults (.store, mlflow.db) live: the parent repository in DVC's queued experiments.

    DVC sets DVC_ROOT to the main repository when it runs a stage in a temporary workspace.
    """
    return Path(os.environ.get("DVC_ROOT") or repo_root()).resolve()


# in the query of an address; not sslkey and the like, which are paths
SECRET_KEYS = re.compile(r"(?i)passw|\bpwd\b|secret|token|\bsig\b|signature|access_?key|api_?key")


def refuse_credentials(name: str, uri: str) -> None:
    """Raises ParamsError, without repeating them, for a password or a token in an address: it would be printed, stored
    and sent. `name` is the key or variable that holds it."""
    try:
        where = urlsplit(uri)
    except ValueError as error:
        raise ParamsError(f"{name} is no address: {error}") from None
    # a password may hold / and #, which end what urlsplit takes for the host; Arrow reads KEY:secret@bucket
    after = uri.partition("://")[2]
    password = re.match(r"[^/:@]*:(?!\d{1,5}(/|$))[^@]*@", after) or (where.scheme == "s3" and ":" in where.netloc)
    token = "@" in where.netloc and where.scheme in ("http", "https")  # in the user's place
    asked = parse_qsl(where.query) if where.scheme else []
    if password or token or any(SECRET_KEYS.search(key) or SECRET_KEYS.search(value) for key, value in asked):
        raise ParamsError(
            f"{name} holds a password or a token, which logs, tags and the cluster would show to all; leave it out and "
            "set AWS_*, MLFLOW_TRACKING_USERNAME and _PASSWORD, PGPASSWORD or RAY_AUTH_TOKEN, also on the nodes"
        )


def storage_uri() -> str:
    """PBE_STORAGE: an absolute local path or s3://bucket/prefix; default `.store` in the repository."""
    value = os.environ.get("PBE_STORAGE") or ".store"
    refuse_credentials("PBE_STORAGE", value)
    if value.startswith("s3://") and value.strip("/") != "s3:":
        return value.rstrip("/")
    if "://" in value:
        raise ParamsError(f"PBE_STORAGE={value}: use a local path or s3://bucket/prefix")
    try:
        return str((home_root() / Path(value).expanduser()).resolve())
    except RuntimeError as error:  # ~name of nobody
        raise ParamsError(f"PBE_STORAGE={value}: {error}") from None


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or an absolute SQLite path in the repository (workers change directory)."""
    value = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home_root() / 'mlflow.db'}"
    refuse_credentials("MLFLOW_TRACKING_URI", value)
    return value


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader takes the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_params(path: Path | None = None) -> Params:
    """Read and check params.yaml. Raises ParamsError, one line per wrong key, each with what is allowed."""
    path = path or repo_root() / "params.yaml"
    try:
        raw = yaml.load(path.read_text(), _UniqueKeys)
    except FileNotFoundError:
        raise ParamsError(f"{path.name}: not found; `make profile P=sample` writes it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path.name}: must be a mapping of stages to settings")
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError("\n".join(_lines(error, path.name, prefix=""))) from None
    for name in params.variants:
        try:
            cfg = params.train_variant(name)
        except ValidationError as error:
            raise ParamsError("\n".join(_lines(error, path.name, prefix=f"variants.{name}.train."))) from None
        if cfg.exemplar.tokens == "all" and cfg.input == "encoded" and params.encode.backbone.tokens != "all":
            raise ParamsError(
                f"{path.name}: variants.{name}: train.exemplar.tokens = 'all' needs encode.backbone.tokens: all, so "
                "that they are stored, or train.input: pixels"
            )
        halvings, codec = len(cfg.unet.block_channels) - 1, params.encode.codec
        # AutoencoderKL's cells are as its weights say; the train stage looks again
        latent_px = params.materialize.image_px // codec.patch_px if codec.kind == "patch" else 0
        if latent_px % 2**halvings:
            raise ParamsError(
                f"{path.name}: variants.{name}: latents of {latent_px} px (materialize.image_px / "
                f"encode.codec.patch_px) cannot be halved {halvings} times, as the {halvings + 1} levels of "
                "train.unet.block_channels ask"
            )
    return params


def _lines(error: ValidationError, file: str, prefix: str) -> list[str]:
    out = []
    items = error.errors()
    for item in items:
        if any(
            other["loc"][: len(item["loc"])] == item["loc"] for other in items if len(other["loc"]) > len(item["loc"])
        ):
            continue  # a list is "too short" because its items are wrong
        names, model, annotation = _without_kinds(TrainConfig if prefix else Params, item["loc"])
        key = (prefix + ".".join(names)).rstrip(".")
        given = item["input"]
        if item["type"].startswith("union_tag_"):
            given = given.get("kind") if isinstance(given, dict) else given
            kinds = _models_by_kind(annotation)
            out.append(f"{file}: {key}.kind = {given!r}: allowed are {', '.join(kinds)}")
        elif item["type"] == "extra_forbidden":
            known = sorted(model.model_fields)
            out.append(f"{file}: {key} = {given!r}: unknown key; allowed here: {', '.join(known)}")
        elif item["type"] == "missing":
            out.append(f"{file}: {key}: required key is missing")
        elif item["type"] == "value_error":
            out.append(f"{file}: {key or 'params'}: {item['ctx']['error']}")
        else:
            out.append(f"{file}: {key} = {given!r}: {item['msg'][0].lower() + item['msg'][1:]}")
    return out


def _without_kinds(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[list[str], type[BaseModel], Any]:
    """Keys of an error's place, without the kinds that pydantic puts after a key that has several; the model that the
    last key belongs to, and what the key may hold."""
    names: list[str] = []
    annotation: Any = model
    for part in loc:
        if options := _models_by_kind(annotation):
            annotation = options[part]
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
            annotation = model.model_fields[part].annotation if part in model.model_fields else None
        elif get_origin(annotation) in (tuple, dict):
            annotation = get_args(annotation)[get_origin(annotation) is dict]
        names.append(str(part))
    return names, model, annotation


def _models_by_kind(annotation: Any) -> dict[str, type[BaseModel]]:
    """Of a key that may hold one of several models; empty for every other."""
    options = get_args(annotation)
    if get_origin(annotation) is Annotated:  # items of a list have their discriminator there
        options = get_args(options[0])
    models = [getattr(option, "__origin__", None) for option in options]
    named = [model for model in models if isinstance(model, type) and issubclass(model, BaseModel)]
    return {kind: model for model in named for kind in get_args(model.model_fields["kind"].annotation)}
