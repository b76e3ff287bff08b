"""The training loop of one rank: build, resume, loop, log, save, finish. Ray Train runs it on every worker.

pbe/train/data/input.py reads the rows, in the order of pbe/train/data/order.py: rows, noise and dropout are the same on
any number of workers. The loss is in pbe/train/loss.py. Deviations from the paper (objective, context dropout, class
embedding, cosine learning rate) are switches in params.yaml.
"""

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pbe import track
from pbe.data.images import encode_png
from pbe.diffusion.schedule import alphas_cumprod
from pbe.errors import UserError
from pbe.model.precision import float32_products
from pbe.model.unet import ConditionedUNet, use_float32_group_norm
from pbe.model.weight_store import open_codec, open_text_encoder
from pbe.store import Store
from pbe.train.checkpoints import RAW, UNLOGGED, CheckpointError, Run, Saver, newest_whole
from pbe.train.data.batch import Batch
from pbe.train.data.input import open_input
from pbe.train.data.order import Share
from pbe.train.divergence import jump
from pbe.train.ema import Ema
from pbe.train.engine import (
    full_parameters,
    load_engine,
    make_engine,
    save_engine,
    step_engine,
    to_universal,
    use_settings,
)
from pbe.train.export import export_trained
from pbe.train.finite import OnHost, count_non_finite
from pbe.train.loss import Diffusion, row_losses
from pbe.train.network import freeze, initial_network
from pbe.train.perceptual import PerceptualLoss
from pbe.train.ranks import Ranks
from pbe.train.scoring import Scoring
from pbe.train.settings import TrainConfig
from pbe.train.spec import TrainSpec
from pbe.train.timing import StepTimer, peak_memory_gib
from pbe.train.trainable import store_frozen_in_bfloat16
from pbe.train.validation import Validation

LAPS = ("data_s", "forward_s", "backward_s", "optimizer_s", "checkpoint_s", "validation_s")


class NonFiniteError(UserError, FloatingPointError):
    """The loss or the gradient is NaN or infinite; a retry would fail the same way."""


def train_worker(spec: TrainSpec, device: torch.device) -> None:
    """Train one rank from the newest undamaged checkpoint to `cfg.steps`; rank 0 exports the finished model.

    Collective: every rank calls it, in an initialized process group. Logs, validates and saves at the intervals that
    the settings give. Raises NonFiniteError, CheckpointError, EngineError, StoreError.
    """
    # build
    cfg, ranks, store = spec.cfg, Ranks.of_this_process(), Store(spec.store_uri)
    run = Run(store, spec.run_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # nccl sends objects through the current device
    text = open_text_encoder(store, spec.text) if spec.text is not None else None
    model = initial_network(spec, store, text)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _use_kernels(model, cfg, device)
    freeze(model, spec, store)
    if cfg.precision == "bf16_autocast":
        store_frozen_in_bfloat16(model)
    codec = open_codec(store, spec.encoded.config["codec"])
    grey_latent = codec.posterior(torch.zeros(1, 3, spec.card.image_px, spec.card.image_px))[0].to(device)
    perceptual = PerceptualLoss(codec, device) if cfg.perceptual_weight else None
    diffusion = Diffusion(cfg, grey_latent, alphas_cumprod(spec.card.scheduler).to(device), device, perceptual)

    # resume
    start, history, window = 0, [], (0, 0.0)
    with tempfile.TemporaryDirectory(prefix="pbe-resume-") as scratch:
        found = newest_whole(store, _candidates(run, spec.origin), ranks, Path(scratch))
        universal = found is not None and _needs_rewriting(found[0].world, found[0].zero_stage, ranks.world, cfg)
        engine = make_engine(model, cfg, device=device, universal=universal)
        if found is None and spec.origin is not None:
            raise CheckpointError(
                f"train.resume_from = {spec.origin[0]}@{spec.origin[1]}: that run no longer has a checkpoint of this "
                "step or an earlier one; name another run, or leave resume_from out to train from the beginning"
            )
        if found is not None:
            checkpoint, folder = found
            history = json.loads((folder / "history.json").read_text())
            state = load_engine(engine, _rewritten(folder, Path(scratch), ranks) if universal else folder)
            start, window = state["step"], state["window"]
            use_settings(engine, cfg)
            # the statistics of this run's data, which its export has; on another number of ranks none are loaded
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            if ranks.rank == 0:
                resized = checkpoint.world != ranks.world
                written_by = f" (checkpoint written by {checkpoint.world} ranks)" if resized else ""
                print(f"train: resuming from step {start}{written_by}", flush=True)
        ema = Ema(engine, cfg.ema_decay) if cfg.ema_decay is not None else None
        if ema is not None and found is not None and not ema.load(found[1]) and ranks.rank == 0:
            print(f"train: the checkpoint has no averaged weights; they begin at step {start}", flush=True)
        ranks.barrier()  # other ranks of the node read from this rank's scratch

    # loop
    with ExitStack() as stack:
        stack.enter_context(float32_products(tf32=cfg.kernels.tf32))
        share = Share(ranks.rank, ranks.world, start_step=start)
        batches = open_input(
            store,
            spec.encoded,
            spec.triplets,
            cfg=cfg,
            seed=spec.seed,
            share=share,
            codec=codec,
            text=text,
            device=device,
        )
        stack.callback(batches.close)
        validation = Validation(spec.card, codec, diffusion, batches.validation())
        scoring: Scoring | None = None
        if cfg.score_every:
            assert spec.triplets is not None and spec.open_judge is not None
            judge = spec.open_judge(store, device)
            scoring = Scoring(spec.card, codec, diffusion, *batches.scored(spec.triplets), judge, ranks)
        newest = start if found is not None and found[0].run == run.name else None
        saver = Saver(run, ranks, zero_stage=cfg.zero_stage, keep=cfg.keep_checkpoints, newest=newest)
        laps, log = StepTimer(device), _Log(spec, run)
        # step of the last log point; since then, the sum of this rank's losses and the steps that this process timed
        logged, loss_sum, timed = window[0], torch.tensor(window[1], device=device), 0
        norm: OnHost | None = None  # of the newest gradient
        for step in range(start, cfg.steps):
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(cfg, step)
            seen: list[tuple[Batch, torch.Tensor]] = []
            broken: OnHost | None = None
            laps.start()
            for _ in range(cfg.accumulation_steps):
                batch = batches.next()
                laps.lap("data_s")
                losses = row_losses(engine, batch, diffusion)
                seen.append((batch, losses.detach()))
                if len(seen) == cfg.accumulation_steps:
                    broken = count_non_finite([losses for _, losses in seen])
                laps.lap("forward_s")
                engine.backward(losses.mean())
                laps.lap("backward_s")
                if broken is not None:
                    # check the previous step first: otherwise the weights that it broke would be saved
                    _require_finite_norm(norm, step, saver, run)
                    if broken.read():
                        saver.finish()
                        if saver.newest != step:  # save the state before this step
                            _save(saver, engine, ema, step, history, (logged, loss_sum), ranks)
                            saver.finish()
                        bad = _non_finite_rows(seen, ranks)
                        raise NonFiniteError(_non_finite_message(step, bad, seen_rows=cfg.batch))
                gradient_norm = step_engine(engine)
                if ema is not None and gradient_norm is not None:
                    ema.update()
                laps.lap("optimizer_s")
            assert gradient_norm is not None
            norm = OnHost(gradient_norm)
            loss_sum += torch.stack([losses.mean() for _, losses in seen]).mean()
            timed += 1

            # log
            done = step + 1
            validates = done % cfg.validate_every == 0 or done == cfg.steps
            scores = scoring is not None and (done % cfg.score_every == 0 or done == cfg.steps)
            saves = done % cfg.checkpoint_every == 0 or done == cfg.steps
            if validates or scores or saves or done % cfg.log_every == 0:
                _require_finite_norm(norm, done, saver, run)
            measured = {}
            if validates or scores:
                with nullcontext() if ema is None else ema.in_network():
                    if validates:
                        measured, grid = {"validation_loss": validation.loss(engine, ranks)}, validation.grid(engine)
                        laps.lap("validation_s")
                    if scoring is not None and scores:
                        measured |= scoring(engine)
            if done % cfg.log_every == 0 or validates or scores:
                saver.poll()
                point = _mean_over_ranks(float(loss_sum) / (done - logged), laps.take(), steps=timed, device=device)
                logged, timed = done, 0
                loss_sum.zero_()
                point |= measured | {"step": done, "lr": learning_rate(cfg, step), "grad_norm": norm.read()}
                point["samples_seen"] = done * cfg.batch
                point["rows_per_s"] = cfg.batch / point["step_s"]
                point["peak_memory_gib"] = max(ranks.all_gather(peak_memory_gib(device)))
                history.append(point)
                if ranks.rank == 0:
                    if (before := jump([point["loss"] for point in history])) is not None:
                        print(_jump_message(before, point, run.name, saver.newest), flush=True)
                    log(point, grid if validates else None)

            # save
            if saves:
                laps.start()
                _save(saver, engine, ema, done, history, (logged, loss_sum), ranks)
                laps.lap("checkpoint_s")
        saver.finish()

    # finish
    with nullcontext() if ema is None else ema.as_masters():
        trained = {"": full_parameters(engine)}
    if cfg.ema_keep_raw:
        trained[RAW] = full_parameters(engine)
    if ranks.rank == 0:
        tensors = {inner: found | buffers for inner, found in trained.items()}
        export_trained(spec, store, tensors, codec, text, history=history)
    dist.barrier()


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Learning rate of a step: linear warm-up over warmup_steps, then a cosine to final_lr_frac * lr at the last step.

    final_lr_frac = 1 is upstream's schedule: warm-up, then constant.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress)))


def _use_kernels(model: ConditionedUNet, cfg: TrainConfig, device: torch.device) -> None:
    kernels = cfg.kernels
    model.use_kernels(
        sdpa=kernels.sdpa,
        channels_last=kernels.channels_last,
        checkpointed_levels=kernels.checkpointed_levels,
    )
    if cfg.precision == "bf16_autocast":
        model.use_autocast()
        if device.type == "cpu":
            use_float32_group_norm(model)
    if kernels.compile and device.type == "cuda":
        model.unet.compile()
    elif kernels.compile:
        print("train: kernels.compile is ignored: there is no GPU", flush=True)


def _candidates(run: Run, origin: tuple[str, int] | None) -> list[Any]:
    """Checkpoints to resume from, best first: the run's own, then those of the run that it continues."""
    own = run.checkpoints()[::-1]
    if origin is None:
        return own
    name, step = origin
    return own + [found for found in Run(run.store, name).checkpoints()[::-1] if found.step <= step]


def _needs_rewriting(world_then: int, stage_then: int, world: int, cfg: TrainConfig) -> bool:
    """Return whether a checkpoint must be converted first: stages 1 to 3 partition it for one number of ranks.

    Only stages 1 and 2 can resume from each other; the train stage checks that.
    """
    return (world_then != world or stage_then != cfg.zero_stage) and stage_then > 0


def _rewritten(folder: Path, scratch: Path, ranks: Ranks) -> Path:
    """The checkpoint after `to_universal`, run once per node in the scratch of the node's first rank. Collective."""
    mine = None
    if ranks.leads_node:
        mine = scratch / "universal"
        to_universal(folder, mine)
    return next(path for node, path in ranks.all_gather((ranks.node, mine)) if path is not None and node == ranks.node)


def _require_finite_norm(norm: OnHost | None, step: int, saver: Saver, run: Run) -> None:
    """Raise NonFiniteError if the gradient norm of optimizer step `step`, counted from 1, is NaN or infinite.

    norm: None before the first step. If it raises it is collective: it first completes the pending checkpoint.
    """
    if norm is not None and not math.isfinite(norm.read()):
        saver.finish()
        raise NonFiniteError(
            f"train: the gradient norm is {norm.read()} at step {step}, although the loss is finite; lower train.lr. "
            f"Earlier checkpoints are in {run.store.full_uri(run.folder)}"
        )


def _non_finite_rows(seen: Sequence[tuple[Batch, torch.Tensor]], ranks: Ranks) -> list[str]:
    """The step's rows, over all ranks, whose loss is NaN or infinite. Collective."""
    losses = torch.cat([losses for _, losses in seen])
    names = [name for batch, _ in seen for name in batch.rows]
    times = [int(t) for batch, _ in seen for t in batch.timestep]
    mine = [
        f"{name} t {time}: {loss}"
        for name, time, loss in zip(names, times, losses.tolist(), strict=True)
        if not math.isfinite(loss)
    ]
    return [row for rows in ranks.all_gather(mine) for row in rows]


def _non_finite_message(step: int, rows: Sequence[str], *, seen_rows: int) -> str:
    shown = "; ".join(rows[:8]) + (f"; and {len(rows) - 8} more" if len(rows) > 8 else "")
    advice = (
        "All rows are affected: training has diverged; lower train.lr and resume from an earlier checkpoint "
        "(train.resume_from)"
        if len(rows) == seen_rows
        else "Only these rows are affected: check their photos with `pbe show`"
    )
    return (
        f"train: the loss is not finite at step {step + 1}; the state before that step is saved as step {step}. "
        f"{len(rows)} of {seen_rows} rows: {shown}. {advice}"
    )


def _jump_message(before: float, point: Mapping[str, float], run_name: str, newest: int | None) -> str:
    cure = "lower train.lr"
    if newest:
        cure += f" and continue from before it, by train.resume_from: {run_name}@{newest}"
    return (
        f"train: the loss jumped from {before:.4g} to {point['loss']:.4g} at step {int(point['step'])}; if it stays "
        f"there, training has diverged: {cure}"
    )


class _Log:
    """Rank 0's log: points to the driver, points and grids to MLflow.

    Training neither ends nor waits for an MLflow that goes away: after a failure it is left alone for twenty times as
    long as the failure took. The driver logs the rest at the end: points from history.json, grids from unlogged/.
    """

    def __init__(self, spec: TrainSpec, run: Run) -> None:
        self._spec, self._run, self._next_try = spec, run, 0.0

    def __call__(self, point: dict[str, float], grid: np.ndarray | None) -> None:
        spec, seen = self._spec, int(point["samples_seen"])
        if spec.on_progress is not None:
            spec.on_progress(point)
        if spec.tracking_uri is None:
            return
        began = time.monotonic()
        if began >= self._next_try:
            try:
                track.log_metrics(spec.tracking_uri, spec.mlflow_run_id, point, step=seen, prefix=track.CURVE)
                if grid is not None:
                    track.log_image_at(spec.tracking_uri, spec.mlflow_run_id, grid, key=track.GRIDS, step=seen)
                return
            except track.TrackError as error:
                now = time.monotonic()
                self._next_try = now + 20 * (now - began)
                print(f"train: step {int(point['step'])} is not logged to MLflow yet: {error}", flush=True)
        if grid is not None:
            self._run.store.write_bytes(f"{self._run.folder}/{UNLOGGED}/{seen:012d}.png", encode_png(grid))


def _mean_over_ranks(loss: float, seconds: dict[str, float], *, steps: int, device: torch.device) -> dict[str, float]:
    """The loss, seconds per step by lap, and step_s: the laps without checkpoints and validation. Collective."""
    total = torch.tensor([loss, *(seconds.get(lap, 0.0) / steps for lap in LAPS)], device=device)
    dist.all_reduce(total)
    out = dict(zip(("loss", *LAPS), (total / dist.get_world_size()).tolist(), strict=True))
    out["step_s"] = sum(out[key] for key in ("data_s", "forward_s", "backward_s", "optimizer_s"))
    return out


def _save(
    saver: Saver,
    engine: Any,
    ema: Ema | None,
    step: int,
    history: list[dict[str, float]],
    window: tuple[int, torch.Tensor],
    ranks: Ranks,
) -> None:
    """Start the checkpoint of `step`. window: step of the last log point, and the sum of this rank's losses since."""
    logged, loss_sum = window
    mean = loss_sum.detach().clone()
    dist.all_reduce(mean)  # over all ranks, because another number of them may resume
    state = {"step": step, "window": (logged, float(mean) / ranks.world)}

    def write(folder: Path) -> None:
        save_engine(engine, folder, state)
        if ema is not None:
            ema.save(folder, rank=ranks.rank)
        if ranks.rank == 0:
            (folder / "history.json").write_text(json.dumps(history))

    saver.save(step, write)
