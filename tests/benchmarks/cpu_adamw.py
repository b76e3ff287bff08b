"""Is DeepSpeed's AdamW for CPUs faster than torch's, where `train.offload` keeps masters and moments?

    python tests/benchmarks/cpu_adamw.py [--parameters 40000000] [--threads 2] [--turns 9] [--device cuda]

DeepSpeed compiles its kernel at first use, which needs g++ and ninja and takes a minute; without them the benchmark is
skipped. Prints medians of one step, in turns, and the ratio. Both run on the processor: --device cuda changes nothing,
and says so.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.device import add_device, say_processor_alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=40_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    add_device(parser)
    args = parser.parse_args()
    say_processor_alone(args.device, "both are optimizers for it")
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        print(f"skipped: DeepSpeed would compile its kernel with {' and '.join(missing)}, which is not on PATH")
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(args.threads)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    began = time.perf_counter()
    optimizers = {
        "torch": torch.optim.AdamW([weights(args.parameters)], lr=1e-5, fused=True),
        "deepspeed": DeepSpeedCPUAdam([weights(args.parameters)], lr=1e-5, adamw_mode=True),
    }
    print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(args.turns + 1):
        for name, optimizer in optimizers.items():
            since = time.perf_counter()
            optimizer.step()
            if turn:  # the first step makes the moments
                seconds[name].append(time.perf_counter() - since)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"{args.parameters:,} parameters, {args.threads} threads:")
    for name, median in medians.items():
        print(f"  {name}: {1000 * median:.1f} ms [{1000 * min(seconds[name]):.1f}, {1000 * max(seconds[name]):.1f}]")
    print(f"  torch / deepspeed: {medians['torch'] / medians['deepspeed']:.2f}")


def weights(count: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(count))
    parameter.grad = 1e-3 * torch.randn(count)
    return parameter


if __name__ == "__main__":
    main()
