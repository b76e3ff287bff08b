"""Real optimizer steps of the paper's network on this machine: python tests/benchmarks/full_size.py [--full]

Encoded rows like those of the encode stage (Parquet in a temporary storage; latents of 4 x 64 x 64 and tokens of 1024
are noise) go through pbe's batches, objective and DeepSpeed engine, on one rank with gloo, with random weights:
micro-batch 1, fused AdamW, activation checkpointing, lr 1e-5 from the first step. All other settings are those of
profile openimages. Without --full the network is narrower (--channels of the first level; 320 in the paper); latents
stay 64 px.

Prints the seconds and loss of each step, the peak resident memory of each phase, and the peak as bytes per trainable
parameter, above what was resident before the network was built. Nothing is asserted.

With --device cuda the engine runs on the first GPU, over nccl. Memory is then the peak of torch's allocator, and the
clock waits for the GPU after each part of a step, so the CPU cannot run ahead as it does in training.

--precision bf16 keeps float32 masters. bf16_pure keeps masters and moments in bfloat16, too coarse for most weights to
move by a step of 1e-5: it tests that the code runs, not that the network learns.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from infra.memory import GIB, architecture  # noqa: E402
from pbe.diffusion.schedule import alphas_cumprod  # noqa: E402
from pbe.diffusion.scheduler_config import scheduler_config  # noqa: E402
from pbe.model.architecture import Architecture  # noqa: E402
from pbe.model.unet import new_network  # noqa: E402
from pbe.store import Store  # noqa: E402
from pbe.train.data.encoded import EncodedRows  # noqa: E402
from pbe.train.data.input import TrainInput  # noqa: E402
from pbe.train.data.order import Share  # noqa: E402
from pbe.train.engine import make_engine, step_engine  # noqa: E402
from pbe.train.loss import Diffusion, row_losses  # noqa: E402
from pbe.train.settings import TrainConfig  # noqa: E402
from tests.benchmarks.device import add_device, now, one_rank, open_device  # noqa: E402
from tests.gpu.training import encoded_noise  # noqa: E402
from tests.profiles import profile  # noqa: E402

ROWS, ROWS_PER_GROUP = 8, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help="the paper's widths: 923 M parameters, about 20 GiB (bf16_pure: 12)"
    )
    parser.add_argument(
        "--channels", type=int, default=128, help="channels of the first level, a multiple of 32; 320 = --full"
    )
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16_autocast", "bf16", "bf16_pure"])
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--checkpointed-levels", type=int, default=4, help="levels of the UNet that recompute")
    parser.add_argument("--build", default="bf16", choices=["fp32", "bf16"], help="dtype the network is built in")
    add_device(parser)
    args = parser.parse_args()
    device = open_device(args.device)
    give_memory_back()
    batch = args.micro_batch * args.accumulation
    train = profile("openimages").train
    cfg = changed(
        train,
        precision=args.precision,
        zero_stage=args.zero_stage,
        micro_batch=args.micro_batch,
        batch=batch,
        streams=1,
        workers=1,
        kernels={**train.kernels.model_dump(), "checkpointed_levels": args.checkpointed_levels},
    )
    import deepspeed  # noqa: F401 - imported before measuring: its 0.1 GiB do not count

    channels = 320 if args.full else args.channels
    with tempfile.TemporaryDirectory(prefix="pbe-full-size-") as folder, one_rank(device):
        measure(Path(folder), cfg, channels, steps=args.steps, build=args.build, device=device)
    return 0


def changed(cfg: TrainConfig, **values: object) -> TrainConfig:
    return TrainConfig.model_validate({**cfg.model_dump(), **values})


def measure(folder: Path, cfg: TrainConfig, channels: int, *, steps: int, build: str, device: torch.device) -> None:
    store = Store(str(folder / "store"))
    arch = narrower(architecture(cfg), channels)
    encoded = encoded_noise(store, arch, patch_px=8, rows=ROWS, per_group=ROWS_PER_GROUP)
    torch.manual_seed(23)
    peak_gib(device)
    empty_gib = peak_gib(device)  # before the network is built

    # build
    low = build == "bf16" and cfg.precision in ("bf16", "bf16_pure")
    torch.set_default_dtype(torch.bfloat16 if low else torch.float32)
    model = new_network(arch)
    torch.set_default_dtype(torch.float32)
    model.use_kernels(sdpa=True, channels_last=False, checkpointed_levels=cfg.kernels.checkpointed_levels)
    if cfg.precision == "bf16_autocast":
        model.use_autocast()
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} trainable parameters, {cfg.precision}, ZeRO-{cfg.zero_stage}, micro-batch {cfg.micro_batch}, "
        f"{cfg.accumulation_steps} per step, {cfg.kernels.checkpointed_levels} levels recomputed, "
        f"built in {'bf16' if low else 'fp32'}, "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )
    peaks = {"build": peak_gib(device)}  # built in main memory, as in training, even for a GPU
    engine = make_engine(model, cfg, device=device)
    del model
    gc.collect()
    peaks["engine"] = peak_gib(device)

    # steps
    alpha_bar = alphas_cumprod(scheduler_config(cfg.beta_schedule, cfg.objective))
    grey_latent = torch.zeros(1, arch.latent_channels, arch.latent_px, arch.latent_px)  # unused: no row hides its photo
    diffusion = Diffusion(cfg, grey_latent.to(device), alpha_bar.to(device), device)
    rows = EncodedRows(encoded, tokens="class", device=device)
    share = Share(rank=0, world=1, start_step=0)
    batches = TrainInput(store, rows, cfg=cfg, seed=23, share=share)
    for step in range(steps):
        clock, losses, lap = now(device), [], {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        for _ in range(cfg.accumulation_steps):
            since = now(device)
            loss = row_losses(engine, batches.next(), diffusion).mean()
            since = spent(lap, "forward", since, device)
            engine.backward(loss)
            since = spent(lap, "backward", since, device)
            peaks["forward and backward"] = max(peaks.get("forward and backward", 0), peak_gib(device))
            step_engine(engine)
            spent(lap, "optimizer", since, device)
            peaks["optimizer"] = max(peaks.get("optimizer", 0), peak_gib(device))
            losses.append(float(loss.detach()))
        seconds = now(device) - clock
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in lap.items())
        print(f"step {step + 1}: {seconds:.1f} s ({parts}), loss {sum(losses) / len(losses):.4f}", flush=True)
    batches.close()

    peak = max(peaks.values())
    held = "on the GPU" if device.type == "cuda" else "resident"
    print(f"{held} before the network: {empty_gib:.2f} GiB; peaks: " + ", ".join(
        f"{name} {value:.2f} GiB" for name, value in peaks.items()
    ))  # fmt: skip
    print(
        f"parameters={parameters} peak_gib={peak:.2f} bytes_per_parameter={(peak - empty_gib) * GIB / parameters:.2f} "
        f"step_s={seconds:.1f} loss={losses[-1]:.4f}"
    )


def spent(lap: dict[str, float], key: str, since: float, device: torch.device) -> float:
    at = now(device)
    lap[key] += at - since
    return at


def peak_gib(device: torch.device) -> float:
    """Peak since the last call: resident memory of this process, or torch's allocations on the GPU."""
    if device.type == "cpu":
        return peak_bytes() / GIB
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / GIB


def narrower(arch: Architecture, channels: int) -> Architecture:
    """Scale all widths to `channels` of the first level, a multiple of 32; depth and latents stay the same."""
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


def give_memory_back() -> None:
    """glibc's mallopt(M_MMAP_THRESHOLD, 1 MiB): larger blocks go back to the system when freed. By default the
    threshold grows to 32 MiB, and smaller freed blocks still count as resident."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)


def peak_bytes() -> int:
    """The kernel's high-water mark of this process since the last call, which resets it to what is resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


if __name__ == "__main__":
    sys.exit(main())
