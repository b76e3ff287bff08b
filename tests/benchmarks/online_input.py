"""What does training from pixels cost? python tests/benchmarks/online_input.py [--rounds 6] [--device cuda]

One process with one thread trains the network of params.yaml on the same rows with the same draws, alternately from
stored arrays and from pixels: next(), forward, backward. Prints the median time of each, and how much the loss differs
if arrays are stored in float32 and in float16. --device cuda moves the network, codec and backbone to the first GPU,
also for encoding the stored arrays; decoding and augmentation stay on the processor.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pbe.config import Params
from pbe.data import images
from pbe.data.slots import slot_files
from pbe.diffusion.schedule import alphas_cumprod
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.model.architecture import Architecture
from pbe.model.backbone import load_backbone
from pbe.model.codec import fit_patch_codec
from pbe.model.unet import ConditionedUNet, new_network
from pbe.settings import Dtype
from pbe.store import Manifest, Store
from pbe.train.data.input import TrainInput, open_input
from pbe.train.data.order import Share
from pbe.train.loss import Diffusion, row_losses
from pbe.train.settings import TrainConfig
from tests.benchmarks.device import add_device, now, one_thread, open_device
from tests.profiles import profile
from tests.tiny_weights import lively
from tests.train.pixels import SEED, SLOTS, Networks, encoded_of, triplets_of

WARM_UP_ROUNDS = 1  # the first calls of a kernel select its algorithm


def measure(rounds: int, device: torch.device) -> tuple[float, float]:
    """(time of a micro-batch from pixels / from stored arrays, largest loss difference with float32 arrays)."""
    params = profile("scratch")
    codec_cfg = params.encode.codec
    assert codec_cfg.kind == "patch" and params.encode.backbone.kind == "efficientnet_lite0", "those of profile scratch"
    threads = torch.get_num_threads()
    one_thread(device)
    try:
        with tempfile.TemporaryDirectory(prefix="pbe-bench-") as folder:
            store = Store(folder)
            image_px = params.materialize.image_px
            # on a second visit pixels draw fresh references, so the losses must differ
            steps = -(-(WARM_UP_ROUNDS + rounds) * _micro_batch(params) // params.train.batch)
            rows = steps * params.train.batch
            triplets = triplets_of(
                store,
                image_px=image_px,
                reference_px=params.materialize.reference_px,
                photos_of_shard=(rows // SLOTS,),
            )
            crops = [images.decode(data) for data in _sources(store, triplets)]
            codec, _ = fit_patch_codec(crops, patch_px=codec_cfg.patch_px, channels=codec_cfg.channels)
            networks = Networks(codec.to(device), load_backbone("efficientnet_lite0").to(device), "class")
            return _measure(rounds, params, store, triplets, networks, device)
    finally:
        torch.set_num_threads(threads)


def _measure(
    rounds: int, params: Params, store: Store, triplets: Manifest, networks: Networks, device: torch.device
) -> tuple[float, float]:
    cfg = params.train.model_copy(update={"precision": "fp32", "micro_batch": _micro_batch(params)})
    network = _network(params, networks).to(device)
    latent = torch.zeros(1, networks.codec.channels, *2 * [params.materialize.image_px // networks.codec.patch_px])
    alpha_bar = alphas_cumprod(scheduler_config(cfg.beta_schedule, cfg.objective))
    diffusion = Diffusion(cfg, latent.to(device), alpha_bar.to(device), device)
    encoded: dict[Dtype, Manifest] = {
        dtype: encoded_of(store, triplets, networks, image_px=params.materialize.image_px, dtype=dtype, device=device)
        for dtype in ("float32", "float16")
    }

    def opened(of: Manifest, source: str) -> closing[TrainInput[Any]]:
        return closing(
            open_input(
                store,
                of,
                triplets if source == "pixels" else None,
                cfg=cfg.model_copy(update={"input": source}),
                seed=SEED,
                share=Share(0, 1, 0),
                codec=networks.codec,
                device=device,
            )
        )

    times: dict[str, list[float]] = {"encoded": [], "pixels": []}
    differences: dict[Dtype, list[float]] = {"float32": [], "float16": []}
    with (
        opened(encoded["float32"], "encoded") as exact,
        opened(encoded["float16"], "encoded") as half,
        opened(encoded["float32"], "pixels") as online,
    ):
        time.sleep(0.5)  # until all queues are full
        for number in range(WARM_UP_ROUNDS + rounds):
            losses = {}
            pairs = [("encoded", half), ("pixels", online)]
            for name, source in pairs[:: 1 if number % 2 else -1]:  # so that neither is always second
                start = now(device)
                losses[name] = _step(network, source, diffusion)
                if number >= WARM_UP_ROUNDS:
                    times[name].append(now(device) - start)
            differences["float16"].append(abs(losses["encoded"] - losses["pixels"]))
            with torch.no_grad():
                loss = float(row_losses(network, exact.next(), diffusion).mean())
            differences["float32"].append(abs(loss - losses["pixels"]))
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = [online / cached for online, cached in zip(times["pixels"], times["encoded"], strict=True)]
    print(
        f"{cfg.micro_batch} rows, next + forward + backward: encoded {1e3 * median['encoded']:.0f} ms, pixels "
        f"{1e3 * median['pixels']:.0f} ms; loss differs by at most {max(differences['float32']):.1e} (stored in "
        f"float32), {max(differences['float16']):.1e} (float16)"
    )
    return statistics.median(ratios), max(differences["float32"])


def _micro_batch(params: Params) -> int:
    """Random rows, an even number, so that all slots and streams have equally many."""
    return min(8, params.train.micro_batch)


def _step(network: ConditionedUNet, source: TrainInput[Any], diffusion: Diffusion) -> float:
    network.zero_grad()
    loss = row_losses(network, source.next(), diffusion).mean()
    loss.backward()
    return float(loss.detach())


def _network(params: Params, networks: Networks) -> ConditionedUNet:
    """Give every layer random weights: some start at zero, which would hide their input."""
    cfg: TrainConfig = params.train
    unet = cfg.unet
    arch = Architecture(
        latent_channels=networks.codec.channels,
        latent_px=params.materialize.image_px // networks.codec.patch_px,
        backbone_width=networks.backbone.width,
        unet=unet,
        exemplar=cfg.exemplar,
    )
    torch.manual_seed(SEED)
    network = new_network(arch)
    lively(network, SEED, scale=0.01)
    return network


def _sources(store: Store, triplets: Manifest) -> list[bytes]:
    files = [file for slot in slot_files(triplets) for file in slot]
    return [data for file in files for data in store.read_table(file, columns=["source"]).column(0).to_pylist()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    add_device(parser)
    args = parser.parse_args()
    ratio, difference = measure(args.rounds, open_device(args.device))
    print(f"online_over_cached={ratio:.3f} cached_online_loss_diff={difference:.2e}")
