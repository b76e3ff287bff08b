"""MLflow, on real SQLite files and a real server: what it cannot do is one line, and work done again is one run."""

import math
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbe import track
from pbe.track import TrackError
from tests.mlflow_server import mlflow_server


@pytest.fixture
def uri(mlflow_uri: str) -> str:
    return mlflow_uri


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _open(uri: str, *, run: str = "full-0123", params: dict[str, Any] | None = None, **more: Any) -> str:
    return track.open_run(uri, name="full", identity={"run": run}, params=params or {}, tags={}, **more)


def _runs(uri: str) -> list[Any]:
    client = _client(uri)
    return client.search_runs([client.get_experiment_by_name(track.EXPERIMENT).experiment_id])


# -- what it is asked before the work --------------------------------------------------------------------------------


def test_a_database_that_is_to_be_made_is_not_made_by_asking(tmp_path: Path) -> None:
    assert "the first run creates it" in track.check(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackError, match=r"file is not a folder that can be written$"):
        track.check(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_asking_leaves_no_run_and_may_be_repeated(uri: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert f"artifacts go to {(tmp_path / 'mlartifacts').as_uri()}" in track.check(uri)
    assert _runs(uri) == []


def _deleted_experiment(uri: str, tmp_path: Path) -> str:
    _open(uri)
    client = _client(uri)
    client.delete_experiment(client.get_experiment_by_name(track.EXPERIMENT).experiment_id)
    return uri


def _schema(version: str) -> Callable[[str, Path], str]:
    def change(uri: str, tmp_path: Path) -> str:
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            database.execute(f"update alembic_version set version_num = '{version}'")
            database.commit()
        return uri

    return change


def _content(data: bytes) -> Callable[[str, Path], str]:
    def change(uri: str, tmp_path: Path) -> str:
        (tmp_path / "mlflow.db").write_bytes(data)
        return uri

    return change


def _read_only(uri: str, tmp_path: Path) -> str:
    _open(uri)
    return f"sqlite:///file:{tmp_path / 'mlflow.db'}?mode=ro&uri=true"


def _artifacts_gone(uri: str, tmp_path: Path) -> str:
    _open(uri)
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    return uri


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_deleted_experiment, r"is deleted there; `MLFLOW_TRACKING_URI=\S+ python -m mlflow experiments restore -x 1`"),
        (_schema("451aebb31d03"), r"out-of-date database schema .*'mlflow db upgrade .*a newer MLflow wrote"),
        (_schema("ffffffffffff"), r"found version ffffffffffff.*a newer MLflow wrote the database: install that one"),
        (_content(b"no database" * 1000), "file is not a database"),
        (_read_only, "attempt to write a readonly database"),
        (_artifacts_gone, r"(File exists|Not a directory).*Artifacts go to file:///.*mlartifacts, as since"),
        (lambda uri, tmp_path: f"sqlite:///{tmp_path}", "unable to open database file"),
        (lambda uri, tmp_path: str(tmp_path / "mlruns"), "maintenance mode"),
        (lambda uri, tmp_path: "http://127.0.0.1:9", "Connection refused.*; start that server, or unset MLFLOW_TRACK"),
        (lambda uri, tmp_path: "http://no-such-host.invalid", "start that server"),
        (lambda uri, tmp_path: "nfs://server/mlflow", "unsupported URI"),
        (lambda uri, tmp_path: "postgresql://localhost/mlflow", "ModuleNotFoundError: No module named 'psycopg"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:20]),
)
@pytest.mark.timeout(60)
def test_what_cannot_be_logged_to_is_one_line_before_the_work(
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make: Callable[[str, Path], str],
    said: str,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    where = make(uri, tmp_path)
    capfd.readouterr()
    with pytest.raises(TrackError, match=said) as error:
        track.check(where)
    assert str(error.value).startswith(f"MLFLOW_TRACKING_URI={where}: ") and "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err  # of MLflow's own log


def test_a_database_that_another_program_holds(uri: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("begin exclusive")
        with pytest.raises(TrackError, match="database is locked; another program holds it"):
            track.check(uri)


# -- one run for the same work ---------------------------------------------------------------------------------------


def test_the_same_work_done_again_updates_its_run_and_its_child(uri: str) -> None:
    parent = _open(uri)
    child = _open(uri, run="evaluation", parent_run_id=parent)
    other = _open(uri, run="evaluation", parent_run_id=_open(uri, run="small-4567"))
    assert parent == _open(uri) and child == _open(uri, run="evaluation", parent_run_id=parent) != other
    assert len(_runs(uri)) == 4


def test_a_storage_whose_path_has_a_quote_names_its_run_too(uri: str) -> None:
    storage = {"run": "full-0123", "storage": "/home/o'brien/.store"}
    first, again = (track.open_run(uri, name="full", identity=storage, params={}, tags={}) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("known", ["deleted", "0" * 32, "", "no id/at all"])
def test_a_run_that_is_deleted_or_of_another_database_is_replaced_once(uri: str, known: str) -> None:
    first = _open(uri)
    _client(uri).delete_run(first)
    known = first if known == "deleted" else known
    second = _open(uri, run_id=known)
    assert second != first and _open(uri, run_id=known) == second
    _client(uri).restore_run(first)
    assert _open(uri, run_id=first) == first  # its own again


def test_params_are_completed_and_never_changed(uri: str) -> None:
    """MLflow refuses another value; a server that went away between a run and its params leaves a run without."""
    many = {f"p{number}": "x" * 9000 for number in range(150)}  # MLflow takes 100 at once, of 6,000 characters
    run = _open(uri, params={"workers": 2})
    _open(uri, params={"workers": 4, "nested": {"lr": 0.1}, **many})
    found = _client(uri).get_run(run).data.params
    assert (found["workers"], found["nested.lr"], len(found)) == ("2", "0.1", 152)


def test_a_killed_or_failed_run_goes_on_and_an_ended_one_keeps_its_time(uri: str) -> None:
    run, client = _open(uri), _client(uri)
    track.end_run(uri, run, failed=True)
    track.resume_run(uri, run)
    assert client.get_run(run).info.status == "RUNNING"
    track.end_run(uri, run)
    ended = client.get_run(run).info
    assert ended.status == "FINISHED"
    _open(uri, run_id=run)
    track.end_run(uri, run, failed=True)
    assert client.get_run(run).info.status == "FINISHED" and client.get_run(run).info.end_time == ended.end_time


def test_every_number_is_logged(uri: str) -> None:
    run = _open(uri)
    values = {f"m{number}": float(number) for number in range(1500)} | {"nan": math.nan, "inf": math.inf}
    track.log_metrics(uri, run, values)
    found = _client(uri).get_run(run).data.metrics
    assert len(found) == 1502 and found["m1499"] == 1499 and math.isnan(found["nan"]) and found["inf"] > 1e300


def test_of_a_curve_the_missing_points_are_logged(uri: str) -> None:
    run, client = _open(uri), _client(uri)
    points = {step * 8: {"step": step, "loss": 1 / step, "score/rows": 4} for step in (1, 2, 3)}
    track.log_metrics(uri, run, points[16], step=16, prefix=track.CURVE)
    for _ in range(2):
        track.log_curve(uri, run, points)
    for name in ("train/loss", "score/rows"):  # which has its own group
        assert sorted(point.step for point in client.get_metric_history(run, name)) == [8, 16, 24]
    track.log_curve(uri, run, {})  # of a model that is not trained


def test_artifacts_for_which_there_is_no_room_are_one_line(uri: str, tmp_path: Path) -> None:
    run = _open(uri)
    (tmp_path / "mlartifacts").symlink_to("/dev/full")
    with pytest.raises(TrackError, match=rf"^MLFLOW_TRACKING_URI={uri}: "):
        track.log_image(uri, run, np.zeros((8, 8, 3), np.uint8), file="edits.png")


def _series_is_replaced(uri: str, run: str) -> None:
    """Same content: not logged again. Other content, or a series that is not whole: none of its images stays."""

    def names() -> set[str]:
        return {file.path for file in _client(uri).list_artifacts(run, track.IMAGES)}

    def log(content: str, *steps: int) -> None:
        pictures = {step: np.full((8, 8, 3), step, np.uint8) for step in steps}
        track.log_series(uri, run, pictures, key="eval-box/edits", content=content)

    log("first", 0, 7)
    first = names()
    log("first", 0, 7)
    assert names() == first and len(first) == 4  # each with a thumbnail
    log("second", 0, 7)
    second = names()
    assert len(second) == 4 and not first & second
    log("second", 0, 5, 7)  # as if it had been cut off
    assert len(names()) == 6 and not second & names()


def test_a_series_is_logged_once_and_replaced_as_a_whole(uri: str) -> None:
    _series_is_replaced(uri, _open(uri))


# -- a server --------------------------------------------------------------------------------------------------------


def test_a_server_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TrackError, match="Read timed out"):
        track.check(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_of_it_through_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with mlflow_server(tmp_path) as server:
        uri = server.uri
        assert "artifacts go to mlflow-artifacts:/" in track.check(uri)
        known = "0" * 32  # of another database
        run = _open(uri, run_id=known, params={f"p{number}": number for number in range(150)})
        assert _open(uri, run_id=known) == run
        track.log_image(uri, run, np.zeros((8, 8, 3), np.uint8), file="edits.png")
        _series_is_replaced(uri, run)
        points = {step: {"step": step, "loss": math.nan if step == 7 else 1.0} for step in range(1, 1200)}
        server.stop()
        with pytest.raises(TrackError, match="Connection refused"):
            track.log_curve(uri, run, points)
        server.start()
        track.log_curve(uri, run, points)
        assert len(_client(uri).get_metric_history(run, "train/loss")) == 1199
        track.end_run(uri, run)
        _client(uri).delete_run(run)
        assert _open(uri, run_id=run) != run
        _client(uri).delete_experiment(_client(uri).get_experiment_by_name(track.EXPERIMENT).experiment_id)
        with pytest.raises(TrackError, match="mlflow experiments restore -x"):
            track.check(uri)
