"""What happens to a finished chain when settings, code or data change, or a kill cuts it: each test in its own copy."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from pbe.data import images
from tests.mlflow_server import mlflow_server
from tests.pipelines.project import BASELINES, VARIANTS, Project, kill_tree, make_project, metrics
from tests.tiny_weights import write_inception

pytest.importorskip("skimage", reason="needs the sample extra")
# whichever test comes first waits for the chain itself: three tries of ten minutes on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

POLL_S = 0.05


def test_another_metric_setting_costs_no_second_look_and_no_second_edit(changeable: Project) -> None:
    before = {stage: changeable.part_times(stage) for stage in ("bench", "edit", "features")}
    changeable.set_params(evaluate__quality_components=3)
    changeable.run("dvc", "repro", "evaluate")
    assert before == {stage: changeable.part_times(stage) for stage in before}


def test_methods_in_another_order_cost_no_second_look(changeable: Project) -> None:
    before = {stage: changeable.part_times(stage) for stage in ("edit", "features", "statistics")}
    first, second = "  copy_paste: {kind: copy_paste}\n", "  poisson: {kind: poisson}\n"
    changeable.edit_params(first + second, second + first)
    changeable.run("pipelines", "evaluate")
    assert before == {stage: changeable.part_times(stage) for stage in before}


def test_a_folder_of_untouched_photos_measures_as_the_same_photos_of_the_bench_do(changeable: Project) -> None:
    """By another extractor too, from one actor and in other batches: 1e-6."""
    before = metrics(changeable)
    folder = changeable.folder / "untouched photos"
    folder.mkdir()
    bench = json.loads((changeable.folder / "data/bench/manifest.json").read_text())
    path = next(f["path"] for f in bench["units"][0]["files"] if f["dataset"] == "real")
    for row in pq.read_table(changeable.folder / ".store" / path).to_pylist():
        (folder / f"{row['real_id'].replace('/', '_')}.png").write_bytes(
            images.encode_png(images.decode(row["picture"]))
        )
    sha256 = hashlib.sha256(write_inception(changeable.folder / "inception.pt").read_bytes()).hexdigest()
    kinds = [{"kind": "efficientnet_lite2"}, {"kind": "efficientnet_lite0"}]
    changeable.set_params(
        evaluate__real_images="untouched photos",
        evaluate__real_images_px=64,
        evaluate__batch_rows=5,
        evaluate__actors=1,
        evaluate__extractors=[*kinds, {"kind": "inception", "file": "inception.pt", "sha256": sha256}],
    )
    shutil.rmtree(changeable.folder / ".store/parts/features")
    changeable.run("pipelines", "evaluate")
    after = metrics(changeable)
    for method in (*VARIANTS, *BASELINES):
        for metric, number in before[method]["box"]["exemplar"].items():
            again = after[method]["box"]["exemplar"][metric]
            for key in ("value", "low", "high"):
                assert again[key] == pytest.approx(number[key], rel=1e-6, abs=1e-6), (method, metric)
        assert {"fid", "kid", "qs_rank_inception"} <= set(after[method]["box"]["exemplar"])
    assert after["card"]["reference"] == "untouched photos"
    for name in ("zzz.png", ".DS_Store"):  # the second is none of ours
        (folder / name).write_bytes(b"no picture")
    result = changeable.run("pipelines", "evaluate", check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("pbe: error: ")]
    assert result.returncode == 1 and len(errors) == 1 and "zzz.png" in errors[0] and "remove it" in errors[0]


def test_edits_go_on_where_a_kill_left_them(changeable: Project) -> None:
    """A part of the edits is gone: that one alone is made again, the same bytes."""
    manifest = json.loads((changeable.folder / "data/edit/full/manifest.json").read_text())
    part = changeable.folder / ".store/parts/edit" / manifest["units"][1]["unit"]
    edits = (part / "edits.parquet").read_bytes()
    before = changeable.part_times("edit")
    shutil.rmtree(part)
    for variant in VARIANTS:
        changeable.run("pipelines", "edit", "--variant", variant)
    assert (part / "edits.parquet").read_bytes() == edits
    after = changeable.part_times("edit")
    assert {name for name in after if after[name] != before[name]} == {
        f"{part.name}/{name}" for name in ("edits.parquet", "record.json")
    }


def test_results_of_others_are_a_row_of_the_table(changeable: Project) -> None:
    """Pictures named by bench id, here those of copy_paste: the same numbers, and clear words for what is missing."""
    theirs = changeable.folder / "results of theirs"
    theirs.mkdir()
    manifest = json.loads((changeable.folder / "data/edit/copy_paste/manifest.json").read_text())
    rows = pq.read_table(changeable.folder / ".store" / manifest["units"][0]["files"][0]["path"]).to_pylist()
    for row in rows:
        if (row["hole_kind"], row["reference_kind"]) == ("box", "exemplar"):
            (theirs / f"{row['bench_id']}.png").write_bytes(row["edit"])
    last = "  poisson: {kind: poisson}\n"
    changeable.edit_params(last, last + "  theirs: {kind: folder, folder: results of theirs}\n")
    changeable.run("pipelines", "baseline", "--baseline", "theirs")
    changeable.run("pipelines", "evaluate")
    found = metrics(changeable)
    ours, again = found["copy_paste"]["box"]["exemplar"], found["theirs"]["box"]["exemplar"]
    assert set(found["theirs"]) == {"protocol", "box"}
    for metric in ("frechet_efficientnet_lite2", "qs_rank_efficientnet_lite0", "copy_paste"):
        assert again[metric]["value"] == pytest.approx(ours[metric]["value"], rel=1e-6)
    next(theirs.iterdir()).unlink()
    result = changeable.run("pipelines", "baseline", "--baseline", "theirs", check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("pbe: error: ")]
    assert result.returncode == 1 and len(errors) == 1 and "1 (" in errors[0] and "allow_missing" in errors[0]


def test_param_switched_and_switched_back_recomputes_nothing(changeable: Project) -> None:
    before = changeable.part_times("materialize")
    changeable.edit_params("min_area_frac: 0.02", "min_area_frac: 0.03")
    changeable.run("pipelines", "filter")
    changeable.run("pipelines", "materialize")
    added = changeable.part_times("materialize")
    assert added.keys() > before.keys()
    changeable.edit_params("min_area_frac: 0.03", "min_area_frac: 0.02")
    changeable.run("dvc", "repro", "encode")
    assert changeable.part_times("materialize") == added


def test_a_comment_renames_no_part_and_runs_no_later_stage(changeable: Project) -> None:
    before = {stage: changeable.part_times(stage) for stage in ("ingest", "filter", "materialize", "encode")}
    changed = [changeable.folder / name for name in ("pipelines/ingest.py", "pbe/data/schema.py", "pbe/store.py")]
    for path in changed:
        path.write_text(f"{path.read_text()}# a comment\n")
    said = changeable.run("dvc", "repro", "encode").stdout
    assert "Running stage 'ingest'" in said and "ingest: 4 of 4 parts are already there" in said
    assert all(f"Running stage '{stage}'" not in said for stage in ("filter", "materialize", "encode"))
    assert before == {stage: changeable.part_times(stage) for stage in before}


def test_a_new_version_makes_its_stages_parts_again_and_others_only_where_bytes_differ(
    changeable: Project,
) -> None:
    before = {stage: changeable.part_times(stage) for stage in ("ingest", "filter", "materialize", "encode")}
    stage = changeable.folder / "pipelines" / "filter.py"
    text, changes = re.subn(r"(?m)^VERSION = \d+$", "VERSION = 1000", stage.read_text())
    assert changes == 1
    stage.write_text(text)
    said = changeable.run("dvc", "repro", "encode").stdout
    assert "materialize: 4 of 4 parts are already there" in said
    after = {stage: changeable.part_times(stage) for stage in before}
    made = {name.split("/")[0] for name in after["filter"].keys() - before["filter"].keys()}
    assert len(made) == 4 and all(after[stage] == before[stage] for stage in ("ingest", "materialize", "encode"))


def test_bad_parameter_is_refused_in_one_line_before_any_work(changeable: Project) -> None:
    changeable.edit_params("steps: 12", "stepz: 12")
    result = changeable.run("pipelines", "ingest", check=False)
    assert result.returncode == 1
    assert "train.stepz = 12: unknown key" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def _size(path: Path) -> int:
    return path.stat().st_size


def _wait_for(found: Callable[[], object], process: subprocess.Popen[bytes], what: str) -> None:
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
    project.set_params(materialize__per_shard={"cpus": 1000, "memory_gib": 0.5})
    asked_too_much = project.run("pipelines", "materialize", check=False).stderr
    assert "materialize.per_shard: 1000 CPUs, 0.5 GiB of memory does not fit on one node with" in asked_too_much
    project.set_params(materialize__per_shard={"cpus": 4, "memory_gib": 0.5})  # one shard after the other
    shutil.rmtree(parts)  # the shards that were whole are done

    process = project.start("pipelines", "materialize")
    _wait_for(lambda: "0 of 4 parts" in project.started_log(), process, "start")
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole foreground group
    assert process.wait(timeout=60) == 130
    assert "rerun the command to resume" in project.started_log()
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


@pytest.mark.drill
def test_killed_in_train_goes_on_from_its_checkpoint_to_the_same_loss(changeable: Project) -> None:
    """On another number of ranks too, with scores and with batches from another process, none of which begins another
    run or changes its loss."""
    from mlflow import MlflowClient

    straight = _last_losses(changeable)
    run = next((changeable.folder / ".store" / "runs").glob("full-*"))
    for path in (run / "finished.json", run / "history.json"):
        path.unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000012")  # as if cut off between step 8's checkpoint and step 12's
    for workers in (2, 1):  # through Ray Train: first as it was, then on another number of ranks
        changeable.edit_params("workers: 2", f"workers: {workers}")
        if workers == 1:
            changeable.set_params(train__score_every=6, train__score_rows=4, train__input_processes=1)
        result = changeable.run("pipelines", "train", "--variant", "full")
        changeable.edit_params(f"workers: {workers}", "workers: 2")
        said = result.stdout + result.stderr
        assert "resuming from step 8" + (" (checkpoint written by 2 ranks)" if workers == 1 else "") in said
        resumed = _last_losses(changeable)
        assert resumed == pytest.approx(straight, rel=1e-5)
        (run / "finished.json").unlink()
        shutil.rmtree(run / "checkpoints" / "step-00000012")
    names = {f"score/{name}_efficientnet_lite2" for name in ("kid", "exemplar_gain")} | {"score/rows", "score/seconds"}
    with (changeable.folder / "data/train/full/loss.csv").open(newline="") as stream:
        scored = [row for row in csv.DictReader(stream) if row["score/rows"]]
    assert [row["step"] for row in scored] == ["12"]
    client = MlflowClient(f"sqlite:///{changeable.folder / 'mlflow.db'}")
    run_id = json.loads((changeable.folder / "data/train/full/manifest.json").read_text())["mlflow_run_id"]
    for name in names:
        [point] = client.get_metric_history(run_id, name)
        assert (point.step, point.value) == (12 * 8, pytest.approx(float(scored[0][name])))


def test_a_model_that_is_gone_from_the_storage_is_exported_again(changeable: Project) -> None:
    run = next((changeable.folder / ".store" / "runs").glob("full-*"))
    model = (run / "export" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for folder in (run / "export", changeable.folder / ".store" / "parts" / "edit"):
        shutil.rmtree(folder)
    result = changeable.run("pipelines", "edit", "--variant", "full", check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("pbe: error: ")]
    assert result.returncode == 1 and len(errors) == 1 and "Traceback" not in result.stderr
    assert f"{run}/export: this part is gone; `dvc repro -f -s train@VARIANT` makes it again" in errors[0]
    changeable.run("pipelines", "train", "--variant", "full")
    assert (run / "export" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == model


@pytest.mark.drill
def test_an_mlflow_that_goes_away_costs_a_training_nothing(changeable: Project, tmp_path: Path) -> None:
    """And the whole curve is logged when it is back."""
    from mlflow import MlflowClient

    changeable.set_params(train__steps=400, train__checkpoint_every=100, train__validate_every=200)
    train = ("pipelines", "train", "--variant", "full")
    with mlflow_server(tmp_path) as server:
        env: dict[str, Any] = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        process = changeable.start(*train, **env)
        runs = changeable.folder / ".store" / "runs"
        before = set(runs.glob("full-*/checkpoints/*/COMPLETE.json"))
        _wait_for(lambda: set(runs.glob("full-*/checkpoints/*/COMPLETE.json")) - before, process, "checkpoint")
        server.stop()
        assert process.wait(timeout=300) == 0, changeable.started_log()
        said = changeable.started_log()
        assert "is not logged to MLflow yet" in said and "`dvc repro -f -s train@full`" in said
        manifest = json.loads((changeable.folder / "data/train/full/manifest.json").read_text())
        assert manifest["steps"] == 400 and (changeable.folder / "models/full/unet").is_dir()

        refused = changeable.run("pipelines", "sweep", check=False, **env)
        assert refused.returncode == 1 and "start that server, or unset MLFLOW_TRACKING_URI" in refused.stderr

        server.start()
        changeable.run(*train, **env)
        client, run_id = MlflowClient(server.uri), manifest["mlflow_run_id"]
        with (changeable.folder / "data/train/full/loss.csv").open() as stream:
            seen = [int(row["samples_seen"]) for row in csv.DictReader(stream)]
        assert sorted(point.step for point in client.get_metric_history(run_id, "train/loss")) == seen
        pictures = [Path(image.path).name for image in client.list_artifacts(run_id, "images")]
        assert {int(re.split(r"[%+]", name)[2]) for name in pictures} == {200 * 8, 400 * 8}
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED" and run.data.tags["export"].endswith("/export")


def test_a_loss_that_is_not_finite_ends_the_stage_without_another_try(changeable: Project) -> None:
    broken = changeable.folder / "broken"
    shutil.copytree(changeable.folder / "models" / "full", broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = 1e30  # finite, its square is not; infinite weights are refused before
    save_file(tensors, weights)
    changeable.edit_params("init: random", f"init: {json.dumps(str(broken))}")
    changeable.set_params(train__input_processes=1)  # of a Ray worker; its end must not hang
    result = changeable.run("pipelines", "train", "--variant", "full", check=False)
    assert result.returncode == 1
    assert (
        "the loss is not finite at step 1; the state before that step is saved as step 0. 8 of 8 rows" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert "resuming from step" not in result.stdout + result.stderr  # as each of two retries would


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_a_training_whose_lease_was_taken_over_stops(tmp_path: Path) -> None:
    """As by another machine, while this one slept."""
    project = make_project(tmp_path / "slept")
    project.edit_params("steps: 12", "steps: 100000")
    project.run("dvc", "repro", "encode")
    process = project.start("pipelines", "train", "--variant", "full")
    runs = project.folder / ".store" / "runs"
    _wait_for(lambda: list(runs.glob("full-*/checkpoints/*/COMPLETE.json")), process, "checkpoint")
    (lease,) = runs.glob("full-*/lease.json")
    theirs = json.loads(lease.read_text()) | {"token": "theirs", "who": "the other"}
    lease.write_text(json.dumps(theirs))
    assert process.wait(timeout=120) == 1, project.started_log()
    assert "is being trained right now by the other" in project.started_log()
    assert json.loads(lease.read_text()) == theirs


def test_a_temporary_experiment_reads_weights_that_git_does_not_track(changeable: Project) -> None:
    changeable.git("add", "-A")
    changeable.git("commit", "-qm", "after repro")
    shutil.copytree(changeable.folder / "models" / "full", changeable.folder / "weights" / "mine")
    (changeable.folder / ".git" / "info" / "exclude").write_text("/weights/\n")
    changeable.run("dvc", "exp", "run", "--temp", "-S", "train.init=weights/mine", "train@untrained")
    runs = [path.name for path in (changeable.folder / ".store" / "runs").glob("untrained-*")]
    assert len(runs) == 2  # in the main repository's storage


@pytest.mark.drill
def test_experiments_land_in_the_main_mlflow_database(changeable: Project) -> None:
    from mlflow import MlflowClient

    changeable.git("add", "-A")
    changeable.git("commit", "-qm", "after repro")
    changeable.run("dvc", "exp", "run", "-S", "train.lr=0.001", "train@full")
    changeable.run("dvc", "exp", "run", "--queue", "-S", "train.lr=0.003", "train@full")
    changeable.run("dvc", "exp", "run", "--run-all")
    client = MlflowClient(f"sqlite:///{changeable.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("paint-by-example")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.dvc_experiment LIKE '%'")
    for rate in ("0.001", "0.003"):
        [run] = [run for run in runs if run.data.params.get("train.lr") == rate]
        assert run.data.params["diff"] == f"train.lr={rate}"
