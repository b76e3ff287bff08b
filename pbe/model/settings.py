"""Settings of the frozen networks (the encode stage) and of the trained network's architecture."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pbe.settings import ActorResources, Dtype, Float, Int, PositiveInt, Settings, Weights, refuse_duplicates

Precision = Literal["fp32", "tf32", "bf16"]  # of the encode stage: pbe/model/precision.py
EditDtype = Literal["float32", "tf32", "bfloat16", "float16"]  # of the editor: pbe/model/precision.py
Condition = Literal["exemplar", "text"]  # what says what should appear in the hole: a picture, or a caption
Tokens = Literal["class", "all"]  # what the mapper reads: the class token alone, or every token, the class token first
BackboneName = Literal["efficientnet_lite0", "efficientnet_lite2"]  # from pip packages


class PatchCodecConfig(Settings):
    """The closed-form codec, fitted on the run's own crops."""

    kind: Literal["patch"]
    patch_px: Int = Field(ge=1, le=32)
    channels: PositiveInt
    fit_crops: PositiveInt

    @model_validator(mode="after")
    def _keeps_at_most_all(self) -> "PatchCodecConfig":
        if self.channels > 3 * self.patch_px**2:
            raise ValueError(f"channels {self.channels} exceeds 3 * patch_px^2 = {3 * self.patch_px**2}")
        return self


class PretrainedCodecConfig(Settings):
    """Stable Diffusion's AutoencoderKL, or the codec of a model folder."""

    kind: Literal["pretrained"]
    weights: Weights


class EfficientNetConfig(Settings):
    kind: Literal["efficientnet_lite0"]
    tokens: Tokens


class ClipConfig(Settings):
    kind: Literal["clip"]
    weights: Weights
    tokens: Tokens


class EncodeConfig(Settings):
    codec: Annotated[PatchCodecConfig | PretrainedCodecConfig, Field(discriminator="kind")]
    backbone: Annotated[EfficientNetConfig | ClipConfig, Field(discriminator="kind")]
    reference_draws: Int = Field(
        2,
        ge=1,
        le=256,
        description="encoded references per row: one clean, the others augmented. Ours; upstream: fresh each epoch",
    )
    precision: Precision = Field(
        "fp32",
        description="precision of the frozen networks on a GPU: fp32 (upstream) | tf32 | bf16 (AutoencoderKL, CLIP)",
    )
    dtype: Dtype = Field(
        "float16", description="type of the stored arrays. float32: twice the space, equal to train.input: pixels. Ours"
    )
    rows_per_group: PositiveInt = Field(
        1,
        description="rows per Parquet row group; each group goes to one of train.streams, and each needs one. Ours",
    )
    batch_rows: PositiveInt = Field(16, description="images per forward pass. Ours")
    actors: PositiveInt
    per_actor: ActorResources


class UNetConfig(Settings):
    block_channels: tuple[PositiveInt, ...] = Field(
        (48, 96, 96), min_length=1, description="channels per level. Ours; paper: 320, 640, 1280, 1280"
    )
    attention: tuple[bool, ...] = Field(
        (False, False, True), description="whether each level has cross-attention. Ours; paper: all but the last"
    )
    layers_per_block: PositiveInt = Field(1, description="ResNet layers per level. Ours; paper: 2")
    attention_heads: PositiveInt = Field(2, description="heads per attention layer. Ours; paper: 8")
    norm_groups: PositiveInt = Field(16, description="GroupNorm groups. Ours; paper: 32")
    context_width: PositiveInt = Field(128, description="width of the exemplar token. Ours; paper: 768")
    class_embedding: bool = Field(True, description="whether the token is added to the time embedding. Ours; paper: no")

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


class ExemplarConfig(Settings):
    """The mapper, from the backbone's features to the exemplar tokens."""

    tokens: Tokens = Field(
        "class", description="tokens that the network reads. class: the bottleneck (paper) | all: the naive baseline"
    )
    mapper_width: PositiveInt = Field(
        256,
        description="width of its transformer blocks; the backbone's features are projected to it. Ours; paper: 1024",
    )
    mapper_blocks: Int = Field(1, ge=0, le=48, description="transformer blocks. Ours; paper: 5")


class LoraConfig(Settings):
    """A low-rank update of each chosen layer of a frozen UNet (pbe/model/adapter.py)."""

    rank: PositiveInt = Field(4, description="rank of the updates. diffusers' train_text_to_image_lora.py")
    alpha: Annotated[Float, Field(gt=0)] | None = Field(
        None, description="updates count alpha / rank times; null: alpha is the rank, as in that script"
    )
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="how the names of the UNet's updated layers end; by default all of attention, as in that script",
    )

    @model_validator(mode="after")
    def _names_each_once(self) -> "LoraConfig":
        refuse_duplicates("targets", self.targets)
        return self
