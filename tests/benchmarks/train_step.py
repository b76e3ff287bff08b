"""What does a training step cost beyond its arithmetic? python tests/benchmarks/train_step.py [--quick] [--device cuda]

One rank, one core, the sample profile's network on 72 rows, so that a step takes over half a second; ZeRO 2, float32.
With --device cuda it runs on the first GPU, over nccl, by the wall clock after the GPU has finished. A step is then
short, and the ratios say more about the processor beside the GPU. In turns, in one process:

ours           a step of `train_worker`: rows from encoded Parquet, loss, backward, the step, guards, a log point
bare           DeepSpeed alone: the same UNet and optimizer on random tensors of the same shapes, made once
unet           torch alone: forward, backward and AdamW on those tensors

ours_over_bare is the overhead of our loop, cached_over_unet that of our loop and of DeepSpeed. online_over_cached
is what training from pixels costs (tests/benchmarks/online_input.py: next batch, forward, backward),
cached_online_loss_diff the largest difference of a loss between the two on the same draws, with float32 arrays. The
last line has the medians of the turns' ratios; nothing is asserted.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from pbe.model.architecture import Architecture, architecture_of  # noqa: E402
from pbe.model.unet import new_network  # noqa: E402
from pbe.store import Store  # noqa: E402
from pbe.train.engine import make_engine, step_engine  # noqa: E402
from pbe.train.settings import TrainConfig  # noqa: E402
from pbe.train.worker import train_worker  # noqa: E402
from tests.benchmarks.device import add_device, now, one_rank, one_thread, open_device  # noqa: E402
from tests.benchmarks.online_input import measure  # noqa: E402
from tests.profiles import profile  # noqa: E402
from tests.train.ranks import PATCH_PX, WIDTH, tiny_encoded, tiny_spec  # noqa: E402

LATENT_PX = 16


def config(steps: int) -> TrainConfig:
    scratch = profile("scratch").train
    changes = {
        "steps": steps,
        "workers": 1,
        "batch": 72,
        "micro_batch": 24,
        "log_every": 1,
        "checkpoint_every": 10_000,
        "validate_every": 10_000,
        "validation_rows": 1,
        "grid_rows": 0,
    }
    return TrainConfig.model_validate(scratch.model_dump() | changes)


def architecture(cfg: TrainConfig) -> Architecture:
    encoded = {"codec": {"channels": 16, "patch_px": PATCH_PX}, "backbone": {"width": WIDTH}}
    return architecture_of(cfg.unet, cfg.exemplar, image_px=LATENT_PX * PATCH_PX, encoded=encoded)


def random_inputs(
    arch: Architecture, rows: int, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    shape = (rows, arch.latent_channels, arch.latent_px, arch.latent_px)
    conditions = {
        "masked_latent": torch.randn(shape, device=device),
        "keep_mask_latent": torch.rand(rows, 1, arch.latent_px, arch.latent_px, device=device),
        "exemplar_tokens": torch.randn(rows, 1, arch.backbone_width, device=device),
        "drop_condition": torch.zeros(rows, dtype=torch.bool, device=device),
    }
    noisy, wanted = (torch.randn(shape, device=device) for _ in range(2))
    return noisy, torch.randint(0, 1000, (rows,), device=device), conditions, wanted


def bare_step(cfg: TrainConfig, arch: Architecture, device: torch.device) -> Callable[[], None]:
    engine = make_engine(new_network(arch), cfg, device=device)
    noisy, timestep, conditions, wanted = random_inputs(arch, cfg.micro_batch, device)

    def step() -> None:
        for _ in range(cfg.accumulation_steps):
            loss = (engine(noisy, timestep, **conditions) - wanted).pow(2).mean()
            engine.backward(loss)
            step_engine(engine)

    return step


def unet_step(cfg: TrainConfig, arch: Architecture, device: torch.device) -> Callable[[], None]:
    network = new_network(arch).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=cfg.lr, fused=True)
    noisy, timestep, conditions, wanted = random_inputs(arch, cfg.micro_batch, device)

    def step() -> None:
        for _ in range(cfg.accumulation_steps):
            loss = (network(noisy, timestep, **conditions) - wanted).pow(2).mean()
            (loss / cfg.accumulation_steps).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclass
class Turns:
    """on_progress of the run: after each step of ours, runs one step of each other kind."""

    others: dict[str, Callable[[], None]]
    device: torch.device
    since: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, point: Mapping[str, float]) -> None:
        took = {"ours": now(self.device) - self.since}
        for name, run in self.others.items():
            before = now(self.device)
            run()
            took[name] = now(self.device) - before
        if point["step"] > 2:  # the first steps allocate
            for name, value in took.items():
                self.seconds.setdefault(name, []).append(value)
        self.since = now(self.device)


def step_times(rounds: int, device: torch.device) -> dict[str, list[float]]:
    cfg = config(rounds + 2)
    arch = architecture(cfg)
    turns = Turns({"bare": bare_step(cfg, arch, device), "unet": unet_step(cfg, arch, device)}, device)
    with tempfile.TemporaryDirectory(prefix="pbe-bench-") as folder:
        store = Store(folder)
        encoded = tiny_encoded(store, shards=4, rows=24, slots=2, channels=16, latent_px=LATENT_PX)
        spec: Any = tiny_spec(store, encoded, cfg, "bench")
        spec = replace(spec, arch=arch, card=replace(spec.card, image_px=LATENT_PX * PATCH_PX), on_progress=turns)
        turns.since = now(device)
        train_worker(spec, device)
    return turns.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns: less than 50 s")
    add_device(parser)
    args = parser.parse_args()
    device = open_device(args.device)
    one_thread(device)
    with one_rank(device):
        seconds = step_times(6 if args.quick else 40, device)
    online_over_cached, loss_difference = measure(6 if args.quick else 30, device)
    for name, values in seconds.items():
        print(f"{name:5} median {1000 * statistics.median(values):.1f} ms of {len(values)} steps")

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds["ours"], seconds[other], strict=True))

    print(
        f"ours_over_bare={ratio('bare'):.3f} cached_over_unet={ratio('unet'):.3f} "
        f"online_over_cached={online_over_cached:.2f} cached_online_loss_diff={loss_difference:.1e}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
