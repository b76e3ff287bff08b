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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe import track
from pbe.data.images import decode
from pbe.data.slots import InputError, require_same_rows
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.errors import UserError
from pbe.model.architecture import architecture_of
from pbe.model.card import ModelCard
from pbe.places import tracking_uri
from pbe.store import Manifest, Store, digest, load_manifest, write_json
from pbe.train.checkpoints import UNLOGGED, Run
from pbe.train.settings import LoraTrainable, TrainConfig
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


@dataclass(frozen=True)
class StoredText:
    """A text encoder's path in the storage, and the number of its tokens."""

    path: str
    tokens: int


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's path in the storage, and the name of the model that it belongs to."""

    path: str
    base_name: str


def main(stage: Stage) -> None:
    assert stage.variant is not None
    track.check(tracking_uri())
    cfg = stage.params.train_variant(stage.variant)
    encoded = load_manifest(stage.input("encode"))
    learns_triplets = cfg.input == "pixels" or cfg.condition == "text"
    triplets = load_manifest(stage.input("materialize")) if learns_triplets or cfg.score_every else None
    if triplets is not None:
        try:
            require_same_rows(encoded, triplets)
        except InputError as error:
            why = "input = pixels" if cfg.input == "pixels" else "condition = text"
            why = why if learns_triplets else f"score_every = {cfg.score_every}"
            raise StageError(f"train.{why}: {error}; run `dvc repro encode` first") from None
    initial, adapter = _initial_weights(stage, cfg, encoded)
    text = _text_encoder(stage, cfg) if cfg.condition == "text" else None
    # of the weights their content counts, not where they were found
    settings = cfg.identity(without=EXECUTION_ONLY | {"init", "seed", "text"})
    more = [triplets.digest] if triplets is not None and learns_triplets else []
    more += [text.path, *cfg.text.captions] if text is not None else []
    more += [adapter.path] if adapter is not None else []
    scale = _guidance_scale_of(cfg.init)
    more += [f"guidance_scale {scale:g}"] if scale is not None else []  # stands in the export
    identity = digest(["train", VERSION, _seed(stage, cfg), settings, initial, encoded.digest, *more])
    run = Run(stage.store, f"{stage.variant}-{identity}")
    origin = origin_of(stage, cfg, run)
    began = training_named(stage, cfg.init)  # before training: it may be missing, or change meanwhile
    with ExitStack() as stack:
        if run.finished(with_raw=cfg.ema_keep_raw) is None:
            stack.enter_context(hold(run))
        run_id = _open_mlflow_run(stage, cfg, encoded, run, identity, origin)
        if run.finished(with_raw=cfg.ema_keep_raw) is None:  # the previous holder may have finished it
            stack.enter_context(_shown_as_failed(run_id))
            refuse_what_cannot_train(
                stage,
                cfg,
                encoded,
                triplets,
                initial,
                text.tokens if text else None,
                adapter.path if adapter else None,
            )
            judge = score_judge(stage, cfg) if cfg.score_every and cfg.steps else None
            track.resume_run(tracking_uri(), run_id)
            _train(stage, cfg, encoded, triplets, initial, adapter, text, judge, run, run_id, origin)
        else:
            print(f"train@{stage.variant}: run {run.name} is finished already; exporting it again")
    finished = run.finished(with_raw=cfg.ema_keep_raw)
    if finished is None:
        raise StageError(f"train@{stage.variant}: run {run.name} ended without a result; see the log above")
    history = (run.read_json("history.json") or {"history": []})["history"]
    named = (*(initial or ()), adapter.path if adapter else None, text.path if text else None)
    read = [path for path in named if path is not None]
    _write_outputs(stage, run, run_id, identity, read, origin, began, finished, history)
    with after_results(stage):
        _log_result(stage, run, run_id, history, origin)


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


def _initial_weights(
    stage: Stage, cfg: TrainConfig, encoded: Manifest
) -> tuple[tuple[str, str | None] | None, StoredAdapter | None]:
    """Storage paths of the UNet and of the image encoder that training starts from, None for random weights, and the
    adapter of them that it starts from, if `train.init` is one."""
    if cfg.init == "random":
        return None, None
    from pbe.model.folder import CODEC_FILE, STEM, STEMS, is_adapter
    from pbe.model.hub import STABLE_DIFFUSION, weights_folder
    from pbe.model.tensors import read_json
    from pbe.model.weight_store import store_weights

    name = STABLE_DIFFUSION if cfg.init == "sd" else cfg.init
    folder = weights_folder(name, parts=["unet", "image_encoder"])
    if is_adapter(folder):
        return adapter_weights(stage, cfg, encoded, folder)
    codec = encoded.config["codec"]
    if (folder / CODEC_FILE).is_file() and (folder / CODEC_FILE).read_bytes() != stage.store.read_bytes(codec["path"]):
        raise StageError(
            f"train.init = {cfg.init}: its codec is not the one that encoded these rows; set "
            f"encode.codec: {{kind: pretrained, weights: {cfg.init}}}"
        )
    unet = store_weights(stage.store, folder / "unet", "unet", STEM)
    has_encoder = (folder / "image_encoder").is_dir()
    if cfg.condition == "text" and has_encoder:
        raise StageError(
            f"train.init = {cfg.init}: a Paint by Example model, whose UNet reads exemplars; train.condition = text "
            "starts from Stable Diffusion (sd) or random"
        )
    if cfg.trainable != "all" and not has_encoder:
        raise StageError(
            f"train.init = {cfg.init}: not a Paint by Example model: the UNet's new input channels start at zero, and "
            f"train.trainable = {_what_trains(cfg)} would leave them there; set train.trainable: all"
        )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if has_encoder and scheduler.is_file():
        refuse_other_objective(cfg, read_json(scheduler))
    encoder = store_weights(stage.store, folder / "image_encoder", "image_encoder", *STEMS) if has_encoder else None
    mapper = f", {encoder}" if encoder else "; the mapper is random" if cfg.condition == "exemplar" else ""
    print(f"train@{stage.variant}: starts from {name}: {unet}{mapper}")
    return (unet, encoder), None


def refuse_other_objective(cfg: TrainConfig, scheduler: Mapping[str, Any]) -> None:
    """Raise StageError where weights that stay as they are would be used as if they predicted something else.

    scheduler: the config of the model that `train.init` names. A whole network may be trained to another objective.
    """
    if cfg.steps and cfg.trainable == "all":
        return
    from pbe.diffusion.schedule import objective_of

    objective, beta_schedule = objective_of(scheduler), scheduler.get("beta_schedule", cfg.beta_schedule)
    if (objective, beta_schedule) != (cfg.objective, cfg.beta_schedule):
        raise StageError(
            f"train.init = {cfg.init}: it predicts {objective} under the noise schedule {beta_schedule}; set "
            f"train.objective: {objective} and train.beta_schedule: {beta_schedule}"
        )


def adapter_weights(
    stage: Stage, cfg: TrainConfig, encoded: Manifest, folder: Path
) -> tuple[tuple[str, str | None], StoredAdapter]:
    """`_initial_weights` for the folder of an adapter, whose base is in the storage or where its name says.

    Raises StageError, AdapterError, WeightsError.
    """
    from pbe.model.adapter import describe, read_adapter
    from pbe.model.folder import STEM, STEMS
    from pbe.model.hub import weights_folder
    from pbe.model.weight_store import store_adapter, store_weights, stored_codec_sha256

    adapter = read_adapter(folder)
    if not isinstance(cfg.trainable, LoraTrainable) or cfg.trainable.lora != adapter.lora:
        raise StageError(
            f"train.init = {cfg.init}: an adapter; to train it further, set train.trainable: {describe(adapter.lora)}, "
            "or name the merged model, whose folder contains the adapter"
        )
    refuse_other_objective(cfg, adapter.card.scheduler)
    base = adapter.base
    if base.codec_sha256 != stored_codec_sha256(stage.store, encoded.config["codec"]):
        raise StageError(
            f"train.init = {cfg.init}: its codec is not the one that encoded these rows; set "
            f"encode.codec: {{kind: pretrained, weights: {base.name}}}"
        )
    if not all(stage.store.exists(f"{path}/record.json") for path in (base.unet, base.image_encoder)):
        source = weights_folder(base.name, parts=["unet", "image_encoder"])
        unet = store_weights(stage.store, source / "unet", "unet", STEM)
        encoder = store_weights(stage.store, source / "image_encoder", "image_encoder", *STEMS)
        if (unet, encoder) != (base.unet, base.image_encoder):
            raise StageError(
                f"train.init = {cfg.init}: an adapter of {base.name}, whose weights have changed since; put them back, "
                "or train a new adapter"
            )
    stored = StoredAdapter(store_adapter(stage.store, folder), base.name)
    print(f"train@{stage.variant}: starts from {stored.path}, an adapter of {base.name}: {base.unet}")
    return (base.unet, base.image_encoder), stored


def _what_trains(cfg: TrainConfig) -> str:
    return cfg.trainable if isinstance(cfg.trainable, str) else "lora"


def _text_encoder(stage: Stage, cfg: TrainConfig) -> StoredText:
    """Copy the text encoder to the storage, which then has what the workers and the export read."""
    from pbe.model.hub import weights_folder
    from pbe.model.text import PARTS, load_text_encoder
    from pbe.model.weight_store import store_text_encoder

    backbone, name, key = stage.params.encode.backbone, cfg.text.encoder, "train.text.encoder"
    if name is None and backbone.kind == "clip":
        name, key = backbone.weights, "encode.backbone.weights"
    if name is None:
        raise StageError(
            f"train@{stage.variant}: train.condition = text needs a text encoder, and encode.backbone is no CLIP; name "
            "a CLIP or a sentence encoder in train.text.encoder"
        )
    try:
        encoder = load_text_encoder(weights_folder(name, parts=[*PARTS, ""]))
    except UserError as error:
        raise StageError(f"train@{stage.variant}: {key} = {name}: {error}") from None
    if encoder.width != cfg.unet.context_width:
        raise StageError(
            f"train@{stage.variant}: {key} = {name}: its tokens have width {encoder.width}; set "
            f"train.unet.context_width ({cfg.unet.context_width}) to that, or name another text encoder"
        )
    path = store_text_encoder(stage.store, encoder)
    print(f"train@{stage.variant}: text encoder {name}: {path}, {encoder.token_count} tokens of {encoder.width}")
    return StoredText(path, encoder.token_count)


def score_judge(stage: Stage, cfg: TrainConfig) -> "Callable[[Store, torch.device], Judge]":
    """Copy the weights of `train.score_extractor` to the storage, and return how workers open them.

    They are loaded once here, because workers would fail later, on every rank at once. Raises StageError.
    """
    from pbe.evaluate.features.weights import store_extractor
    from pbe.evaluate.judge import CPU, open_judge
    from pbe.evaluate.settings import ClipExtractorConfig, EfficientNetExtractorConfig
    from pbe.model.hub import weights_folder

    named, key = cfg.score_extractor, "train.score_extractor"
    try:
        if named.kind == "clip":
            key = f"{key}.weights = {named.weights}"
            weights_folder(named.weights, parts=[""])
            entry = store_extractor(stage.store, ClipExtractorConfig(kind="clip", weights=named.weights, mixture=None))
        else:
            entry = store_extractor(stage.store, EfficientNetExtractorConfig(kind=named.kind))
        open_judge(entry, stage.store, CPU)
    except UserError as error:
        raise StageError(f"train@{stage.variant}: {key}: {error}") from None
    return partial(open_judge, entry)


def _train(
    stage: Stage,
    cfg: TrainConfig,
    encoded: Manifest,
    triplets: Manifest | None,
    initial: tuple[str, str | None] | None,
    adapter: StoredAdapter | None,
    text: StoredText | None,
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
        arch=architecture_of(
            cfg.unet,
            cfg.exemplar,
            image_px=stage.params.materialize.image_px,
            encoded=encoded.config,
            caption_tokens=text.tokens if text else None,
        ),
        initial=initial,
        card=_model_card(stage, cfg, encoded, run),
        run_name=run.name,
        origin=origin,
        text=text.path if text else None,
        adapter=adapter.path if adapter else None,
        base_name=adapter.base_name if adapter else cfg.init,
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


def _model_card(stage: Stage, cfg: TrainConfig, encoded: Manifest, run: Run) -> ModelCard:
    materialize = stage.params.materialize
    return ModelCard(
        image_px=materialize.image_px,
        reference_px=materialize.reference_px,
        reference_pad_px=materialize.reference_pad_px,
        tokens=cfg.exemplar.tokens,
        scheduler=scheduler_config(cfg.beta_schedule, cfg.objective),
        run={"variant": stage.variant, "name": run.name, "steps": cfg.steps, "dataset_digest": encoded.digest},
        condition=cfg.condition,
        guidance_scale=_guidance_scale_of(cfg.init),
    )


def _guidance_scale_of(init: str) -> float | None:
    """That of the model that `train.init` names, if its card names one."""
    if init == "random":
        return None
    from pbe.model.folder import guidance_scale_of
    from pbe.model.hub import STABLE_DIFFUSION, weights_folder

    name = STABLE_DIFFUSION if init == "sd" else init
    return guidance_scale_of(weights_folder(name, parts=["unet", "image_encoder"]))


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
