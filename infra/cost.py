"""Computes what training the paper's network takes: memory of one GPU, bytes between GPUs, hours and price.

python infra/cost.py prints time for the published A100 rate. --step-s and --step-rows take a step that you measured:
train with `workers: 1` and add MLflow's forward_s, backward_s and optimizer_s, or run `make gpu`. --memory prints the
memory of one GPU instead. infra/SCALING.md holds both outputs. Sizes and counts come from infra/scaling.py, settings
from a profile. Nothing here was run at this size.

Memory: one forward and backward pass of the full network runs on fake tensors, which have shapes and lifetimes but no
memory; every live storage counts once. Weights, gradients, moments and buckets follow from DeepSpeed 0.19.8's source
and the settings in pbe/train/engine.py. The CUDA context, kernel workspaces and fragmentation are not counted.

Time: a row costs the same for any number of rows per GPU, and links reach their nominal speed.
tests/benchmarks/link_bytes.py measures the bytes that ranks send. The range of a step runs from full overlap of compute
and link to none.
"""

import argparse
import math
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from infra.scaling import (  # noqa: E402
    A100_PHOTOS_PER_S,
    DAY_S,
    GB,
    HOUR_S,
    PAPER_SIZED,
    PARAMETERS,
    PHOTOS,
    profile,
    row_bytes,
    table,
)
from pbe.model.architecture import Architecture, architecture_of  # noqa: E402
from pbe.model.settings import ExemplarConfig, UNetConfig  # noqa: E402
from pbe.model.unet import new_network  # noqa: E402
from pbe.train.engine import GPU_BUCKET  # noqa: E402
from pbe.train.settings import TrainConfig  # noqa: E402

GIB = 2**30
STAGES = (0, 1, 2, 3)
MICRO_BATCHES = (1, 4, 8)
# of weights and gradients, in the engine and on the link
VALUE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "bf16_pure": 2}

# -- DeepSpeed 0.19.8
ALLREDUCE_BUCKET = 500_000_000  # elements that stage 0 flattens at once: MEMORY_OPT_ALLREDUCE_SIZE in runtime/engine.py
MAX_LIVE = 2 * GPU_BUCKET  # elements that stage 3 keeps gathered, as set in pbe/train/engine.py

# -- cited: README.md of github.com/mosaicml/diffusion at 066e68f, seconds of an A100 per 512 px photo
A100_ROW_S = 8 / A100_PHOTOS_PER_S[8]
# -- cited: network/README.md of github.com/stas00/ml-engineering at 0030e63: nccl-tests on a node of A100, 235 GB/s
NVLINK_GBIT_S = 8 * 235


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


def live_bytes_of_a_step(arch: Architecture, *, batch: int, precision: str, checkpointing: bool) -> int:
    """Peak bytes of activations in one forward and backward pass."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.set_default_dtype(dtype)
    try:
        model = new_network(arch)
    finally:
        torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
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
        prediction.float().pow(2).mean().backward()
    return live.peak


def activation_bytes(arch: Architecture, precision: str, *, checkpointing: bool) -> dict[int, float]:
    """Peak bytes by micro-batch, 1 to 8. 1 and 8 are counted, the others interpolated: an upper bound, because a peak
    is the largest of amounts that each grow in proportion to the batch."""
    low, high = MICRO_BATCHES[0], MICRO_BATCHES[-1]
    with FakeTensorMode():
        first, last = (
            live_bytes_of_a_step(arch, batch=batch, precision=precision, checkpointing=checkpointing)
            for batch in (low, high)
        )
    return {batch: first + (last - first) * (batch - low) / (high - low) for batch in range(low, high + 1)}


@dataclass(frozen=True)
class States:
    """Bytes on one rank. `step`: what the optimizer's step holds besides parameters and moments. Activations and full
    gradients are freed by then."""

    parameters: float
    gradients: float
    moments: float  # including float32 masters
    buckets: float
    step: float

    def peak(self, activations: float) -> float:
        return self.parameters + self.moments + self.buckets + max(self.gradients + activations, self.step)


def states(precision: str, stage: int, ranks: int, *, count: int = PARAMETERS, bucket: int = GPU_BUCKET) -> States:
    """Return the bytes that DeepSpeed holds on each of `ranks` at ZeRO `stage`, for `count` parameters."""
    width = 2 if precision == "bf16" else 4
    share = count / ranks
    if stage == 0:
        # fp32: plain AdamW. bf16: float32 masters and, in the step, float32 gradients. Buckets come after backward
        masters = 4 * count if width == 2 else 0
        return States(
            parameters=width * count,
            gradients=width * count,
            moments=8 * count + masters,
            buckets=0,
            step=width * count + max(masters, width * min(count, ALLREDUCE_BUCKET)),
        )
    moments = 12 * share  # a float32 master and two moments, even for float32 weights
    flat = width * share + (4 * share if width == 2 else 0)  # the step flattens gradients and converts to float32
    # contiguous_gradients: a second copy of this rank's part. overlap_comm: two buckets; off on a single rank
    buckets = (2 if ranks > 1 else 1) * width * bucket
    if stage == 1:
        return States(width * count, width * (count + share), moments, buckets, width * share + flat)
    if stage == 2:
        return States(width * count, width * share, moments, buckets, width * share + flat)
    gathered = width * min(count, MAX_LIVE)
    return States(width * share + gathered, width * share, moments, width * bucket, flat)


def memory_rows(precisions: Sequence[str]) -> list[list[str]]:
    kinds = {"kept": False, "checkpointed": True}
    sizes = [f"{batch} row{'s' if batch > 1 else ''}" for batch in MICRO_BATCHES]
    rows = [["precision", "ZeRO", "GPUs", *(f"{kind}, {size}" for kind in kinds for size in sizes)]]
    for precision in precisions:
        counted = [activation_bytes(PAPER, precision, checkpointing=on) for on in kinds.values()]
        activations = [by_batch[batch] for by_batch in counted for batch in MICRO_BATCHES]
        rows.append([precision, "only activations", "", *(f"{size / GIB:.1f}" for size in activations)])
        for stage in STAGES:
            for ranks in (8, 64) if stage else (1,):
                held = states(precision, stage, ranks)
                peaks = (f"{held.peak(size) / GIB:.1f}" for size in activations)
                rows.append([precision, f"{stage}", f"{ranks}" if stage else "any", *peaks])
    return rows


# -- time


def bytes_sent(stage: int, *, ranks: int, size: float, micro_batches: int = 1) -> float:
    """Bytes that one rank sends in an optimizer step, for `size` bytes of gradients or of parameters.

    DeepSpeed 0.19.8 all-reduces buckets of gradients at every stage, 2 (N-1)/N of their size, even if a rank keeps only
    its part. Stages 0 and 1 reduce once a step, 2 and 3 after each micro-batch. Stages 1 and 2 gather the new
    parameters once a step, (N-1)/N. Stage 3 gathers them in each forward and each backward pass: an upper bound, as two
    buckets stay gathered.
    """
    reductions = micro_batches if stage >= 2 else 1
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[stage]
    return (2 * reductions + gathers) * size * (ranks - 1) / ranks


def training_rows(args: argparse.Namespace, params: dict[str, Any]) -> list[list[str]]:
    train = params["train"]
    batch, stage = train["batch"], train["zero_stage"] if args.zero_stage is None else args.zero_stage
    size = PARAMETERS * VALUE_BYTES[args.precision or train["precision"]]
    row_s = A100_ROW_S
    if args.step_s is not None:
        row_s = args.step_s / (args.step_rows or batch // train["workers"])
    rows = [["GPUs", "between nodes, Gbit/s", "rows per GPU, micro-batches", "sent, GB", "compute, s", "link, s",
             "rows/s", "days", "GPU-hours", "storage must deliver"]]  # fmt: skip
    if args.gpu_hour_price:
        rows[0].append("price")
    for gpus in args.gpus:
        if train["streams"] % gpus:
            sys.exit(f"infra/cost.py: --gpus {gpus} must divide the profile's {train['streams']} streams")
        micro_batches = math.ceil(batch / gpus / train["micro_batch"])
        sent = bytes_sent(stage, ranks=gpus, size=size, micro_batches=micro_batches)
        one_node = gpus <= args.gpus_per_node
        for speed in args.link_gbit_s[:1] if one_node else sorted(args.link_gbit_s):
            compute = batch / gpus * row_s
            # a ring visits all GPUs of a node before it leaves the node, and is as fast as its slowest hop
            slowest = args.gpu_link_gbit_s if one_node else min(args.gpu_link_gbit_s, speed)
            sending = 8 * sent / (slowest * 1e9)
            low, high = max(compute, sending), compute + sending
            low_h, high_h = (train["steps"] * seconds * gpus / HOUR_S for seconds in (low, high))
            rows.append(
                [
                    f"{gpus}",
                    "one node" if one_node else f"{speed:g}",
                    f"{batch // gpus}, {micro_batches}",
                    f"{sent / GB:.1f}",
                    f"{compute:.3f}",
                    f"{sending:.3f}",
                    span(batch / high, batch / low, ",.0f"),
                    span(train["steps"] * low / DAY_S, train["steps"] * high / DAY_S, ".2f"),
                    span(low_h, high_h, ",.0f"),
                    f"{batch / low * row_bytes(params) / 1e6:,.0f} MB/s",
                ]
            )
            if args.gpu_hour_price:
                rows[-1].append(span(args.gpu_hour_price * low_h, args.gpu_hour_price * high_h, ",.0f"))
    return rows


def other_rows(args: argparse.Namespace, params: dict[str, Any]) -> list[list[str]]:
    """Encode and edit, if --encode-row-s or --edit-s is given: their GPUs share the rows and exchange nothing."""
    edit = params["edit"]
    edits = params["bench"]["max_items"] * len(edit["holes"]) * len(edit["references"]) * len(edit["seeds"])
    given = [("encode", PHOTOS * params["materialize"]["slots"], args.encode_row_s), ("edit", edits, args.edit_s)]
    rows = [["stage", "rows", "GPU-hours", *(["price"] if args.gpu_hour_price else [])]]
    for name, count, each_s in given:
        if each_s:
            hours = count * each_s / HOUR_S
            price = [f"{args.gpu_hour_price * hours:,.0f}"] if args.gpu_hour_price else []
            rows.append([name, f"{count:,}", f"{hours:,.1f}", *price])
    return rows


def span(low: float, high: float, form: str) -> str:
    """Both bounds, or one number if they print the same."""
    first, last = f"{low:{form}}", f"{high:{form}}"
    return first if first == last else f"{first} to {last}"


# -- the program


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(f"infra/cost.py: {message}")  # one line, without the usage


def positive(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="memory of one GPU; for all precisions or --precision")
    parser.add_argument(
        "--profile", choices=PAPER_SIZED, default="openimages-8gpu", help="profile with the run's settings"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        choices=[1 << n for n in range(7)],
        default=(1, 8, 16, 64),
        help="numbers of GPUs",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs per node (8)")
    parser.add_argument("--step-s", type=positive, help="seconds of one GPU's step; default: a published A100 rate")
    parser.add_argument("--step-rows", type=positive, help="rows in that step; default: rows per GPU in the profile")
    parser.add_argument("--encode-row-s", type=positive, help="GPU seconds per encoded row; no default")
    parser.add_argument("--edit-s", type=positive, help="GPU seconds per edit; no default")
    parser.add_argument("--zero-stage", type=int, choices=STAGES, help="ZeRO stage; default: the profile's")
    parser.add_argument("--precision", choices=VALUE_BYTES, help="train.precision; default: the profile's")
    parser.add_argument(
        "--gpu-link-gbit-s", type=positive, default=NVLINK_GBIT_S, help="Gbit/s of a GPU inside a node; default: NVLink"
    )
    parser.add_argument(
        "--link-gbit-s",
        type=positive,
        nargs="+",
        default=[100, 400],
        help="Gbit/s between nodes, one or more (100 400)",
    )
    parser.add_argument(
        "--gpu-hour-price", type=positive, help="price of a GPU-hour: prints what training costs; no default"
    )
    args = parser.parse_args(arguments)
    if args.memory:
        if args.precision == "bf16_pure":
            parser.error("--memory does not count bf16_pure")
        print(table(memory_rows([args.precision] if args.precision else ["fp32", "bf16_autocast", "bf16"])))
        return 0
    if args.step_rows and args.step_s is None:
        parser.error("--step-rows needs --step-s")
    params = profile(args.profile)
    print(table(training_rows(args, params)))
    if args.encode_row_s or args.edit_s:
        print()
        print(table(other_rows(args, params)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
