"""Memory per GPU of training the paper's network: python infra/memory.py prints the table, --measure checks the method.

Activations are counted, not estimated: one forward and backward of the full network runs on fake tensors, which have
shapes and lifetimes but no memory, and every live storage is added up once; the peak leaves out weights and their
gradients. Recomputation under activation checkpointing happens there as in training. Weights, gradients, masters,
moments and buckets follow from what pbe/train/engine.py asks of DeepSpeed 0.19.8: which buffers it holds is read in its
source, and was measured on one rank (infra/SCALING.md).

Not counted: the CUDA context, workspaces of kernels, fragmentation, and what a kernel on a GPU keeps that its
counterpart on a processor does not. Encoders need nothing: training reads what encode wrote.
"""

import argparse
import ctypes
import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from pbe.model.settings import ExemplarConfig, UNetConfig  # noqa: E402
from pbe.model.unet import Architecture, architecture_of, new_network  # noqa: E402
from pbe.train.engine import GPU_BUCKET  # noqa: E402
from pbe.train.settings import TrainConfig  # noqa: E402

GIB = 2**30
PARAMETERS = 923_306_500  # trainable: UNet 859,535,364, mapper, LayerNorm, projection and vector 63,771,136
LATENT_CHANNELS, LATENT_PX, IMAGE_PX, TOKEN_WIDTH = 4, 64, 512, 1024  # AutoencoderKL at 512 px; CLIP ViT-L/14

PRECISIONS = ("fp32", "bf16_autocast", "bf16")
STAGES = (0, 1, 2, 3)
RANKS = (8, 64)
MICRO_BATCHES = (1, 2, 4, 8)

# -- DeepSpeed 0.19.8
ALLREDUCE_BUCKET = 500_000_000  # elements that stage 0 flattens at once: MEMORY_OPT_ALLREDUCE_SIZE in runtime/engine.py
MAX_LIVE = 2 * GPU_BUCKET  # elements that stage 3 leaves gathered, as pbe/train/engine.py sets it


def architecture(cfg: TrainConfig) -> Architecture:
    """The network of a profile at 512 px with AutoencoderKL and CLIP ViT-L/14."""
    encoded = {
        "codec": {"channels": LATENT_CHANNELS, "patch_px": IMAGE_PX // LATENT_PX},
        "backbone": {"width": TOKEN_WIDTH},
    }
    return architecture_of(cfg.unet, cfg.exemplar, image_px=IMAGE_PX, encoded=encoded)


PAPER = Architecture(
    latent_channels=LATENT_CHANNELS,
    latent_px=LATENT_PX,
    backbone_width=TOKEN_WIDTH,
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


def narrower(arch: Architecture, channels: int) -> Architecture:
    """All widths in proportion to `channels`, a multiple of 32, of the first level; depth and latents stay."""
    first = arch.unet.block_channels[0]

    def scaled(width: int) -> int:
        return max(64, round(width * channels / first / 64) * 64)

    width = scaled(arch.exemplar.mapper_width)
    return replace(
        arch,
        backbone_width=width,
        unet=arch.unet.model_copy(
            update={
                "block_channels": tuple(value * channels // first for value in arch.unet.block_channels),
                "context_width": scaled(arch.unet.context_width),
            }
        ),
        exemplar=arch.exemplar.model_copy(update={"mapper_width": width}),
    )


# ------------------------------------------------------------------------------------------------ activations


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive, each once: all but the weights of `model`, whose gradients apart.

    peak: without gradients of weights. peak_with_gradients: with those there were at that time.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._weight_ids = {id(storage) for storage in self._weights}
        self._sizes: dict[int, int] = {}
        self._gradient_sizes: dict[int, int] = {}
        self._live = self._gradients = self.peak = self.peak_with_gradients = 0
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes or key in self._gradient_sizes or key in self._weight_ids:
            return
        self._sizes[key] = storage.nbytes()
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        self.peak_with_gradients = max(self.peak_with_gradients, self._live + self._gradients)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
        self._gradients -= self._gradient_sizes.pop(key, 0)

    def _is_gradient(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key not in self._gradient_sizes:
            self._gradient_sizes[key] = self._sizes.pop(key)
            self._live -= self._gradient_sizes[key]
            self._gradients += self._gradient_sizes[key]


def step_on(arch: Architecture, *, batch: int, precision: str, checkpointing: bool, fake: bool) -> LiveBytes:
    """One forward and backward; what was alive. fake: without memory."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with FakeTensorMode() if fake else nullcontext():
        torch.set_default_dtype(dtype)
        try:
            model = new_network(arch)
        finally:
            torch.set_default_dtype(torch.float32)
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        size, channels = arch.latent_px, arch.latent_channels
        noisy, masked = (torch.zeros(batch, channels, size, size, dtype=dtype) for _ in range(2))
        keep = torch.zeros(batch, 1, size, size, dtype=dtype)
        tokens = torch.zeros(batch, 1, arch.backbone_width, dtype=dtype)
        timestep, drop = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.bool)
        live = LiveBytes(model)
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
                prediction = model(
                    noisy,
                    timestep,
                    masked_latent=masked,
                    keep_mask_latent=keep,
                    exemplar_tokens=tokens,
                    drop_condition=drop,
                )
            prediction.float().pow(2).mean().backward()
    return live


def activation_bytes(arch: Architecture, precision: str, *, checkpointing: bool) -> dict[int, float]:
    """By micro-batch. 1 and 8 are counted, those between lie on the line: no less than what they are, as a peak is the
    largest of amounts that each grow in proportion."""
    low, high = MICRO_BATCHES[0], MICRO_BATCHES[-1]
    first, last = (
        step_on(arch, batch=batch, precision=precision, checkpointing=checkpointing, fake=True).peak
        for batch in (low, high)
    )
    return {batch: first + (last - first) * (batch - low) / (high - low) for batch in MICRO_BATCHES}


# ----------------------------------------------------------------------------------- weights and what goes with them


@dataclass(frozen=True)
class States:
    """Bytes on one rank. `step` is what the optimizer's step holds besides parameters and moments; activations and full
    gradients are gone by then."""

    parameters: float
    gradients: float
    moments: float  # and float32 masters
    buckets: float
    step: float

    def peak(self, activations: float) -> float:
        return self.parameters + self.moments + self.buckets + max(self.gradients + activations, self.step)


def states(precision: str, stage: int, ranks: int, *, count: int = PARAMETERS, bucket: int = GPU_BUCKET) -> States:
    """Of DeepSpeed's stages, by the dtype that weights and gradients have in the engine."""
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
    moments = 12 * share  # a float32 master and two moments, also of float32 weights
    flat = width * share + (4 * share if width == 2 else 0)  # the step flattens the gradients and turns them to float32
    # contiguous_gradients: a second copy of this rank's part. overlap_comm: two buckets; one rank alone has none
    buckets = (2 if ranks > 1 else 1) * width * bucket
    if stage == 1:
        return States(width * count, width * (count + share), moments, buckets, width * share + flat)
    if stage == 2:
        return States(width * count, width * share, moments, buckets, width * share + flat)
    gathered = width * min(count, MAX_LIVE)
    return States(width * share + gathered, width * share, moments, width * bucket, flat)


# ------------------------------------------------------------------------------------------------------- printing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, help="these rows alone")
    parser.add_argument("--measure", action="store_true", help="small networks: counted against resident memory")
    parser.add_argument(
        "--one", nargs=4, metavar=("CHANNELS", "BATCH", "PRECISION", "CHECKPOINTING"), help="of --measure"
    )
    args = parser.parse_args()
    if args.one:
        channels, batch, precision, checkpointing = args.one
        measure_one(int(channels), int(batch), precision, checkpointing == "on")
    elif args.measure:
        measure()
    else:
        print_tables(PRECISIONS if args.precision is None else (args.precision,))
    return 0


def print_tables(precisions: Sequence[str]) -> None:
    rows = [["precision", "checkpointing", *(f"micro-batch {batch}" for batch in MICRO_BATCHES)]]
    activations = {}
    for precision in precisions:
        for checkpointing in (False, True):
            found = activations[precision, checkpointing] = activation_bytes(
                PAPER, precision, checkpointing=checkpointing
            )
            rows.append([precision, "on" if checkpointing else "off", *(gib(found[batch]) for batch in MICRO_BATCHES)])
    print("### Activations, GiB\n")
    print(table(rows))

    head = ["precision", "ZeRO", "GPUs", "parameters", "gradients", "masters, moments", "buckets", "in the step"]
    rows = [[*head, *(f"peak, {how} {batch}" for how in ("all kept", "checkpointed") for batch in MICRO_BATCHES)]]
    for precision in precisions:
        for stage in STAGES:
            for ranks in RANKS if stage else (None,):
                held = states(precision, stage, ranks or 1)
                peaks = [
                    gib(held.peak(activations[precision, checkpointing][batch]))
                    for checkpointing in (False, True)
                    for batch in MICRO_BATCHES
                ]
                parts = (held.parameters, held.gradients, held.moments, held.buckets, held.step)
                rows.append([precision, f"{stage}", f"{ranks or 'any'}", *map(gib, parts), *peaks])
    print("\n### One GPU, GiB\n")
    print(table(rows))


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


# ------------------------------------------------------------------------------------------------------ measuring

CASES = [(64, 4), (128, 2)]  # channels of the first level, rows


def measure() -> None:
    """Each case in a process of its own, so that what one leaves behind is not the next one's."""
    print("channels, rows, precision, checkpointing: counted, resident, resident / counted")
    for channels, batch in CASES:
        for precision in ("fp32", "bf16"):
            for checkpointing in ("off", "on"):
                case = [str(channels), str(batch), precision, checkpointing]
                subprocess.run([sys.executable, __file__, "--one", *case], check=True)


def measure_one(channels: int, batch: int, precision: str, checkpointing: bool) -> None:
    """What the process grew by at its peak in one forward and backward, beside what was counted."""
    arch = narrower(PAPER, channels)
    counted = step_on(arch, batch=batch, precision=precision, checkpointing=checkpointing, fake=True)
    resident = resident_peak(arch, batch=batch, precision=precision, checkpointing=checkpointing)
    print(
        f"{channels}, {batch}, {precision}, {'on' if checkpointing else 'off'}: "
        f"{counted.peak_with_gradients / GIB:.3f} GiB, {resident / GIB:.3f} GiB, "
        f"{resident / counted.peak_with_gradients:.3f}",
        flush=True,
    )


def resident_peak(arch: Architecture, *, batch: int, precision: str, checkpointing: bool) -> int:
    """Bytes of activations and gradients: the high-water mark of the process over what it held before."""
    give_memory_back()
    # kernels are loaded and compiled before the mark is set
    step_on(replace(arch, latent_px=8), batch=1, precision=precision, checkpointing=checkpointing, fake=False)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what that left free would be filled before the process grows
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in new_network(arch).parameters())
    peak_bytes()
    before = peak_bytes()  # what is resident now
    step_on(arch, batch=batch, precision=precision, checkpointing=checkpointing, fake=False)
    return peak_bytes() - before - count * (2 if precision == "bf16" else 4)


def give_memory_back() -> None:
    """glibc's mallopt(M_MMAP_THRESHOLD, 1 MiB): larger blocks are given back when freed. By default that threshold
    grows to 32 MiB, and what was freed below it still counts as resident."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)


def peak_bytes() -> int:
    """The kernel's high-water mark of this process since the last call; it then starts again from what is resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


if __name__ == "__main__":
    sys.exit(main())
