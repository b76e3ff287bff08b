"""What stages tell MLflow: asked before the work, told after the results are written, once for the same results."""

import json
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from pbe import track
from pbe.store import Store
from pbe.track import TrackError
from pbe.train.checkpoints import Run
from pipelines import evaluate, sweep, train
from pipelines.runtime.stage import Stage
from pipelines.runtime.tracking import after_results
from tests.pipelines import golden

METHODS = ("full", "copy_paste", "poisson")


@pytest.fixture
def uri(mlflow_uri: str) -> str:
    return mlflow_uri


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _experiment(uri: str) -> str:
    return str(_client(uri).get_experiment_by_name(track.EXPERIMENT).experiment_id)


def _runs(uri: str, prefix: str = "") -> list[Any]:
    return [run for run in _client(uri).search_runs([_experiment(uri)]) if run.info.run_name.startswith(prefix)]


def _pictures(uri: str, run_id: str) -> dict[str, int]:
    """How often a series has a step."""
    return Counter(file.path.partition("+timestamp+")[0] for file in _client(uri).list_artifacts(run_id, "images"))


def _stage(root: Path, name: str, variant: str | None = None) -> Stage:
    return Stage(name, variant, golden.small_params(), Store(str(root / "store")), root)


def test_results_that_cannot_be_logged_cost_a_line_that_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = _stage(tmp_path, "train", "full")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with after_results(stage):
        raise TrackError("MLFLOW_TRACKING_URI=x: away")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "MLFLOW_TRACKING_URI=x: away" in said and "`dvc repro -f -s train@full`" in said
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")  # where a finished job would be fetched, not run
    with after_results(stage):
        raise TrackError("away")
    assert "`env -u RAY_ADDRESS dvc repro -f -s train@full`" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), after_results(stage):
        raise ZeroDivisionError


# -- train -----------------------------------------------------------------------------------------------------------


def test_what_rank_0_could_not_log_is_logged_at_the_end(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It tries once, then leaves MLflow alone for a while: the second point is not even tried."""
    from pbe.train.worker import _Log

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    stage, client = _stage(tmp_path, "train", "full"), _client(uri)
    run = Run(stage.store, "full-0123")
    run_id = track.open_run(uri, name="full", identity={"run": run.name}, params={}, tags={})
    shown: list[Any] = []
    grid = np.full((8, 8, 3), 7, np.uint8)
    history = [{"step": step, "samples_seen": step * 8, "loss": 1 / step} for step in (2, 4, 6)]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        away = f"http://127.0.0.1:{silent.getsockname()[1]}"
        log = _Log(mock.Mock(tracking_uri=away, mlflow_run_id=run_id, on_progress=shown.append), run)
        log(history[1], grid)
        log(history[2], grid)
    assert shown == history[1:] and capsys.readouterr().out.count("is not logged to MLflow yet") == 1
    train._log_result(stage, run, run_id, history, origin=("small-4567", 2))  # which has the point of step 2
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == [32, 48]
    grids = [image.path for image in client.list_artifacts(run_id, "images")]
    assert sum("step%32" in path or "step+32" in path for path in grids) and len(grids) == 4  # each with a thumbnail
    assert client.get_run(run_id).info.status == "FINISHED"
    train._log_result(stage, run, run_id, history, origin=None)  # of the whole curve only the first is missing now
    assert sorted(point.step for point in client.get_metric_history(run_id, "train/loss")) == [16, 32, 48]
    assert len(client.list_artifacts(run_id, "images")) == 4


def test_what_stopped_a_training_is_not_hidden_by_an_mlflow_that_fails_too(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = track.open_run(uri, name="full", identity={"run": "full-0123"}, params={}, tags={})
    with pytest.raises(KeyboardInterrupt), train._shown_as_failed(run_id):
        raise KeyboardInterrupt
    assert _client(uri).get_run(run_id).info.status == "FAILED"
    with pytest.raises(KeyboardInterrupt), train._shown_as_failed("0" * 32):
        raise KeyboardInterrupt
    assert "still looks as if it ran" in capsys.readouterr().out


# -- evaluate and sweep ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of every stage's results, with nothing in MLflow."""
    pytest.importorskip("skimage", reason="needs the sample extra")
    root = tmp_path_factory.mktemp("stages")
    golden.run_stages(root)
    return root


@pytest.fixture
def root(stages: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(stages, tmp_path / "stages")
    with golden.in_this_process():
        yield tmp_path / "stages"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_results_are_the_same_runs_also_after_some_were_deleted(
    root: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_both() -> dict[str, str]:
        evaluate.main(_stage(root, "evaluate"))
        sweep.main(_stage(root, "sweep"))
        return {run.info.run_name: run.info.run_id for run in reversed(_runs(uri))}  # of each name the newest

    first = run_both()
    scales = {f"guidance-{scale:g}" for scale in golden.small_params().sweep.guidance_scales}
    parents = {"full", "baseline-copy_paste", "baseline-poisson"}
    assert first.keys() == parents | {f"evaluate-{name}" for name in METHODS} | scales
    assert "MLflow has no run" in capsys.readouterr().out  # its training is none of MLflow's
    pictures = {name: _pictures(uri, first[name]) for name in parents}
    edits = [{step for step in found if "eval-" in step} for found in pictures.values()]
    assert len(edits[0]) == 8 and edits[0] == edits[1] == edits[2]  # the bench's items, under the same key and steps
    assert len(pictures["full"]) == 8 * (1 + len(scales))
    assert run_both() == first and len(_runs(uri)) == len(first)
    assert pictures == {name: _pictures(uri, first[name]) for name in pictures}
    assert {run.info.status for run in _runs(uri)} == {"FINISHED"}

    for name in ("full", "evaluate-poisson"):
        _client(uri).delete_run(first[name])
    second = run_both()
    # a new parent, hence new children, and the deleted child
    again = {"full", "evaluate-full", "evaluate-poisson", *scales}
    assert {name for name in first if second[name] != first[name]} == again
    assert run_both() == second and len(_runs(uri)) == len(first) + len(again) - 2

    params = golden.small_params()
    other = params.evaluate.statistics.model_copy(update={"resamples": 101})
    changed = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"statistics": other})})
    evaluate.main(Stage("evaluate", None, changed, Store(str(root / "store")), root))
    assert len(_runs(uri, "evaluate-poisson")) == 2  # other numbers


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("module", "work"), [(evaluate, "extract_features"), (sweep, "fill_bench")])
def test_an_mlflow_that_fails_is_told_before_the_work_or_after_the_results(
    root: Path,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    work: str,
) -> None:
    name = module.__name__.rpartition(".")[2]
    stage, does = _stage(root, name), getattr(module, work)
    module.main(stage)
    count, experiment = len(_runs(uri)), _experiment(uri)
    manifest = stage.outputs / "manifest.json"
    before = json.loads(manifest.read_text())
    manifest.unlink()

    def goes_away(*given: Any) -> Any:
        _client(uri).delete_experiment(experiment)
        return does(*given)

    capsys.readouterr()
    monkeypatch.setattr(module, work, goes_away)
    module.main(stage)
    assert json.loads(manifest.read_text()) == before
    said = capsys.readouterr().err
    assert f"`dvc repro -f -s {name}`" in said and "mlflow experiments restore -x 1" in said and "Traceback" not in said

    def never(*given: Any) -> Any:
        raise AssertionError("the work began")

    monkeypatch.setattr(module, work, never)
    with pytest.raises(TrackError, match="mlflow experiments restore -x 1"):
        module.main(stage)
    monkeypatch.setattr(module, work, does)
    _client(uri).restore_experiment(experiment)
    module.main(stage)
    assert len(_runs(uri)) == count
