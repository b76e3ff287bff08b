"""Measured trainings: `train_worker` on encoded Parquet, ended from inside after enough steps."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch

from pbe.data.schema import array_bytes, array_shape, encoded_schema, without_empty
from pbe.data.slots import slot_name
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.model.architecture import Architecture
from pbe.model.card import ModelCard
from pbe.model.codec import codec_bytes, fit_patch_codec
from pbe.model.unet import ConditionedUNet, new_network
from pbe.store import Manifest, Store, load_manifest, make_manifest, save_manifest
from pbe.train import worker
from pbe.train.engine import make_engine
from pbe.train.settings import TrainConfig
from pbe.train.spec import TrainSpec
from pbe.train.timing import peak_memory_gib
from pbe.train.worker import train_worker
from tests.gpu.process import join_one_rank
from tests.gpu.sizes import Sizes
from tests.gpu.stops import stops_of_steps
from tests.profiles import profile

NEVER, DRAWS = 10**6, 2


class EnoughError(Exception):
    """Ends `train_worker` from its own progress report, before it saves or exports."""


def write_encoded_rows(device: torch.device, work: Path, sizes: Sizes) -> None:
    """The rows that all measured trainings read, and their manifest."""
    patch_px = sizes.image_px // sizes.arch.latent_px
    rows, per_group = sizes.encoded_rows, sizes.rows_per_group
    manifest = encoded_noise(Store(str(work / "store")), sizes.arch, patch_px=patch_px, rows=rows, per_group=per_group)
    save_manifest(work / "encoded.json", manifest)


def encoded_noise(store: Store, arch: Architecture, *, patch_px: int, rows: int, per_group: int) -> Manifest:
    """Rows of noise in one slot, written by the store with the encode stage's schema, and a patch codec."""
    crops = np.random.default_rng(0).integers(0, 256, (8, 4 * patch_px, 4 * patch_px, 3)).astype(np.uint8)
    codec, _ = fit_patch_codec(crops, patch_px=patch_px, channels=arch.latent_channels)
    path = "parts/encode/codec.safetensors"
    store.write_bytes(path, codec_bytes(codec))
    latent = (arch.latent_channels, arch.latent_px, arch.latent_px)
    schema = without_empty(encoded_schema(latent, (DRAWS, 1, arch.backbone_width)).empty_table()).schema
    rng = np.random.default_rng(23)
    columns: dict[str, list[Any]] = {
        "image_id": [f"row{index}" for index in range(rows)],
        "slot": [0] * rows,
        "box_index": [0] * rows,
    }
    for field in schema:
        if field.metadata:
            values: np.ndarray = rng.standard_normal((rows, *array_shape(field)), dtype=np.float32)
            if field.name.endswith("_std"):
                values = np.zeros_like(values)  # as of the patch codec; an AutoencoderKL's are read and sampled too
            if "mask_latent" in field.name:
                values = values > 0.5
            columns[field.name] = [array_bytes(field, value) for value in values]
    table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    tables = {slot_name(0): table}
    record = store.write_unit("encode", "b0000-noise", tables, counts={"rows": rows}, rows_per_group=per_group)
    config = {
        "rows_per_group": per_group,
        "codec": {"kind": "patch", "path": path, "patch_px": patch_px, "channels": arch.latent_channels},
        "backbone": {"kind": "efficientnet_lite0", "width": arch.backbone_width, "tokens": "class"},
    }
    return make_manifest("encode", config=config, version=1, units=[record])


def paper_config(sizes: Sizes, **changes: Any) -> TrainConfig:
    """The openimages profile on one rank with one micro-batch per step, unless `changes` say otherwise. `kernels` are
    merged."""
    base = profile("openimages").train.model_dump()
    kernels = base["kernels"] | changes.pop("kernels", {})
    micro_batch = changes.pop("micro_batch", sizes.micro_batch)
    base |= {"workers": 1, "streams": 1, "micro_batch": micro_batch, "batch": micro_batch, "kernels": kernels}
    base |= {"steps": NEVER, "log_every": sizes.window_steps, "checkpoint_every": NEVER, "validate_every": NEVER}
    return TrainConfig.model_validate(base | {"validation_rows": 1, "grid_rows": 0, "lr": 1e-6} | changes)


def paper_job(work: Path, sizes: Sizes, cfg: TrainConfig, name: str, on_progress: Any = None) -> TrainSpec:
    encoded: Manifest = load_manifest(work / "encoded.json")
    return TrainSpec(
        cfg=cfg,
        seed=23,
        store_uri=str(work / "store"),
        encoded=encoded,
        triplets=None,
        arch=sizes.arch,
        initial=None,
        card=ModelCard(sizes.image_px, 224, 10, "class", scheduler_config(cfg.beta_schedule, cfg.objective), run={}),
        run_name=name,
        origin=None,
        tracking_uri=None,
        mlflow_run_id="",
        on_progress=on_progress,
    )


class Windows:
    """on_progress: the points of the curve with the wall-clock time between them; raises EnoughError after the last.

    between: called after every window but the first, outside the measured time.
    """

    def __init__(self, count: int, between: Callable[[], None] | None = None) -> None:
        self.seconds: list[float] = []
        self.points: list[Mapping[str, float]] = []
        self._count, self._between = count, between
        self._since = time.perf_counter()

    def __call__(self, point: Mapping[str, float]) -> None:
        # the device is in sync here, because the point has its seconds
        self.seconds.append(time.perf_counter() - self._since)
        self.points.append(point)
        if len(self.points) > 1 and self._between is not None:
            self._between()
        if len(self.points) > self._count:
            raise EnoughError
        self._since = time.perf_counter()


@contextmanager
def measured_on(device: torch.device) -> Iterator[None]:
    """Within the block, `train_worker` makes its network on the device, because the paper's takes six seconds on a CPU
    and initial weights do not matter here. At the end the engine, which its hooks keep alive, is destroyed."""
    engines: list[Any] = []

    def new(arch: Architecture) -> ConditionedUNet:
        with device:
            return new_network(arch)

    def make(*args: Any, **kwargs: Any) -> Any:
        engines.append(make_engine(*args, **kwargs))
        return engines[-1]

    with patch("pbe.train.network.new_network", new), patch.object(worker, "make_engine", make):
        try:
            yield
        finally:
            for engine in engines:
                engine.destroy()
            engines.clear()


def measure_training(device: torch.device, work: Path, sizes: Sizes, cfg: TrainConfig) -> dict[str, Any]:
    """rows_per_s: median of the windows. start_s: to the end of the first window, compilation and all. data_frac: share
    of a step in which the device waits for rows. peak_gib: of the GPU's allocator; None on a processor."""
    join_one_rank(device, work)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    windows = Windows(sizes.windows)
    with measured_on(device), suppress(EnoughError):
        train_worker(paper_job(work, sizes, cfg, "measured", windows), device)
    assert len(windows.points) == 1 + sizes.windows, "the training ended before it was measured"
    rows = sizes.window_steps * cfg.batch
    measured = windows.points[1:]
    return {
        "rows_per_s": rows / statistics.median(windows.seconds[1:]),
        "peak_gib": peak_memory_gib(device) if device.type == "cuda" else None,
        "data_frac": sum(point["data_s"] for point in measured) / sum(point["step_s"] for point in measured),
        "start_s": windows.seconds[0],
        "loss": measured[-1]["loss"],
    }


def stops_of_training(device: torch.device, work: Path, sizes: Sizes, cfg: TrainConfig) -> dict[str, Any]:
    """How often a step makes the CPU wait, and in which lines."""
    join_one_rank(device, work)
    with measured_on(device):
        steps = stops_of_steps(device, paper_job(work, sizes, cfg.model_copy(update={"log_every": NEVER}), "stops"))
    return {"per_step": statistics.mean(step.total() for step in steps), "places": dict(steps[-1])}
