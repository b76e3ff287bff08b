"""train: fine-tune the conditioned UNet with Ray Train and DeepSpeed ZeRO; export safetensors.

The run's folder is named by the digest of what shapes the result: VERSION, train settings, seed, initial weights and
encoded data. An unfinished run of the same digest resumes from its checkpoint, on any number of workers that divides
the streams, also when the code has changed and VERSION has not; a finished one is only exported again.
`train.resume_from` continues from the checkpoint of another run, on purpose.
"""

import csv
import hashlib
import itertools
import pickle
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pbe import track
from pbe.data.images import decode
from pbe.data.slots import InputError, require_same_rows
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.errors import UserError
from pbe.model.card import ModelCard
from pbe.places import tracking_uri
from pbe.store import Manifest, Store, digest, load_manifest, write_json
from pbe.train.checkpoints import UNLOGGED, Run
from pbe.train.settings import TrainConfig
from pbe.train.spec import TrainSpec
from pipelines.cluster.lease import hold
from pipelines.runtime.capacity import Demand, ray_resources, refuse_unmet
from pipelines.runtime.cures import with_cure
from pipelines.runtime.differences import diff_params, differences
from pipelines.runtime.logs import root_cause
from pipelines.runtime.parts import start_ray
from pipelines.runtime.progress import progress_bar
from pipelines.runtime.progress_records import write_plan
from pipelines.runtime.provenance import provenance_tags
from pipelines.runtime.stage import Stage, StageError, load_train_manifest, training_named
from pipelines.runtime.tracking import after_results
from pipelines.train_preflight import refuse_what_cannot_train
from pipelines.train_weights import StartingPoint, architecture, score_judge, starting_point

if TYPE_CHECKING:
    import torch
    from ray.train.torch import TorchTrainer

    from pbe.train.scoring import Judge

# names the run, in place of the code: raise it when losses change for the same settings and rows, so that an unfinished
# run starts anew instead of resuming
VERSION = 1
# Settings that change how a run is executed, not what it computes.
EXECUTION_ONLY = {
    "workers",
    "per_worker",
    "input_processes",
    "micro_batch",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "validate_every",
    "validation_rows",
    "grid_rows",
    "score_every",
    "score_rows",
    "score_extractor",
    "ema_keep_raw",
    "offload",
    "max_failures",
    "kernels",
}


def main(stage: Stage) -> None:
    assert stage.variant is not None
    track.check(tracking_uri())
    cfg = stage.params.train_variant(stage.variant)
    encoded = load_manifest(stage.input("encode"))
    learns_triplets = cfg.input == "pixels" or cfg.condition == "text"
    scores = bool(cfg.score_every and cfg.steps)
    triplets = load_manifest(stage.input("materialize")) if learns_triplets or scores else None
    if triplets is not None:
        try:
            require_same_rows(encoded, triplets)
        except InputError as error:
            why = "input = pixels" if cfg.input == "pixels" else "condition = text"
            why = why if learns_triplets else f"score_every = {cfg.score_every}"
            raise StageError(f"train.{why}: {error}; run `dvc repro encode` first") from None
    start = starting_point(stage, cfg, encoded)
    identity = training_digest(cfg, _seed(stage, cfg), encoded, triplets if learns_triplets else None, start)
    run = Run(stage.store, f"{stage.variant}-{identity}")
    origin = origin_of(stage, cfg, run)
    began = training_named(stage, cfg.init)  # before training: it may be missing, or change meanwhile
    with ExitStack() as stack:
        if run.finished(with_raw=cfg.ema_keep_raw) is None:
            stack.enter_context(hold(run))
        run_id = _open_mlflow_run(stage, cfg, encoded, run, identity, origin)
        if run.finished(with_raw=cfg.ema_keep_raw) is None:  # the previous holder may have finished it
            stack.enter_context(_shown_as_failed(run_id))
            refuse_what_cannot_train(stage, cfg, encoded, triplets, start)
            judge = score_judge(stage, cfg) if scores else None
            track.resume_run(tracking_uri(), run_id)
            _train(stage, cfg, encoded, triplets, start, judge, run, run_id, origin)
        else:
            print(f"train@{stage.variant}: run {run.name} is finished already; exporting it again")
    finished = run.finished(with_raw=cfg.ema_keep_raw)
    if finished is None:
        raise StageError(f"train@{stage.variant}: run {run.name} ended without a result; see the log above")
    history = (run.read_json("history.json") or {"history": []})["history"]
    _write_outputs(stage, run, run_id, identity, start.paths, origin, began, finished, history)
    with after_results(stage):
        _log_result(stage, run, run_id, history, origin)


def training_digest(
    cfg: TrainConfig, seed: int, encoded: Manifest, learned_triplets: Manifest | None, start: StartingPoint
) -> str:
    """What names a training: all that shapes its export, wherever and on however many workers it runs."""
    # of the weights their content counts, not where they were found
    settings = cfg.identity(without=EXECUTION_ONLY | {"init", "seed", "text"})
    more = [learned_triplets.digest] if learned_triplets is not None else []
    more += [start.text.path, *cfg.text.captions] if start.text is not None else []
    more += [start.adapter.path] if start.adapter is not None else []
    more += [f"guidance_scale {start.guidance_scale:g}"] if start.guidance_scale is not None else []
    return digest(["train", VERSION, seed, settings, start.initial, encoded.digest, *more])


def fetch_export(stage: Stage) -> None:
    """Copy the finished model from the storage to models/<variant>, where DVC and people look for it."""
    assert stage.variant is not None
    manifest = load_train_manifest(stage, stage.variant)
    target = stage.root / "models" / str(stage.variant)
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    stage.store.copy_tree_out(f"runs/{manifest['run']}/export", beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    print(f"train@{stage.variant}: model in models/{stage.variant}")


def _seed(stage: Stage, cfg: TrainConfig) -> int:
    return stage.params.seed if cfg.seed is None else cfg.seed


def origin_of(stage: Stage, cfg: TrainConfig, run: Run) -> tuple[str, int] | None:
    """Return the run and step of `train.resume_from`, fixed at the first start: the other run may still advance."""
    if cfg.resume_from is None:
        return None
    settled = run.read_json("origin.json")
    if settled is not None:
        return settled["run"], settled["step"]
    name, _, step = cfg.resume_from.partition("@")
    there = Run(stage.store, name).checkpoints()
    steps = ", ".join(str(found.step) for found in there) or "none"
    wanted = [found for found in there if not step or found.step == int(step)]
    if not wanted:
        raise StageError(
            f"train.resume_from = {cfg.resume_from}: no such checkpoint in {stage.store.full_uri('runs/' + name)} "
            f"(steps there: {steps}); a run's name is in data/train/<variant>/manifest.json and in MLflow's tag `run`"
        )
    found = wanted[-1]
    if found.step >= cfg.steps:
        raise StageError(
            f"train.resume_from = {cfg.resume_from}: that checkpoint is of step {found.step}, and train.steps is "
            f"{cfg.steps}; set train.steps higher"
        )
    if found.zero_stage != cfg.zero_stage and {found.zero_stage, cfg.zero_stage} != {1, 2}:
        raise StageError(
            f"train.resume_from = {cfg.resume_from}: saved with train.zero_stage {found.zero_stage}, which "
            f"DeepSpeed cannot convert to {cfg.zero_stage} (only between 1 and 2); train.init can start from that "
            "run's export instead, without the optimizer's state"
        )
    run.write_json("origin.json", {"run": name, "step": found.step})
    return name, found.step


def _open_mlflow_run(
    stage: Stage, cfg: TrainConfig, encoded: Manifest, run: Run, identity: str, origin: tuple[str, int] | None
) -> str:
    uri = tracking_uri()
    known = run.read_json("mlflow.json") or {"run_id": None, "attempt": 0}
    attempt = known["attempt"] + 1
    run_id = track.open_run(
        uri,
        run_id=known["run_id"],
        name=f"{stage.variant}-{identity[:8]}",
        identity={"run": run.name, "storage": stage.store.uri},  # a colleague's training is another run
        params={
            "seed": stage.params.seed,
            "train": cfg.model_dump(mode="json") | {"seed": _seed(stage, cfg)},
            "encode": dict(encoded.config),
            "materialize": stage.params.materialize.model_dump(mode="json"),
            **diff_params(differences(stage)),
        },
        tags={
            **provenance_tags(stage.root),
            "variant": str(stage.variant),
            "train_digest": identity,
            "dataset_digest": encoded.digest,
            "world_size": str(cfg.workers),
            "attempt": str(attempt),
            **({"resumed_from": f"{origin[0]}@{origin[1]}"} if origin else {}),
        },
    )
    run.write_json("mlflow.json", {"run_id": run_id, "attempt": attempt})
    track.log_dataset(
        uri, run_id, name="encoded", digest=encoded.digest, source=stage.store.uri, rows=encoded.counts["rows"]
    )
    return run_id


def _log_result(
    stage: Stage,
    run: Run,
    run_id: str,
    history: Sequence[Mapping[str, float]],
    origin: tuple[str, int] | None,
) -> None:
    """Complete the MLflow run: what rank 0 could not log, the export, the end. Raises TrackError."""
    uri = tracking_uri()
    first = origin[1] if origin else 0  # earlier points are the other run's
    points = {int(point["samples_seen"]): point for point in history if point["step"] > first}
    track.log_curve(uri, run_id, points)
    for name in run.store.list_names(f"{run.folder}/{UNLOGGED}"):
        path = f"{run.folder}/{UNLOGGED}/{name}"
        picture = decode(run.store.read_bytes(path))
        track.log_image_at(uri, run_id, picture, key=track.GRIDS, step=int(name.partition(".")[0]))
        run.store.delete_file(path)
    export_uri = stage.store.full_uri(f"{run.folder}/export")
    registered = track.register_model(uri, run_id, name=f"pbe-{stage.variant}", source=export_uri)
    print(f"train@{stage.variant}: {registered}")
    track.end_run(uri, run_id)


@contextmanager
def _shown_as_failed(run_id: str) -> Iterator[None]:
    """End the MLflow run as failed if the block raises; an MLflow that fails too does not hide why."""
    try:
        yield
    except BaseException:
        try:
            track.end_run(tracking_uri(), run_id, failed=True)
        except track.TrackError as error:
            print(f"train: MLflow run {run_id} still looks as if it ran: {error}", flush=True)
        raise


def _train(
    stage: Stage,
    cfg: TrainConfig,
    encoded: Manifest,
    triplets: Manifest | None,
    start: StartingPoint,
    judge: "Callable[[Store, torch.device], Judge] | None",
    run: Run,
    run_id: str,
    origin: tuple[str, int] | None,
) -> None:
    write_plan(stage.store, stage.title, "run", [run.name], total=cfg.steps)
    spec = TrainSpec(
        cfg=cfg,
        seed=_seed(stage, cfg),
        store_uri=stage.store.uri,
        encoded=encoded,
        triplets=triplets,
        arch=architecture(stage, cfg, encoded, start),
        initial=start.initial,
        card=_model_card(stage, cfg, encoded, start, run),
        run_name=run.name,
        origin=origin,
        text=start.text.path if start.text else None,
        adapter=start.adapter.path if start.adapter else None,
        base_name=start.adapter.base_name if start.adapter else cfg.init,
        tracking_uri=tracking_uri(),
        mlflow_run_id=run_id,
        open_judge=judge,
    )
    if not cfg.steps:
        from pbe.train.export import export_initial  # imported here: torch and diffusers take seconds

        export_initial(spec)
        return
    _train_on_ranks(stage, spec, run)


def _train_on_ranks(stage: Stage, spec: TrainSpec, run: Run) -> None:
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cfg = spec.cfg
    start_ray()
    refuse_unmet("train", Demand(cfg.per_worker, "train.per_worker", cfg.workers, "train.workers"))
    # on the driver's own node, which may offer no CPUs: on another it would go with that node, and rank 0 calls it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    stage.store.delete_file(f"{run.folder}/stopped.json")
    with ExitStack() as stack:
        stack.enter_context(ProgressBar(progress, total=cfg.steps, label=f"train@{stage.variant}"))
        stack.enter_context(track.system_metrics(tracking_uri(), spec.mlflow_run_id))
        _fit(stage, replace(spec, on_progress=_Put(progress)), run)
        _raise_what_stopped(stage, run)


def _fit(stage: Stage, spec: TrainSpec, run: Run) -> None:
    """Train to the end; where memory is short, wait and go on from the newest checkpoint. Raises StageError."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    from pipelines.runtime.memory import Patience, shortage

    attempt = (run.read_json("mlflow.json") or {})["attempt"]
    patience = Patience(stage.title, "lower train.micro_batch or train.workers")
    for again in itertools.count():
        try:
            new_trainer(spec, attempt=f"{attempt}-{again}" if again else str(attempt)).fit()
            return
        except (TrainingFailedError, RayError) as error:
            _raise_what_stopped(stage, run)
            if (problem := shortage(error)) is None:
                raise StageError(f"{stage.title}: {root_cause(error)}; checkpoints stay in the storage") from error
            patience.wait(problem, done=max((found.step for found in run.checkpoints()), default=0))


def new_trainer(spec: TrainSpec, *, attempt: str) -> "TorchTrainer":
    """Ray Train's side of a spec: its ranks, their GPUs or processors, and how often lost ones are replaced."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cfg, run = spec.cfg, Run(Store(spec.store_uri), spec.run_name)
    on_gpu = cfg.per_worker.gpus > 0  # not what this process sees: a cluster's head rarely has one
    return TorchTrainer(
        _train_loop,
        # as bytes: Ray's controller unpickles the config, and need not import torch and diffusers for it
        train_loop_config={"spec": pickle.dumps(spec)},
        scaling_config=ScalingConfig(
            num_workers=cfg.workers, use_gpu=on_gpu, resources_per_worker=ray_resources(cfg.per_worker)
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        # Ray's checkpoints are not used; its bookkeeping goes to a separate folder of the run
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=run.store.full_uri(f"{run.folder}/ray"),
            failure_config=FailureConfig(max_failures=cfg.max_failures),
        ),
    )


def _raise_what_stopped(stage: Stage, run: Run) -> None:
    stopped = run.read_json("stopped.json")
    if stopped is not None:
        raise StageError(f"train@{stage.variant}: {stopped['reason']}")


def _train_loop(config: dict[str, bytes]) -> None:
    """Train on every worker. If training stops, write the reason to the run's folder, in one line, for the driver."""
    import ray.train.torch

    from pbe.train.worker import NonFiniteError, train_worker

    spec: TrainSpec = pickle.loads(config["spec"])
    run = Run(Store(spec.store_uri), spec.run_name)
    if ray.train.get_context().get_world_rank() == 0:
        run.store.delete_file(f"{run.folder}/stopped.json")  # of the previous attempt
    try:
        train_worker(spec, ray.train.torch.get_device())
    except NonFiniteError as error:
        # Every rank fails like this and would again: stop here, without Ray's tracebacks and retries.
        run.write_json("stopped.json", {"reason": str(error)})
    except UserError as error:
        run.write_json("stopped.json", {"reason": with_cure(error)})
        raise  # Ray retries: the storage may come back


@dataclass(frozen=True)
class _Put:
    """Rank 0's side of the progress bar."""

    queue: Any

    def __call__(self, point: Mapping[str, float]) -> None:
        from ray.exceptions import RayActorError

        with suppress(RayActorError):  # a bar that Ray has ended, for want of memory, does not end the training
            self.queue.put_nowait((int(point["step"]), point["loss"]))


class ProgressBar:
    """A tqdm bar in the driver, fed by rank 0 through a Ray queue."""

    def __init__(self, progress: Any, *, total: int, label: str) -> None:
        self._progress, self._stop = progress, threading.Event()
        self._bar = progress_bar(label, total=total, unit="step")
        self._thread = threading.Thread(target=self._follow, daemon=True, name="pbe-progress")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._bar.close()

    def _follow(self) -> None:
        from ray.exceptions import RayActorError
        from ray.util.queue import Empty

        while not self._stop.is_set():
            try:
                step, loss = self._progress.get(timeout=0.5)
            except (Empty, queue.Empty):
                continue
            except RayActorError:
                return
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)


def _model_card(stage: Stage, cfg: TrainConfig, encoded: Manifest, start: StartingPoint, run: Run) -> ModelCard:
    materialize = stage.params.materialize
    return ModelCard(
        image_px=materialize.image_px,
        reference_px=materialize.reference_px,
        reference_pad_px=materialize.reference_pad_px,
        tokens=cfg.exemplar.tokens,
        scheduler=scheduler_config(cfg.beta_schedule, cfg.objective),
        run={"variant": stage.variant, "name": run.name, "steps": cfg.steps, "dataset_digest": encoded.digest},
        condition=cfg.condition,
        guidance_scale=start.guidance_scale,
    )


def _write_outputs(
    stage: Stage,
    run: Run,
    run_id: str,
    identity: str,
    weights: Sequence[str],
    origin: tuple[str, int] | None,
    began: dict[str, str],
    finished: dict[str, Any],
    history: Sequence[Mapping[str, float]],
) -> None:
    stage.outputs.mkdir(parents=True, exist_ok=True)
    columns = ["step", "samples_seen", "loss", "validation_loss", "lr", "grad_norm", "rows_per_s", "peak_memory_gib"]
    columns += ["step_s", "data_s", "forward_s", "backward_s", "optimizer_s", "checkpoint_s", "validation_s"]
    columns += sorted({name for point in history for name in point if name.startswith(track.SCORES)})
    with (stage.outputs / "loss.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        whole = ("step", "samples_seen")
        writer.writerows({**point, **{name: int(point[name]) for name in whole}} for point in history)
    export = f"{run.folder}/export"
    write_json(
        stage.outputs / "manifest.json",
        {
            "run": run.name,
            "digest": identity,
            "mlflow_run_id": run_id,
            "initial": list(weights),
            "resumed_from": {"run": origin[0], "step": origin[1]} if origin else None,
            **({"init": began} if began else {}),  # the variant whose model train.init names
            "steps": finished["steps"],
            "loss": finished["loss"],
            "export": {
                name: hashlib.sha256(stage.store.read_bytes(f"{export}/{name}")).hexdigest()
                for name in stage.store.list_files(export)
            },
        },
    )
