"""Settings of bench, edit, baselines, evaluate and sweep."""

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pbe.data.schema import CaptionForm, HoleKind, LpipsNet, ReferenceKind, Split
from pbe.diffusion.settings import SamplerName
from pbe.model.settings import BackboneName, EditDtype
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


class DinoExtractorConfig(Settings):
    """DINOv2, or DINO: frechet_dino, similarity_dino (DINO-I)."""

    kind: Literal["dino"]
    weights: Weights


MatcherConfig = Annotated[EfficientNetExtractorConfig | ClipExtractorConfig, Field(discriminator="kind")]
ExtractorConfig = Annotated[
    EfficientNetExtractorConfig | ClipExtractorConfig | InceptionExtractorConfig | DinoExtractorConfig,
    Field(discriminator="kind"),
]


class LpipsConfig(Settings):
    """LPIPS, version 0.1: background_lpips, hole_lpips. Each of its files may be a folder or a hub id, too."""

    net: LpipsNet = Field(description="alex: AlexNet, the original's own choice | vgg: VGG16, 25 times the work")
    backbone: Weights = Field(description="torchvision's state_dict of it, such as alexnet-owt-7be5be79.pth")
    heads: Weights = Field(description="lpips/weights/v0.1/alex.pth or vgg.pth of richzhang/PerceptualSimilarity")


class BenchConfig(Settings):
    source: Literal["heldout", "cocoee"]
    cocoee: LocalPath | None = Field(
        None, description="folder test_bench of the unpacked COCOEE archive, for source cocoee"
    )
    cocoee_annotations: LocalPath | None = Field(
        None, description="COCO's instances_val2017.json, for source cocoee: gives its items their class names. Ours"
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
    dtype: EditDtype = Field(
        "float32",
        description="of the networks: float32 | tf32 (float32, products in TF32 on a GPU) | bfloat16 | float16. Ours; "
        "upstream: float16 by autocast",
    )
    compile: bool = Field(
        False, description="torch.compile of the UNet, only on a GPU: takes minutes at the start of every actor. Ours"
    )
    seeds: tuple[NoiseSeed, ...] = Field(min_length=1)
    holes: tuple[HoleKind, ...] = Field(min_length=1)
    references: tuple[ReferenceKind, ...] = Field(min_length=1)
    captions: tuple[CaptionForm, ...] = Field(
        ("label", "label_colour"),
        min_length=1,
        description="what variants with train.condition: text fill each hole from, in place of references: captions of "
        "the exemplar; caption: that of the box files, of items whose exemplar has one. Paper: Fig. 8",
    )
    batch_rows: PositiveInt = Field(16, description="edits per sampler call. Ours")
    items_per_unit: PositiveInt = Field(10, description="bench items per Ray task. Ours")
    actors: PositiveInt
    per_actor: ActorResources

    @model_validator(mode="after")
    def _fits_together(self) -> "EditConfig":
        for key in ("seeds", "holes", "references", "captions"):
            refuse_duplicates(key, getattr(self, key))
        if "exemplar" not in self.references:
            raise ValueError("references: must include exemplar, which every score is based on")
        return self

    @property
    def asked(self) -> dict[str, list[Any]]:
        """What is filled: the keys that rows of one table share, also those of baselines."""
        return {"seeds": list(self.seeds), "holes": list(self.holes), "references": list(self.references)}


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
    lpips: LpipsConfig | None = Field(
        None, description="{net, backbone, heads}: also scores background and hole by LPIPS. Ours; null: not"
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

    kind: Literal["hole_kept", "copy_paste", "poisson", "colour_transfer"]


class FolderBaseline(Settings):
    """Results made elsewhere: one picture per bench item, named by its id."""

    kind: Literal["folder"]
    folder: LocalPath
    allow_missing: bool = Field(False, description="true: score only the items that the folder has")


def _checked_prompt(prompt: str) -> str:
    try:
        fields = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(prompt)]
    except ValueError as error:
        raise ValueError(f"{prompt!r} is no prompt ({error}); an example: a photo of a {{label_name}}") from None
    for name, form, conversion in fields:
        if name not in (None, "label_name") or form or conversion:
            raise ValueError(f"{prompt!r}: a prompt may name {{label_name}}, the item's class, and nothing else")
    return prompt


Prompt = Annotated[str, Field(min_length=1), AfterValidator(_checked_prompt)]


class RivalBaseline(Settings):
    """What every baseline that needs a network has. The holes and references are those of `edit`."""

    license: str = Field(min_length=1, description="of these weights, for the report, such as CreativeML OpenRAIL-M")
    items_per_unit: PositiveInt = Field(10, description="bench items per Ray task. Ours")
    actors: PositiveInt = Field(1, description="Ray actors, each with its own copy of the model. Ours")
    per_actor: ActorResources = Field(
        ActorResources(cpus=1, gpus=0, memory_gib=2),
        description="what Ray reserves for each; a reserved GPU is used. Ours",
    )


class ModelBaseline(RivalBaseline):
    """What every baseline of a diffusion model has. Its seeds are those of `edit`."""

    model: Weights
    steps: Int = Field(50, ge=1, le=1000, description="diffusers' default for Stable Diffusion")
    dtype: EditDtype = Field("float32", description="of the networks: float32 | tf32 | bfloat16 | float16. Ours")
    batch_rows: PositiveInt = Field(4, description="edits per call of the model. Ours")


class HarmoniseBaseline(RivalBaseline):
    """The reference pasted and harmonised by a network of a file: (composite, mask) to image, in 0..1."""

    kind: Literal["harmonise"]
    file: LocalPath = Field(description="TorchScript or torch.export file. It runs code, so its SHA-256 names it")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def batch_rows(self) -> int:
        """Edits per call: exported networks take one."""
        return 1


class InpaintBaseline(ModelBaseline):
    """Stable Diffusion's inpainting model, told by text what to paint: the paper's Table 1."""

    kind: Literal["inpaint"]
    prompt: Prompt = Field("a photo of a {label_name}", description="the paper's, of the item's class")
    guidance_scale: GuidanceScale = Field(7.5, description="diffusers' default")


class BlendedTextBaseline(ModelBaseline):
    """Blended latent diffusion, told by text: a 4-channel Stable Diffusion, the photo put back after every step.

    The latent form of the paper's Blended Diffusion (text), which is a pixel model: its own results enter as a folder.
    """

    kind: Literal["blended_text"]
    prompt: Prompt = Field("a photo of a {label_name}", description="the paper's, of the item's class")
    guidance_scale: GuidanceScale = Field(7.5, description="diffusers' default")


class BlendedImageBaseline(ModelBaseline):
    """Blended latent diffusion, drawn to the reference by the gradient of a cosine.

    The latent form of the paper's Blended Diffusion (image): its own results enter as a folder.
    """

    kind: Literal["blended_image"]
    clip: Weights | None = Field(
        None,
        description="CLIP whose cosine guides and ranks, with its projection. null: the backbone of `model`, which is "
        "then one of this project's",
    )
    gradient_scale: Float = Field(
        1000, ge=0, description="of the cosine's gradient; 0: none. Blended Diffusion's clip_guidance_lambda"
    )
    candidates: PositiveInt = Field(1, description="edits per item, of which the one with the best cosine is kept")

    @model_validator(mode="after")
    def _computes_in_float32(self) -> "BlendedImageBaseline":
        if self.dtype not in ("float32", "tf32"):
            raise ValueError(f"dtype: {self.dtype} is too narrow for the gradient; use float32 or tf32")
        return self


class DiffusersBaseline(ModelBaseline):
    """A pipeline of the installed diffusers that takes a reference picture: newer models, for a GPU."""

    kind: Literal["diffusers"]
    pipeline: str = Field(
        pattern=r"^[A-Za-z0-9_]+$",
        description="its class, which takes image, mask_image and image_reference: FluxKontextInpaintPipeline, "
        "Flux2KleinInpaintPipeline",
    )
    prompt: Prompt = Field("a photo of a {label_name}", description="as of the paper's rivals")
    guidance_scale: Annotated[Float, Field(ge=0, le=50)] | None = Field(None, description="null: the pipeline's own")
    strength: Annotated[Float, Field(gt=0, le=1)] = Field(1, description="1: the hole begins as noise alone. Ours")


ByDiffusion = InpaintBaseline | BlendedTextBaseline | BlendedImageBaseline | DiffusersBaseline
ByModel = ByDiffusion | HarmoniseBaseline

BaselineConfig = Annotated[FilledBaseline | FolderBaseline | ByModel, Field(discriminator="kind")]
