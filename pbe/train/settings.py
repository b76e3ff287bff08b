"""Settings of training."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pbe.diffusion.settings import BetaSchedule, Objective
from pbe.model.settings import ExemplarConfig, UNetConfig
from pbe.settings import ActorResources, Float, Frac, Int, PositiveInt, Prob, Seed, Settings, Weights

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
    activation_checkpointing: bool = Field(
        False, description="recompute activations: less memory, a third more time. Ours; upstream: true"
    )


class TrainConfig(Settings):
    input: Literal["encoded", "pixels"] = Field(
        "encoded",
        description="encoded: what the encode stage stored | pixels: encoders run at every step, with fresh references "
        "(paper). Ours",
    )
    init: Weights  # or: random, sd
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
    weight_decay: Float = Field(0.01, ge=0, description="AdamW's weight decay. Upstream (torch's default)")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's betas. Upstream (torch's default)")
    adam_eps: Float = Field(1e-8, gt=0, description="AdamW's epsilon. Upstream (torch's default)")
    grad_clip: Annotated[Float, Field(gt=0)] | None = Field(
        1.0, description="maximum gradient norm. Ours; upstream: null, no limit"
    )
    zero_stage: Int = Field(ge=0, le=3)
    precision: Literal["fp32", "bf16_autocast", "bf16", "bf16_pure"]
    objective: Objective
    min_snr_gamma: Annotated[Float, Field(gt=0)] | None = Field(
        None, description="gamma of min-SNR loss weights, e.g. 5; null: none, as upstream"
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
    max_failures: Int = Field(2, ge=0, description="restarts of the worker group after a worker is lost. Ours")
    kernels: KernelsConfig = KernelsConfig()
    unet: UNetConfig = UNetConfig()
    exemplar: ExemplarConfig = ExemplarConfig()

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "bezier_prob" in values:
            share = values["bezier_prob"]
            new = f"{{box: {1 - share:g}, bezier: {share:g}}}" if isinstance(share, int | float) else "{box, bezier}"
            raise ValueError(f"bezier_prob: is now hole_probs, which names every kind of hole; write hole_probs: {new}")
        return values

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
        if self.kernels.compile and self.zero_stage == 3:
            raise ValueError("kernels.compile does not work with zero_stage 3, which gathers weights as modules run")
        return self

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step on one worker: batch / (workers * micro_batch)."""
        return self.batch // (self.workers * self.micro_batch)
