"""MLflow tracking: one run per train digest, evaluations as its children. Only this file imports mlflow.

Whatever MLflow cannot do is a TrackError of one line. The same work, done again, updates its run.
"""

import os
import shlex
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pbe.errors import UserError, one_line

EXPERIMENT = "paint-by-example"
CURVE, SCORES = "train/", "score/"  # groups of metrics: the loss curve's, and scores of edits while training
GRIDS = "edits"  # series of the grids of edits
IMAGES = "images"  # MLflow's folder of series
VIEW = "mlflow.sharedViewState."  # prefix of an experiment's tags that hold saved views
ANSWER_S = 30
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what MLflow says of an id that it does not know


class TrackError(UserError):
    """The tracking server or database cannot be used."""


# -- reaching it -----------------------------------------------------------------------------------------------------


@contextmanager
def _connected(tracking_uri: str) -> Iterator[Any]:
    """Give an MlflowClient; whatever it raises becomes a TrackError of one line."""
    # must be set before the first import; turns off MLflow's usage reporting
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default, 7, takes four minutes to fail
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ANSWER_S))  # seconds; the default is 120
    import logging

    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints tracebacks of what it raises
    try:
        yield MlflowClient(tracking_uri)
    except TrackError:
        raise
    except Exception as error:  # databases, servers and buckets all raise exceptions of their own
        raise TrackError(f"MLFLOW_TRACKING_URI={tracking_uri}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from mlflow.exceptions import MlflowException

    text = str(error).partition("\n[SQL")[0].partition("(Background on")[0]
    if "Max retries exceeded" in text:
        cause = one_line(text.rpartition("(Caused by ")[2].removesuffix(")"), 200)
        return f"no answer: {cause}; start that server, or unset MLFLOW_TRACKING_URI to log to a file here"
    if "database schema" in text:
        text += " If that does not know the version found, a newer MLflow wrote the database: install that one."
    kind = "" if isinstance(error, MlflowException | OSError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(text, 500)}"


def check(tracking_uri: str) -> str:
    """Ask for all that logging will need, before any work; returns what was found.

    Writes a tag of the experiment, which it makes if necessary, and a small file beside the runs' artifacts. A SQLite
    file that does not exist yet is not made. Raises TrackError.
    """
    file = _sqlite_file(tracking_uri)
    if file is not None and not file.exists():
        folder = next(parent for parent in file.parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise TrackError(f"MLFLOW_TRACKING_URI={tracking_uri}: {folder} is not a folder that can be written")
        return "does not exist yet, the first run creates it"
    if file is not None:
        _require_writable(file, tracking_uri)
    with _connected(tracking_uri) as client:
        experiment = _experiment(client, tracking_uri)
        client.set_experiment_tag(experiment.experiment_id, "checked", str(time.time_ns()))
    try:
        with _connected(tracking_uri), tempfile.TemporaryDirectory(prefix="pbe-mlflow-") as local:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            (Path(local) / "checked.txt").write_text("pbe wrote this to see whether artifacts can be written\n")
            artifacts = get_artifact_repository(experiment.artifact_location, tracking_uri)
            artifacts.log_artifact(str(Path(local) / "checked.txt"))
    except TrackError as error:
        raise TrackError(
            f"{error}. Artifacts go to {experiment.artifact_location}, as since the experiment was made; make "
            "that place usable, or name another database"
        ) from None
    return f"takes runs; their artifacts go to {experiment.artifact_location}"


def _sqlite_file(tracking_uri: str) -> Path | None:
    path = tracking_uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path) if tracking_uri.startswith("sqlite:////") else None


def _require_writable(file: Path, tracking_uri: str) -> None:
    """Ask SQLite itself: MLflow would try for 100 seconds to open what is no database."""
    try:
        with closing(sqlite3.connect(file)) as database:
            database.execute("begin immediate")
    except sqlite3.Error as error:
        advice = "; another program holds it: end it, or wait" if "locked" in str(error) else ""
        raise TrackError(f"MLFLOW_TRACKING_URI={tracking_uri}: {error}{advice}") from None


def _experiment(client: Any, tracking_uri: str) -> Any:
    """Return the experiment, created if necessary. Raises TrackError if it is deleted: its name stays taken."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        file = _sqlite_file(tracking_uri)
        # absolute: workers run in other folders, and the default ./mlruns would be lost
        location = None if file is None else (file.parent / "mlartifacts").as_uri()
        try:
            client.create_experiment(EXPERIMENT, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # created by another program since
                raise
        found = client.get_experiment_by_name(EXPERIMENT)
    if found.lifecycle_stage != "active":
        restore = (
            f"MLFLOW_TRACKING_URI={shlex.quote(tracking_uri)} python -m mlflow experiments restore -x "
            f"{found.experiment_id}"
        )
        raise TrackError(
            f"MLFLOW_TRACKING_URI={tracking_uri}: the experiment {EXPERIMENT} is deleted there; `{restore}` restores it"
        )
    return found


# -- runs ------------------------------------------------------------------------------------------------------------


def find_run(tracking_uri: str, *, run_id: str | None, identity: Mapping[str, str]) -> str | None:
    """Return `run_id` if that run is there and not deleted, else the newest run that has the tags `identity`, if any.

    An id that was written down may belong to another database. Raises TrackError.
    """
    from mlflow.exceptions import MlflowException

    with _connected(tracking_uri) as client:
        if run_id:
            try:
                if client.get_run(run_id).info.lifecycle_stage == "active":
                    return run_id
            except MlflowException as error:
                if error.error_code not in NOT_THERE:
                    raise
        experiment = _experiment(client, tracking_uri)
        same = " and ".join(f"tags.`{key}` = {_quoted(value)}" for key, value in identity.items())
        found = client.search_runs(
            [experiment.experiment_id], same, order_by=["attributes.start_time DESC"], max_results=1
        )
        return found[0].info.run_id if found else None


def open_run(
    tracking_uri: str,
    *,
    name: str,
    identity: Mapping[str, str],
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None = None,
    parent_run_id: str | None = None,
) -> str:
    """Return the run that `find_run` finds, or a new one, with `identity` and `tags` as its tags.

    Params that the run has already stay as they are: MLflow never lets them change. Raises TrackError.
    """
    from mlflow.entities import Param, RunTag

    if parent_run_id is not None:
        identity = {"mlflow.parentRunId": parent_run_id, **identity}
    # MLflow's own names: they fill the columns Source and Version of its run table
    tags = {"mlflow.source.name": "pbe", "mlflow.source.type": "JOB", **tags, **identity}
    if "git_commit" in tags:
        tags["mlflow.source.git.commit"] = tags["git_commit"]
    found = find_run(tracking_uri, run_id=run_id, identity=identity)
    with _connected(tracking_uri) as client:
        if found is None:
            experiment = _experiment(client, tracking_uri)
            found = client.create_run(experiment.experiment_id, run_name=name, tags=tags).info.run_id
        known = client.get_run(found).data.params
        client.log_batch(
            found,
            params=[Param(key, value) for key, value in flatten(params).items() if key not in known],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
    return str(found)


def resume_run(tracking_uri: str, run_id: str) -> None:
    """Show a run that had ended as running again. Raises TrackError."""
    with _connected(tracking_uri) as client:
        client.update_run(run_id, status="RUNNING")


def end_run(tracking_uri: str, run_id: str, *, failed: bool = False) -> None:
    """End a run unless it has ended, whose time then stays. Raises TrackError."""
    with _connected(tracking_uri) as client:
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "FAILED" if failed else "FINISHED")


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings to dotted keys, as MLflow's comparison page shows them."""
    out: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = str(value)
    return out


# -- what a run holds ------------------------------------------------------------------------------------------------


def log_metrics(
    tracking_uri: str, run_id: str, metrics: Mapping[str, float], *, step: int = 0, prefix: str = ""
) -> None:
    """Log metrics of one step. A name with a slash has its group already, and gets no prefix. Raises TrackError."""
    with _connected(tracking_uri) as client:
        client.log_batch(run_id, metrics=_entries(metrics, step, prefix))


def log_curve(tracking_uri: str, run_id: str, points: Mapping[int, Mapping[str, float]]) -> None:
    """Log those points of the loss curve, by step, that the run lacks because MLflow was away. Raises TrackError."""
    with _connected(tracking_uri) as client:
        there = {entry.step for entry in client.get_metric_history(run_id, f"{CURVE}loss")}
        missing = [entry for step in sorted(points.keys() - there) for entry in _entries(points[step], step, CURVE)]
        client.log_batch(run_id, metrics=missing)


def _entries(metrics: Mapping[str, float], step: int, prefix: str) -> Sequence[Any]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    named = {key if "/" in key else prefix + key: value for key, value in metrics.items() if key != "step"}
    return [Metric(name, float(value), now, step) for name, value in named.items()]


def log_dataset(tracking_uri: str, run_id: str, *, name: str, digest: str, source: str, rows: int) -> None:
    """Record which encoded data a run read; shown in MLflow's dataset column. Raises TrackError."""
    import json

    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name, digest=digest, source_type="local", source=source, profile=json.dumps({"num_rows": rows})
    )
    with _connected(tracking_uri) as client:
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def log_image(tracking_uri: str, run_id: str, image: np.ndarray, *, file: str) -> None:
    """Log (H, W, 3) uint8 RGB as a PNG artifact. Raises TrackError."""
    with _connected(tracking_uri) as client:
        client.log_image(run_id, image, file)


def log_image_at(tracking_uri: str, run_id: str, image: np.ndarray, *, key: str, step: int) -> None:
    """Log (H, W, 3) uint8 RGB in a series that MLflow shows with a slider. Raises TrackError."""
    with _connected(tracking_uri) as client:
        client.log_image(run_id, image, key=key, step=step, synchronous=True)


def log_series(tracking_uri: str, run_id: str, pictures: Mapping[int, np.ndarray], *, key: str, content: str) -> None:
    """Make pictures, (H, W, 3) uint8 RGB by step, a series of images that MLflow shows side by side for several runs.

    Does nothing if the run has the series with this `content`, a digest; else those of another content are deleted,
    because MLflow would show their steps too. Raises TrackError.
    """
    tag = f"content.{key}"
    with _connected(tracking_uri) as client:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        run = client.get_run(run_id)
        there = [file.path for file in client.list_artifacts(run_id, IMAGES) if _series_of(file.path)[0] == key]
        if run.data.tags.get(tag) == content and {_series_of(path)[1] for path in there} == pictures.keys():
            return
        artifacts = get_artifact_repository(run.info.artifact_uri, tracking_uri)
        for path in there:
            artifacts.delete_artifacts(path)
        for step in sorted(pictures):
            client.log_image(run_id, pictures[step], key=key, step=step, synchronous=True)
        client.set_tag(run_id, tag, content)


def _series_of(path: str) -> tuple[str, int | None]:
    """Key and step of an image, as MLflow's client writes them into its name: images/a~b+step+7+timestamp+..."""
    key, _, rest = path.removeprefix(f"{IMAGES}/").partition("+step+")
    step = rest.partition("+")[0]
    return key.replace("~", "/"), int(step) if step.isdecimal() else None


def set_tags(tracking_uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run. Raises TrackError."""
    from mlflow.entities import RunTag

    with _connected(tracking_uri) as client:
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def save_view(tracking_uri: str, *, view_id: str, name: str, state: Mapping[str, Any]) -> str:
    """Save a view of the runs, which MLflow's page lists under Views; return its address there, from `#` on.

    state: the page's own settings, as it saves them itself in this tag; MLflow does not document them. A view of the
    same id is replaced. Raises TrackError.
    """
    import json

    now = int(time.time() * 1000)
    view = {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    with _connected(tracking_uri) as client:
        experiment = _experiment(client, tracking_uri)
        client.set_experiment_tag(experiment.experiment_id, f"{VIEW}{view_id}", json.dumps(view))
    return f"#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={view_id}&compareRunsMode=CHART"


def register_model(tracking_uri: str, run_id: str, *, name: str, source: str) -> str:
    """Register the export at `source` as a version of the model `name`, once per run; returns what it did.

    A tracking server may refuse a source on a local disk; then only the run's tag `export` names it. Raises
    TrackError.
    """
    from mlflow.exceptions import MlflowException

    with _connected(tracking_uri) as client:
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


@contextmanager
def system_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Log CPU, memory, disk and network of this machine while the block runs. Raises TrackError, before the block."""
    with _connected(tracking_uri):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            run_id, sampling_interval=5, samples_before_logging=1, resume_logging=True, tracking_uri=tracking_uri
        )
        monitor.start()
    try:
        yield
    finally:
        monitor.finish()
