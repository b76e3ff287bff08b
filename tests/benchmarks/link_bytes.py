"""How many bytes does a training step send? python tests/benchmarks/link_bytes.py [--quick]

Real ranks with gloo take steps of a small network through pbe/train/engine.py. Each rank asks the kernel what its own
sockets have sent (TCP_INFO: bytes that arrived, each counted once). The table also has what infra/cost.py computes and
what the ZeRO paper would send. On GPUs DeepSpeed calls the same collectives; NCCL may send them by trees instead of by
rings, as gloo does.

Stage 3 keeps up to two buckets of parameters gathered. One bucket of engine.CPU_BUCKET exceeds this network, so the
benchmark sets smaller buckets: tiny ones, with which all parameters are gathered twice, and one that is as large a part
of this network as GPU_BUCKET is of the paper's.

--device cuda is skipped, because nothing could be counted: nccl needs one GPU per rank, and sends between the GPUs of a
machine by NVLink, PCIe or shared memory, not by sockets.
"""

import argparse
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from infra.cost import bytes_sent  # noqa: E402
from infra.memory import VALUE_BYTES  # noqa: E402
from infra.scaling import PARAMETERS, table  # noqa: E402
from tests.benchmarks.device import add_device, open_device  # noqa: E402
from tests.train.ranks import ARCH, run_ranks, tiny_config  # noqa: E402

NETWORK = replace(
    ARCH,
    unet=ARCH.unet.model_copy(update={"block_channels": (32, 64), "context_width": 32}),
    exemplar=ARCH.exemplar.model_copy(update={"mapper_width": 64}),
)
WARM_STEPS, STEPS = 2, 3  # in the first step stage 3 records the order of parameters
TINY_BUCKET, WHOLE_BUCKET = 20_000, 4_000_000
BYTES_ACKED = 120  # offset of tcpi_bytes_acked in Linux' struct tcp_info


@dataclass(frozen=True)
class Case:
    stage: int
    precision: str = "fp32"
    micro_batches: int = 1
    bucket: int = WHOLE_BUCKET  # elements

    def computed(self, count: int, ranks: int) -> float:
        size = count * VALUE_BYTES[self.precision]
        return bytes_sent(self.stage, ranks=ranks, size=size, micro_batches=self.micro_batches)

    def paper(self, count: int, ranks: int) -> float:
        """Bytes by section 7 of the ZeRO paper (arXiv 1910.02054): reduce-scatter and all-gather each send (N-1)/N of
        the size. Stages 0 to 2 call two, stage 3 calls three."""
        size = count * VALUE_BYTES[self.precision]
        return (3 if self.stage == 3 else 2) * size * (ranks - 1) / ranks


def cases() -> list[Case]:
    """Each stage without and with accumulation, and each precision."""
    return [
        *(Case(stage, micro_batches=micro) for stage in (0, 1, 2) for micro in (1, 2)),
        *(Case(3, micro_batches=micro, bucket=TINY_BUCKET) for micro in (1, 2)),
        *(Case(stage, "bf16", 2) for stage in (0, 1, 2)),
        Case(3, "bf16", 2, TINY_BUCKET),
        Case(1, "bf16_pure", 2),
        Case(1, "bf16_autocast", 2),
    ]


def measured(wanted: Sequence[Case], *, world: int, tmp: Path) -> tuple[int, list[float]]:
    """Number of parameters, and for each case the bytes that a rank sends per optimizer step, as a mean over ranks."""
    results = run_ranks(sent_by_rank, wanted, world, world=world, tmp=tmp, timeout_s=60 + 30 * len(wanted))
    count = results[0][0]
    return count, [sum(sent) / world for sent in zip(*(values for _, values in results), strict=True)]


def sent_by_rank(wanted: Sequence[Case], world: int) -> tuple[int, list[float]]:
    """The same on one rank."""
    import torch
    import torch.distributed as dist

    from pbe.model.unet import new_network
    from pbe.train import engine as engines

    count, out = 0, []
    for case in wanted:
        cfg = tiny_config(
            zero_stage=case.stage,
            precision=case.precision,
            workers=world,
            streams=world,
            micro_batch=1,
            batch=world * case.micro_batches,
        )
        engines.CPU_BUCKET = case.bucket  # only in this process, which ends after the measurement
        network = new_network(NETWORK)
        count = sum(parameter.numel() for parameter in network.parameters())
        engine = engines.make_engine(network, cfg, device=torch.device("cpu"))
        dtype = torch.bfloat16 if case.precision in ("bf16", "bf16_pure") else torch.float32
        size, channels = NETWORK.latent_px, NETWORK.latent_channels
        noisy = torch.randn(1, channels, size, size, dtype=dtype)
        conditions = {
            "masked_latent": torch.randn(1, channels, size, size, dtype=dtype),
            "keep_mask_latent": torch.ones(1, 1, size, size, dtype=dtype),
            "exemplar_tokens": torch.randn(1, 1, NETWORK.backbone_width, dtype=dtype),
            "drop_condition": torch.zeros(1, dtype=torch.bool),
        }
        before = 0
        for step in range(WARM_STEPS + STEPS):
            dist.barrier()
            if step == WARM_STEPS:
                before = sent_bytes()
            for _ in range(case.micro_batches):
                loss = engine(noisy, torch.zeros(1, dtype=torch.long), **conditions).float().pow(2).mean()
                engine.backward(loss)
                engines.step_engine(engine)
        dist.barrier()
        out.append((sent_bytes() - before) / STEPS)
    return count, out


def sent_bytes() -> int:
    """Bytes sent by all TCP connections of this process; other processes do not count."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # closed after it was listed
            continue
        with connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
                total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only two ranks, not four")
    add_device(parser)
    args = parser.parse_args()
    if args.device == "cuda":
        print(
            "skipped: it counts bytes in gloo's sockets, and nccl uses none between the GPUs of a machine; "
            "ZeRO calls the same collectives on GPUs, so use --device cpu"
        )
        return 0
    open_device(args.device)  # ranks fork from a server that imports DeepSpeed
    import torch

    from pbe.model.unet import new_network
    from pbe.train.engine import GPU_BUCKET

    rows = [["ranks", "precision", "ZeRO", "micro-batches", "sent per step, MB", "computed, MB", "sent / computed",
             "sent / ZeRO paper"]]  # fmt: skip
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in new_network(NETWORK).parameters())
    wanted = [*cases(), Case(3, bucket=round(count * GPU_BUCKET / PARAMETERS))]
    for world in (2,) if args.quick else (2, 4):
        with tempfile.TemporaryDirectory(prefix="pbe-link-") as tmp:
            count, sent = measured(wanted, world=world, tmp=Path(tmp))
        for case, size in zip(wanted, sent, strict=True):
            note = f", buckets of {case.bucket:,}" if case.stage == 3 else ""
            computed, paper = case.computed(count, world), case.paper(count, world)
            rows.append(
                [f"{world}", case.precision, f"{case.stage}{note}", f"{case.micro_batches}", f"{size / 1e6:.2f}",
                 f"{computed / 1e6:.2f}", f"{size / computed:.3f}", f"{size / paper:.2f}"]
            )  # fmt: skip
    print(f"{count:,} parameters\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
