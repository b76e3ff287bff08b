"""Real optimiser steps of the paper's network on this machine: python tests/benchmarks/full_size.py [--full]

Encoded rows as the encode stage writes them (Parquet in a temporary storage; latents and tokens are noise, 4 x 64 x 64
and 1024 wide) go through pbe's own batches, objective and DeepSpeed engine, on one rank with gloo, with random weights:
micro-batch 1, fused AdamW, activation checkpointing, lr 1e-5 from the first step. Everything else is
infra/profiles/openimages.yaml. Without --full the network is narrower (--channels of the first level, 320 in the
paper), latents stay 64 px.

Prints per step its seconds and loss; per phase the peak resident memory; and the peak as bytes per trainable parameter,
counted from what was resident before the network was built. Nothing is asserted.
--precision bf16 keeps float32 masters, bf16_pure keeps masters and moments in bfloat16, too coarse for a step of 1e-5
on most weights: that shows that the chain runs, not that it learns.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from infra.memory import GIB, architecture, give_memory_back, narrower, peak_bytes  # noqa: E402
from pbe.config import TrainConfig, load_params  # noqa: E402
from pbe.data.batches import Batch, DrawConfig, Prefetched, rank_batches  # noqa: E402
from pbe.data.schema import array_shape, encoded_schema, require  # noqa: E402
from pbe.data.slots import slot_name  # noqa: E402
from pbe.diffusion.schedule import TRAIN_TIMESTEPS, alphas_cumprod, scheduler_config  # noqa: E402
from pbe.model.unet import new_network  # noqa: E402
from pbe.store import Manifest, Store, make_manifest  # noqa: E402
from pbe.train.engine import make_engine, step_engine  # noqa: E402
from pbe.train.loss import Diffusion, row_losses  # noqa: E402

ROWS, ROWS_PER_GROUP, DRAWS = 8, 2, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help="the paper's widths: 923 M parameters; some 20 GiB, with bf16_pure 12"
    )
    parser.add_argument("--channels", type=int, default=128, help="of the first level, a multiple of 32; 320 = --full")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16_autocast", "bf16", "bf16_pure"])
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--build", default="bf16", choices=["fp32", "bf16"], help="dtype the network is built in")
    args = parser.parse_args()
    give_memory_back()
    batch = args.micro_batch * args.accumulation
    train = load_params(ROOT / "infra" / "profiles" / "openimages.yaml").train
    cfg = changed(
        train,
        precision=args.precision,
        zero_stage=args.zero_stage,
        micro_batch=args.micro_batch,
        batch=batch,
        lanes=1,
        workers=1,
        kernels={**train.kernels.model_dump(), "activation_checkpointing": not args.no_checkpointing},
    )
    with tempfile.TemporaryDirectory(prefix="pbe-full-size-") as folder:
        measure(Path(folder), cfg, 320 if args.full else args.channels, steps=args.steps, build=args.build)
    return 0


def changed(cfg: TrainConfig, **values: object) -> TrainConfig:
    return TrainConfig.model_validate({**cfg.model_dump(), **values})


def measure(folder: Path, cfg: TrainConfig, channels: int, *, steps: int, build: str) -> None:
    store = Store(str(folder / "store"))
    arch = narrower(architecture(cfg), channels)
    encoded = write_rows(store, arch.latent_channels, arch.latent_px, arch.backbone_width)
    one_rank(folder / "rendezvous")
    torch.manual_seed(23)
    peak_gib()
    empty_gib = peak_gib()  # what is resident now

    # build
    low = build == "bf16" and cfg.precision in ("bf16", "bf16_pure")
    torch.set_default_dtype(torch.bfloat16 if low else torch.float32)
    model = new_network(arch)
    torch.set_default_dtype(torch.float32)
    model.use_kernels(sdpa=True, channels_last=False, activation_checkpointing=cfg.kernels.activation_checkpointing)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} trainable parameters, {cfg.precision}, ZeRO-{cfg.zero_stage}, micro-batch {cfg.micro_batch}, "
        f"{cfg.accumulation_steps} per step, activation checkpointing "
        f"{'on' if cfg.kernels.activation_checkpointing else 'off'}, built in {'bf16' if low else 'fp32'}, "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )
    peaks = {"build": peak_gib()}
    engine = make_engine(model, cfg, device=torch.device("cpu"))
    del model
    gc.collect()
    peaks["engine"] = peak_gib()

    # steps
    alpha_bar = alphas_cumprod(scheduler_config(cfg.beta_schedule, cfg.objective))
    grey_latent = torch.zeros(1, arch.latent_channels, arch.latent_px, arch.latent_px)  # no row hides its photo
    diffusion = Diffusion(cfg, grey_latent, alpha_bar, torch.device("cpu"))
    batches = Prefetched(batches_of(store, encoded, cfg), depth=2)
    for step in range(steps):
        clock, losses, lap = time.perf_counter(), [], {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        for _ in range(cfg.accumulation_steps):
            since = time.perf_counter()
            loss = row_losses(engine, batches.next(), diffusion).mean()
            since = spent(lap, "forward", since)
            engine.backward(loss)
            since = spent(lap, "backward", since)
            peaks["forward and backward"] = max(peaks.get("forward and backward", 0), peak_gib())
            step_engine(engine)
            spent(lap, "optimizer", since)
            peaks["optimizer"] = max(peaks.get("optimizer", 0), peak_gib())
            losses.append(float(loss.detach()))
        seconds = time.perf_counter() - clock
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in lap.items())
        print(f"step {step + 1}: {seconds:.1f} s ({parts}), loss {sum(losses) / len(losses):.4f}", flush=True)
    batches.close()
    dist.destroy_process_group()

    peak = max(peaks.values())
    print(f"resident before the network: {empty_gib:.2f} GiB; peaks: " + ", ".join(
        f"{name} {value:.2f} GiB" for name, value in peaks.items()
    ))  # fmt: skip
    print(
        f"parameters={parameters} peak_gib={peak:.2f} bytes_per_parameter={(peak - empty_gib) * GIB / parameters:.2f} "
        f"step_s={seconds:.1f} loss={losses[-1]:.4f}"
    )


def write_rows(store: Store, channels: int, latent_px: int, token_width: int) -> Manifest:
    """One unit of one slot, by the store and the schema of the encode stage."""
    schema = encoded_schema((channels, latent_px, latent_px), (DRAWS, 1, token_width))
    rng = np.random.default_rng(23)
    columns: dict[str, list] = {
        "image_id": [f"row{index}" for index in range(ROWS)],
        "slot": [0] * ROWS,
        "box_index": [0] * ROWS,
    }
    for field in schema:
        if field.metadata:
            values = rng.standard_normal((ROWS, *array_shape(field)))
            if "_std" in field.name:
                values = np.abs(values) * 0.1
            if "mask_latent" in field.name:
                values = values > 0.5
            columns[field.name] = [value.astype("<f2").tobytes() for value in values]
    table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    record = store.write_unit(
        "encode",
        "b0000-full-size",
        {slot_name(0): require(table, schema, "full_size")},
        counts={"rows": ROWS},
        rows_per_group=ROWS_PER_GROUP,
    )
    return make_manifest("encode", config={"rows_per_group": ROWS_PER_GROUP}, version=1, units=[record])


def batches_of(store: Store, encoded: Manifest, cfg: TrainConfig) -> Iterator[Batch]:
    draw = DrawConfig(
        seed=23,
        timesteps=TRAIN_TIMESTEPS,
        bezier_prob=cfg.bezier_prob,
        condition_dropout_prob=cfg.condition_dropout_prob,
        context_dropout_prob=cfg.context_dropout_prob,
        reference_augmentation=cfg.reference_augmentation,
        class_token_only=True,
    )
    return rank_batches(
        store,
        encoded,
        cfg=draw,
        batch=cfg.batch,
        micro_batch=cfg.micro_batch,
        lanes=cfg.lanes,
        rank=0,
        world=1,
        rows_per_group=ROWS_PER_GROUP,
        start_step=0,
    )


def one_rank(rendezvous: Path) -> None:
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - its 0.1 GiB are not the network's

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)


def spent(lap: dict[str, float], key: str, since: float) -> float:
    now = time.perf_counter()
    lap[key] += now - since
    return now


def peak_gib() -> float:
    """Since the last call."""
    return peak_bytes() / GIB


if __name__ == "__main__":
    sys.exit(main())
