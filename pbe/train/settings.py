"""Settings of training."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pbe.data.schema import CaptionForm
from pbe.diffusion.settings import BetaSchedule, Objective
from pbe.model.settings import BackboneName, Condition, ExemplarConfig, LoraConfig, UNetConfig
from pbe.settings import (
    ActorResources,
    Float,
    Frac,
    Int,
    PositiveInt,
    Prob,
    Seed,
    Settings,
    Weights,
    refuse_duplicates,
)

Beta = Annotated[Float, Field(ge=0, lt=1)]


class HoleProbs(Settings):
    """Shares of the kinds of hole; together 1. A row without the object's mask divides its share among the others."""

    box: Prob
    bezier: Prob
    segmentation: Prob = Field(0.0, description="share of holes of the object's own shape, where it has a mask. Ours")

    @model_validator(mode="after")
    def _sum(self) -> "HoleProbs":
        total = self.box + self.bezier + self.segmentation
        if abs(total - 1) > 1e-6:
            raise ValueError(f"box, bezier and segmentation must add up to 1, not {total:g}")
        if self.box + self.bezier == 0:
            raise ValueError("segmentation alone leaves no hole for rows without a mask; give box or bezier a share")
        return self


class TextConfig(Settings):
    """For condition text."""

    encoder: Weights | None = Field(
        None,
        description="text encoder: folder or org/name@revision of a CLIP, Stable Diffusion or a sentence encoder; "
        "null: the CLIP of encode.backbone. Its width is unet.context_width",
    )
    captions: tuple[CaptionForm, ...] = Field(
        ("label", "label_colour"),
        min_length=1,
        description="what captions say; each row draws one form, so that the model learns all that edit.captions asks "
        "for. label: a photo of a car | label_colour: a photo of a red car | caption: that of the box files, and "
        "label where they have none. Ours",
    )

    @model_validator(mode="after")
    def _names_each_once(self) -> "TextConfig":
        refuse_duplicates("captions", self.captions)
        return self


class KernelsConfig(Settings):
    """How the same mathematics runs. Results differ only by rounding, and a run's digest does not include these."""

    sdpa: bool = Field(
        True,
        description="torch's fused attention, without the matrix of all pairs of cells. Ours; upstream: without fusion",
    )
    tf32: bool = Field(
        False, description="float32 products with 10 bits of mantissa, on Ampere and newer. Upstream: no (V100)"
    )
    channels_last: bool = Field(False, description="convolutions in NHWC; for GPUs with bf16. Ours")
    compile: bool = Field(False, description="torch.compile of the UNet, only on a GPU. Ours")
    fused_adamw: bool = Field(True, description="one kernel per AdamW step. Ours")
    checkpointed_levels: Int = Field(
        0,
        ge=0,
        description="how many of the UNet's levels, the finest first, recompute their activations in the backward "
        "pass: less memory, up to a third more time. 0: none. Ours; upstream: all, which are 4",
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "activation_checkpointing" in values:
            raise ValueError(
                "activation_checkpointing: is now checkpointed_levels, which counts the UNet's levels that recompute; "
                f"write checkpointed_levels: {'4' if values['activation_checkpointing'] else '0'}"
            )
        return values


class EfficientNetScoreConfig(Settings):
    """EfficientNet, with weights from a pip package; efficientnet_lite0 is biased where it conditions the model."""

    kind: BackboneName


class ClipScoreConfig(Settings):
    """CLIP with its projection."""

    kind: Literal["clip"]
    weights: Weights


class LoraTrainable(Settings):
    lora: LoraConfig


def _kind(trainable: Any) -> str:
    return "part" if isinstance(trainable, str) else "lora"


Trainable = Annotated[
    Annotated[Literal["all", "cross_attention"], Tag("part")] | Annotated[LoraTrainable, Tag("lora")],
    Discriminator(_kind),
]


class TrainConfig(Settings):
    input: Literal["encoded", "pixels"] = Field(
        "encoded",
        description="encoded: what the encode stage stored | pixels: encoders run at every step, with fresh references "
        "(paper). Ours",
    )
    condition: Condition = Field(
        "exemplar",
        description="what says what fills the hole. exemplar: a picture (paper) | text: a caption in its place, as the "
        "paper's Fig. 8 compares",
    )
    input_processes: Int = Field(
        0,
        ge=0,
        le=64,
        description="processes of each worker that prepare its encoded batches, each in some hundred MB and with its "
        "part of the memory for cached rows; 0: a thread, enough for some thousand rows a second. Ours",
    )
    init: Weights  # or: random, sd; an adapter's folder, with trainable: {lora: ...}
    trainable: Trainable = Field(
        "all",
        description="what of the UNet is trained, always beside the whole exemplar mapper. all (paper) | "
        "cross_attention: its attention to the exemplar, as Custom Diffusion's crossattn | {lora: {rank: 4}}: low-rank "
        "updates of a frozen UNet, which make an adapter",
    )
    resume_from: Annotated[str, Field(pattern=r"^[a-z0-9_]+-[0-9a-f]+(@[0-9]+)?$")] | None = Field(
        None,
        description="null | RUN or RUN@STEP: start from that run's checkpoint in the storage, under other settings",
    )
    seed: Seed | None = Field(
        None,
        description="seed of the first weights, order and noise of training; null: `seed`, which also draws the data",
    )
    steps: Int = Field(ge=0)  # 0: the untrained model
    batch: PositiveInt
    streams: PositiveInt = Field(
        2, description="fixed sequences of rows; a multiple of workers, and batch is a multiple of it. Ours"
    )
    workers: PositiveInt
    per_worker: ActorResources
    micro_batch: PositiveInt
    lr: Float = Field(gt=0, le=1)
    warmup_steps: Int = Field(ge=0)
    final_lr_frac: Frac
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw (paper) | adamw_8bit: with moments of 8 bits, in blocks of 256 with their own scale, by "
        "bitsandbytes (arXiv 2110.02861): 2 bytes per parameter and not 8; for one worker. Ours",
    )
    weight_decay: Float = Field(0.01, ge=0, description="AdamW's weight decay. Upstream (torch's default)")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's betas. Upstream (torch's default)")
    adam_eps: Float = Field(1e-8, gt=0, description="AdamW's epsilon. Upstream (torch's default)")
    grad_clip: Annotated[Float, Field(gt=0)] | None = Field(
        1.0, description="maximum gradient norm. Ours; upstream: null, no limit"
    )
    zero_stage: Int = Field(ge=0, le=3)
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="what lies in the CPU's memory and not the GPU's (ZeRO-Offload). none | optimizer: masters and "
        "moments, which AdamW then updates on the CPU; needs zero_stage 1 to 3 | all: the weights too, each on the GPU "
        "while it is used; needs zero_stage 3. Ours",
    )
    precision: Literal["fp32", "bf16_autocast", "bf16", "bf16_pure"]
    objective: Objective
    min_snr_gamma: Annotated[Float, Field(gt=0)] | None = Field(
        None, description="gamma of min-SNR weights of the squared error, e.g. 5; null: none, as upstream"
    )
    perceptual_weight: Float = Field(
        0.0,
        ge=0,
        description="weight of the perceptual loss, which compares the predicted photo with the true one by "
        "EfficientNet-lite0 (pbe/train/perceptual.py), beside the squared error; 0: none, as upstream",
    )
    ema_decay: Annotated[Float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="decay per step of an exponential moving average of the weights, e.g. 0.9999, smaller in the first "
        "steps; the average is validated, scored and exported. null: none, as upstream (use_ema: False)",
    )
    ema_keep_raw: bool = Field(
        False, description="also export the weights of the last step, as a model in the folder's raw/. Ours"
    )
    beta_schedule: BetaSchedule
    hole_probs: HoleProbs
    pair_prob: Prob = Field(
        1.0, description="share of rows with a pair that see it, and not the object itself, as their reference. Ours"
    )
    condition_dropout_prob: Prob
    context_dropout_prob: Prob
    reference_augmentation: bool
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt = Field(2, description="newest complete checkpoints to keep. Ours")
    log_every: PositiveInt = Field(10, description="steps per point of the loss curve. Ours")
    validate_every: PositiveInt
    validation_rows: PositiveInt = Field(
        64, description="rows of the validation loss, always with the same timesteps and noise. Ours"
    )
    grid_rows: Int = Field(6, ge=0, le=64, description="edits shown in MLflow, always of the same rows; 0: none. Ours")
    score_every: Int = Field(
        0, ge=0, description="steps between scores of edits of training photos (pbe/train/scoring.py); 0: none. Ours"
    )
    score_rows: Int = Field(64, ge=2, description="rows that are scored, each edited twice, always the same. Ours")
    score_extractor: Annotated[EfficientNetScoreConfig | ClipScoreConfig, Field(discriminator="kind")] = Field(
        EfficientNetScoreConfig(kind="efficientnet_lite2"),
        description="network whose features the scores are of: {kind: efficientnet_lite2} | {kind: clip, weights: W}. "
        "Ours",
    )
    max_failures: Int = Field(2, ge=0, description="restarts of the worker group after a worker is lost. Ours")
    kernels: KernelsConfig = KernelsConfig()
    unet: UNetConfig = UNetConfig()
    exemplar: ExemplarConfig = ExemplarConfig()
    text: TextConfig = TextConfig()

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "bezier_prob" in values:
            share = values["bezier_prob"]
            new = f"{{box: {1 - share:g}, bezier: {share:g}}}" if isinstance(share, int | float) else "{box, bezier}"
            raise ValueError(f"bezier_prob: is now hole_probs, which names every kind of hole; write hole_probs: {new}")
        return values

    @field_validator("trainable", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        known = value.keys() == {"lora"} if isinstance(value, dict) else value in ("all", "cross_attention")
        if not known and not isinstance(value, LoraTrainable):
            raise ValueError(f"{value!r}: allowed are all, cross_attention and {{lora: {{rank: 4}}}}")
        return value

    @model_validator(mode="after")
    def _has_what_it_freezes(self) -> "TrainConfig":
        if self.trainable == "all":
            return self
        kind = self.trainable if isinstance(self.trainable, str) else "lora"
        if self.condition == "text":
            raise ValueError(
                f"trainable {kind} starts from a Paint by Example model, which reads exemplars: set trainable: all for "
                "condition text"
            )
        if self.init == "random":
            raise ValueError(
                f"trainable {kind} freezes the rest of the UNet, and init random would freeze noise: set init to a "
                "Paint by Example model (a folder, or org/name@revision on the hub), or trainable: all"
            )
        return self

    @model_validator(mode="after")
    def _processes_prepare_encoded_rows(self) -> "TrainConfig":
        if self.input_processes and (self.input, self.condition) != ("encoded", "exemplar"):
            raise ValueError(
                f"input_processes {self.input_processes} needs input: encoded and condition: exemplar; for others the "
                "networks that finish a batch stay in the training process: set input_processes: 0"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        if self.streams % self.workers:
            raise ValueError(f"workers {self.workers} must divide streams {self.streams}")
        if self.batch % self.streams:
            raise ValueError(f"streams {self.streams} must divide batch {self.batch}")
        if (self.batch // self.workers) % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} must divide the rows per worker, batch / workers = "
                f"{self.batch // self.workers}"
            )
        if self.per_worker.gpus not in (0, 1):
            raise ValueError(f"per_worker.gpus: {self.per_worker.gpus:g} must be 0 or 1: a rank uses at most one GPU")
        if self.precision == "bf16_pure" and self.zero_stage == 0:
            raise ValueError("precision bf16_pure needs zero_stage 1, 2 or 3: DeepSpeed does not support it at 0")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload {self.offload} needs zero_stage 1, 2 or 3; at 0 DeepSpeed moves nothing")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"offload all needs zero_stage 3, which gathers weights as modules run: set zero_stage: 3 instead of "
                f"{self.zero_stage}, or offload: optimizer"
            )
        if self.offload != "none" and self.precision == "bf16_pure":
            raise ValueError("offload needs float32 masters, which precision bf16_pure lacks: set precision: bf16")
        if self.optimizer == "adamw_8bit":
            if self.workers > 1:
                raise ValueError(
                    "optimizer adamw_8bit is for one worker: its blocks cannot be cut for other numbers of ranks; set "
                    "workers: 1, or optimizer: adamw, whose moments zero_stage 1 to 3 divides among the workers"
                )
            if self.offload != "none":
                raise ValueError("optimizer adamw_8bit saves GPU memory that offload frees anyway: set offload: none")
            if self.precision == "bf16_pure":
                raise ValueError(
                    "optimizer adamw_8bit needs float32 masters, which precision bf16_pure lacks: set precision: bf16"
                )
        if self.perceptual_weight and self.objective == "eps":
            raise ValueError(
                "perceptual_weight needs the photo that a prediction implies, and with objective eps a prediction at "
                "full noise implies none: set objective: x0 or v, or perceptual_weight: 0"
            )
        if self.ema_decay is not None and self.steps == 0:
            raise ValueError("ema_decay averages over steps, and steps is 0: set ema_decay: null, or steps above 0")
        if self.ema_decay is not None and self.precision == "bf16_pure":
            raise ValueError("ema_decay needs float32 masters, which precision bf16_pure lacks: set precision: bf16")
        if self.ema_keep_raw and self.ema_decay is None:
            raise ValueError("ema_keep_raw: without an average the export has these weights anyway; set ema_decay too")
        if self.condition == "text" and self.input == "pixels":
            raise ValueError(
                "input pixels draws fresh references, which condition text does not read: set input: encoded"
            )
        if self.condition == "text" and self.unet.class_embedding:
            raise ValueError(
                "unet.class_embedding reads one token, and the first of a caption is always the same: set it to false "
                "for condition text"
            )
        if self.kernels.compile and self.zero_stage == 3:
            raise ValueError("kernels.compile does not work with zero_stage 3, which gathers weights as modules run")
        return self

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step on one worker: batch / (workers * micro_batch)."""
        return self.batch // (self.workers * self.micro_batch)
