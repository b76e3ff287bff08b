"""Computes what training the paper's network takes: bytes between GPUs, hours and price. infra/memory.py counts memory.

python infra/cost.py prints time for the published A100 rate. --step-s and --step-rows take a step that you measured:
train with `workers: 1` and add MLflow's forward_s, backward_s and optimizer_s, or run `make gpu`. infra/SCALING.md has
its output. Sizes and counts come from infra/scaling.py, settings from a profile. Nothing here was run at this size.

A row costs the same for any number of rows per GPU, and links reach their nominal speed. tests/benchmarks/link_bytes.py
measures the bytes that ranks send. The range of a step runs from full overlap of compute and link to none.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infra.memory import STAGES, VALUE_BYTES
from infra.scaling import (
    A100_PHOTOS_PER_S,
    DAY_S,
    GB,
    HOUR_S,
    PAPER_SIZED,
    PARAMETERS,
    PHOTOS,
    Parser,
    profile,
    row_bytes,
    table,
)

# -- cited: README.md of github.com/mosaicml/diffusion at 066e68f, seconds of an A100 per 512 px photo
A100_ROW_S = 8 / A100_PHOTOS_PER_S[8]
# -- cited: network/README.md of github.com/stas00/ml-engineering at 0030e63: nccl-tests on a node of A100, 235 GB/s
NVLINK_GBIT_S = 8 * 235


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


def positive(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("infra/cost.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
