"""Is sampling here as fast as diffusers' pipeline? python tests/benchmarks/sampler.py [--quick] [--device cuda]

One edit at guidance scale 5 with PNDM, one thread, with a UNet small enough for a processor and large enough that a
step takes more than 50 ms. PaintByExamplePipeline and `sample` with `ConditionedUNet.denoise` run in turns, on the same
UNet, noise and conditions (those that the pipeline prepares). On both sides the benchmark measures processor time from
one call of the UNet to the next, as the median of an edit's steps: network, guidance and scheduler, without encoding
the pictures and decoding the result, which a pipeline does once per call. With --device cuda all networks are on the
first GPU, and the wall clock is read after the GPU has finished. The network is so small that launching kernels then
takes most of a step.

The last line has the median of the pairs' ratios and the largest difference of the final latents; nothing is asserted.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import PNDMScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from pbe.diffusion.sampling import Sampling, sample  # noqa: E402
from pbe.model.architecture import Architecture  # noqa: E402
from pbe.model.settings import ExemplarConfig, UNetConfig  # noqa: E402
from pbe.model.unet import new_network  # noqa: E402
from tests.benchmarks.device import add_device, now, one_thread, open_device  # noqa: E402
from tests.tiny_weights import CLIP_LAYERS, CLIP_WIDTH, CONTEXT_WIDTH, REFERENCE_PX, paper_model  # noqa: E402

ARCH = Architecture(
    latent_channels=4,
    latent_px=16,
    backbone_width=CLIP_WIDTH,
    unet=UNetConfig(
        block_channels=(64, 128, 320),
        attention=(True, True, False),
        layers_per_block=2,
        attention_heads=8,
        norm_groups=32,
        context_width=CONTEXT_WIDTH,
        class_embedding=False,
    ),
    exemplar=ExemplarConfig(mapper_width=CLIP_WIDTH, mapper_blocks=(CLIP_LAYERS + 1) // 5),
)
IMAGE_PX, SCALE = 8 * ARCH.latent_px, 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs: less than 50 s")
    add_device(parser)
    args = parser.parse_args()
    device = open_device(args.device)
    try:
        from tests.diffusers_pipeline import conditions_seen, pipeline_of
    except ImportError as error:
        print(f"skipped: this diffusers no longer has PaintByExamplePipeline ({error})")
        return 0
    one_thread(device)
    torch.manual_seed(0)
    model = replace(paper_model(), network=new_network(ARCH).eval())
    pipeline = pipeline_of(model, PNDMScheduler.from_config(model.card.scheduler)).to(
        device
    )  # also moves the model's UNet
    rng = np.random.default_rng(0)
    photo, reference = (rng.integers(0, 256, (side, side, 3)).astype(np.uint8) for side in (IMAGE_PX, REFERENCE_PX))
    hole = np.zeros((IMAGE_PX, IMAGE_PX), np.uint8)
    hole[30:100, 20:85] = 255
    noise = torch.randn(1, 4, ARCH.latent_px, ARCH.latent_px).to(device)  # the same on every device

    def theirs(steps: int) -> Tensor:
        return pipeline(
            example_image=Image.fromarray(reference),
            image=Image.fromarray(photo),
            mask_image=Image.fromarray(hole),
            num_inference_steps=steps,
            guidance_scale=SCALE,
            latents=noise,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images

    with conditions_seen(model.network.unet) as seen:
        theirs(1)

    def ours(steps: int) -> Tensor:
        return sample(
            lambda noisy, timestep: model.network.denoise(noisy, timestep, **vars(seen[0])),
            noise,
            scheduler=model.card.scheduler,
            sampling=Sampling(SCALE, steps, "pndm"),
        )

    def seconds_per_step(run: Callable[[int], Tensor], steps: int) -> tuple[float, Tensor]:
        entries: list[float] = []
        hook = model.network.unet.register_forward_pre_hook(lambda *_: entries.append(now(device, time.process_time)))
        latent = run(steps)
        hook.remove()
        return statistics.median(after - before for before, after in itertools.pairwise(entries)), latent

    pairs, steps = (24, 5) if args.quick else (60, 10)
    found: dict[Callable[[int], Tensor], list[float]] = {ours: [], theirs: []}
    differences = []
    for pair in range(pairs + 1):
        latents = {}
        for run in (ours, theirs) if pair % 2 else (theirs, ours):
            seconds, latents[run] = seconds_per_step(run, steps)
            if pair:  # the first is a warm-up
                found[run].append(seconds)
        differences.append(float((latents[ours] - latents[theirs]).abs().max()))
    for name, run in (("ours", ours), ("diffusers", theirs)):
        print(
            f"{name}: {1000 * statistics.median(found[run]):.1f} ms per step, median of {pairs} edits of {steps} steps"
        )
    ratio = statistics.median(mine / other for mine, other in zip(found[ours], found[theirs], strict=True))
    print(f"ours_over_diffusers={ratio:.3f} max_diff={max(differences):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
