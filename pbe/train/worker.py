"""The training loop of one rank: build, resume, loop, save, finish. Ray Train runs it on every worker.

Reads encoded Parquet in the order of pbe/data/order.py; runs no encoder. Same rows, same noise and same dropout on
any number of workers. The loss is pbe/diffusion/objective.py; deviations from the paper (objective, context
dropout, class embedding, cosine learning rate) are switches in params.yaml.
"""

import math
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.util.queue import Queue

from pbe import track
from pbe.config import TrainConfig
from pbe.data.batches import Batch, DrawConfig, Prefetched, rank_batches
from pbe.data.slots import slot_files
from pbe.diffusion.objective import add_noise, loss_per_row, min_snr_weight, target
from pbe.diffusion.schedule import TRAIN_TIMESTEPS, alphas_cumprod
from pbe.model.frozen import open_backbone, open_codec
from pbe.model.initial import load_kept
from pbe.model.unet import Architecture, new_network, use_float32_group_norm
from pbe.model.weights import Model, ModelCard, save_model
from pbe.store import Manifest, Store
from pbe.train.checkpoints import Run
from pbe.train.engine import load_engine, make_engine, save_engine

STATISTICS_ROWS = 2048  # references that standardise the exemplar features


@dataclass(frozen=True)
class Job:
    """All that a worker needs; pickled to every rank."""

    cfg: TrainConfig
    seed: int
    store_uri: str
    encoded: Manifest
    arch: Architecture
    initial: tuple[str, str | None] | None  # storage paths of a UNet and of an image encoder, or random weights
    card: ModelCard
    run_name: str
    tracking_uri: str
    mlflow_run_id: str
    progress: Queue | None  # rank 0 puts (step, loss) here for the driver's progress bar


def train_worker(job: Job) -> None:
    # build
    cfg, rank, world = job.cfg, dist.get_rank(), dist.get_world_size()
    store = Store(job.store_uri)
    run = Run(store, job.run_name)
    device = ray.train.torch.get_device()
    torch.manual_seed(job.seed)  # same initial weights on every rank
    model = new_network(job.arch)
    model.exemplar.set_statistics(_reference_features(store, job.encoded))
    if job.initial is not None:
        load_kept(model, store, job.initial)
    if cfg.precision == "bf16_autocast" and device.type == "cpu":
        use_float32_group_norm(model)
    codec = open_codec(store, job.encoded.config["codec"])
    grey_latent = codec.posterior(torch.zeros(1, 3, job.card.image_px, job.card.image_px))[0].to(device)
    alpha_bar = alphas_cumprod(job.card.scheduler).to(device)
    engine = make_engine(model, cfg)

    # resume
    history: list[dict[str, float]] = []
    start = 0
    with tempfile.TemporaryDirectory(prefix="pbe-resume-") as local:
        found = run.checkpoints()
        if found:
            assert found[-1].world == world, "the train stage refuses this before it starts workers"
            run.download(found[-1], Path(local))
            state = load_engine(engine, Path(local))
            start, history = state["step"], state["history"]
            if rank == 0:
                print(f"train: goes on from the checkpoint of step {start}", flush=True)

    # loop
    with ExitStack() as stack:
        batches = Prefetched(_batches(job, store, rank=rank, world=world, start_step=start), depth=4)
        stack.callback(batches.close)
        window: list[dict[str, float]] = []
        for step in range(start, cfg.steps):
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(cfg, step)
            timing = {"loss": 0.0, "data_s": 0.0, "forward_s": 0.0, "backward_s": 0.0, "optimizer_s": 0.0}
            for _ in range(cfg.accumulation_steps):
                clock = time.perf_counter()
                batch = batches.next()
                clock = _lap(timing, "data_s", clock)
                loss = _loss(engine, batch, cfg=cfg, grey_latent=grey_latent, alpha_bar=alpha_bar, device=device)
                clock = _lap(timing, "forward_s", clock)
                engine.backward(loss)
                clock = _lap(timing, "backward_s", clock)
                engine.step()
                _lap(timing, "optimizer_s", clock)
                timing["loss"] += float(loss.detach()) / cfg.accumulation_steps
            window.append(timing)

            # log
            done = step + 1
            if done % cfg.log_every == 0 or done == cfg.steps:
                point = _mean_over_ranks(window, device)
                point["step_s"] = sum(value for key, value in point.items() if key.endswith("_s"))
                window = []
                if not math.isfinite(point["loss"]):
                    raise FloatingPointError(f"train: loss is {point['loss']} at step {done}; lower train.lr")
                point |= {"step": done, "lr": learning_rate(cfg, step), "rows_per_s": cfg.batch / point["step_s"]}
                history.append(point)
                if rank == 0:
                    track.log_metrics(job.tracking_uri, job.mlflow_run_id, point, step=done, prefix="train/")
                    if job.progress is not None:
                        job.progress.put_nowait((done, point["loss"]))

            # save
            if done % cfg.checkpoint_every == 0 and done < cfg.steps:
                _save(run, engine, {"step": done, "history": history}, cfg=cfg, rank=rank, world=world)

    # finish: ZeRO 0-2 keep whole parameters on every rank
    if rank == 0:
        with tempfile.TemporaryDirectory(prefix="pbe-export-") as local:
            backbone = open_backbone(store, job.encoded.config["backbone"])
            save_model(Path(local), Model(engine.module, codec, backbone, job.card))
            store.copy_tree_in(Path(local), f"{run.folder}/export")
        run.write_json("history.json", {"history": history})
        run.write_json("finished.json", {"steps": cfg.steps, "world": world, "loss": history[-1]["loss"]})
    dist.barrier()


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Linear warm-up over warmup_frac of the steps, then a cosine to final_lr_frac * lr at the last step.

    final_lr_frac = 1 is upstream's warm-up then constant.
    """
    warmup_steps = max(1, round(cfg.warmup_frac * cfg.steps))
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, cfg.steps - warmup_steps)
    return cfg.lr * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress)))


def _loss(
    engine: Any,
    batch: Batch,
    *,
    cfg: TrainConfig,
    grey_latent: torch.Tensor,
    alpha_bar: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    b = Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(batch).items()})
    hide = b.drop_context[:, None, None, None]
    ab = alpha_bar[b.timestep]
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16_autocast"):
        prediction = engine(
            add_noise(b.x0, b.noise, ab),
            b.timestep,
            masked_latent=torch.where(hide, grey_latent, b.masked_latent),
            keep_mask_latent=torch.where(hide, torch.zeros_like(b.keep_mask_latent), b.keep_mask_latent),
            exemplar_tokens=b.exemplar_tokens,
            drop_condition=b.drop_condition,
        )
    wanted = target(cfg.objective, x0=b.x0, noise=b.noise, alpha_bar=ab)
    loss = loss_per_row(prediction, wanted)
    if cfg.min_snr_gamma is not None:
        loss = loss * min_snr_weight(cfg.objective, alpha_bar=ab, gamma=cfg.min_snr_gamma)
    return loss.mean()


def _batches(job: Job, store: Store, *, rank: int, world: int, start_step: int) -> Any:
    cfg = job.cfg
    draw = DrawConfig(
        seed=job.seed,
        timesteps=TRAIN_TIMESTEPS,
        bezier_prob=cfg.bezier_prob,
        condition_dropout_prob=cfg.condition_dropout_prob,
        context_dropout_prob=cfg.context_dropout_prob,
        reference_augmentation=cfg.reference_augmentation,
        class_token_only=cfg.exemplar.tokens == "class",
    )
    return rank_batches(
        store,
        job.encoded,
        cfg=draw,
        batch=cfg.batch,
        micro_batch=cfg.micro_batch,
        lanes=cfg.lanes,
        rank=rank,
        world=world,
        rows_per_group=int(job.encoded.config["rows_per_group"]),
        start_step=start_step,
    )


def _reference_features(store: Store, encoded: Manifest) -> torch.Tensor:
    """(N, width) clean class tokens of the first rows in manifest order: the same on every rank."""
    rows: list[np.ndarray] = []
    for files in slot_files(encoded):
        for file in files:
            table = store.read_table(file, columns=["exemplar_tokens"])
            width = int(table.schema.field("exemplar_tokens").metadata[b"shape"].split(b",")[-1])
            rows += [np.frombuffer(value, "<f2", count=width) for value in table.column(0).to_pylist()]
        if len(rows) >= STATISTICS_ROWS:
            break
    return torch.from_numpy(np.stack(rows[:STATISTICS_ROWS]).astype(np.float32))


def _mean_over_ranks(window: list[dict[str, float]], device: torch.device) -> dict[str, float]:
    keys = list(window[0])
    total = torch.tensor([sum(entry[key] for entry in window) / len(window) for key in keys], device=device)
    dist.all_reduce(total)
    return dict(zip(keys, (total / dist.get_world_size()).tolist(), strict=True))


def _save(run: Run, engine: Any, state: dict[str, Any], *, cfg: TrainConfig, rank: int, world: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pbe-checkpoint-") as local:
        save_engine(engine, Path(local), state)
        run.upload(state["step"], Path(local))
    dist.barrier()
    if rank == 0:
        run.complete(state["step"], world=world, keep=cfg.keep_checkpoints)


def _lap(timing: dict[str, float], key: str, since: float) -> float:
    now = time.perf_counter()
    timing[key] += now - since
    return now
