"""Counts the memory of one GPU that training the paper's network takes, in GiB.

python infra/memory.py prints peaks by precision, ZeRO stage, GPUs and rows; with --precision, --ema, --offload,
--optimizer and --trainable, those with these settings of `train`. --cards prints what the profiles for one card take.
infra/SCALING.md has these outputs. Nothing here was run at this size.

One forward and backward pass of the full network runs on fake tensors, which have shapes and lifetimes but no memory;
every live storage counts once. Weights, gradients, moments and buckets follow from DeepSpeed 0.19.8's source and the
settings in pbe/train/engine.py. The CUDA context, kernel workspaces and fragmentation are not counted.
"""

import argparse
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from pydantic import TypeAdapter, ValidationError  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from infra.scaling import PARAMETERS, Parser, profile, table  # noqa: E402
from pbe.model.architecture import Architecture, architecture_of  # noqa: E402
from pbe.model.codec import PatchCodec  # noqa: E402
from pbe.model.settings import ExemplarConfig, UNetConfig  # noqa: E402
from pbe.model.unet import checkpoint_levels, new_network  # noqa: E402
from pbe.train.engine import GPU_BUCKET  # noqa: E402
from pbe.train.perceptual import PerceptualLoss  # noqa: E402
from pbe.train.settings import Trainable, TrainConfig  # noqa: E402
from pbe.train.trainable import choose_trainable, parameter_counts, store_frozen_in_bfloat16  # noqa: E402

GIB = 2**30
PRECISIONS = ("fp32", "bf16_autocast", "bf16")
STAGES = (0, 1, 2, 3)
MICRO_BATCHES = (1, 4, 8)
CARDS = {"openimages-24gb": 24, "openimages-12gb": 12, "finetune-8gb": 8}  # profiles, and GB of their card
# of weights and gradients, in the engine and on the link
VALUE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "bf16_pure": 2}
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}  # two per parameter; bitsandbytes has a scale per 256
FROZEN_BYTES = VALUE_BYTES | {"bf16_autocast": 2}  # of a frozen weight; its norms, a thousandth, are float32

# -- DeepSpeed 0.19.8
ALLREDUCE_BUCKET = 500_000_000  # elements that stage 0 flattens at once: MEMORY_OPT_ALLREDUCE_SIZE in runtime/engine.py
MAX_LIVE = 2 * GPU_BUCKET  # elements that stage 3 keeps gathered, as set in pbe/train/engine.py


# -- the network


def architecture(cfg: TrainConfig) -> Architecture:
    """The network of a profile at 512 px with AutoencoderKL and CLIP ViT-L/14."""
    encoded = {"codec": {"channels": 4, "patch_px": 8}, "backbone": {"width": 1024}}
    return architecture_of(cfg.unet, cfg.exemplar, image_px=512, encoded=encoded)


PAPER = Architecture(
    latent_channels=4,
    latent_px=64,
    backbone_width=1024,
    unet=UNetConfig(
        block_channels=(320, 640, 1280, 1280),
        attention=(True, True, True, False),
        layers_per_block=2,
        attention_heads=8,
        norm_groups=32,
        context_width=768,
        class_embedding=False,
    ),
    exemplar=ExemplarConfig(mapper_width=1024, mapper_blocks=5),
)


# -- memory


class LiveBytes(TorchDispatchMode):
    """Counts bytes of live storages, each once. `peak` excludes the weights of `model` and their gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._ignored = {id(storage) for storage in self._weights}
        self._sizes: dict[int, int] = {}
        self._live = self.peak = 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._ignore_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes or key in self._ignored:
            return
        self._sizes[key] = storage.nbytes()
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
        self._ignored.discard(key)  # another storage may get this id

    def _ignore_gradient(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        self._live -= self._sizes.pop(key, 0)
        self._ignored.add(key)


def live_bytes_of_a_step(
    arch: Architecture,
    *,
    batch: int,
    precision: str,
    checkpointed_levels: int,
    trainable: Trainable = "all",
    perceptual_patch_px: int | None = None,
) -> int:
    """Peak bytes of activations in one forward and backward pass. perceptual_patch_px: also those of the perceptual
    loss, through a codec with patches of this side."""
    dtype = torch.bfloat16 if precision in ("bf16", "bf16_pure") else torch.float32
    torch.set_default_dtype(dtype)
    try:
        with unset_fake_temporarily(), torch.device("meta"):  # peft cannot add layers to fake tensors
            model = new_network(arch)
            choose_trainable(model, trainable, seed=0)
            if precision == "bf16_autocast":
                store_frozen_in_bfloat16(model)
    finally:
        torch.set_default_dtype(torch.float32)
    with unset_fake_temporarily():  # it reads its weights
        perceptual = None if perceptual_patch_px is None else _perceptual_loss(arch, perceptual_patch_px)
    model.to_empty(device="cpu")
    if checkpointed_levels:
        checkpoint_levels(model.unet, checkpointed_levels)
    latent = torch.zeros(batch, arch.latent_channels, arch.latent_px, arch.latent_px, dtype=dtype)
    with LiveBytes(model) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
            prediction = model(
                latent,
                torch.zeros(batch, dtype=torch.long),
                masked_latent=latent.clone(),
                keep_mask_latent=latent[:, :1].clone(),
                exemplar_tokens=torch.zeros(batch, 1, arch.backbone_width, dtype=dtype),
                drop_condition=torch.zeros(batch, dtype=torch.bool),
            )
        loss = prediction.float().pow(2).mean()
        if perceptual is not None:
            loss = loss + perceptual(prediction.float(), latent.float()).mean()
        loss.backward()
    return live.peak


def _perceptual_loss(arch: Architecture, patch_px: int) -> PerceptualLoss:
    """That of training, whose memory does not depend on the codec's values."""
    values = 3 * patch_px**2
    basis = torch.zeros(arch.latent_channels, values)
    codec = PatchCodec(torch.zeros(values), basis, torch.ones(()), torch.eye(patch_px))
    return PerceptualLoss(codec, torch.device("cpu"))


@dataclass(frozen=True)
class Activations:
    """Peak bytes of a step's activations, by rows per forward pass."""

    first: float
    further: float  # each of the others

    def of(self, rows: int) -> float:
        return self.first + self.further * (rows - 1)


@cache
def activations_of(
    arch: Architecture,
    precision: str,
    *,
    checkpointed_levels: int,
    trainable: Trainable = "all",
    perceptual_patch_px: int | None = None,
) -> Activations:
    """1 and 8 rows are counted, other numbers lie on their line: between them that is an upper bound, because a peak is
    the largest of amounts that each grow in proportion to the rows."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        one, eight = (
            live_bytes_of_a_step(
                arch,
                batch=rows,
                precision=precision,
                checkpointed_levels=checkpointed_levels,
                trainable=trainable,
                perceptual_patch_px=perceptual_patch_px,
            )
            for rows in (1, 8)
        )
    return Activations(one, (eight - one) / 7)


@dataclass(frozen=True)
class States:
    """Bytes on one rank's GPU. `step`: what the optimizer's step holds besides parameters and moments. Activations and
    full gradients are freed by then."""

    parameters: float
    gradients: float
    moments: float  # including float32 masters and, with train.ema_decay, their average
    buckets: float
    step: float
    host: float = 0  # in the CPU's memory, with train.offload

    def peak(self, activations: float) -> float:
        return self.parameters + self.moments + self.buckets + max(self.gradients + activations, self.step)


def states(
    precision: str,
    stage: int,
    ranks: int,
    *,
    ema: bool = False,
    offload: str = "none",
    optimizer: str = "adamw",
    count: int = PARAMETERS,
    trained: int | None = None,
    bucket: int = GPU_BUCKET,
) -> States:
    """Return the bytes that DeepSpeed and pbe/train/ema.py hold on each of `ranks` at ZeRO `stage`, for `count`
    parameters, of which `trained` are not frozen (None: all)."""
    width = VALUE_BYTES[precision]
    trained = count if trained is None else trained
    weights = width * trained + FROZEN_BYTES[precision] * (count - trained)
    share = trained / ranks
    average, both_moments = 4 if ema else 0, MOMENT_BYTES[optimizer]
    master = 4
    if precision == "bf16_pure":  # masters and moments as narrow as the weights; the settings refuse other moments
        master, both_moments = width, 2 * width
    if stage == 0:
        # fp32: plain AdamW. bf16: float32 masters and, in the step, float32 gradients. Buckets come after backward
        masters = 4 * trained if width == 2 else 0
        return States(
            parameters=weights,
            gradients=width * trained,
            moments=(both_moments + average) * trained + masters,
            buckets=0,
            step=width * trained + max(masters, width * min(trained, ALLREDUCE_BUCKET)),
        )
    moments = (master + both_moments + average) * share  # a master and two moments, even for float32 weights
    # the step flattens gradients and converts them to the masters' format
    flat = width * share + (master * share if master != width else 0)
    # contiguous_gradients: a second copy of this rank's part. overlap_comm: two buckets; off on a single rank
    buckets = (2 if ranks > 1 else 1) * width * bucket
    live = width * min(count, MAX_LIVE)  # stage 3 keeps so many gathered
    if offload != "none":
        # masters, moments, their gradients and the rounded weights lie in the CPU's memory. Stages 2 and 3 send each
        # bucket of gradients there; stage 1 keeps all until the last micro-batch
        on_cpu = moments + (4 + width) * share
        if stage == 3:
            kept, sent = (weights / ranks, 0) if offload == "optimizer" else (0, weights / ranks)
            return States(kept + live, 0, 0, width * bucket, 0, on_cpu + sent)
        return States(weights, width * trained if stage == 1 else 0, 0, buckets, 0, on_cpu)
    if stage == 1:
        return States(weights, width * (trained + share), moments, buckets, width * share + flat)
    if stage == 2 and precision == "bf16":  # gradients are summed in one flat float32 partition, which the step takes
        return States(weights, 4 * share, moments, buckets, 4 * share)
    if stage == 2:
        return States(weights, width * share, moments, buckets, width * share + flat)
    return States(weights / ranks + live, width * share, moments, width * bucket, flat)


def memory_rows(
    precisions: Sequence[str], trainable: Trainable, *, ema: bool, offload: str, optimizer: str
) -> list[list[str]]:
    """A table of peaks. ZeRO stages at which `offload` does nothing are left out."""
    stages = {"none": STAGES, "optimizer": STAGES[1:], "all": STAGES[3:]}[offload]
    count, trained = parameter_counts(PAPER, trainable)
    kinds = {"kept": 0, "finest level checkpointed": 1, "checkpointed": 4}
    sizes = [f"{batch} row{'s' if batch > 1 else ''}" for batch in MICRO_BATCHES]
    rows = [["precision", "ZeRO", "GPUs", *(f"{kind}, {size}" for kind in kinds for size in sizes)]]
    for precision in precisions:
        counted = [
            activations_of(PAPER, precision, checkpointed_levels=levels, trainable=trainable)
            for levels in kinds.values()
        ]
        activations = [counts.of(rows) for counts in counted for rows in MICRO_BATCHES]
        rows.append([precision, "only activations", "", *(f"{size / GIB:.1f}" for size in activations)])
        for stage in stages:
            for ranks in (1, 8, 64) if stage else (1,):
                if ranks > 1 and optimizer == "adamw_8bit":
                    continue
                held = states(
                    precision,
                    stage,
                    ranks,
                    ema=ema,
                    offload=offload,
                    optimizer=optimizer,
                    count=count,
                    trained=trained,
                )
                peaks = (f"{held.peak(size) / GIB:.1f}" for size in activations)
                rows.append([precision, f"{stage}", f"{ranks}" if stage else "any", *peaks])
    return rows


def states_of(cfg: TrainConfig, arch: Architecture = PAPER) -> States:
    """What training under `cfg` holds on each rank, for a network of `arch`."""
    count, trained = parameter_counts(arch, cfg.trainable)
    return states(
        cfg.precision,
        cfg.zero_stage,
        cfg.workers,
        ema=cfg.ema_decay is not None,
        offload=cfg.offload,
        optimizer=cfg.optimizer,
        count=count,
        trained=trained,
    )


def peak_of(cfg: TrainConfig, arch: Architecture = PAPER, *, patch_px: int = 8) -> float:
    """Peak bytes of a GPU's memory while training under `cfg`, through a codec with patches of this side."""
    activations = activations_of(
        arch,
        cfg.precision,
        checkpointed_levels=cfg.kernels.checkpointed_levels,
        trainable=cfg.trainable,
        perceptual_patch_px=patch_px if cfg.perceptual_weight else None,
    )
    return states_of(cfg, arch).peak(activations.of(cfg.micro_batch))


def card_rows() -> list[list[str]]:
    rows = [["profile", "trains", "rows per forward pass", "levels recomputed", "GPU, GiB", "CPU, GiB"]]
    for name in CARDS:
        cfg = TrainConfig.model_validate(profile(name)["train"])
        trained = parameter_counts(PAPER, cfg.trainable)[1]
        counted = [f"{size / GIB:.1f}" for size in (peak_of(cfg), states_of(cfg).host)]
        rows.append([name, f"{trained:,}", f"{cfg.micro_batch}", f"{cfg.kernels.checkpointed_levels}", *counted])
    return rows


# -- the program


def trainable(text: str) -> Trainable:
    try:
        return TypeAdapter(Trainable).validate_python(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError):
        message = f"{text}: allowed are all, cross_attention and {{lora: {{rank: 4}}}}"
        raise argparse.ArgumentTypeError(message) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("infra/memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", action="store_true", help="the profiles for one card, whose settings are their own")
    parser.add_argument("--precision", choices=PRECISIONS, help="train.precision; default: each of these")
    parser.add_argument("--ema", action="store_true", help="with train.ema_decay set")
    parser.add_argument(
        "--offload", choices=["none", "optimizer", "all"], default="none", help="train.offload; default: none"
    )
    parser.add_argument("--optimizer", choices=MOMENT_BYTES, default="adamw", help="train.optimizer; default: adamw")
    parser.add_argument("--trainable", type=trainable, default="all", help="train.trainable, in YAML; default: all")
    args = parser.parse_args(arguments)
    if args.cards:
        if any(value != parser.get_default(key) for key, value in vars(args).items() if key != "cards"):
            parser.error("--cards takes the settings of the profiles, so no other option goes with it")
        print(table(card_rows()))
        return 0
    precisions = [args.precision] if args.precision else PRECISIONS
    print(table(memory_rows(precisions, args.trainable, ema=args.ema, offload=args.offload, optimizer=args.optimizer)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
