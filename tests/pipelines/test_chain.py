"""The whole chain through `dvc repro` on real Ray, DeepSpeed, MLflow and DVC, in a folder with a space in its name."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from pbe.data import images
from tests.pipelines.project import Project, kill_tree, make_project

pytest.importorskip("skimage", reason="needs the sample extra")
POLL_S = 0.05


@pytest.fixture(scope="module")
def repro(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("chain") / "my project")
    project.run("dvc", "repro")
    return project


def metrics(project: Project, variant: str) -> dict:
    return json.loads((project.folder / "data" / "evaluate" / variant / "metrics.json").read_text())


@pytest.mark.timeout(700)
def test_repro_leaves_every_promised_output(repro: Project) -> None:
    for stage in ("ingest", "filter", "materialize", "encode"):
        manifest = json.loads((repro.folder / "data" / stage / "manifest.json").read_text())
        for unit in manifest["units"]:
            for file in unit["files"]:
                assert pq.read_metadata(repro.folder / ".store" / file["path"]).num_rows == file["rows"]
    counts = json.loads((repro.folder / "data" / "filter" / "counts.json").read_text())
    assert counts["boxes_in"] == 44
    assert counts["boxes_kept"] + counts["boxes_rejected"] == 44
    for variant in ("full", "no_context_dropout"):
        assert (repro.folder / "models" / variant / "unet" / "diffusion_pytorch_model.safetensors").is_file()
        own = metrics(repro, variant)["own_gain_efficientnet_lite2"]
        assert own["low"] <= own["value"] <= own["high"]
        assert own["n"] == 12
    html = (repro.folder / "reports" / "index.html").read_text()
    assert "own gain" in html.lower()
    clean, *draws = re.findall(r'<img src="(data:[^"]+)" alt="(?:clean|augmented) reference', html)
    assert len(draws) == 16 and len({clean, *draws}) > 8  # some draws leave it as it is
    assert 'src="http' not in html
    assert 'href="http' not in html.split("</head>")[0]


def test_repro_again_does_nothing(repro: Project) -> None:
    before = {stage: repro.part_times(stage) for stage in ("ingest", "materialize", "encode")}
    assert "up to date" in repro.run("dvc", "repro").stdout
    assert before == {stage: repro.part_times(stage) for stage in before}


def test_metrics_and_plots_are_shown(repro: Project) -> None:
    assert "own_gain_efficientnet_lite2" in repro.run("dvc", "metrics", "show").stdout
    repro.run("dvc", "plots", "show", "--out", "plots-out")
    assert (repro.folder / "plots-out" / "index.html").is_file()


def test_mlflow_has_both_variants_with_curves_images_dataset_and_system_metrics(repro: Project) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{repro.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("paint-by-example")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {run.data.tags["variant"] for run in parents} == {"full", "no_context_dropout"}
    for run in parents:
        assert run.data.params["train.steps"] == "12"
        assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["dataset_digest"]
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) > 2
        assert "eval/own_gain_efficientnet_lite2" in run.data.metrics
        assert any(name.startswith("system/") for name in run.data.metrics)
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["edits.png", "images"]
        grids = [image.path for image in client.list_artifacts(run.info.run_id, "images")]
        steps = {int(step) for grid in grids for step in re.findall(r"[%+]step[%+](\d+)[%+]", grid)}
        assert steps == {6 * 8, 12 * 8}  # validate_every x batch: grids stand against samples seen
        validation = client.get_metric_history(run.info.run_id, "train/validation_loss")
        assert [point.step for point in validation] == sorted(steps)
        assert {"train/grad_norm", "train/peak_memory_gib", "train/data_s"} <= set(run.data.metrics)
        version = client.search_model_versions(f"name='pbe-{run.data.tags['variant']}'")[0]
        assert version.run_id == run.info.run_id
        assert Path(version.source, "unet", "diffusion_pytorch_model.safetensors").is_file()
        children = [other for other in runs if other.data.tags.get("mlflow.parentRunId") == run.info.run_id]
        assert len(children) == 1


def test_param_switched_and_switched_back_recomputes_nothing(repro: Project) -> None:
    before = repro.part_times("materialize")
    repro.edit_params("min_area_frac: 0.02", "min_area_frac: 0.03")
    repro.run("pipelines", "filter")
    repro.run("pipelines", "materialize")
    added = repro.part_times("materialize")
    assert added.keys() > before.keys()
    repro.edit_params("min_area_frac: 0.03", "min_area_frac: 0.02")
    repro.run("dvc", "repro", "encode")
    assert repro.part_times("materialize") == added


def test_bad_parameter_is_refused_in_one_line_before_any_work(repro: Project) -> None:
    repro.edit_params("steps: 12", "stepz: 12")
    try:
        result = repro.run("pipelines", "ingest", check=False)
    finally:
        repro.edit_params("stepz: 12", "steps: 12")
    assert result.returncode == 1
    assert "train.stepz = 12: unknown key" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def _size(path: Path) -> int:
    return path.stat().st_size


def _wait_for(found, process, what: str) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, f"no {what} within two minutes"
        time.sleep(POLL_S)


@pytest.mark.timeout(400)
def test_interrupted_or_killed_in_materialize_keeps_finished_parts(tmp_path: Path) -> None:
    project = make_project(tmp_path / "killed")
    project.edit_params("slots: 4", "slots: 600")
    project.run("pipelines", "ingest")
    project.run("pipelines", "filter")
    parts = project.folder / ".store" / "parts" / "materialize"

    photos = max((project.folder / ".store" / "parts" / "ingest").glob("*/images.parquet"), key=_size)
    whole = photos.read_bytes()
    photos.write_bytes(whole[:5000] + bytes(byte ^ 255 for byte in whole[5000:5020]) + whole[5020:])
    damaged = project.run("pipelines", "materialize", check=False)  # the error is raised in a Ray task
    assert damaged.returncode == 1 and "Traceback" not in damaged.stderr
    errors = [line for line in damaged.stderr.splitlines() if line.startswith("pbe: error: ")]
    assert len(errors) == 1 and str(photos) in errors[0] and "dvc repro -f -s ingest" in errors[0]
    photos.write_bytes(whole)
    project.edit_params("cpus_per_bucket: 1\n", "cpus_per_bucket: 1000\n")
    assert "a task asks for 1000 CPUs" in project.run("pipelines", "materialize", check=False).stderr
    project.edit_params("cpus_per_bucket: 1000\n", "cpus_per_bucket: 4\n")  # one bucket after the other
    shutil.rmtree(parts)  # the buckets that were whole are done

    process = project.start("pipelines", "materialize")
    _wait_for(lambda: "0 of 4 parts" in project.started_log(), process, "start")
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole foreground group
    assert process.wait(timeout=60) == 130
    assert "the same command goes on" in project.started_log()
    assert "Traceback" not in project.started_log()

    process = project.start("dvc", "repro", "materialize")
    _wait_for(lambda: list(parts.glob("*/record.json")), process, "finished part")
    kill_tree(process)
    finished = {path.parent.name for path in parts.glob("*/record.json")}
    assert 0 < len(finished) < 4
    before = {name: when for name, when in project.part_times("materialize").items() if name.split("/")[0] in finished}
    project.run("pipelines", "check")  # as `make repro` does
    project.run("dvc", "repro", "materialize")
    after = project.part_times("materialize")
    assert len(list(parts.glob("*/record.json"))) == 4
    assert {name: after[name] for name in before} == before


def _last_losses(project: Project) -> list[float]:
    """Training and validation loss of the last step."""
    with (project.folder / "data" / "train" / "full" / "loss.csv").open(newline="") as stream:
        last = list(csv.DictReader(stream))[-1]
    return [float(last["loss"]), float(last["validation_loss"])]


@pytest.mark.timeout(500)
def test_killed_in_train_goes_on_from_its_checkpoint_to_the_same_loss(repro: Project) -> None:
    straight = _last_losses(repro)
    run = next((repro.folder / ".store" / "runs").glob("full-*"))
    for path in (run / "finished.json", run / "history.json"):
        path.unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000012")  # as if cut off between step 8's checkpoint and step 12's
    for workers in (2, 1):  # through Ray Train: first as it was, then on another number of ranks
        repro.edit_params("workers: 2", f"workers: {workers}")
        result = repro.run("pipelines", "train", "--variant", "full")
        repro.edit_params(f"workers: {workers}", "workers: 2")
        said = result.stdout + result.stderr
        assert "goes on from the checkpoint of step 8" + (", written by 2 ranks" if workers == 1 else "") in said
        resumed = _last_losses(repro)
        assert resumed == pytest.approx(straight, rel=1e-5)
        (run / "finished.json").unlink()
        shutil.rmtree(run / "checkpoints" / "step-00000012")


@pytest.mark.timeout(500)
def test_a_loss_that_is_not_finite_ends_the_stage_without_another_try(repro: Project) -> None:
    broken = repro.folder / "broken"
    shutil.copytree(repro.folder / "models" / "full", broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = np.inf
    save_file(tensors, weights)
    repro.edit_params("init: random", f"init: {json.dumps(str(broken))}")
    result = repro.run("pipelines", "train", "--variant", "full", check=False)
    repro.edit_params(f"init: {json.dumps(str(broken))}", "init: random")
    assert result.returncode == 1
    assert (
        "the loss is not finite at step 1; the state before that step is saved as step 0. 8 of 8 rows" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert "goes on from the checkpoint" not in result.stdout + result.stderr  # as each of two more tries would


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_killed_by_sigkill_in_train_goes_on(tmp_path: Path) -> None:
    project = make_project(tmp_path / "killed")
    project.edit_params("steps: 12", "steps: 60")
    project.run("dvc", "repro", "encode")
    process = project.start("dvc", "repro", "train@full")
    runs = project.folder / ".store" / "runs"
    _wait_for(lambda: list(runs.glob("full-*/checkpoints/*/COMPLETE.json")), process, "checkpoint")
    kill_tree(process)
    result = project.run("dvc", "repro", "train@full")
    assert "goes on from the checkpoint" in result.stdout + result.stderr
    assert (project.folder / "models" / "full" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_experiments_land_in_the_main_mlflow_database(repro: Project) -> None:
    from mlflow import MlflowClient

    repro.git("add", "-A")
    repro.git("commit", "-qm", "after repro")
    repro.run("dvc", "exp", "run", "-S", "train.lr=0.001", "train@full")
    repro.run("dvc", "exp", "run", "--queue", "-S", "train.lr=0.003", "train@full")
    repro.run("dvc", "exp", "run", "--run-all")
    client = MlflowClient(f"sqlite:///{repro.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("paint-by-example")
    assert experiment is not None
    rates = {run.data.params.get("train.lr") for run in client.search_runs([experiment.experiment_id])}
    assert {"0.001", "0.003"} <= rates


@pytest.mark.browser
def test_report_shows_in_a_browser(repro: Project, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on PATH")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}"]
    picture, page = tmp_path / "page.png", (repro.folder / "reports" / "index.html").as_uri()
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", "--window-size=1280,3000", page],
        check=True,
        capture_output=True,
        timeout=120,
    )
    shown = images.decode(picture.read_bytes())
    assert shown.shape == (3000, 1280, 3)
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 2000  # pictures are there, not only text
