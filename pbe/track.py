"""MLflow tracking: one run per train digest, evaluations as its children. Only this file imports mlflow."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pbe.errors import UserError, one_line

EXPERIMENT = "paint-by-example"


class TrackError(UserError):
    """The tracking server or database cannot be used."""


def _client(tracking_uri: str) -> Any:
    # must be set before the first import; turns off MLflow's usage reporting
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default, 7, takes four minutes to fail
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri)


def reach(tracking_uri: str) -> None:
    """Raises TrackError if MLflow does not answer."""
    _reach(_client(tracking_uri), tracking_uri)


def open_run(
    tracking_uri: str,
    *,
    run_id: str | None,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    parent_run_id: str | None = None,
) -> str:
    """Open an existing run, or create one with `params`, which MLflow never lets change; returns its id.

    If the server no longer has `run_id` (a deleted database), a new run is created. Raises TrackError.
    """
    client = _client(tracking_uri)
    _reach(client, tracking_uri)
    if run_id is not None and _exists(client, run_id):
        client.update_run(run_id, status="RUNNING")
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        return run_id
    # MLflow's own names: they fill the columns Source and Version of its run table
    all_tags = {"mlflow.source.name": "pbe", "mlflow.source.type": "JOB", **tags}
    if "git_commit" in tags:
        all_tags["mlflow.source.git.commit"] = tags["git_commit"]
    if parent_run_id is not None:
        all_tags["mlflow.parentRunId"] = parent_run_id
    run = client.create_run(_experiment(client, tracking_uri), run_name=name, tags=all_tags)
    for key, value in flatten(params).items():
        client.log_param(run.info.run_id, key, value)
    return run.info.run_id


def _reach(client: Any, tracking_uri: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_experiment_by_name(EXPERIMENT)
    except MlflowException as error:
        reason = one_line(error)
        raise TrackError(f"MLFLOW_TRACKING_URI={tracking_uri}: MLflow does not answer: {reason}") from None


@contextmanager
def _as_track_error(tracking_uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # OSError: from the disk or the connection
        raise TrackError(f"MLFLOW_TRACKING_URI={tracking_uri}: {' '.join(str(error).split())[:300]}") from error


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


def _experiment(client: Any, tracking_uri: str) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    location = None
    if tracking_uri.startswith("sqlite:///"):
        # absolute: workers run in other folders, and the default ./mlruns would be lost
        location = (Path(tracking_uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return client.create_experiment(EXPERIMENT, artifact_location=location)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings to dotted keys, as MLflow's comparison page shows them."""
    out: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = str(value)
    return out


def log_metrics(
    tracking_uri: str, run_id: str, metrics: Mapping[str, float], *, step: int = 0, prefix: str = ""
) -> None:
    """Log metrics of one step. Raises TrackError."""
    import time

    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    entries = [Metric(prefix + key, float(value), now, step) for key, value in metrics.items() if key != "step"]
    with _as_track_error(tracking_uri):
        _client(tracking_uri).log_batch(run_id, metrics=entries)


def log_dataset(tracking_uri: str, run_id: str, *, name: str, digest: str, source: str, rows: int) -> None:
    """Record which encoded data a run read; shown in MLflow's dataset column."""
    import json

    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name, digest=digest, source_type="local", source=source, profile=json.dumps({"num_rows": rows})
    )
    _client(tracking_uri).log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def log_image(tracking_uri: str, run_id: str, image: np.ndarray, *, file: str) -> None:
    """Log (H, W, 3) uint8 RGB as a PNG artifact."""
    _client(tracking_uri).log_image(run_id, image, file)


def log_image_at(tracking_uri: str, run_id: str, image: np.ndarray, *, key: str, step: int) -> None:
    """Log (H, W, 3) uint8 RGB in a series that MLflow shows with a slider. Raises TrackError."""
    with _as_track_error(tracking_uri):
        _client(tracking_uri).log_image(run_id, image, key=key, step=step, synchronous=True)


def log_files(tracking_uri: str, run_id: str, folder: Path, *, to: str) -> None:
    _client(tracking_uri).log_artifacts(run_id, str(folder), to)


def register_model(tracking_uri: str, run_id: str, *, name: str, source: str) -> str:
    """Register the export at `source` as a version of the model `name`, once per run; returns what it did.

    A tracking server may refuse a source on a local disk; then only the run's tag `export` names it. Raises
    TrackError.
    """
    from mlflow.exceptions import MlflowException

    client = _client(tracking_uri)
    with _as_track_error(tracking_uri):
        client.set_tag(run_id, "export", source)
        known = [version for version in client.search_model_versions(f"name='{name}'") if version.run_id == run_id]
        if known:
            return f"already registered in MLflow as {name} version {known[0].version}"
        if not client.search_registered_models(f"name='{name}'"):
            client.create_registered_model(name)
    try:
        version = client.create_model_version(name, source=source, run_id=run_id).version
    except MlflowException as error:
        reason = one_line(error, 200)
        return f"the export is in {source}; MLflow does not accept it as a registered model ({reason})"
    return f"registered in MLflow as {name} version {version}"


def set_tags(tracking_uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    client = _client(tracking_uri)
    for key, value in tags.items():
        client.set_tag(run_id, key, value)


def end_run(tracking_uri: str, run_id: str, *, failed: bool = False) -> None:
    _client(tracking_uri).set_terminated(run_id, "FAILED" if failed else "FINISHED")


@contextmanager
def system_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Log CPU, memory, disk and network of this machine while the block runs."""
    _client(tracking_uri)
    import mlflow
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    mlflow.set_tracking_uri(tracking_uri)
    monitor = SystemMetricsMonitor(run_id, sampling_interval=5, samples_before_logging=1, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
