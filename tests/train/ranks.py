"""Real training ranks without Ray: processes joined by gloo, each running `train_worker`.

They fork from a server that has torch, diffusers and DeepSpeed imported already and has never used them, and take one
call after the other, until one of them fails: then the next call has new ones.
"""

import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from pbe.data.schema import array_bytes, array_shape, encoded_schema, without_empty
from pbe.data.slots import slot_name
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.model.architecture import Architecture
from pbe.model.card import ModelCard
from pbe.model.codec import codec_bytes, fit_patch_codec
from pbe.model.settings import ExemplarConfig, UNetConfig
from pbe.model.unet import ConditionedUNet, new_network
from pbe.store import Manifest, Store, make_manifest
from pbe.train.checkpoints import Run
from pbe.train.settings import TrainConfig
from pbe.train.spec import TrainSpec
from pbe.train.worker import train_worker
from tests.profiles import profile

LATENT_PX, CHANNELS, PATCH_PX, WIDTH = 4, 4, 4, 1280
ARCH = Architecture(
    latent_channels=CHANNELS,
    latent_px=LATENT_PX,
    backbone_width=WIDTH,
    unet=UNetConfig(
        block_channels=(8, 16),
        attention=(False, True),
        layers_per_block=1,
        attention_heads=2,
        norm_groups=4,
        context_width=8,
        class_embedding=True,
    ),
    exemplar=ExemplarConfig(mapper_width=16, mapper_blocks=1),
)
_PRELOAD = ["torch", "diffusers", "deepspeed", "mlflow", "pyarrow.parquet", "pbe.train.worker", "tests.train.ranks"]


class RankDiedError(Exception):
    """A rank was killed, or raised the error whose text this is."""


@dataclass(frozen=True)
class FillDiskAt:
    """on_progress: from `step` on, this process cannot write files above 20 kB, as if the disk were full."""

    step: int

    def __call__(self, point: Mapping[str, float]) -> None:
        if point["step"] >= self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


@dataclass(frozen=True)
class KillAt:
    """on_progress: SIGKILL of rank 0 once `step` is logged."""

    step: int

    def __call__(self, point: Mapping[str, float]) -> None:
        if point["step"] >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KillOnceAt:
    """on_progress: SIGKILL of this process once `step` is logged, if the file `killed` is not there yet."""

    step: int
    killed: Path

    def __call__(self, point: Mapping[str, float]) -> None:
        if point["step"] >= self.step and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class _Ranks:
    """Joined processes that serve one call after the other."""

    processes: list[BaseProcess]
    pipes: list[Connection]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(timeout=20)


_waiting: dict[int, _Ranks] = {}  # for the next call, by world size


def run_ranks(function: Callable[..., Any], *args: Any, world: int, tmp: Path, timeout_s: float = 120) -> list[Any]:
    """What `function(*args)` returns on each rank. Raises RankDiedError.

    The same processes serve the next call with this `world`. After an error they are killed and the next call starts
    new ones.
    """
    ranks = _waiting.pop(world, None) or _started(world, tmp)
    aws = {
        key: value for key, value in os.environ.items() if key.startswith("AWS_")
    }  # the fork server started before they were set
    results: dict[int, Any] = {}
    try:
        for pipe in ranks.pipes:
            pipe.send((aws, tmp / "said.txt", function, args))
        while len(results) < world:
            ready = wait([pipe for rank, pipe in enumerate(ranks.pipes) if rank not in results], timeout=timeout_s)
            if not ready:
                raise RankDiedError(f"no rank said anything for {timeout_s} s")
            for rank, pipe in enumerate(ranks.pipes):
                if pipe not in ready:
                    continue
                try:
                    ok, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise RankDiedError(f"rank {rank} was killed") from None
                if not ok:
                    raise RankDiedError(value)
                results[rank] = value
        _waiting[world] = ranks
    finally:
        if len(results) < world:
            ranks.end()
    return [results[rank] for rank in range(world)]


def end_ranks() -> None:
    """End all processes that wait for a call."""
    while _waiting:
        _waiting.popitem()[1].end()


def _started(world: int, tmp: Path) -> _Ranks:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    meeting = tmp / f"meeting-{os.urandom(4).hex()}"
    ranks = _Ranks([], [])
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(theirs, meeting, rank, world), daemon=True)
        process.start()
        theirs.close()
        ranks.pipes.append(ours)
        ranks.processes.append(process)
    return ranks


def _rank(pipe: Connection, meeting: Path, rank: int, world: int) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), NODE_RANK="0")
    torch.set_num_threads(1)
    try:
        while True:
            aws, said, function, args = pipe.recv()
            log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)  # the server's own are those of the test that started it
            os.dup2(log, 2)
            os.close(log)
            for key in [key for key in os.environ if key.startswith("AWS_")]:
                del os.environ[key]
            os.environ.update(aws)
            if not dist.is_initialized():
                dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
            result = function(*args)
            sys.stdout.flush()
            pipe.send((True, result))
    except Exception:
        pipe.send((False, traceback.format_exc()))


def take_said(tmp: Path) -> str:
    """What ranks have printed below `tmp` since the last call."""
    log = tmp / "said.txt"
    text = log.read_text()
    log.unlink()
    return text


def train(spec: TrainSpec) -> None:
    import torch

    train_worker(spec, torch.device("cpu"))


def train_with_broken_weights(spec: TrainSpec) -> None:
    def broken(arch: Architecture) -> ConditionedUNet:
        network = new_network(arch)
        network.unet.conv_out.bias.data[0] = float("inf")
        return network

    with patch("pbe.train.network.new_network", broken):
        train(spec)


def loss_curve(store: Store, run_name: str) -> list[float]:
    """The loss of every step, then the validation loss after the last."""
    history = Run(store, run_name).read_json("history.json")
    assert history is not None, "the run is not finished"
    points = history["history"]
    return [*(point["loss"] for point in points), points[-1]["validation_loss"]]


# -- a tiny data set ---------------------------------------------------------------------------------------------------


def encoded_rows(
    shard: int, slot: int, count: int, *, channels: int = CHANNELS, latent_px: int = LATENT_PX
) -> pa.Table:
    schema = without_empty(encoded_schema((channels, latent_px, latent_px), (2, 1, WIDTH)).empty_table()).schema
    rng = np.random.default_rng([shard, slot])
    columns: dict[str, list[Any]] = {
        "image_id": [f"image{shard}_{index}" for index in range(count)],
        "slot": [slot] * count,
        "box_index": [0] * count,
    }
    for field in schema:
        if field.metadata:
            values = rng.standard_normal((count, *array_shape(field)))
            if "mask_latent" in field.name:
                values = (values > 0).astype(float)
            if field.name.endswith("_std"):
                values = np.zeros_like(values)  # as of the patch codec
            columns[field.name] = [array_bytes(field, np.abs(value)) for value in values]
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def tiny_encoded(
    store: Store,
    *,
    shards: int = 4,
    rows: int = 6,
    slots: int = 2,
    channels: int = CHANNELS,
    latent_px: int = LATENT_PX,
) -> Manifest:
    """24 rows per slot of random latents, in 4 shards, and a real codec."""
    crops = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    codec, _ = fit_patch_codec(crops, patch_px=PATCH_PX, channels=channels)
    store.write_bytes("parts/encode/codec.safetensors", codec_bytes(codec))
    units = [
        store.write_unit(
            "encode",
            f"s{shard:04d}-x",
            {
                slot_name(slot): encoded_rows(shard, slot, rows, channels=channels, latent_px=latent_px)
                for slot in range(slots)
            },
            counts={"rows": rows * slots},
            rows_per_group=2,
        )
        for shard in range(shards)
    ]
    config = {
        "rows_per_group": 2,
        "codec": {
            "kind": "patch",
            "path": "parts/encode/codec.safetensors",
            "patch_px": PATCH_PX,
            "channels": channels,
        },
        "backbone": {"kind": "efficientnet_lite0", "width": WIDTH, "tokens": "class"},
    }
    return make_manifest("encode", config=config, version=1, units=units)


def tiny_config(**changes: Any) -> TrainConfig:
    """30 steps of 8 rows in fp32; validation and checkpoints rare unless `changes` say otherwise."""
    base = profile("tiny").train.model_dump()
    base |= {
        "steps": 30,
        "batch": 8,
        "streams": 4,
        "micro_batch": 2,
        "workers": 1,
        "lr": 2e-3,
        "warmup_steps": 3,
        "log_every": 1,
        "checkpoint_every": 1000,
        "validate_every": 1000,
        "validation_rows": 4,
        "grid_rows": 0,
        "precision": "fp32",
        "grad_clip": 1.0,
    }
    return TrainConfig.model_validate(base | changes)


def tiny_spec(store: Store, encoded: Manifest, cfg: TrainConfig, run_name: str, **changes: Any) -> TrainSpec:
    card = ModelCard(
        image_px=LATENT_PX * PATCH_PX,
        reference_px=32,
        reference_pad_px=0,
        tokens="class",
        scheduler=scheduler_config("squaredcos_cap_v2", cfg.objective),
        run={},
    )
    spec = TrainSpec(
        cfg=cfg,
        seed=23,
        store_uri=store.uri,
        encoded=encoded,
        triplets=None,
        arch=ARCH,
        initial=None,
        card=card,
        run_name=run_name,
        origin=None,
        tracking_uri=None,
        mlflow_run_id="",
        on_progress=None,
    )
    return replace(spec, **changes)
