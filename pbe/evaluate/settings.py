"""Settings of bench, edit, baselines, evaluate and sweep."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pbe.data.schema import HoleKind, ReferenceKind, Split
from pbe.diffusion.settings import SamplerName
from pbe.model.settings import BackboneName, Precision
from pbe.settings import ActorResources, Float, Int, LocalPath, PositiveInt, Settings, Weights, refuse_duplicates

Protocol = Literal["ours", "upstream"]
Region = Literal["whole", "upstream"]
GuidanceScale = Annotated[Float, Field(ge=1, le=50)]
NoiseSeed = Annotated[Int, Field(ge=0, lt=2**62)]
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]


class EfficientNetExtractorConfig(Settings):
    """EfficientNet, with weights from a pip package."""

    kind: BackboneName


class ClipExtractorConfig(Settings):
    """CLIP: clip_fid, clip_score and, with a mixture, qs."""

    kind: Literal["clip"]
    weights: Weights
    mixture: LocalPath | None  # what `pbe import-mixture` wrote


class InceptionExtractorConfig(Settings):
    """Inception as a TorchScript file: fid."""

    kind: Literal["inception"]
    file: LocalPath
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


MatcherConfig = Annotated[EfficientNetExtractorConfig | ClipExtractorConfig, Field(discriminator="kind")]
ExtractorConfig = Annotated[
    EfficientNetExtractorConfig | ClipExtractorConfig | InceptionExtractorConfig, Field(discriminator="kind")
]


class BenchConfig(Settings):
    source: Literal["heldout", "cocoee"]
    cocoee: LocalPath | None = Field(
        None, description="folder test_bench of the unpacked COCOEE archive, for source cocoee"
    )
    split: Split
    crops_per_box: PositiveInt = Field(1, description="bench items per kept box. Ours")
    max_items: PositiveInt
    candidates: PositiveInt = Field(
        10_000,
        description="boxes among which items and their references are found: those of the split in the first shards "
        "that have at least as many; more cost time, not memory. Ours",
    )
    matcher: MatcherConfig
    actors: PositiveInt = Field(2, description="Ray actors, each with its own copy of the matcher. Ours")
    per_actor: ActorResources = Field(
        ActorResources(cpus=0.5, gpus=0, memory_gib=1),
        description="what Ray reserves for each; a reserved GPU is used. Ours",
    )

    @model_validator(mode="after")
    def _has_its_folder(self) -> "BenchConfig":
        if self.source == "cocoee" and not self.cocoee:
            raise ValueError("cocoee: source 'cocoee' needs the folder of the unpacked archive")
        return self


class EditConfig(Settings):
    protocol: Protocol = Field(
        "ours",
        description="ours: pixels outside the hole stay | upstream: the codec decodes the whole square",
    )
    sampler: SamplerName | None = Field(
        None,
        description="null: the model's own (DDIM for x0, PLMS for Stable Diffusion) | ddim | pndm (PLMS, upstream) | "
        "dpm++ | unipc",
    )
    guidance_scale: GuidanceScale
    steps: Int = Field(ge=1, le=1000)
    precision: Precision = Field(
        "fp32",
        description="precision of the networks on a GPU: fp32 | tf32 | bf16. Ours; upstream: float16 by autocast",
    )
    compile: bool = Field(
        False, description="torch.compile of the UNet, only on a GPU: takes minutes at the start of every actor. Ours"
    )
    seeds: tuple[NoiseSeed, ...] = Field(min_length=1)
    holes: tuple[HoleKind, ...] = Field(min_length=1)
    references: tuple[ReferenceKind, ...] = Field(min_length=1)
    batch_rows: PositiveInt = Field(16, description="edits per sampler call. Ours")
    items_per_unit: PositiveInt = Field(10, description="bench items per Ray task. Ours")
    actors: PositiveInt
    per_actor: ActorResources

    @model_validator(mode="after")
    def _fits_together(self) -> "EditConfig":
        for key in ("seeds", "holes", "references"):
            refuse_duplicates(key, getattr(self, key))
        if "exemplar" not in self.references:
            raise ValueError("references: must include exemplar, which every score is based on")
        return self


class StatisticsConfig(Settings):
    """Settings of the intervals and p-values."""

    resamples: Int = Field(2000, ge=100, le=1_000_000, description="resamples of the bootstrap. Ours")
    subsets: Int = Field(200, ge=20, le=100_000, description="subsets of the delete-half jackknife. Ours")
    # scikit-learn takes no larger one
    seed: Int = Field(42, ge=0, lt=2**32, description="seed of resampling and of qs_rank's mixture. Ours")


class EvaluateConfig(Settings):
    extractors: tuple[ExtractorConfig, ...] = Field(min_length=1)
    real_images: LocalPath | None = Field(
        None,
        description="folder of photos that the Frechet distance, KID and QS rank compare with; null: untouched crops "
        "of the bench's boxes. Paper: COCO test2017",
    )
    real_images_px: Annotated[Int, Field(ge=8, le=2048)] | None = Field(
        None, description="px, side of the square cut from each of them. Paper: 512"
    )
    clip_region: Region = Field(
        "whole",
        description="region for clip_score. whole: all of the hole's box | upstream: without its last row and column",
    )
    quality_components: PositiveInt = Field(
        5, description="components of qs_rank's Gaussian mixture. GIQA: 5; upstream: 20"
    )
    quality_pca_dims: PositiveInt = Field(16, description="PCA dimensions of the features for qs_rank. Ours")
    statistics: StatisticsConfig = StatisticsConfig()
    batch_rows: PositiveInt = Field(16, description="pictures per extractor call. Ours")
    actors: PositiveInt
    per_actor: ActorResources

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluateConfig":
        refuse_duplicates("extractors", tuple(extractor.kind for extractor in self.extractors))
        if (self.real_images is None) != (self.real_images_px is None):
            raise ValueError(
                "real_images and real_images_px go together: a folder of photos, and the side of the square cut from "
                "each"
            )
        return self


class DiversityConfig(Settings):
    items: Int = Field(ge=2)
    seeds: tuple[NoiseSeed, ...] = Field(min_length=2)


class SweepConfig(Settings):
    variant: VariantName
    guidance_scales: tuple[GuidanceScale, ...] = Field(min_length=1)
    items: Int = Field(ge=2)
    diversity: DiversityConfig

    @model_validator(mode="after")
    def _names_each_once(self) -> "SweepConfig":
        refuse_duplicates("guidance_scales", self.guidance_scales)
        refuse_duplicates("diversity.seeds", self.diversity.seeds)
        return self


class FilledBaseline(Settings):
    """A fill that needs no model."""

    kind: Literal["hole_kept", "copy_paste", "poisson"]


class FolderBaseline(Settings):
    """Results made elsewhere: one picture per bench item, named by its id."""

    kind: Literal["folder"]
    folder: LocalPath
    allow_missing: bool = Field(False, description="true: score only the items that the folder has")


BaselineConfig = Annotated[FilledBaseline | FolderBaseline, Field(discriminator="kind")]
