"""Steps of profile `speedrun` on rows of noise: how long its training takes, and what its perceptual loss costs."""

from pathlib import Path
from typing import Any

import torch

from infra.memory import GIB, peak_of
from pbe.model.architecture import architecture_of
from pbe.store import Store, save_manifest
from pbe.train.settings import TrainConfig
from tests.gpu.sizes import Sizes
from tests.gpu.training import NEVER, encoded_noise, measure_training
from tests.profiles import profile

ROWS_PER_GROUP = 32


def measure_speedrun(device: torch.device, work: Path, sizes: Sizes, changes: dict[str, Any]) -> dict[str, Any]:
    """training_min: minutes of the profile's rows at this rate, without validation and checkpoints."""
    params = profile("speedrun")
    settings, batch, codec = params.train.model_dump(), sizes.speedrun_batch, params.encode.codec
    assert codec.kind == "patch"
    kernels = settings["kernels"] | changes.get("kernels", {})
    settings |= {"batch": batch, "micro_batch": batch, "streams": 1, "steps": NEVER, "log_every": sizes.window_steps}
    settings |= {"checkpoint_every": NEVER, "validate_every": NEVER, "validation_rows": 1, "grid_rows": 0}
    if device.type == "cpu":
        settings["input_processes"] = 0  # more processes than cores would only wait
    cfg = TrainConfig.model_validate(settings | changes | {"kernels": kernels})
    config = {
        "codec": {"channels": codec.channels, "patch_px": codec.patch_px},
        "backbone": {"width": 1280},  # of EfficientNet-lite0
    }
    arch = architecture_of(cfg.unet, cfg.exemplar, image_px=params.materialize.image_px, encoded=config)
    here = work / "speedrun"
    if not (here / "encoded.json").exists():
        store = Store(str(here / "store"))
        rows = max(4 * batch, ROWS_PER_GROUP)
        manifest = encoded_noise(store, arch, patch_px=codec.patch_px, rows=rows, per_group=ROWS_PER_GROUP)
        save_manifest(here / "encoded.json", manifest)
    measured = measure_training(device, here, sizes.of(arch, params.materialize.image_px), cfg)
    rate = measured["rows_per_s"]
    return {
        "rows_per_s": rate,
        "training_min": params.train.steps * params.train.batch / rate / 60,
        "predicted_gib": peak_of(cfg, arch, patch_px=codec.patch_px) / GIB,
        **{key: measured[key] for key in ("peak_gib", "data_frac", "start_s", "loss")},
    }
